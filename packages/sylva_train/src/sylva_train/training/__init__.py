"""One training loop over parts that are passed in, resumable bit for bit."""

from .batches import number_of_steps
from .loop import TrainResult, train
from .setup import make_scheduler, pick_device

__all__ = ["TrainResult", "make_scheduler", "number_of_steps", "pick_device", "train"]
