"""Speculative decoding for Hugging Face causal language models; `import forerun` alone does not load torch."""

from forerun.types import Completion, Delta, Request, Sampling, UserError, complete

__version__ = "0.1.0"

__all__ = ["Completion", "Delta", "Request", "Sampling", "UserError", "complete"]
