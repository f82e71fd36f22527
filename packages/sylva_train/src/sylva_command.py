"""The command `sylva`.

While this module is loaded, ``import sylva_train`` imports nothing else: the command line
shows help and errors of options at once, and its commands import what they need.
"""

from sylva_train.cli import main

__all__ = ["main"]
