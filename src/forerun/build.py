"""From configuration to a running backend: loads each model once, checks that the parts fit, and puts them together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.accept import choose
from forerun.backends.endpoint import Endpoint
from forerun.backends.reference import Reference
from forerun.backends.vllm import build as build_vllm
from forerun.backends.words import Words, words
from forerun.compress.cache import compressed
from forerun.compress.opened import open_model
from forerun.config import (
    EMBEDDED,
    DraftModelConfig,
    EagleConfig,
    EngineConfig,
    MedusaConfig,
    MLPConfig,
    ModelConfig,
    NGramConfig,
    NoDraftConfig,
    Variant,
)
from forerun.draft import (
    AdaptiveShape,
    Choices,
    Drafter,
    DraftModel,
    Dynamic,
    EagleDraft,
    FixedShape,
    LengthPolicy,
    MedusaDraft,
    MLPDraft,
    NGram,
    NoDraft,
    ShapePolicy,
    build_policy,
    default_choices,
    grid,
    prefixes,
    read_choices,
)
from forerun.engine import Engine
from forerun.heads import Eagle, Medusa, MLPSpeculator
from forerun.heads.store import Head
from forerun.heads.store import load as load_head
from forerun.model import ASSETS, Loaded, Target, probe
from forerun.packed import pack
from forerun.types import Backend, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HeadConfig = MedusaConfig | MLPConfig | EagleConfig


def to_stderr(words: str) -> None:
    print(words, file=sys.stderr)


class Models:
    """Every model that was asked for so far, loaded once; the reference has its own, unpacked and with its own attention."""

    def __init__(self, say: Callable[[str], None] = to_stderr) -> None:
        """`say` hears of models that are compressed, or were compressed before, as their recipes ask."""
        self.say = say
        self.loaded: dict[tuple[ModelConfig, str, str], Loaded] = {}
        self.known: dict[ModelConfig, Words] = {}
        self.heads: dict[tuple[str, str, ModelConfig], tuple[Head, dict[str, Any]]] = {}

    def target(self, config: ModelConfig, backend: str = "forerun") -> Loaded:
        return self._get(config, "target", backend)

    def words(self, config: ModelConfig) -> Words:
        """Of a target whose weights are loaded elsewhere."""
        if config not in self.known:
            self.known[config] = words(config)
        return self.known[config]

    def draft(self, config: DraftModelConfig, target: ModelConfig, backend: str = "forerun") -> Loaded:
        """The draft goes where the target is; `auto` dtype is the checkpoint's own."""
        own = ModelConfig(
            path=config.path, dtype=config.dtype, weights=config.weights, recipes=config.recipes,
            device=target.device, attention=target.attention, pack=target.pack,
        )  # fmt: skip
        return self._get(own, "draft", backend)

    def head(self, config: HeadConfig, target: ModelConfig) -> tuple[Head, dict[str, Any]]:
        """A head in its target's type and place, and what else its config.json says; UserError where it does not fit."""
        key = (config.kind, config.path, target)
        if key not in self.heads:
            model = self.target(target).model
            path = ASSETS / config.kind if config.path == EMBEDDED else Path(config.path)
            head, extra = load_head(path, model.dtype, model.config)
            if head.shape.kind != config.kind:
                raise UserError(f"drafter.path={config.path} holds a head of kind {head.shape.kind}, not {config.kind}")
            head = head.to(model.device)
            if target.pack:
                pack(head)
            self.heads[key] = head, extra
        return self.heads[key]

    def _get(self, config: ModelConfig, embedded: str, backend: str) -> Loaded:
        key = (config, embedded, backend)
        if key not in self.loaded:
            place = config
            if config.recipes:
                folder = compressed(config, embedded, self.say, lambda _what, _done, _all: None)
                place = config.model_copy(update={"path": str(folder), "weights": "pretrained", "recipes": ()})
            found = open_model(place, embedded)
            if config.pack and backend == "forerun":
                pack(found.model)
            self.loaded[key] = found
        return self.loaded[key]


def build(variant: Variant, models: Models) -> Backend:
    """The backend of a variant; UserError where its parts do not fit."""
    if variant.backend == "reference":
        return build_reference(variant, models)
    if variant.backend == "vllm":
        return build_vllm(variant, models.words(variant.model), models.say)
    if variant.backend == "endpoint":
        return build_endpoint(variant, models)
    settings, loaded = variant.engine, models.target(variant.model)
    fitting = [loaded.model]
    if isinstance(variant.drafter, DraftModelConfig):
        fitting.append(models.draft(variant.drafter, variant.model).model)
    limits = [getattr(one.config.get_text_config(decoder=True), "max_position_embeddings", None) for one in fitting]
    capacity = min([settings.capacity, *(limit for limit in limits if limit)])
    drafter = build_drafter(variant, models, capacity)
    rule = choose(variant.rule, drafter.drawn, trees=drafter.trees)
    return Engine(
        build_target(loaded, variant, drafter.features), drafter, rule, rows=settings.rows, capacity=capacity,
        tokenizer=loaded.tokenizer, eos=end_tokens(loaded.model), chunk=settings.chunk, debug=settings.debug,
    )  # fmt: skip


def build_endpoint(variant: Variant, models: Models) -> Endpoint:
    """Says so where prompts would go as ids of the embedded model to a server of what may be another one."""
    tokenizer, asked = models.words(variant.model).tokenizer, variant.endpoint
    server = Endpoint(asked, tokenizer, variant.engine.rows, variant.engine.capacity)
    if asked.prompts == "ids" and variant.model.path == EMBEDDED and not any(map(embedded_ids, server.names)):
        models.say(
            f"{server.base} serves {server.model!r} and gets prompts as token ids of the embedded model; if it is another, "
            "set model.path to its folder or hub id, or endpoint.prompts=text"
        )
    return server


def embedded_ids(name: str) -> bool:
    """Whether a served model, by its name, has the embedded tokenizer: a copy's folder, or ours on another machine."""
    folder = Path(name)
    with suppress(OSError):  # not a folder that can be read here
        return (folder / "tokenizer.json").read_bytes() == (ASSETS / "target" / "tokenizer.json").read_bytes()
    return folder.parent.parts[-2:] == ASSETS.parts[-2:]


def build_target(loaded: Loaded, variant: Variant, features: Sequence[int] = ()) -> Target:
    """`auto` captures graphs on one GPU and compiles nothing on the CPU, where that takes a minute a shape (docs/log.md)."""
    mode = graph_mode(loaded.model, variant.engine)
    target = Target(loaded.model, features, compile=mode, attention=variant.model.attention)
    probe(target)
    return target


def graph_mode(model: PreTrainedModel, settings: EngineConfig) -> bool:
    devices = set((getattr(model, "hf_device_map", None) or {}).values())
    captures = model.device.type == "cuda" and len(devices) <= 1
    return captures if settings.compile == "auto" else settings.compile


def build_drafter(variant: Variant, models: Models, capacity: int) -> Drafter:
    config, settings = variant.drafter, variant.engine
    if isinstance(config, NoDraftConfig):
        return NoDraft()
    policy = build_policy(config.policy, config.k, settings.rows)
    if isinstance(config, NGramConfig):
        return NGram(policy, settings.rows, config.lookup_min, config.lookup_max)
    if isinstance(config, DraftModelConfig):
        drafting = models.draft(config, variant.model)
        refuse_other_vocabulary(models.target(variant.model), drafting)
        draft = build_target(drafting, variant)
        vocabulary = int(models.target(variant.model).model.get_output_embeddings().out_features)
        return DraftModel(draft, policy, settings.rows, capacity, config.confidence, config.greedy, settings.chunk, vocabulary)
    return build_head_drafter(config, policy, variant, models, capacity)


def build_head_drafter(
    config: HeadConfig, policy: LengthPolicy, variant: Variant, models: Models, capacity: int
) -> MedusaDraft | MLPDraft | EagleDraft:
    """A drafter around a head. Chains are as long as a LengthPolicy says, trees as deep and large as a ShapePolicy says."""
    head, extra = models.head(config, variant.model)
    settings = variant.engine
    if isinstance(config, MLPConfig):
        assert isinstance(head, MLPSpeculator)
        return MLPDraft(head, policy, settings.rows)
    if isinstance(config, MedusaConfig):
        assert isinstance(head, Medusa)
        choices = medusa_choices(config, head, extra).cut(min(config.k, head.shape.heads), config.nodes + 1)
        return MedusaDraft(
            head, choices, tree_policy(config, prefixes(choices), choices.deepest(choices.size), choices.size), settings.rows
        )
    assert isinstance(head, Eagle)
    model = models.target(variant.model).model
    tree: Choices | Dynamic | None = None
    shape_policy: LengthPolicy | ShapePolicy = policy
    if config.tree == "static":
        if not config.choices:
            raise UserError("drafter.tree=static needs drafter.choices, paths of child ranks such as [[0], [1], [0, 0]]")
        tree = read_choices(config.choices).cut(config.k, len(config.choices) + 1)
        shape_policy = tree_policy(config, prefixes(tree), tree.deepest(tree.size), tree.size)
    elif config.tree == "dynamic" and config.k:
        tree = Dynamic(config.branches)
        size = tree.size(config.k, config.nodes + 1)
        shape_policy = tree_policy(config, grid(config.k, size, config.branches), config.k, size)
    return EagleDraft(
        head, model.get_input_embeddings(), model.get_output_embeddings(), shape_policy, settings.rows, capacity, tree,
        drawn=config.tree == "chain" or config.drawn, chunk=settings.chunk, compile=graph_mode(model, settings),
    )  # fmt: skip


def tree_policy(config: HeadConfig, shapes: Sequence[tuple[int, int]], depth: int, nodes: int) -> ShapePolicy:
    if config.policy == "heuristic":
        raise UserError(f"drafter.policy=heuristic lengthens and shortens chains; for the trees of {config.kind} take adaptive")
    return AdaptiveShape(shapes) if config.policy == "adaptive" else FixedShape(depth, nodes)


def medusa_choices(config: MedusaConfig, head: Medusa, extra: dict[str, Any]) -> Choices:
    """The tree of the configuration, else the best one by the accuracies that training measured."""
    if config.choices:
        return read_choices(config.choices)
    if not extra.get("accuracies"):
        raise UserError(
            f"drafter.path={config.path}: its config.json has no accuracies to make a tree from; give drafter.choices, "
            "paths of child ranks such as [[0], [1], [0, 0]]"
        )
    return default_choices(extra["accuracies"][: min(config.k, head.shape.heads)], config.nodes + 1)


def build_reference(variant: Variant, models: Models) -> Backend:
    """transformers' own generate on the same weights, never packed."""
    loaded, drafter = models.target(variant.model, "reference"), variant.drafter
    if isinstance(drafter, HeadConfig):
        raise UserError(f"backend=reference: transformers has no drafter of kind {drafter.kind}; take none, ngram or model")
    assistant = None
    if isinstance(drafter, DraftModelConfig):
        draft = models.draft(drafter, variant.model, "reference")
        refuse_other_vocabulary(loaded, draft, padded=False)
        assistant = draft.model
    return Reference(
        loaded.model, loaded.tokenizer, assistant=assistant, k=getattr(drafter, "k", 0),
        lookup=drafter if isinstance(drafter, NGramConfig) else None,
        confidence=getattr(drafter, "confidence", 0.0), rows=variant.engine.rows, eos=end_tokens(loaded.model),
    )  # fmt: skip


def end_tokens(model: PreTrainedModel) -> frozenset[int]:
    """The tokens that end a text, by the generation config as transformers reads it."""
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ends = model.config.get_text_config(decoder=True).eos_token_id if ends is None else ends
    return frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends)


def refuse_other_vocabulary(target: Loaded, draft: Loaded, padded: bool = True) -> None:
    """Speculation needs one vocabulary; the error names both sizes and the first token that differs.

    `padded`: with equal tokenizers the embeddings may have different numbers of padding rows.
    """
    sizes = [loaded.model.get_output_embeddings().out_features for loaded in (target, draft)]
    different = first_difference(target.tokenizer, draft.tokenizer)
    padded = padded and target.tokenizer is not None and draft.tokenizer is not None
    if different or (sizes[0] != sizes[1] and not padded):
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
