"""From tokens to text as they come: whole characters only, and nothing that may yet turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from forerun.types import Finish

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How tokenizers decode a character whose last bytes are still to come."""


class Detokenizer:
    """The text of one completion, grown token by token; without a tokenizer it stays empty."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.tokens: list[int] = []
        self.anchor = 0  # tokens from here on are decoded again, since a token's text may depend on the ones before it
        self.decoded = 0  # tokens whose text is in `text`
        self.text = ""  # decoded so far, a stop string included
        self.sent = 0  # characters given out
        self.held = max((len(string) for string in self.stop), default=1) - 1  # may be the start of a stop string

    def push(self, tokens: Sequence[int]) -> tuple[int, bool]:
        """Take tokens in; returns how many of them count, and whether a stop string ended the text with the last of those."""
        if self.tokenizer is None:
            return len(tokens), False
        if not self.stop:
            self.tokens += tokens
            self._decode()
            return len(tokens), False
        for count, token in enumerate(tokens, 1):
            before = len(self.text)
            self.tokens.append(token)
            self._decode()
            found = [at for string in self.stop if (at := self.text.find(string, max(0, before - self.held))) >= 0]
            if found:
                self.text = self.text[: min(found)]
                return count, True
        return len(tokens), False

    def take(self, last: bool) -> str:
        """The text that may be given out now; at the end of the completion, all of it."""
        if last and self.tokenizer is not None and self.decoded < len(self.tokens):
            self.text += self._tail()
            self.decoded = len(self.tokens)
        end = len(self.text) if last else max(self.sent, len(self.text) - self.held)
        part, self.sent = self.text[self.sent : end], end
        return part

    def _tail(self) -> str:
        assert self.tokenizer is not None
        known = self.tokenizer.decode(self.tokens[self.anchor : self.decoded], skip_special_tokens=True)
        whole = self.tokenizer.decode(self.tokens[self.anchor :], skip_special_tokens=True)
        assert isinstance(known, str) and isinstance(whole, str)
        return whole[len(known) :]

    def _decode(self) -> None:
        tail = self._tail()
        if tail and not tail.endswith(UNFINISHED):
            self.text += tail
            self.anchor, self.decoded = self.decoded, len(self.tokens)


def cut(tokens: Sequence[int], room: int, ends: frozenset[int], text: Detokenizer) -> tuple[tuple[int, ...], Finish | None]:
    """The new tokens that count, and why the completion is over, if it is; their text is taken in.

    `room` is how many tokens the limit still allows. A token of `ends` counts, and so does the one that completes a stop
    string; nothing after them does.
    """
    kept = tuple(tokens[:room])
    finish: Finish | None = "length" if len(tokens) >= room else None
    end = next((at for at, token in enumerate(kept) if token in ends), None)
    if end is not None:
        kept, finish = kept[: end + 1], "stop"
    counted, stopped = text.push(kept)
    if stopped:
        kept, finish = kept[:counted], "stop"
    return kept, finish
