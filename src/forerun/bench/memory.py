"""Peak memory of one variant, in a process that does nothing else: `python -m forerun.bench.memory` reads a job on stdin."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from forerun.config import Experiment, Variant, parse

TIMEOUT_S = 600


class Peaks(NamedTuple):
    """Most bytes at any time; None where that is not known."""

    process: int | None  # resident
    device: int | None  # what torch allocated on GPUs, all together; None without one


def measure(variant: Variant, experiment: Experiment) -> Peaks | None:
    """Peaks while a fresh process loads the variant and serves its longest prompts; None where that fails."""
    job = {"variant": variant.model_dump(mode="json"), "experiment": experiment.model_dump(mode="json")}
    try:
        done = apart([sys.executable, "-m", "forerun.bench.memory"], json.dumps(job), TIMEOUT_S)
        done.check_returncode()
        return Peaks(**json.loads(done.stdout.strip().splitlines()[-1]))
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError):
        return None


def apart(command: Sequence[str], job: str, timeout_s: float | None = None) -> subprocess.CompletedProcess[str]:
    """Run a process to its end with a job on its stdin. What it started ends with it, however that comes about: an engine
    that a backend runs in a process of its own would live on.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(job, timeout_s)
        finally:
            process.kill()
            if hasattr(os, "killpg"):  # not on Windows
                with suppress(ProcessLookupError):  # nobody is left
                    os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def peaks(device: str) -> Peaks:
    """Of this process so far, on the device that its backend names."""
    if not device.startswith("cuda"):
        return Peaks(resident(), None)
    import torch

    return Peaks(resident(), sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())))


def resident() -> int | None:
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: its ru_maxrss survives exec, so a child would report the size of the process that started it.
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def main() -> None:
    from forerun import workload
    from forerun.bench.lanes import room_for_prompts
    from forerun.bench.methods import maker
    from forerun.bench.serve import request, serve

    job = json.load(sys.stdin)
    variant = parse(Variant, job["variant"], "variant")
    experiment = parse(Experiment, job["experiment"], "experiment")
    make = maker()
    backend = make.build(variant)
    room = room_for_prompts(backend.facts, variant)
    prompts = workload.load(experiment.workload, backend.tokenizer, make.vocabulary(variant), room)
    longest = sorted(prompts, key=lambda prompt: len(prompt.tokens))[-variant.engine.rows :]
    serve(backend, [request(prompt, variant, experiment, prompt.id) for prompt in longest], variant.engine.rows)
    print(json.dumps(peaks(str(backend.facts.get("device", "cpu")))._asdict()))
    sys.stdout.flush()
    os._exit(0)  # nothing to clean up, and worker threads of libraries may linger


if __name__ == "__main__":
    main()
