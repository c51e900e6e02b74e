"""From configuration to a running backend: loads each model once, checks that the parts fit, and puts them together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.accept import choose
from forerun.backends.reference import Reference
from forerun.config import DrafterConfig, DraftModelConfig, ModelConfig, NGramConfig, Variant
from forerun.draft import Drafter, DraftModel, NGram, NoDraft, build_policy
from forerun.engine import Engine
from forerun.model import Loaded, Target, load, probe
from forerun.packed import pack
from forerun.types import Backend, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Models:
    """Every model that was asked for so far, loaded once; a packed and an unpacked one are two."""

    def __init__(self) -> None:
        self.loaded: dict[tuple[ModelConfig, str], Loaded] = {}

    def get(self, config: ModelConfig, embedded: str) -> Loaded:
        key = (config, embedded)
        if key not in self.loaded:
            if config.recipes:
                raise UserError("model.recipes: this version has no compression recipes; leave the list empty")
            found = load(config, embedded)
            if config.pack:
                pack(found.model)
            self.loaded[key] = found
        return self.loaded[key]

    def target(self, config: ModelConfig) -> Loaded:
        return self.get(config, "target")

    def draft(self, config: DraftModelConfig, target: ModelConfig) -> Loaded:
        """The draft goes where the target is; `auto` dtype is the checkpoint's own."""
        own = ModelConfig(
            path=config.path, dtype=config.dtype, weights=config.weights, recipes=config.recipes,
            device=target.device, attention=target.attention, pack=target.pack,
        )  # fmt: skip
        return self.get(own, "draft")


def build(variant: Variant, models: Models) -> Backend:
    """The backend of a variant; UserError where its parts do not fit."""
    if variant.backend == "reference":
        return build_reference(variant, models)
    settings = variant.engine
    loaded = models.target(variant.model)
    compiled = settings.compile if isinstance(settings.compile, bool) else loaded.model.device.type == "cuda"
    target = Target(loaded.model, compile=compiled, attention=variant.model.attention)
    probe(target)
    capacity = min(settings.capacity, getattr(target.config, "max_position_embeddings", None) or settings.capacity)
    drafter = build_drafter(variant.drafter, variant.model, loaded, models, settings.rows, capacity, compiled)
    rule = choose(variant.rule.kind, drafter.drawn)
    return Engine(
        target, drafter, rule, rows=settings.rows, capacity=capacity, tokenizer=loaded.tokenizer,
        eos=end_tokens(loaded.model), chunk=settings.chunk, debug=settings.debug,
    )  # fmt: skip


def build_drafter(
    config: DrafterConfig, model: ModelConfig, target: Loaded, models: Models, rows: int, capacity: int, compiled: bool
) -> Drafter:
    if isinstance(config, NGramConfig):
        policy = build_policy(config.policy, config.k, rows)
        return NGram(policy, rows, config.lookup_min, config.lookup_max)
    if isinstance(config, DraftModelConfig):
        loaded = models.draft(config, model)
        refuse_other_vocabulary(target, loaded)
        draft = Target(loaded.model, compile=compiled)
        probe(draft)
        policy = build_policy(config.policy, config.k, rows)
        return DraftModel(draft, policy, rows, capacity, config.confidence, config.greedy)
    return NoDraft()


def build_reference(variant: Variant, models: Models) -> Backend:
    """transformers' own generate on the same weights, never packed."""
    model = variant.model.model_copy(update={"pack": False})
    loaded, assistant, ngram = models.target(model), None, None
    drafter = variant.drafter
    if isinstance(drafter, DraftModelConfig):
        draft = models.draft(drafter, model)
        refuse_other_vocabulary(loaded, draft)
        assistant = draft.model
    return Reference(
        loaded.model, loaded.tokenizer, assistant=assistant, k=getattr(drafter, "k", 0),
        lookup=drafter if isinstance(drafter, NGramConfig) else ngram,
        confidence=getattr(drafter, "confidence", 0.0), rows=variant.engine.rows, eos=end_tokens(loaded.model),
    )  # fmt: skip


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, by the generation config as transformers reads it."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = model.config.get_text_config(decoder=True).eos_token_id if ends is None else ends
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def refuse_other_vocabulary(target: Loaded, draft: Loaded) -> None:
    """Speculation needs one vocabulary; the error names both sizes and the first token that differs."""
    sizes = [loaded.model.get_output_embeddings().weight.shape[0] for loaded in (target, draft)]
    different = first_difference(target.tokenizer, draft.tokenizer)
    if sizes[0] != sizes[1] or different:
        raise UserError(
            f"the draft's vocabulary ({sizes[1]} tokens) is not the target's ({sizes[0]} tokens)"
            + (f"; first difference: {different}" if different else "")
            + "; use a draft of the same model family"
        )


def first_difference(target: PreTrainedTokenizerBase | None, draft: PreTrainedTokenizerBase | None) -> str | None:
    if target is None or draft is None:
        return None
    ours, theirs = ({index: token for token, index in t.get_vocab().items()} for t in (target, draft))
    for index in range(max(len(ours), len(theirs))):
        if ours.get(index) != theirs.get(index):
            return f"token {index} is {ours.get(index)!r} in the target and {theirs.get(index)!r} in the draft"
    return None
