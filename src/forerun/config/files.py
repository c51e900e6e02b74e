"""From a YAML file, flags and overrides `a.b=c` to the data that a configuration is parsed from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from forerun.config.parsing import merge, nest
from forerun.types import UserError


def read(path: str | None, overrides: list[str], flags: dict[str, Any] | None = None, small: bool = False) -> dict[str, Any]:
    """The file's mapping (or nothing) with flags {"a.b": c} and then overrides `a.b=c` on top.

    `small` lays the file's own `small:` section over it first: the same experiment at a size for any machine.
    """
    data = mapping(path) if path is not None else {}
    overlay = data.pop("small", None)
    if small:
        if not isinstance(overlay, dict):
            raise UserError(f"--small: {path or 'the command line'} has no section `small:` that says what is smaller")
        data = merge(data, overlay)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r}: an override has the form a.b=c")
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except Exception as error:  # YAML's own errors share no base class with OmegaConf's
        raise UserError(f"overrides: {str(error).splitlines()[0]}") from error
    assert isinstance(changes, dict)
    return merge(merge(data, nest(flags or {})), {str(key): value for key, value in changes.items()})


def mapping(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; give the path of a YAML file")
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # as above
        raise UserError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(loaded, dict):
        raise UserError(f"{path}: expected a mapping at the top, found {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}
