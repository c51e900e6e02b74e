"""Streaming text: whole characters, nothing twice, nothing lost, and stop strings never shown."""

import functools
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from forerun.text import UNFINISHED, Detokenizer

CORPUS = ["the cat sat on the mat, the end.", "Straße über Zürich", "naïve façade", "日本語の文章", "the then there"]
TEXTS = [
    "the cat sat on the mat",
    "Zürich, Straße, naïve",
    "日本語と中国語の文章です",
    "emoji 🙂👩‍👩‍👧‍👦 and flags 🇨🇭!",
    "  leading, doubled  and trailing spaces \n\n\ttabs ",
    "מזל טוב नमस्ते",
    "a literal \N{REPLACEMENT CHARACTER} in the text",
]


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with few merges, so that most characters beyond ASCII are spread over several tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", clean_up_tokenization_spaces=False)


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def whole(tokens: Sequence[int]) -> str:
    text = tokenizer().decode(list(tokens), skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@functools.cache
def marked_spaces() -> PreTrainedTokenizerFast:
    """A tokenizer that marks spaces, drops the first one, and falls back to bytes, as Llama's and Mistral's first ones did."""
    pieces = ["<end>", "▁", "▁the", "▁cat", "s", ".", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    bpe = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    bpe.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", clean_up_tokenization_spaces=False)


def stream(
    tokens: Sequence[int], sizes: Sequence[int], stop: Sequence[str] = (), own: PreTrainedTokenizerFast | None = None
) -> tuple[list[str], int, bool]:
    """Push tokens in portions; returns the pieces given out, how many tokens count, and whether a stop string was met."""
    text, pieces, counted = Detokenizer(own or tokenizer(), stop), [], 0
    at = 0
    for i in range(len(tokens)):
        portion = tokens[at : at + sizes[i % len(sizes)]]
        at += len(portion)
        count, stopped = text.push(portion)
        counted += count
        last = stopped or at >= len(tokens)
        pieces.append(text.take(last=last))
        if last:
            return pieces, counted, stopped
    raise AssertionError("unreachable: every portion has a token")


PORTIONS = [(1,), (2,), (3, 1), (1, 5, 2), (100,)]


@pytest.mark.parametrize("sizes", PORTIONS, ids=str)
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_add_up_to_the_whole(text: str, sizes: tuple[int, ...]) -> None:
    tokens = encode(text)
    assert whole(tokens) == text
    pieces, counted, stopped = stream(tokens, sizes)
    assert "".join(pieces) == text
    assert (counted, stopped) == (len(tokens), False)


@pytest.mark.parametrize("text", TEXTS[:-1])
def test_no_piece_holds_half_a_character(text: str) -> None:
    tokens = encode(text)
    pieces, _, _ = stream(tokens, (1,))
    assert not any(UNFINISHED in piece for piece in pieces)
    if any(UNFINISHED in whole([token]) for token in tokens):
        assert "" in pieces, "a character spread over tokens must be waited for"


def test_text_comes_as_soon_as_it_is_whole() -> None:
    text = "the cat sat"
    pieces, _, _ = stream(encode(text), (1,))
    assert all(pieces)


@pytest.mark.parametrize("seed", range(30))
def test_arbitrary_tokens_add_up_too(seed: int) -> None:
    """Broken bytes and special tokens, as a random model writes them."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, len(tokenizer()), (60,), generator=generator).tolist()
    for sizes in PORTIONS:
        pieces, _, _ = stream(tokens, sizes)
        assert "".join(pieces) == whole(tokens)


@pytest.mark.parametrize("sizes", PORTIONS, ids=str)
def test_marked_spaces_and_fallback_bytes_add_up(sizes: tuple[int, ...]) -> None:
    own = marked_spaces()
    spelled = [f"<0x{byte:02X}>" for byte in "🙂é".encode()]
    names = ["▁the", "▁", "▁cat", "s", *spelled, "▁", "<0xC3>", "<0xBC>", "é", "▁the", "."]
    tokens = own.convert_tokens_to_ids(names)
    pieces, _, _ = stream(tokens, sizes, own=own)
    assert "".join(pieces) == own.decode(tokens) == "the  cats🙂é üé the."
    assert not any(UNFINISHED in piece for piece in pieces)


def test_a_character_that_never_ends_is_given_out_at_the_end() -> None:
    tokens = encode("ab🙂")[:-1]
    pieces, _, _ = stream(tokens, (1,))
    assert "".join(pieces) == whole(tokens)
    assert pieces[-1] == UNFINISHED
    assert UNFINISHED not in "".join(pieces[:-1])


def test_special_tokens_have_no_text() -> None:
    end = tokenizer().eos_token_id
    assert isinstance(end, int)
    tokens = [*encode("the "), end, *encode("cat"), end]
    pieces, counted, _ = stream(tokens, (1,))
    assert "".join(pieces) == "the cat"
    assert counted == len(tokens)


@pytest.mark.parametrize("sizes", PORTIONS, ids=str)
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the cat sat on the mat", ("sat on",), "the cat "),
        ("the cat sat on the mat", ("mat", "sat", "zzz"), "the cat "),
        ("the cat sat on the mat", ("sat on the mat", "on"), "the cat sat "),
        ("the cat sat on the mat", ("t s", "cat sat"), "the "),
        ("the cat sat on the mat", ("the",), ""),
        ("the cat sat on the mat", ("mat",), "the cat sat on the "),
        ("ababababc", ("babc",), "ababa"),
        ("日本語と中国語の文章です", ("国語",), "日本語と中"),
        ("emoji 🙂👩‍👩‍👧‍👦 and", ("👩‍👧",), "emoji 🙂👩‍"),
        ("one\n\ntwo", ("\n\n",), "one"),
    ],
)
def test_stop_strings_cut_and_are_never_shown(text: str, stop: tuple[str, ...], expected: str, sizes: tuple[int, ...]) -> None:
    tokens = encode(text)
    pieces, counted, stopped = stream(tokens, sizes, stop)
    assert stopped
    assert "".join(pieces) == expected
    # The last counted token is the one that completes a stop string: without it there is none.
    assert any(string in whole(tokens[:counted]) for string in stop)
    assert not any(string in whole(tokens[: counted - 1]) for string in stop)


@pytest.mark.parametrize("sizes", PORTIONS, ids=str)
@pytest.mark.parametrize("stop", [("catch",), ("mat.", "then"), ("mat the",), ("x" * 50,)])
def test_what_was_held_back_comes_where_no_stop_string_follows(stop: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    text = "the cat sat on the mat"
    pieces, counted, stopped = stream(encode(text), sizes, stop)
    assert not stopped
    assert counted == len(encode(text))
    assert "".join(pieces) == text


def test_the_start_of_a_stop_string_is_held_back() -> None:
    text = Detokenizer(tokenizer(), ("mat!",))
    shown = ""
    for token in encode("on the ma"):
        text.push([token])
        shown += text.take(last=False)
    assert "ma" not in shown
    text.push(encode("n"))
    assert shown + text.take(last=True) == "on the man"


def test_text_without_a_tokenizer_is_empty() -> None:
    text = Detokenizer(None, ("stop",))
    assert text.push([1, 2, 3]) == (3, False)
    assert text.take(last=False) == ""
    assert text.take(last=True) == ""


def test_nothing_is_given_out_twice_at_the_end() -> None:
    text = Detokenizer(tokenizer())
    text.push(encode("the cat"))
    assert text.take(last=True) == "the cat"
    assert text.take(last=True) == ""
