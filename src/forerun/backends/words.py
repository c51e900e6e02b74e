"""What is known of a model without its weights, for backends that load them elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import GenerationConfig

from forerun.backends.vllm_files import geometry, target_folder
from forerun.compress.opened import read_tokenizer
from forerun.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Words:
    """A tokenizer, the number of token ids that the model knows, and the tokens that end a text."""

    tokenizer: PreTrainedTokenizerBase | None
    vocabulary: int
    ends: frozenset[int]


def words(config: ModelConfig) -> Words:
    """UserError where the model's configuration cannot be read."""
    settings = geometry(config)
    text = settings.get_text_config(decoder=True)
    folder = target_folder(config.model_copy(update={"recipes": ()}), "target", lambda _: None)
    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):  # there is none
        ends = None
    ends = text.eos_token_id if ends is None else ends
    return Words(
        read_tokenizer(folder),
        int(text.vocab_size),
        frozenset() if ends is None else frozenset([ends] if isinstance(ends, int) else ends),
    )
