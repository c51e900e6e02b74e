"""From nested data to validated parts: merging, dotted keys, and mistakes told with the nearest right key."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from forerun.config.data import QualityConfig, named
from forerun.config.part import Part
from forerun.config.parts import METHODS, DrafterConfig, RuleConfig
from forerun.config.recipes import RecipeConfig
from forerun.types import UserError

T = TypeVar("T", bound=Part)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a change of `kind` replaces the whole part, since the old kind's keys mean nothing to the new one."""
    if "kind" in over and "kind" in base and METHODS.get(over["kind"], over["kind"]) != METHODS.get(base["kind"], base["kind"]):
        return dict(over)
    joined = dict(base)
    for key, value in over.items():
        old = joined.get(key, [] if key in LISTS else None)
        if isinstance(old, list | tuple) and isinstance(value, dict) and all(str(index).isdigit() for index in value):
            joined[key] = merge_list(list(named(old) if key == "quality" else old), value)
        else:
            joined[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return joined


def merge_list(base: list[Any], over: dict[str, Any]) -> list[Any]:
    """`recipes.0.bits=4` arrives as {"0": {"bits": 4}}: it changes an entry, or adds the next one."""
    for index, value in sorted((int(index), value) for index, value in over.items()):
        if index >= len(base):
            base.append(value)
        elif isinstance(base[index], dict) and isinstance(value, dict):
            base[index] = merge(base[index], value)
        else:
            base[index] = value
    return base


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}; places in a list stay keys: only the list that they are merged into knows its length."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = str(key).split(".")
        branch = tree
        for part in parents:
            below = branch.get(part)
            branch[part] = dict(below) if isinstance(below, dict) else {}
            branch = branch[part]
        old = branch.get(last)
        branch[last] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return tree


def flatten_keys(tree: dict[str, Any], parents: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_keys(value, f"{parents}{key}.") if isinstance(value, dict) else {f"{parents}{key}": value}
    return flat


def parse(kind: type[T], data: dict[str, Any], where: str) -> T:
    """Validate, turning the first mistake into one line that names the nearest right key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(kind, error)}") from error


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first mistake; the tag that pydantic puts in the place of a union (`drafter.none.k`) is said apart."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    tags = {tag for union in UNIONS for k in flatten(union) for tag in kinds_of(k)}
    place = [part for i, part in enumerate(loc) if not (part in tags and i and in_union(loc[:i]))]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], known_keys(kind, loc[:-1]), n=1, cutoff=0.0)
        right = ".".join([*place[:-1], *near])
        tag = next((i for i, part in enumerate(loc[:-1]) if part in tags and in_union(loc[:i])), 0)
        of = f" where {'.'.join(loc[:tag])}.kind is {loc[tag]!r}" if tag else ""
        return f"unknown key {'.'.join(place)!r}{of}; did you mean {right!r}?"
    if first["type"] == "union_tag_invalid":
        return f"{'.'.join(place)}.kind: {first['ctx']['tag']!r} is none of {first['ctx']['expected_tags']}"
    if first["type"] == "union_tag_not_found":
        return f"{'.'.join(place)}: says no `kind` (got {first['input']!r})"
    if first["type"] == "value_error":
        return f"{'.'.join(place)}: {first['ctx']['error']}".removeprefix(": ")
    return f"{'.'.join(place)}: {first['msg']} (got {first['input']!r})"


UNIONS = (DrafterConfig, RuleConfig, QualityConfig, RecipeConfig)
LISTS = ("quality", "recipes")
TAGGED = ("drafter", "rule", "quality", "recipes")
"""Parts that are tagged unions, or lists of them: pydantic puts the tag into the place of a mistake."""


def in_union(place: list[str]) -> bool:
    """Whether a place such as ["rule"] or ["quality", "0"] is that of a tagged union."""
    return bool(place) and (place[-1] in TAGGED or (place[-1].isdigit() and len(place) > 1 and place[-2] in TAGGED))


def kinds_of(part: type[BaseModel]) -> tuple[str, ...]:
    """The tags that a member of a tagged union answers to."""
    return get_args(part.model_fields["kind"].annotation) if "kind" in part.model_fields else ()


def known_keys(kind: type[BaseModel], place: list[str]) -> list[str]:
    """The fields at a place such as ["drafter", "model"]; tags of unions appear in the place as pydantic writes them."""
    kinds: list[Any] = [kind]
    for part in place:
        inner = [f.annotation for k in kinds for name, f in k.model_fields.items() if name == part]
        if inner:
            kinds = [k for annotation in inner for k in flatten(annotation)]
        else:
            kinds = [k for k in kinds if part in kinds_of(k)] or kinds
    return [name for k in kinds for name in k.model_fields]


def flatten(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [k for argument in get_args(annotation) for k in flatten(argument)]
