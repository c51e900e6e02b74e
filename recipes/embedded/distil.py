"""Distil a draft on what the finished target itself writes: python distil.py --out DIR --draft NAME --sequences N --minutes M.

train.py taught the draft on the corpora's text; in use it must follow the target's own text. So the target continues prompts
from the corpora (half greedily, half sampled), its most probable tokens at every position are kept, and the draft learns them.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from forerun.accept import choose
from forerun.draft import NoDraft
from forerun.engine import Engine
from forerun.model import Target
from forerun.packed import pack
from forerun.types import Request, Sampling, complete
from prepare import SOURCES
from train import Student, build, update

PROMPT, NEW = 48, 144  # tokens
KEPT = 48  # most probable tokens of the teacher that are kept a position
ROWS = 48
MICRO = 16  # sequences a forward pass
RATE_FLOOR = 0.05


def draw_prompts(arrays: dict[str, np.ndarray], count: int, seed: int) -> list[tuple[int, ...]]:
    random = np.random.default_rng(seed)
    names, shares = list(SOURCES), [share for _, _, share in SOURCES.values()]
    prompts = []
    for name in random.choice(names, size=count, p=shares):
        start = random.integers(0, len(arrays[name]) - PROMPT)
        prompts.append(tuple(int(token) for token in arrays[name][start : start + PROMPT]))
    return prompts


def write(model: LlamaForCausalLM, prompts: list[tuple[int, ...]], sampled_share: float) -> np.ndarray:
    """[count, PROMPT + NEW]: the prompts and what the target makes of them."""
    engine = Engine(Target(model), NoDraft(), choose("auto", drawn=False), rows=ROWS, capacity=256)
    greedy, sampled = Sampling(max_new=NEW, ignore_eos=True), Sampling(temperature=0.8, max_new=NEW, ignore_eos=True, seed=0)
    split = int(len(prompts) * (1 - sampled_share))
    requests = [Request(str(i), prompt, greedy if i < split else sampled) for i, prompt in enumerate(prompts)]
    return np.array(
        [[*prompt, *c.tokens] for prompt, c in zip(prompts, complete(engine, requests), strict=True)], dtype=np.uint16
    )


@torch.inference_mode()
def teach(model: LlamaForCausalLM, texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The teacher's KEPT most probable tokens after each position and their probabilities, renormalized."""
    ids, probs = [], []
    for part in np.array_split(texts, -(-len(texts) // MICRO)):
        logits = model(input_ids=torch.from_numpy(part.astype(np.int64)), use_cache=False).logits[:, :-1].float()
        top = logits.softmax(-1).topk(KEPT, -1)
        ids.append(top.indices.to(torch.int16).numpy())
        probs.append((top.values / top.values.sum(-1, keepdim=True)).half().numpy())
    return np.concatenate(ids), np.concatenate(probs)


def learn(student: Student, texts: np.ndarray, ids: np.ndarray, probs: np.ndarray, minutes: float) -> None:
    """Passes over the material until the time is up, the rate falling linearly with it."""
    began, spoken, done = time.time(), time.time(), 0
    random = np.random.default_rng(0)
    while (spent := (time.time() - began) / (60 * minutes)) < 1:
        pick = random.integers(0, len(texts), 2 * MICRO)
        total = 0.0
        for part in np.split(pick, 2):
            x = torch.from_numpy(texts[part].astype(np.int64))[:, :-1]
            said = student.model(input_ids=x, use_cache=False).logits.log_softmax(-1)
            wanted = torch.from_numpy(ids[part].astype(np.int64))
            loss = -(said.gather(-1, wanted) * torch.from_numpy(probs[part]).float()).sum(-1).mean()
            (loss / 2).backward()
            total += float(loss.detach()) / 2
        update([student], max(RATE_FLOOR, 0.7 * (1 - spent)))
        done += 2 * MICRO
        if time.time() - spoken > 30:
            spoken = time.time()
            print(f"{done:,} sequences ({done / len(texts):.1f} passes), loss {total:.3f}", flush=True)


@torch.inference_mode()
def agreement(student: LlamaForCausalLM, texts: np.ndarray) -> float:
    """Share of the target's greedy tokens that are the draft's most probable ones after the same text."""
    same = total = 0
    for part in np.array_split(texts, -(-len(texts) // MICRO)):
        x = torch.from_numpy(part.astype(np.int64))
        guess = student(input_ids=x[:, :-1], use_cache=False).logits[:, PROMPT - 1 :].argmax(-1)
        same += int((guess == x[:, PROMPT:]).sum())
        total += guess.numel()
    return same / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of train.py")
    parser.add_argument("--draft", default="draft-deep")
    parser.add_argument("--sequences", type=int, default=3000)
    parser.add_argument("--minutes", type=float, default=12)
    arguments = parser.parse_args()
    out = arguments.out
    target = LlamaForCausalLM.from_pretrained(out / "target", dtype=torch.float32).eval().requires_grad_(False)
    pack(target)
    arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r") for name in SOURCES}
    held_out = np.load(out / "held_out.npy")
    if not (out / "written.npz").exists():
        began = time.time()
        held_out_prompts = [tuple(map(int, held_out[i * 2000 : i * 2000 + PROMPT])) for i in range(96)]
        tests = write(target, held_out_prompts, 0.0)
        texts = write(target, draw_prompts(arrays, arguments.sequences, 0), 0.5)
        print(f"wrote {texts.size:,} tokens in {time.time() - began:.0f} s", flush=True)
        ids, probs = teach(target, texts)
        np.savez(out / "written.tmp.npz", texts=texts, tests=tests, ids=ids, probs=probs)
        (out / "written.tmp.npz").rename(out / "written.npz")
    material = np.load(out / "written.npz")
    texts, tests, ids, probs = (material[name] for name in ("texts", "tests", "ids", "probs"))
    student = build(arguments.draft, "cpu")
    student.model.load_state_dict(torch.load(out / "state.pt")["students"][arguments.draft]["model"])
    before = agreement(student.model, tests)
    print(f"agreement on held-out prompts before: {before:.3f}", flush=True)
    learn(student, texts, ids, probs, arguments.minutes)
    after = agreement(student.model, tests)
    print(f"agreement on held-out prompts after: {after:.3f}")
    name = f"{arguments.draft}-distilled"
    student.model.bfloat16().save_pretrained(out / name)
    AutoTokenizer.from_pretrained(out / "tokenizer").save_pretrained(out / name)
    with (out / "log.jsonl").open("a") as file:
        file.write(
            json.dumps({"distilled": arguments.draft, "minutes": arguments.minutes, "agreement": [before, after]}) + "\n"
        )


if __name__ == "__main__":
    main()
