"""What every part of a configuration is: frozen, with strict keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

EMBEDDED = "embedded"
"""The path that names the model that ships with the package."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
