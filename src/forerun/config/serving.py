"""Engines that are not ours: vLLM's options by its own names, and servers that are measured from outside. No torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from forerun.config.part import Part


class VllmConfig(Part):
    """backend=vllm: engine arguments under vLLM's names and with its meanings; None leaves its default."""

    tensor_parallel_size: int = Field(default=1, ge=1)
    pipeline_parallel_size: int = Field(default=1, ge=1)
    data_parallel_size: int = Field(default=1, ge=1)
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    draft_tensor_parallel_size: int | None = Field(default=None, ge=1)
    quantization: str | None = None  # None: what the checkpoint says
    enable_prefix_caching: bool | None = None
    enable_chunked_prefill: bool | None = None
    max_model_len: int | None = Field(default=None, ge=1)  # None: engine.capacity
    gpu_memory_utilization: float | None = Field(default=None, gt=0.0, le=1.0)
    kv_cache_memory_bytes: int | None = Field(default=None, ge=1)
    attention_backend: str | None = None
    enforce_eager: bool | None = None
    multiprocess: bool = False  # the engine in a process of its own, as servers run it
    options: dict[str, Any] = Field(default={})  # any other engine argument, passed through


class EndpointConfig(Part):
    """backend=endpoint: a running OpenAI-compatible server (vLLM, SGLang, llama.cpp), measured from outside."""

    url: str = "http://localhost:8000/v1"
    model: str | None = None  # None: the server's only one
    key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key, where the server wants one
    prompts: Literal["ids", "text"] = "ids"  # as what they are sent; text for servers that take no token ids
    timeout_s: float = Field(default=600.0, gt=0.0)
