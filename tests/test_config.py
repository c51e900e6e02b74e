"""Experiments as data: defaults, YAML, overrides, variants, axes, and messages that name the right key."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from forerun.config import (
    METHODS,
    DraftModelConfig,
    EagleConfig,
    Experiment,
    MedusaConfig,
    MLPConfig,
    NGramConfig,
    NoDraftConfig,
    SamplingConfig,
    flatten_keys,
    load,
    merge,
    nest,
    save,
)
from forerun.types import Sampling, UserError


def test_defaults_are_plain_decoding_of_the_embedded_model() -> None:
    found = load(None, [])
    assert found == Experiment()
    assert found.expand()["base"].drafter == NoDraftConfig()
    assert found.model.path == "embedded"


def test_yaml_then_flags_then_overrides(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("sampling: {temperature: 0.5, top_p: 0.5, top_k: 5}\ndrafter: {kind: ngram, k: 2}\n")
    found = load(str(path), ["sampling.top_k=7"], {"sampling.top_p": 0.6, "sampling.top_k": 6})
    assert (found.sampling.temperature, found.sampling.top_p, found.sampling.top_k) == (0.5, 0.6, 7)
    assert found.drafter == NGramConfig(k=2)


def test_a_saved_experiment_loads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    overrides = [
        "drafter.kind=model",
        "drafter.k=3",
        "axes.drafter.k=[1,2]",
        "sampling.stop=[a,b]",
        "sampling.logit_bias.5=1.5",
    ]
    found = load(None, overrides)
    save(found, path)
    assert load(str(path), []) == found


def test_another_kind_forgets_the_old_ones_keys() -> None:
    assert merge({"kind": "model", "path": "x", "k": 3}, {"kind": "ngram"}) == {"kind": "ngram"}
    assert merge({"kind": "model", "path": "x"}, {"kind": "model", "k": 3}) == {"kind": "model", "path": "x", "k": 3}
    assert merge({"kind": "model", "path": "x"}, {"kind": "draft", "k": 3})["path"] == "x", "two names of one kind"
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_kind(name: str) -> None:
    kinds = {"none": NoDraftConfig, "ngram": NGramConfig, "model": DraftModelConfig}
    kinds |= {"medusa": MedusaConfig, "mlp": MLPConfig, "eagle": EagleConfig}
    where = ["drafter.path=x"] if name == "mlp" else []
    assert isinstance(load(None, [f"drafter.kind={name}", *where]).drafter, kinds[METHODS[name]])


def test_nesting_and_flattening_are_inverse() -> None:
    flat = {"a.b": 1, "a.c.d": 2, "e": [3]}
    assert nest(flat) == {"a": {"b": 1, "c": {"d": 2}}, "e": [3]}
    assert flatten_keys(nest(flat)) == flat
    assert nest({"a.b": 1, "a": {"c": 2}}) == {"a": {"b": 1, "c": 2}}


def test_variants_override_the_base() -> None:
    data: dict[str, Any] = {
        "drafter": {"kind": "model", "k": 3},
        "variants": {"plain": {"drafter": {"kind": "none"}}, "dotted": {"drafter.k": 7}, "base": None},
    }
    found = Experiment.model_validate(data).expand()
    assert [type(variant.drafter) for variant in found.values()] == [NoDraftConfig, DraftModelConfig, DraftModelConfig]
    assert (found["dotted"].drafter, found["base"].drafter) == (DraftModelConfig(k=7), DraftModelConfig(k=3))


def test_axes_make_a_grid_without_the_excluded_points() -> None:
    data: dict[str, Any] = {
        "drafter": {"kind": "ngram"},
        "axes": {"drafter": {"k": [3, 5]}, "engine.rows": [1, 2]},
        "excludes": [{"drafter.k": 5, "engine": {"rows": 2}}],
    }
    found = Experiment.model_validate(data).expand()
    assert list(found) == ["drafter.k=3,engine.rows=1", "drafter.k=3,engine.rows=2", "drafter.k=5,engine.rows=1"]
    assert found["drafter.k=3,engine.rows=2"].engine.rows == 2
    assert list(load(None, ["drafter.kind=ngram", "axes.drafter.k=[3,5]"]).expand()) == ["drafter.k=3", "drafter.k=5"]


def test_excludes_name_variants_and_settings() -> None:
    words = ["variants.a.drafter.kind=ngram", "variants.b.drafter.kind=model", "axes.drafter.k=[1,2]"]
    found = load(None, [*words, "excludes=[{variant: b, drafter.k: 2}, {drafter.kind: ngram, drafter.k: 1}]"]).expand()
    assert list(found) == ["a,drafter.k=2", "b,drafter.k=1"]


def test_a_measure_named_shortly_takes_settings(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("quality: [race-high]")
    [measure] = load(str(path), ["quality.0.limit=5"]).quality
    assert (measure.kind, measure.limit) == ("race-high", 5)


def test_named_variants_cross_the_axes() -> None:
    found = load(None, ["variants.a.drafter.kind=ngram", "variants.b.drafter.kind=model", "axes.drafter.k=[1,2]"])
    assert list(found.expand()) == ["a,drafter.k=1", "a,drafter.k=2", "b,drafter.k=1", "b,drafter.k=2"]


def test_the_baseline() -> None:
    two = ["variants.other.drafter.kind=ngram", "variants.plain.drafter.kind=none"]
    assert load(None, two).baseline_name() == "plain"
    assert load(None, [*two, "baseline=other"]).baseline_name() == "other"
    assert load(None, ["variants.x.drafter.kind=ngram"]).baseline_name() == "x"
    with pytest.raises(UserError, match="no variant is called 'y'; there are other, plain"):
        load(None, [*two, "baseline=y"]).baseline_name()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["modle.path=x"], "unknown key 'modle'; did you mean 'model'?"),
        (["sampling.temprature=1"], "unknown key 'sampling.temprature'; did you mean 'sampling.temperature'?"),
        (["drafter.kind=draft", "drafter.confidenc=1"], "where drafter.kind is 'model'; did you mean 'drafter.confidence'?"),
        (["drafter.kind=ngram", "drafter.k=-1"], "drafter.k: Input should be greater than or equal to 0 (got -1)"),
        (["drafter.kind=eagl"], "drafter.kind: 'eagl' is none of 'none', 'ngram', 'model'"),
        (["engine.rows=many"], "engine.rows: Input should be a valid integer"),
        (["sampling.top_p=0"], "sampling.top_p: Input should be greater than 0 (got 0)"),
        (["workload.kind=spec"], "workload.kind: Input should be 'demo', 'synthetic', 'text', 'jsonl', 'hub', 'spec-bench'"),
        (["model=3"], "model: Input should be a valid dictionary"),
        (["drafter=ngram"], "drafter: Input should be a valid dictionary"),
        (["axes.drafter.k=3"], "axes.drafter.k: Input should be a valid list"),
        (["temperature"], "'temperature': an override has the form a.b=c"),
        (["drafter.k=[1"], "overrides: while parsing"),
        (["variants.a.drafter.k=1"], "variant 'a': unknown key 'drafter.k' where drafter.kind is 'none'"),
        (["axes.drafter.k=[]"], "axes: the axis drafter.k has no values"),
        (["axes.engine.rows=[1,2]", "excludes=[{engine.row: 1}]"], "setting 'engine.row'; did you mean 'engine.rows'?"),
        (["axes.engine.rows=[1]", "excludes=[{engine.rows: 1}]"], "excludes: they leave no variant to measure"),
        (["quality=[{kind: humaneval, k: [10]}]"], "command line: quality.0: k=10 needs samples=10 or more, not 1"),
        (["quality=[{kind: mbpp, samples: 4}]"], "quality.0: samples=4 at temperature=0 are all the same"),
        (["quality=[{kind: mbpp, k: []}]"], "quality.0.k: "),
        (["quality=[{kind: perplexity, stride: 9, max_length: 8}]"], "quality.0: stride=9 leaves gaps between windows"),
        (["quality=[{limit: 3}]"], "quality.0: says no `kind` (got {'limit': 3})"),
        (["axes.engine.row=[1]"], "variant 'engine.row=1': unknown key 'engine.row'; did you mean 'engine.rows'?"),
    ],
)  # fmt: skip
def test_mistakes_get_one_line_that_names_the_right_key(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(None, overrides).expand()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_config_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    with pytest.raises(UserError, match="no such config file"):
        load(str(path), [])
    path.write_text("a: [1\nb: {")
    with pytest.raises(UserError, match="not readable as YAML"):
        load(str(path), [])
    path.write_text("- 1\n- 2\n")
    with pytest.raises(UserError, match="expected a mapping at the top, found list"):
        load(str(path), [])
    path.write_text("engine: {row: 1}\n")
    with pytest.raises(UserError, match=r"a\.yaml: unknown key 'engine\.row'; did you mean 'engine\.rows'\?"):
        load(str(path), [])


def test_sampling_has_every_option_of_a_request() -> None:
    """What the engine can do, a config can say, with the same defaults; but runs are seeded unless told otherwise."""
    assert set(SamplingConfig.model_fields) == {field.name for field in dataclasses.fields(Sampling)}
    assert SamplingConfig(seed=None).build() == Sampling()
    assert SamplingConfig().seed == 0


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"max_new": 0}, {"n": 0}])
def test_sampling_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"sampling.{next(iter(wrong))}="):
        Sampling(**wrong)
