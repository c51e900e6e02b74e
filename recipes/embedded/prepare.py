"""Train the embedded tokenizer and turn the corpora into token arrays: python prepare.py --data DIR --out DIR."""

import argparse
import lzma
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 4096
MEGABYTE = 1 << 20
# file, megabytes of text that are read, share of the training windows
SOURCES = {
    "wiki": ("corpus_wiki/wiki_train.txt.xz", 30, 0.40),
    "novels": ("corpus_novels/novels.txt.xz", 12, 0.12),
    "peps": ("corpus_peps/peps.txt.xz", 5, 0.08),
    "python": ("corpus_python/python.txt.xz", 12, 0.22),
    "stories": ("tinystories_sample/train.txt.xz", 5, 0.18),
}
HELD_OUT = "corpus_wiki/wiki_heldout.txt.xz"


def documents(path: Path, megabytes: int) -> Iterator[str]:
    """The documents of a corpus file, cut off after so many megabytes of characters."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        text = file.read(megabytes * MEGABYTE)
    for document in text.split(END):
        if document := document.strip():
            yield document


def train_tokenizer(data: Path) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    sample = (text for file, size, _ in SOURCES.values() for text in documents(data / file, max(1, size // 3)))
    tokenizer.train_from_iterator(sample, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterator[str]) -> np.ndarray:
    end = tokenizer.token_to_id(END)
    ids = [np.array([*encoding.ids, end], dtype=np.uint16) for encoding in tokenizer.encode_batch_fast(list(texts))]
    return np.concatenate(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with corpus_* and tinystories_sample")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if (arguments.out / "held_out.npy").exists():
        print("already prepared")
        return
    tokenizer = train_tokenizer(arguments.data)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END, model_max_length=1024
    )
    fast.save_pretrained(arguments.out / "tokenizer")
    for name, (file, size, _) in SOURCES.items():
        ids = encode(tokenizer, documents(arguments.data / file, size))
        np.save(arguments.out / f"{name}.npy", ids)
        print(f"{name}: {len(ids):,} tokens")
    held_out = list(documents(arguments.data / HELD_OUT, 1))
    ids = encode(tokenizer, iter(held_out))
    np.save(arguments.out / "held_out.npy", ids)
    characters = sum(len(text.encode()) for text in held_out)
    print(f"held out: {len(ids):,} tokens, {characters / len(ids):.3f} bytes a token")
    (arguments.out / "held_out_bytes.txt").write_text(str(characters))


if __name__ == "__main__":
    main()
