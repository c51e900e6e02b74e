"""A training run as data: what learns, from which target, on which text, how long. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from forerun.config import ModelConfig, Part, parse, read
from forerun.types import UserError


class DataConfig(Part):
    """Where text comes from; every kind ends as sequences of `length` tokens."""

    kind: Literal["text", "jsonl", "hub", "tokens"] = "text"
    path: str = (
        ""  # text: files or patterns, comma-separated; jsonl: the same; hub: data set's name; tokens: .npy or .npz [N, T]
    )
    field: str = "text"  # jsonl, hub: where the text is; tokens: name of the array in an .npz
    subset: str | None = None  # hub
    split: str = "train"  # hub
    limit: int | None = Field(default=None, ge=1)  # most sequences that are kept
    length: int = Field(default=512, ge=4)  # tokens a sequence
    packed: bool = True  # documents laid end to end; false: a sequence a document, its first `length` tokens
    prompt: int = Field(default=1, ge=1)  # tokens at each sequence's start that nobody drafts, so that nothing learns them


class WriteConfig(Part):
    """Self-distillation: the target continues the data's sequences, and that is what is learned."""

    prompt: int = Field(default=64, ge=1)  # tokens taken from each sequence
    new: int = Field(default=192, ge=2)  # tokens that the target writes after them
    sequences: int | None = Field(default=None, ge=1)  # default: one for each sequence of the data
    greedy: float = Field(default=0.5, ge=0.0, le=1.0)  # share written greedily
    temperature: float = Field(default=0.8, gt=0.0)  # of the others
    rows: int = Field(default=16, ge=1)  # continued at a time
    ignore_eos: bool = False


class TeachConfig(Part):
    """What is kept of the target's pass over a sequence."""

    cache: bool = False  # keep hidden states on disk, so that only the first pass over the data runs the target
    top: int = Field(default=64, ge=0)  # most probable tokens kept of each law, renormalized; 0: all
    temperature: float = Field(default=1.0, gt=0.0)  # below 1 the law that is learned is sharper than the target's

    @model_validator(mode="after")
    def kept_laws_are_short(self) -> Self:
        if self.cache and not self.top:
            raise ValueError("teach.cache keeps the most probable tokens only; set teach.top")
        return self


class Common(Part):
    """Everything but the shape of what learns."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    validation: DataConfig | None = None  # default: `held_out` of the data
    held_out: float = Field(default=0.02, gt=0.0, lt=1.0)  # share of the sequences that validate and are not learned
    write: WriteConfig | None = None
    teach: TeachConfig = TeachConfig()
    steps: int = Field(default=1000, ge=1)  # optimizer steps
    batch: int = Field(default=8, ge=1)  # sequences a forward pass, each process
    accumulate: int = Field(default=1, ge=1)  # forward passes an optimizer step
    rate: float = Field(default=1e-3, gt=0.0)  # AdamW
    matrix_rate: float | None = Field(default=None, gt=0.0)  # Muon, for hidden matrices; null: AdamW learns them too
    weight_decay: float = Field(default=0.0, ge=0.0)
    clip: float = Field(default=1.0, gt=0.0)  # largest norm of the gradient
    warmup: int = Field(default=25, ge=0)  # steps
    decay: float = Field(default=0.5, ge=0.0, le=1.0)  # last share of the steps, over which the rate falls to zero
    depth_weight: float = Field(default=0.8, gt=0.0, le=1.0)  # each further guess counts this much of the one before it
    bf16: bool = False  # autocast; weights and optimizer stay float32
    seed: int = 0
    save_minutes: float = Field(default=5.0, gt=0.0)
    validate_every: int = Field(default=200, ge=1)  # steps
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    layouts: tuple[Literal["medusa", "vllm-medusa", "mlp", "eagle", "eagle3", "speculators"], ...] = ()  # also written


class MedusaTraining(Common):
    kind: Literal["medusa"] = "medusa"
    heads: int = Field(default=4, ge=1)
    layers: int = Field(default=1, ge=1)


class MLPTraining(Common):
    kind: Literal["mlp"] = "mlp"
    heads: int = Field(default=3, ge=1)
    inner_size: int = Field(default=0, ge=0)  # 0: the target's hidden size
    scale_input: bool = False


class EagleTraining(Common):
    kind: Literal["eagle"] = "eagle"
    version: Literal[1, 3] = 3
    features: tuple[int, ...] | None = None  # version 3: indices into the target's hidden_states; default: low, middle, high
    intermediate_size: int | None = Field(default=None, ge=1)  # default: the target's
    draft_vocab_size: int = Field(default=0, ge=0)  # version 3: the data's most frequent tokens; 0: all
    depth: int = Field(default=4, ge=1)  # guesses one after another in training; version 1 learns the first alone
    anchors: float = Field(default=1.0, gt=0.0, le=1.0)  # share of the positions from which more than one guess is learned
    noise: float = Field(default=0.1, ge=0.0)  # version 1: half-width of the uniform noise on features
    feature_weight: float = Field(default=10.0, ge=0.0)  # version 1: of the smooth-L1 distance of features


class DraftTraining(Common):
    kind: Literal["draft"] = "draft"
    layers: int = Field(default=2, ge=1)
    hidden_size: int = Field(default=256, ge=8)
    intermediate_size: int | None = Field(default=None, ge=1)  # default: 8/3 of the hidden size, to a multiple of 64
    heads: int | None = Field(default=None, ge=1)  # default: heads of 64
    kv_heads: int | None = Field(default=None, ge=1)  # default: as many as heads
    depth: int = Field(default=5, ge=1)  # length of the chain that validation simulates


Training = MedusaTraining | MLPTraining | EagleTraining | DraftTraining
KINDS: dict[str, type[Training]] = {
    "draft": DraftTraining, "medusa": MedusaTraining, "mlp": MLPTraining, "eagle": EagleTraining,
}  # fmt: skip


def load(path: str, overrides: list[str]) -> Training:
    """The run of a YAML file with overrides `a.b=c` on top; mistakes are one line."""
    data = read(path, overrides)
    kind = data.get("kind")
    if kind not in KINDS:
        raise UserError(f"{path}: kind: {kind!r}; say which of {', '.join(KINDS)} is trained")
    return parse(KINDS[kind], data, path)
