"""Is this rule, engine or endpoint lossless? Each question is answered by a verdict and its evidence."""

from forerun.audit.verdict import Audit, Check

__all__ = ["Audit", "Check"]
