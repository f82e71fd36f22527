"""One training loop over parts that are passed in, resumable bit for bit."""

from .loop import TrainResult, number_of_steps, train
from .setup import make_scheduler, pick_device

__all__ = ["TrainResult", "make_scheduler", "number_of_steps", "pick_device", "train"]
