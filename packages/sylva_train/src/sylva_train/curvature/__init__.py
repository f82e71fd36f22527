"""Second-order statistics of a model's layers: the only importer of `hmatrix`."""

from .batches import (
    batches_of,
    default_loss,
    loss_scale,
    loss_units,
    note,
    some_samples,
)
from .collect import (
    Loss,
    collect_curvature,
    damage,
    describe_factor,
    not_reached,
)
from .factors import Factor, strips
from .layer import LayerCurvature, block_sums
from .planning import curvature_bytes
from .state import Store, settings

__all__ = [
    "Factor",
    "LayerCurvature",
    "Loss",
    "Store",
    "batches_of",
    "block_sums",
    "collect_curvature",
    "curvature_bytes",
    "damage",
    "default_loss",
    "describe_factor",
    "loss_scale",
    "loss_units",
    "not_reached",
    "note",
    "settings",
    "some_samples",
    "strips",
]
