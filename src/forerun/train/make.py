"""New students, started from what the target knows: its output layer, its last norm, its embeddings where the sizes agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forerun.heads import Eagle, Medusa, MedusaShape, MLPShape, MLPSpeculator
from forerun.heads.eagle import EagleShape, shape_for
from forerun.train.data import Sequences
from forerun.train.settings import DraftTraining, EagleTraining, MedusaTraining, MLPTraining, Training
from forerun.train.students import DraftStudent, EagleStudent, MedusaStudent, MLPStudent, Student
from forerun.types import UserError

SPREAD = 0.02  # standard deviation of new matrices


def make(config: Training, target: PreTrainedModel, learned: Sequences) -> Student:
    """A new student in float32 (float64 where the target is), the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        student = _make(config, target, learned)
    embedding: Any = target.get_input_embeddings().weight
    dtype = torch.float64 if embedding.dtype == torch.float64 else torch.float32
    student.module.to(device=embedding.device, dtype=dtype).train().requires_grad_(True)
    return student


def _make(config: Training, target: PreTrainedModel, learned: Sequences) -> Student:
    output: Any = target.get_output_embeddings()
    vocabulary, size = output.weight.shape
    if isinstance(config, MedusaTraining):
        medusa = Medusa(MedusaShape(size, vocabulary, config.heads, config.layers))
        medusa.start(output)
        return MedusaStudent(medusa)
    if isinstance(config, MLPTraining):
        return MLPStudent(make_mlp(MLPShape(size, vocabulary, config.heads, config.inner_size, config.scale_input), target))
    if isinstance(config, EagleTraining):
        eagle = make_eagle(config, target, learned)
        return EagleStudent(eagle, target, config.depth, config.noise, config.feature_weight)
    return DraftStudent(make_draft(config, target), config.depth)


def make_mlp(shape: MLPShape, target: PreTrainedModel) -> MLPSpeculator:
    module = MLPSpeculator(shape)
    spread(module)
    for embedding, output in zip(module.embeddings, module.outputs, strict=True):
        if shape.inner == shape.hidden_size:
            copy(embedding, target.get_input_embeddings())
            copy(output, target.get_output_embeddings())
    return module


def make_eagle(config: EagleTraining, target: PreTrainedModel, learned: Sequences) -> Eagle:
    """A layer that adds nothing yet: it passes on the features of the last position it reads."""
    shape = eagle_shape(config, target)
    module = Eagle(shape)
    spread(module)
    size = shape.hidden_size
    with torch.no_grad():
        module.join.weight[:, -size:] += torch.eye(size)  # version 1: the features; version 3: the highest layer's
        module.attention.o_proj.weight.zero_()
        module.mlp.down_proj.weight.zero_()
        if shape.version == 1:
            return module
        if shape.draft_vocab_size:
            module.token_ids.copy_(frequent(learned, shape.draft_vocab_size, shape.vocab_size))
        output: Any = target.get_output_embeddings()
        module.output.weight.copy_(output.weight[module.token_ids.to(output.weight.device)])
        decoder: Any = target.get_decoder()
        norm = getattr(decoder, "norm", None)
        if norm is not None and getattr(norm, "weight", None) is not None and norm.weight.shape == (size,):
            module.last_norm.weight.copy_(norm.weight)
    return module


def eagle_shape(config: EagleTraining, target: PreTrainedModel) -> EagleShape:
    shape = shape_for(target.config, config.version, draft_vocab_size=config.draft_vocab_size)
    if config.features is not None:
        shape = replace(shape, features=config.features)
    if config.intermediate_size is not None:
        shape = replace(shape, intermediate_size=config.intermediate_size)
    text: Any = target.config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    wrong = [i for i in shape.features if not -layers - 1 <= i <= layers]
    if wrong or (config.version == 1 and len(shape.features) != 1):
        raise UserError(f"features {list(shape.features)}: the target has hidden states 0 to {layers}; version 1 reads one")
    if config.draft_vocab_size > shape.vocab_size or (config.draft_vocab_size and config.version == 1):
        raise UserError(f"draft_vocab_size={config.draft_vocab_size}: version 3 only, at most the target's {shape.vocab_size}")
    return shape


def make_draft(config: DraftTraining, target: PreTrainedModel) -> LlamaForCausalLM:
    text: Any = target.config.get_text_config(decoder=True)
    output: Any = target.get_output_embeddings()
    heads = config.heads or max(1, config.hidden_size // 64)
    if config.hidden_size % heads:
        raise UserError(f"hidden_size={config.hidden_size} is no multiple of heads={heads}")
    kv_heads = config.kv_heads or heads
    if heads % kv_heads:
        raise UserError(f"heads={heads} is no multiple of kv_heads={kv_heads}")
    special: dict[str, Any] = {name: getattr(text, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=output.weight.shape[0], hidden_size=config.hidden_size, num_hidden_layers=config.layers,
            intermediate_size=config.intermediate_size or -(-config.hidden_size * 8 // 3 // 64) * 64,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=config.hidden_size // heads,
            tie_word_embeddings=True, max_position_embeddings=text.max_position_embeddings, **special,
        )
    )  # fmt: skip


def frequent(learned: Sequences, count: int, vocabulary: int) -> Tensor:
    """The most frequent tokens of the data, in order of their numbers."""
    inside = np.arange(learned.tokens_NT.shape[1]) < learned.lengths_N[:, None]
    counts = np.bincount(learned.tokens_NT[inside], minlength=vocabulary)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:count]))


def spread(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=SPREAD)


def copy(to: nn.Module, source: nn.Module) -> None:
    to.load_state_dict({"weight": source.weight})
