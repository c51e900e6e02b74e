"""Resident memory of a model in bf16 and in 4 bit: while it loads, and while it decodes, above the level before.

    python benchmarks/loading.py

Llama of hidden 2048, intermediate 5632, 8 layers, vocabulary 4096, random weights, in a temporary folder; each variant is
loaded and decoded in a process of its own. Peak resident memory is the kernel's (VmHWM), so a copy held for a moment shows.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

GEOMETRY = {
    "vocab_size": 4096, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 16, "max_position_embeddings": 2048,
}  # fmt: skip
CHILD = """
import json, sys
from forerun.build import Models, build
from forerun.config import Variant, parse
from forerun.types import Request, Sampling, complete
import forerun.compress.checkpoint, transformers.models.llama.modeling_llama
def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
before, anonymous = memory("VmRSS"), memory("RssAnon")
engine = build(parse(Variant, {"model": {"path": sys.argv[1]}, "engine": {"capacity": 256}}, "variant"), Models())
loaded = memory("VmHWM") - before
complete(engine, [Request("one", tuple(range(64)), Sampling(max_new=32, ignore_eos=True))])
print(json.dumps({"loading_bytes": loaded, "peak_bytes": memory("VmHWM") - before,
  "resident_bytes": memory("VmRSS") - before, "anonymous_bytes": memory("RssAnon") - anonymous}))
"""


def write(folder: Path) -> dict[str, Path]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from forerun.compress.run import compress
    from forerun.config import Compression, parse

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**GEOMETRY)).to(torch.bfloat16).save_pretrained(folder / "bf16")
    recipe = {"model": {"path": str(folder / "bf16")}, "recipes": [{"kind": "rtn", "bits": 4, "group_size": 128}]}
    compress(parse(Compression, recipe, "benchmark"), folder / "int4", lambda *_: None)
    return {"bf16": folder / "bf16", "int4 g128": folder / "int4"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", default="benchmarks/results/loading.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = {}
        for name, path in write(Path(folder)).items():
            done = subprocess.run([sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
    for name, figures in found.items():
        shares = {key: f"{value / found['bf16'][key]:.2f}" for key, value in figures.items()}
        print(name, {key: f"{value / 2**20:.0f} MiB" for key, value in figures.items()}, "of bf16:", shares)
    Path(options.json).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
