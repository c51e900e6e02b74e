"""Train the embedded target and distil its drafts in the same pass: python train.py --data DIR --out DIR --tokens N.

Every micro-batch trains the target on the text and each draft on the target's distribution, so that the teacher's forward
pass is paid once. Learning rate: warm-up, constant, then linear decay over the last part, so that a longer run can resume
an earlier one.
"""

import argparse
import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prepare import SOURCES, VOCABULARY

HEAD = 64
SHAPES = {  # layers, hidden, intermediate, heads, key-value heads
    "target": (9, 384, 1024, 6, 2),
    "draft": (1, 256, 384, 4, 1),
    "draft-deep": (2, 256, 128, 2, 1),
}
BATCH, MICRO = 8192, 2048  # tokens an optimizer step, tokens a forward pass
SHORT, LONG = 256, 1024  # window lengths: short ones until the decay begins
DECAY, WARM = 0.3, 25  # share of the tokens, steps
COPIES, PERIODS = 0.15, (24, 128)  # share of windows that repeat their own start, and the shortest and longest start repeated
RATE = {"muon": 6e-3, "adam": 3e-3}


@dataclass
class Student:
    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]


def build(name: str, device: str) -> Student:
    layers, hidden, intermediate, heads, groups = SHAPES[name]
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=HEAD, tie_word_embeddings=True,
        max_position_embeddings=LONG, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=RATE["muon"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(others, lr=RATE["adam"], betas=(0.9, 0.95), weight_decay=0.0)
    return Student(model, [muon, adam])


def rate(done: int, total: int) -> float:
    return min(1.0, (done / BATCH + 1) / WARM, max(0.0, (total - done) / (DECAY * total)))


def windows(arrays: dict[str, np.ndarray], step: int, length: int, device: str) -> Tensor:
    """BATCH tokens in windows of length + 1, drawn by the sources' shares; a function of the step, so that a run resumes."""
    random = np.random.default_rng(step)
    names, shares = list(SOURCES), [share for _, _, share in SOURCES.values()]
    rows = []
    for name in random.choice(names, size=BATCH // length, p=shares):
        start = random.integers(0, len(arrays[name]) - length - 1)
        row = arrays[name][start : start + length + 1].astype(np.int64)
        if random.random() < COPIES:  # a short run sees too little natural repetition to learn to copy
            row = np.resize(row[: random.integers(*PERIODS)], length + 1)
        rows.append(row)
    return torch.from_numpy(np.stack(rows)).to(device)


def soft_loss(student_BTV: Tensor, teacher_BTV: Tensor) -> Tensor:
    """Cross-entropy of the student under the teacher's distribution, nats a token."""
    return -(teacher_BTV.softmax(-1) * student_BTV.log_softmax(-1)).sum(-1).mean()


def update(students: Iterable[Student], scale: float) -> None:
    for student in students:
        torch.nn.utils.clip_grad_norm_(student.model.parameters(), 1.0)
        for optimizer, peak in zip(student.optimizers, RATE.values(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@torch.inference_mode()
def evaluate(students: dict[str, Student], held_out: np.ndarray, held_out_bytes: int, device: str) -> dict[str, float]:
    """Held-out bits per byte of every model, and each draft's greedy agreement with the target on the same text."""
    length, count = 512, 60
    step = (len(held_out) - 1) // count // 1
    rows = np.stack([held_out[i * step : i * step + length + 1] for i in range(count)]).astype(np.int64)
    nats, same, total = dict.fromkeys(students, 0.0), dict.fromkeys(students, 0), 0
    for x in torch.from_numpy(rows).to(device).split(4):
        greedy = None
        for name, student in students.items():
            logits = student.model(input_ids=x[:, :-1], use_cache=False).logits.float()
            nats[name] += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
            greedy = logits.argmax(-1) if greedy is None else greedy
            same[name] += int((logits.argmax(-1) == greedy).sum())
        total += x[:, 1:].numel()
    bits = {f"{n} bits/byte": v / total / np.log(2) * len(held_out) / held_out_bytes for n, v in nats.items()}
    return bits | {f"{n} agreement": v / total for n, v in same.items() if n != "target"}


def save(out: Path, students: dict[str, Student], done: int, report: dict[str, float]) -> None:
    state = {
        n: {"model": s.model.state_dict(), "optimizers": [o.state_dict() for o in s.optimizers]} for n, s in students.items()
    }
    torch.save({"done": done, "students": state}, out / "state.tmp")
    (out / "state.tmp").rename(out / "state.pt")
    tokenizer = AutoTokenizer.from_pretrained(out / "tokenizer")
    for name, student in students.items():
        copy = LlamaForCausalLM(student.model.config)
        copy.load_state_dict(student.model.state_dict())
        copy.bfloat16().save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps({"tokens": done, **report}) + "\n")
    print(f"saved at {done:,} tokens:", {k: round(v, 4) for k, v in report.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that prepare.py filled; checkpoints go there too")
    parser.add_argument("--tokens", type=int, default=9_000_000)
    parser.add_argument("--drafts", default="draft", help="comma-separated names of SHAPES")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-seconds", type=float, default=600)
    arguments = parser.parse_args()
    out, device = arguments.out, arguments.device
    arrays = {name: np.load(out / f"{name}.npy", mmap_mode="r") for name in SOURCES}
    held_out, held_out_bytes = np.load(out / "held_out.npy"), int((out / "held_out_bytes.txt").read_text())
    students = {name: build(name, device) for name in ["target", *arguments.drafts.split(",")]}
    done, began, spoken = 0, time.time(), time.time()
    if (out / "state.pt").exists():
        state = torch.load(out / "state.pt", map_location=device)
        done = state["done"]
        for name, student in students.items():
            if name not in state["students"]:
                continue  # a draft that joins a run
            student.model.load_state_dict(state["students"][name]["model"])
            for optimizer, saved in zip(student.optimizers, state["students"][name]["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        print(f"resumed at {done:,} tokens")
    first, saved_at = done, time.time()
    while done < arguments.tokens:
        length = LONG if done >= arguments.tokens * (1 - DECAY) else SHORT
        losses = dict.fromkeys(students, 0.0)
        parts = windows(arrays, done // BATCH, length, device).split(MICRO // length)
        for x in parts:
            teacher = students["target"].model(input_ids=x[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(teacher.flatten(0, 1), x[:, 1:].flatten())
            (loss / len(parts)).backward()
            losses["target"] += float(loss.detach()) / len(parts)
            for name, student in students.items():
                if name != "target":
                    loss = soft_loss(student.model(input_ids=x[:, :-1], use_cache=False).logits, teacher.detach())
                    (loss / len(parts)).backward()
                    losses[name] += float(loss.detach()) / len(parts)
        if not all(map(np.isfinite, losses.values())):
            raise SystemExit(f"the loss is not finite at {done:,} tokens: {losses}; the last checkpoint is kept in {out}")
        update(students.values(), rate(done, arguments.tokens))
        done += BATCH
        if time.time() - spoken > 30:
            spoken = time.time()
            speed = (done - first) / (spoken - began)
            print(f"{done:,} tokens, {speed:.0f}/s,", {k: round(v, 3) for k, v in losses.items()}, flush=True)
        if time.time() - saved_at > arguments.save_seconds or done >= arguments.tokens:
            saved_at = time.time()
            save(out, students, done, evaluate(students, held_out, held_out_bytes, device))


if __name__ == "__main__":
    main()
