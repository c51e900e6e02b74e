"""A configuration's own pipeline on random models so small that the law of every token can be known exactly.

Shape suffixes: R sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forerun.build import HeadConfig, Models, build
from forerun.config import DraftModelConfig, MedusaConfig, MLPConfig, ModelConfig, Part, Variant
from forerun.heads import EagleShape, MedusaShape, MLPShape
from forerun.heads.store import Shape
from forerun.heads.store import build as empty_head
from forerun.heads.store import save as save_head
from forerun.model import load
from forerun.types import Backend, Completion, Request

SCALE = 1.5  # of random weights: laws whose most probable token has about 0.35, and which the context changes much
NOISE = 0.15  # of the draft's weights, relative to the target's: the laws overlap by about 0.65
HIDDEN = 16
CHUNK = 24  # tokens a prefill pass at most, so that the longer prompts take several
HEAD_OF_VLLM = 32  # the least size of an attention head that vLLM's CPU build takes
CACHE_OF_VLLM = 64 << 20  # bytes; its own choice is gigabytes
ROUNDING = 1e-6  # difference of two ways to the same scores: float64, but for what norms compute in float32
BATCH = 64  # sequences a plain forward pass


@dataclass(frozen=True)
class Subject:
    """A variant on small models that lie in two folders, and the same models as transformers runs them by itself."""

    variant: Variant
    vocabulary: int
    target: Path
    plain: PreTrainedModel
    plain_draft: PreTrainedModel
    models: Models

    def build(self, requests: Sequence[Request], rows: int, *, self_draft: bool = False) -> Backend:
        """A fresh backend of so many rows with room for these requests; `self_draft`: the target itself is the draft model."""
        drafter, settings = self.variant.drafter, self.variant.engine
        # The deepest draft of any length policy or the largest tree, and the pending token.
        tree = max(4 * getattr(drafter, "k", 0), getattr(drafter, "nodes", 0)) + 2
        capacity = max(len(request.prompt) + request.sampling.max_new for request in requests) + tree
        engine = settings.model_copy(update={"rows": rows, "capacity": capacity, "chunk": min(settings.chunk, CHUNK)})
        if self_draft:
            drafter = drafter.model_copy(update={"path": str(self.target)})
        return build(self.variant.model_copy(update={"engine": engine, "drafter": drafter}), self.models)

    def requests(
        self, lengths: Sequence[int], new: Sequence[int], seed: int, temperature: float, label: str = ""
    ) -> list[Request]:
        """Random prompts of so many tokens, each with its own limit and seed, under the config's sampling but for its stops.

        Biases are of the config's own tokens: they are taken modulo the vocabulary.
        """
        draw, tokens = random.Random(seed), range(self.vocabulary)
        own = self.variant.sampling.build()
        bias = {token % self.vocabulary: value for token, value in own.logit_bias.items()}
        found = []
        for i, (length, limit) in enumerate(zip(lengths, new, strict=True)):
            sampling = replace(
                own, temperature=temperature, max_new=limit, seed=draw.getrandbits(60), n=1,
                stop=(), stop_ids=(), ignore_eos=True, logit_bias=bias,
            )  # fmt: skip
            found.append(Request(f"{label}-{i}", tuple(draw.choices(tokens, k=length)), sampling))
        return found

    @property
    def temperature(self) -> float:
        """Of the checks that sample; a greedy config's are at 1."""
        return self.variant.sampling.temperature or 1.0


def prepare(variant: Variant, folder: Path, vocabulary: int, seed: int) -> Subject:
    """Write the small models and point the variant at them; precision is another question than losslessness.

    They run in float64, in vLLM in float32, the most precise it has; there without compilation, unless the config asks for it.
    """
    in_vllm = variant.backend == "vllm"
    dtype = "float32" if in_vllm else "float64"
    target, draft = write_models(folder, vocabulary, seed, in_vllm)
    small = {"path": str(target), "dtype": dtype, "weights": "pretrained", "recipes": (), "attention": "auto"}
    model = variant.model.model_copy(update=small)
    drafter, vllm = variant.drafter, variant.vllm
    if isinstance(drafter, DraftModelConfig):
        own = {"path": str(draft), "dtype": dtype, "weights": "pretrained", "recipes": ()}
        drafter = drafter.model_copy(update=own)
    elif isinstance(drafter, HeadConfig):
        drafter = drafter.model_copy(update={"path": str(write_head(drafter, folder / "head", vocabulary, seed, in_vllm))})
    if in_vllm:
        modest = {
            "enforce_eager": vllm.enforce_eager is not False,
            "kv_cache_memory_bytes": vllm.kv_cache_memory_bytes or CACHE_OF_VLLM,
        }
        vllm = vllm.model_copy(update=modest)
    plain, plain_draft = (
        load(ModelConfig(path=str(path), dtype="float64", device=variant.model.device)).model for path in (target, draft)
    )
    changed = variant.model_copy(update={"model": model, "drafter": drafter, "vllm": vllm})
    return Subject(changed, vocabulary, target, plain, plain_draft, Models())


def write_models(folder: Path, vocabulary: int, seed: int, in_vllm: bool) -> tuple[Path, Path]:
    """A random target and a draft that is the target with noise on its weights, as checkpoints."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, num_hidden_layers=3 if in_vllm else 2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim(in_vllm), max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    paths = folder / "target", folder / "draft"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().requires_grad_(False)
        for noise, path in zip((1.0, NOISE), paths, strict=True):
            for weight in model.parameters():
                if weight.ndim > 1:
                    random_weight = torch.randn_like(weight) * (SCALE / weight.shape[1] ** 0.5)
                    weight.copy_(random_weight if noise == 1.0 else weight + noise * random_weight)
            model.save_pretrained(path)
    return paths


def head_dim(in_vllm: bool) -> int:
    return HEAD_OF_VLLM if in_vllm else HIDDEN // 2


def write_head(config: HeadConfig, folder: Path, vocabulary: int, seed: int, in_vllm: bool) -> Path:
    """A random head of the kind that the drafter wants: right as often as chance has it, which is enough to judge by."""
    heads = max(config.k, 1)
    shape: Shape
    if isinstance(config, MedusaConfig):
        shape = MedusaShape(HIDDEN, vocabulary, heads)
    elif isinstance(config, MLPConfig):
        shape = MLPShape(HIDDEN, vocabulary, heads)
    else:
        read = (0, 1, 2) if in_vllm else (-1,)  # vLLM reads what enters three layers
        shape = EagleShape(
            HIDDEN, vocabulary, 2 * HIDDEN, 2, 1, head_dim(in_vllm), features=read, max_position_embeddings=4096
        )  # fmt: skip
    draw, head = torch.Generator().manual_seed(seed), empty_head(shape)
    for name, weight in head.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0, SCALE / weight.shape[1] ** 0.5, generator=draw)
        else:  # of a norm, or a bias
            weight.fill_(float(name.endswith("weight")))
    save_head(head, folder, {"accuracies": [[0.4, 0.2, 0.1]] * heads})
    return folder


def drafter_name(variant: Variant) -> str:
    """The kind with its k and what is not as by default: `model (k=5, greedy=True)`."""
    drafter = variant.drafter
    hidden = {"kind", "path", "dtype", "weights", "recipes"}
    told = drafter.model_dump(exclude=hidden | {name for name in type(drafter).model_fields if is_default(drafter, name)})
    options = ", ".join(f"{name}={value}" for name, value in told.items())
    return f"{drafter.kind} ({options})" if options else drafter.kind


def is_default(part: Part, name: str) -> bool:
    return name != "k" and getattr(part, name) == type(part).model_fields[name].default


def drafts_told(completions: Sequence[Completion]) -> str:
    """How much drafting there was to judge by."""
    rounds = [round for completion in completions for round in completion.rounds]
    drafted, accepted = sum(round.drafted for round in rounds), sum(round.accepted for round in rounds)
    return f"{accepted / drafted:.0%} of {drafted} drafts accepted" if drafted else "nothing drafted"


@torch.inference_mode()
def fresh(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Scores [T, V] after every token of each sequence, by one pass without a cache; float64, on the CPU.

    Sequences are padded on the right, where a causal model does not look.
    """
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))  # of like lengths together
    found: dict[int, Tensor] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        longest = len(sequences[part[-1]])
        ids_RT = torch.tensor([[*sequences[i], *[0] * (longest - len(sequences[i]))] for i in part], device=model.device)
        scores_RTV = model(input_ids=ids_RT, use_cache=False).logits.double().cpu()
        found |= {i: scores_TV[: len(sequences[i])] for i, scores_TV in zip(part, scores_RTV, strict=True)}
    return [found[i] for i in range(len(sequences))]
