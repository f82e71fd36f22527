"""Second-order statistics of a model's layers: the only importer of `hmatrix`."""

from .collect import (
    LayerCurvature,
    block_sums,
    collect_curvature,
    damage,
    default_loss,
    describe_factor,
    loss_units,
)
from .factors import Factor

__all__ = [
    "Factor",
    "LayerCurvature",
    "block_sums",
    "collect_curvature",
    "damage",
    "default_loss",
    "describe_factor",
    "loss_units",
]
