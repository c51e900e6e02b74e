"""Small networks that guess tokens from the target's hidden states: what they compute, apart from how they draft or learn."""

from forerun.heads.eagle import Eagle, EagleShape
from forerun.heads.medusa import Medusa, MedusaShape
from forerun.heads.mlp import MLPShape, MLPSpeculator

__all__ = ["Eagle", "EagleShape", "MLPShape", "MLPSpeculator", "Medusa", "MedusaShape"]
