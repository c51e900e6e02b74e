"""Models that forerun compressed, in vLLM: they say there what they say in our engine, or are refused in one line."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from forerun.backends.vllm_files import target_folder
from forerun.build import Models, build
from forerun.config import Variant, parse
from forerun.model import ASSETS
from forerun.types import Request, Sampling, UserError, complete

pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM's own
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before anything imports vLLM
TEXTS = (
    "Once upon a time, a small robot",
    "The cat sat on the mat. The dog sat",
    "1. Wash the apples.\n2. Cut the apples.\n3.",
)
QUANTIZED = {"bits": 4, "group_size": 32, "symmetric": True}
ROUND = {"kind": "rtn"} | QUANTIZED
GPTQ = {"kind": "gptq", "calibration": {"samples": 4, "length": 64}} | QUANTIZED
PRUNE = {"kind": "prune", "what": "mlp", "fraction": 0.25}


def variant(model: dict[str, Any], backend: str = "vllm", drafter: dict[str, Any] | None = None) -> Variant:
    settings = {
        "model": model,
        "drafter": drafter or {"kind": "none"},
        "engine": {"rows": 3, "capacity": 128},
        "backend": backend,
        "vllm": {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20},
    }
    return parse(Variant, settings, "test")


def scores(backend: Any, texts: list[tuple[int, ...]]) -> list[float]:
    return [one.logprob for one in backend.scorer.score([(text[:cut], text[cut:]) for text in texts for cut in (2, 5)])]


@pytest.mark.parametrize(
    ("recipe", "dtype", "close"),
    [(ROUND, "float16", 0.05), (GPTQ, "float16", 0.05), (PRUNE, "float32", 1e-3)],
    ids=["rtn", "gptq", "prune"],
)
def test_compressed_models_are_the_same_in_vllm(recipe: dict[str, Any], dtype: str, close: float, models: Models) -> None:
    """As our engine has the same folder in float32; vLLM computes 4-bit layers in 16 bits alone."""
    small = variant({"dtype": dtype, "recipes": [recipe]})
    backend, whole = build(small, models), {"dtype": "float32"}
    same = whole | {"path": target_folder(small.model, "target", print)}
    tokenizer = models.words(small.model).tokenizer
    assert tokenizer is not None
    texts = [tuple(tokenizer(text)["input_ids"]) for text in TEXTS]
    found, ours, dense = (
        scores(each, texts)
        for each in (backend, build(variant(same, "reference"), models), build(variant(whole, "reference"), models))
    )
    assert found == pytest.approx(ours, rel=0, abs=close)
    assert max(abs(one - other) for one, other in zip(ours, dense, strict=True)) > 3 * close, "it changes too little to be seen"
    assert (backend.facts["quantization"] is None) == (recipe is PRUNE)
    if recipe is PRUNE:
        asked = [Request(str(i), text, Sampling(max_new=24)) for i, text in enumerate(texts)]
        wanted = [one.tokens for one in complete(build(variant(same, "forerun"), models), asked)]
        assert [one.tokens for one in complete(backend, asked)] == wanted


@pytest.mark.parametrize("which", ["target", "draft"])
def test_four_bits_beside_float32_are_refused(which: str, models: Models) -> None:
    target = {"dtype": "float32"} | ({"recipes": [ROUND]} if which == "target" else {})
    drafter = {"kind": "model", "k": 3, "recipes": [ROUND]} if which == "draft" else None
    with pytest.raises(UserError, match=r"^vLLM refuses this: .*float32 is not supported for quantization method[^\n]*$"):
        build(variant(target, drafter=drafter), models)


def test_bitsandbytes_is_refused(models: Models, tmp_path: Path) -> None:
    folder = shutil.copytree(ASSETS / "target", tmp_path / "target")
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": said}))
    with pytest.raises(UserError, match=r"^vLLM refuses this: Unknown quantization method: bitsandbytes[^\n]*$"):
        build(variant({"path": str(folder), "dtype": "bfloat16"}), models)
