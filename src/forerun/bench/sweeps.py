"""Which settings a run varied, and which variants differ in exactly one of them. Pure functions over configurations."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from forerun.config import NoDraftConfig, Variant

Configs = dict[str, Variant]


@dataclass(frozen=True)
class Line:
    """Variants that differ in one setting only, in the order of its values."""

    label: str  # of the settings that they share
    points: tuple[tuple[Any, str], ...]  # the setting's value, the variant's name


@dataclass(frozen=True)
class Sweep:
    """One setting and its lines, one for each combination of the other settings."""

    key: str
    lines: tuple[Line, ...]

    @property
    def values(self) -> list[Any]:
        """All values: numbers in their order, anything else in the order of the run."""
        found = list({shown(value): value for line in self.lines for value, _ in line.points}.values())
        return sorted(found) if self.numeric else found

    @property
    def numeric(self) -> bool:
        return all(is_number(value) for line in self.lines for value, _ in line.points)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def shown(value: Any) -> str:
    """A setting's value in a few characters: `gptq 4` for a recipe, `none` for an empty list."""
    if isinstance(value, list | tuple):
        return " + ".join(shown(one) for one in value) or "none"
    if isinstance(value, dict):
        named = [str(value[key]) for key in ("kind", "what", "bits", "fraction") if value.get(key) is not None]
        return " ".join(named) or json.dumps(value, sort_keys=True)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if is_number(value) else str(value)


def flat(config: Variant, whole: Sequence[str]) -> dict[str, Any]:
    """Dotted settings of a variant, lists by index; those named in `whole` are kept in one piece."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) and value else None
        if inner is None or path in whole:
            found[path] = value
        else:
            for key, one in inner:
                walk(one, f"{path}.{key}")

    for key, value in config.model_dump(mode="json").items():
        walk(value, key)
    return found


def sweeps(configs: Configs, axes: Sequence[str]) -> list[Sweep]:
    """A sweep for each axis, then for each other setting in which some variants differ and in nothing else."""
    settings = {name: flat(config, axes) for name, config in configs.items()}
    keys = dict.fromkeys([*axes, *(key for found in settings.values() for key in found)])
    found = [Sweep(key, lines(key, settings)) for key in keys]
    return [sweep for sweep in found if sweep.lines]


def lines(key: str, settings: dict[str, dict[str, Any]]) -> tuple[Line, ...]:
    """Groups of variants that agree in all settings but this one, which they have at two values or more."""
    groups: dict[str, list[tuple[Any, str]]] = {}
    for name, found in settings.items():
        if key in found:
            others = json.dumps({other: value for other, value in found.items() if other != key}, sort_keys=True)
            groups.setdefault(others, []).append((found[key], name))
    kept = [points for points in groups.values() if len({shown(value) for value, _ in points}) > 1]
    kept = [sorted(points, key=lambda point: point[0]) if all(is_number(v) for v, _ in points) else points for points in kept]
    return tuple(Line(label(key, points), tuple(points)) for points in kept)


def label(key: str, points: Sequence[tuple[Any, str]]) -> str:
    """What the names of a line's variants share, once the swept setting is taken out of them."""
    bare = {",".join(part for part in name.split(",") if not part.startswith(f"{key}=")) for _, name in points}
    if len(bare) == 1:
        return bare.pop() or "all"
    names = [name for _, name in points]
    parts = [re.split(r"([\s,]+)", name) for name in names]
    lead = common(parts)
    trail = common([one[len(lead) :][::-1] for one in parts])[::-1]
    shared = ["".join(words).strip(" ,") for words in (lead, trail)]
    return ", ".join(one for one in shared if one) or f"{names[0]} and {len(names) - 1} more"


def common(parts: Sequence[Sequence[str]]) -> list[str]:
    """The words that all begin with."""
    return [words[0] for words in itertools.takewhile(lambda words: len(set(words)) == 1, zip(*parts, strict=False))]


def own_plains(configs: Configs) -> dict[str, str]:
    """Each drafting variant's plain decoding: the one without a drafter that is otherwise set as it is, where there is one."""
    plain = {bare(config): name for name, config in reversed(configs.items()) if isinstance(config.drafter, NoDraftConfig)}
    drafting = {name: config for name, config in configs.items() if not isinstance(config.drafter, NoDraftConfig)}
    return {name: plain[bare(config)] for name, config in drafting.items() if bare(config) in plain}


def bare(config: Variant) -> str:
    """All settings but the drafter and its rule, in one string."""
    return json.dumps(config.model_dump(mode="json", exclude={"drafter", "rule"}), sort_keys=True)


def differing(configs: Configs) -> dict[str, dict[str, Any]]:
    """For each variant, the settings in which the variants of a run differ."""
    settings = {name: flat(config, ()) for name, config in configs.items()}
    keys = dict.fromkeys(key for found in settings.values() for key in found)
    varied = [key for key in keys if len({shown(found.get(key)) for found in settings.values()}) > 1]
    return {name: {key: found.get(key) for key in varied} for name, found in settings.items()}
