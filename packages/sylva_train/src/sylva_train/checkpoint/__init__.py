"""Training checkpoints: all that a run needs to go on bit for bit, without pickle."""

from .files import (
    Checkpoint,
    CheckpointError,
    checkpoints,
    claimed,
    load_checkpoint,
    save_checkpoint,
    update_record,
)
from .state import capture, identify, restore, rng_state, set_rng_state

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "capture",
    "checkpoints",
    "claimed",
    "identify",
    "load_checkpoint",
    "restore",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
    "update_record",
]
