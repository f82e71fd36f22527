"""Hierarchical low-rank matrices on NumPy, PyTorch and CuPy arrays."""

from hmatrix._checks import (
    BackendError,
    DTypeError,
    EntryError,
    FileFormatError,
    HMatrixError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularBlockError,
    SingularLeafError,
)
from hmatrix.arithmetic import add, add_low_rank, matmul, norm, scale, shift, truncate
from hmatrix.construct import from_dense
from hmatrix.factor import Factorization, factorize, inverse
from hmatrix.hodlr import HODLR
from hmatrix.interop import aslinearoperator
from hmatrix.io import load, save
from hmatrix.lowrank import LowRank
from hmatrix.mlr import MLR
from hmatrix.plot import plot
from hmatrix.tree import ClusterTree
from hmatrix.update import StreamingHODLR, StreamingMLR

__all__ = [
    "HODLR",
    "MLR",
    "BackendError",
    "ClusterTree",
    "DTypeError",
    "EntryError",
    "Factorization",
    "FileFormatError",
    "HMatrixError",
    "LowRank",
    "NonFiniteError",
    "NotPositiveDefiniteError",
    "ShapeError",
    "SingularBlockError",
    "SingularLeafError",
    "StreamingHODLR",
    "StreamingMLR",
    "add",
    "add_low_rank",
    "aslinearoperator",
    "factorize",
    "from_dense",
    "inverse",
    "load",
    "matmul",
    "norm",
    "plot",
    "save",
    "scale",
    "shift",
    "truncate",
]
