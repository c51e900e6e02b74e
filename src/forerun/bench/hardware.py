"""What the figures were measured on, and how busy it was."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from forerun import __version__
from forerun.config import EMBEDDED, ModelConfig

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "flash-attn", "triton")


def environment() -> dict[str, Any]:
    """Versions, devices, threads, load and commit, as environment.json has them; None for what cannot be told."""
    return {
        "forerun": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "cpu_allowed": allowed_cpus(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "memory_bytes": memory_bytes(),
        "gpus": [gpu(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith(("OMP_", "MKL_", "TORCH_"))},
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write(path: Path, found: dict[str, Any], facts: dict[str, dict[str, Any]]) -> None:
    """environment.json: the machine, and what each variant's backend says of itself (dtype and device among it)."""
    path.write_text(json.dumps(found | {"variants": facts}, indent=2, default=str) + "\n", encoding="utf-8")


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, `+` where it was changed since; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        ours = ["git", "ls-files", "--error-unmatch", __file__]  # fails in a venv inside some other checkout
        known = subprocess.run(ours, cwd=here, capture_output=True, timeout=10, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() if known.returncode == 0 else None


def cpu_name() -> str | None:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.lower().startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def allowed_cpus() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
    }


def kv_bytes_per_token(model: ModelConfig) -> int | None:
    """Bytes of keys and values that a token of one row takes, from the geometry alone; None where that cannot be read."""
    from transformers import AutoConfig

    from forerun.model import ASSETS, kv_bytes

    try:
        settings = AutoConfig.from_pretrained(str(ASSETS / "target") if model.path == EMBEDDED else model.path)
        named = settings.dtype if model.dtype == "auto" else model.dtype
        dtype = getattr(torch, str(named or "float32").removeprefix("torch."))
        return kv_bytes(settings, dtype)
    except (OSError, ValueError, AttributeError, TypeError):
        return None
