"""Tests with a real vLLM, which is an extra of its own: skipped where it is not installed."""

import importlib.util
from collections.abc import Iterator

import pytest

from forerun.build import Models


@pytest.fixture(scope="session", autouse=True)
def _vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # this folder is found under the same name, as a package without files
        pytest.skip("vLLM is not installed here: `make test-vllm` runs these in a venv of their own")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORERUN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def models() -> Models:
    return Models()
