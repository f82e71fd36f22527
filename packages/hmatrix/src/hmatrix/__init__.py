"""Hierarchical low-rank matrices on NumPy, PyTorch and CuPy arrays."""

from hmatrix._checks import (
    BackendError,
    DTypeError,
    FileFormatError,
    HMatrixError,
    NonFiniteError,
    NotPositiveDefiniteError,
    ShapeError,
    SingularBlockError,
    SingularLeafError,
    ToleranceError,
)
from hmatrix.arithmetic import add, norm, scale, shift, subtract, truncate
from hmatrix.construct import (
    from_dense,
    from_diagonal,
    from_entries,
    from_kernel,
    from_low_rank,
    from_matvec,
    from_sparse,
    from_toeplitz,
    identity,
)
from hmatrix.factor import Factorization, factorize
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
    "ToleranceError",
    "add",
    "aslinearoperator",
    "factorize",
    "from_dense",
    "from_diagonal",
    "from_entries",
    "from_kernel",
    "from_low_rank",
    "from_matvec",
    "from_sparse",
    "from_toeplitz",
    "identity",
    "load",
    "norm",
    "plot",
    "save",
    "scale",
    "shift",
    "subtract",
    "truncate",
]
