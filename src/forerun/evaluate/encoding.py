"""Texts in tokens, as lm-evaluation-harness encodes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forerun.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """A context and a continuation in tokens, cut where lm-evaluation-harness cuts them.

    Space at the end of the context goes to the continuation; both are encoded together and cut at the length of the
    context's own encoding. Without a context, the token that begins texts (or ends them) stands for it.
    """
    prefix = prefix_token(tokenizer)
    if not context:
        told = encode(tokenizer, continuation, special=False)
        return ([prefix], told) if told[:1] != [prefix] else (told[:1], told[1:])
    bare = context.rstrip()
    continuation = context[len(bare) :] + continuation
    before = encode(tokenizer, bare)
    return before, encode(tokenizer, bare + continuation)[len(before) :]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = True) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds, unless the text brings the first of them itself."""
    first = tokenizer.bos_token or tokenizer.eos_token
    begun = first is not None and text.startswith(str(first))
    return list(tokenizer(text, add_special_tokens=special and not begun, verbose=False)["input_ids"])


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands for no context."""
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not isinstance(token, int):
        raise UserError("the tokenizer has neither a token that begins texts nor one that ends them; log-likelihood needs one")
    return token
