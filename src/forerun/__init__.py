"""Speculative decoding for Hugging Face causal language models; `import forerun` alone does not load torch."""

from forerun.types import Backend, Completion, Delta, Request, Sampling, UserError, complete

__version__ = "0.1.0"

__all__ = ["Backend", "Completion", "Delta", "Request", "Sampling", "UserError", "complete", "load"]


def load(**settings: object) -> Backend:
    """A backend from the keys of a config, the embedded target without any: load(drafter={"kind": "ngram", "k": 5}).

    Raises UserError for an unknown key, a model that cannot be served, and parts that do not fit.
    """
    from forerun.build import Models, build  # torch comes with it
    from forerun.config import Variant, parse

    return build(parse(Variant, settings, "load"), Models())
