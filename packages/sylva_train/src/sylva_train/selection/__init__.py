"""Choosing blocks: by their scores, within a budget."""

from .choosing import blocks_of, check_selection, select, select_as
from .ranking import share_out, spread_out, top_blocks

__all__ = [
    "blocks_of",
    "check_selection",
    "select",
    "select_as",
    "share_out",
    "spread_out",
    "top_blocks",
]
