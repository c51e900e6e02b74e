"""Which releases of vLLM the adapters were written for."""

from __future__ import annotations

KNOWN = ("0.32",)


def trouble(version: str) -> str | None:
    """Why the rules cannot work in this vLLM, in a sentence; None where they can."""
    if ".".join(version.split(".")[:2]) in KNOWN:
        return None
    return (
        f"forerun's rules know vLLM {', '.join(KNOWN)} and this is {version}: install `vllm=={KNOWN[-1]}.*`, "
        "or leave `forerun` out of additional_config"
    )
