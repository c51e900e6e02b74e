"""Peak memory of one variant, in a process that does nothing else: `python -m forerun.bench.memory` reads a job on stdin."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from forerun.config import Experiment, Variant, parse

TIMEOUT_S = 600


def measure(variant: Variant, experiment: Experiment) -> int | None:
    """Peak bytes while a fresh process loads the variant and serves its longest prompts; None where that fails."""
    job = {"variant": variant.model_dump(mode="json"), "experiment": experiment.model_dump(mode="json")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "forerun.bench.memory"],
            input=json.dumps(job), capture_output=True, text=True, timeout=TIMEOUT_S, check=True,
        )  # fmt: skip
        return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_memory_bytes"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, IndexError):
        return None


def peak(cuda: bool) -> int | None:
    """On a GPU what torch allocated there, of all devices; else the most that this process had resident."""
    if cuda:
        import torch

        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its ru_maxrss survives exec, so a child would report the size of the process that started it.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resident_peak()


def resident_peak() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    from forerun import workload
    from forerun.bench.measure import request, room_for_prompts, serve
    from forerun.bench.methods import maker

    job = json.load(sys.stdin)
    variant = parse(Variant, job["variant"], "variant")
    experiment = parse(Experiment, job["experiment"], "experiment")
    make = maker()
    backend = make.build(variant)
    room = room_for_prompts(backend.facts, variant)
    prompts = workload.load(experiment.workload, backend.tokenizer, make.vocabulary(variant), room)
    longest = sorted(prompts, key=lambda prompt: len(prompt.tokens))[-variant.engine.rows :]
    serve(backend, [request(prompt, variant, experiment, prompt.id) for prompt in longest], variant.engine.rows)
    print(json.dumps({"peak_memory_bytes": peak(str(backend.facts.get("device", "cpu")).startswith("cuda"))}))
    sys.stdout.flush()
    os._exit(0)  # nothing to clean up, and worker threads of libraries may linger


if __name__ == "__main__":
    main()
