"""forerun's acceptance rules inside vLLM: `LLM(..., additional_config={"forerun": {"rule": {"kind": "typical"}}})`."""

from __future__ import annotations


def register() -> None:
    """Entry point `vllm.general_plugins`: vLLM calls it once in each of its processes; calling it again changes nothing.

    It puts forerun's classes where vLLM looks for its own; they act only on engines whose configuration names `forerun`, but
    for one repair (`forerun.plugin.repair`). Of a vLLM that is not known it touches nothing but the reading of configurations.
    """
    import vllm

    from forerun.plugin import settings, versions

    trouble = versions.trouble(vllm.__version__)
    settings.install(trouble)
    if trouble is None:
        from forerun.plugin import v1, v2

        v1.install()
        v2.install()
