"""What an engine's `additional_config["forerun"]` asks for, judged where vLLM puts its configuration together. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from forerun.config import LosslessRuleConfig, Part, RuleConfig, parse
from forerun.types import UserError

KEY = "forerun"
BENT = ("temperature-relaxed", "top-p-residual", "min-p-ratio", "ensemble")  # rules that bend the ratio to the draft's law
CHOSEN = ("ngram", "ngram_gpu", "medusa", "mlp_speculator", "suffix", "custom_class")  # methods that draw nothing


class PluginConfig(Part):
    """The key `rule` of a forerun configuration, and a min-p warp of every request that samples, as `sampling.min_p`."""

    rule: RuleConfig = LosslessRuleConfig()
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)


def settings(vllm_config: Any) -> PluginConfig | None:
    """What this engine asks of forerun; None: nothing. UserError names a wrong key."""
    named = getattr(vllm_config, "additional_config", None)
    return parse(PluginConfig, named[KEY], f"additional_config.{KEY}") if isinstance(named, dict) and KEY in named else None


def check(config: PluginConfig, speculation: Any) -> None:
    """UserError where the speculative configuration (None: no drafts) takes the rule's place or starves it."""
    if speculation is None:
        return
    if speculation.rejection_sample_method != "standard":
        raise UserError(
            f"speculative_config.rejection_sample_method={speculation.rejection_sample_method}: with a rule of forerun's it "
            "stays at standard"
        )
    drawn = speculation.draft_sample_method == "probabilistic"
    if config.rule.kind in BENT and not drawn and speculation.method not in CHOSEN:
        raise UserError(
            f"additional_config.{KEY}.rule.kind={config.rule.kind} compares the target's with the draft's probabilities, and "
            'vLLM keeps none of the drafts: set speculative_config.draft_sample_method to "probabilistic"'
        )


def install(trouble: str | None) -> None:
    """Have every new VllmConfig judged; with `trouble`, one that names forerun is refused with it."""
    from vllm.config import VllmConfig

    if not is_ours(VllmConfig.__post_init__):
        VllmConfig.__post_init__ = judging(VllmConfig.__post_init__, trouble)


def judging(own: Callable[[Any], None], trouble: str | None) -> Callable[[Any], None]:
    def __post_init__(self: Any) -> None:  # noqa: N807  # in the place of a method of this name
        own(self)
        if (config := settings(self)) is not None:
            if trouble is not None:
                raise UserError(trouble)
            check(config, self.speculative_config)

    return __post_init__


def is_ours(thing: Any) -> bool:
    """Whether a class or function that stands in one of vLLM's modules has been put there from here."""
    return str(thing.__module__).startswith("forerun.")
