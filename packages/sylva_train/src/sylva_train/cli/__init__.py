"""The command line: parsing and printing; the work is `sylva_train.workflow`'s."""

from . import jobs  # noqa: F401, I001 (help lists commands in the order of the imports)
from . import experiments  # noqa: F401
from .frame import app, main

__all__ = ["app", "main"]
