"""Tests with a real vLLM, which is an extra of its own: skipped where it is not installed."""

import importlib.util

import pytest


@pytest.fixture(scope="session", autouse=True)
def _vllm() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:  # this folder is found under the same name, as a package without files
        pytest.skip("vLLM is not installed here: `make test-vllm` runs these in a venv of their own")
