"""The command line: parsing and printing; the work is `sylva_train.workflow`'s."""

from .app import app, main

__all__ = ["app", "main"]
