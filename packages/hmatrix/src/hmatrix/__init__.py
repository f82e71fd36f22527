"""Hierarchical low-rank matrices on NumPy, PyTorch and CuPy arrays."""

from hmatrix._checks import (
    BackendError,
    DTypeError,
    EntryError,
    FileFormatError,
    HMatrixError,
    NonFiniteError,
    NotPositiveDefiniteError,
    OverwrittenError,
    PrecisionError,
    ShapeError,
    SingularBlockError,
    SingularLeafError,
    ToleranceError,
)
from hmatrix.arithmetic import (
    add,
    add_low_rank,
    matmul,
    norm,
    scale,
    shift,
    subtract,
    truncate,
)
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
from hmatrix.factor import Factorization, factorize, inverse
from hmatrix.hodlr import HODLR
from hmatrix.interop import aslinearoperator
from hmatrix.io import load, save
from hmatrix.lowrank import LowRank
from hmatrix.mlr import MLR
from hmatrix.plot import plot
from hmatrix.tree import ClusterTree
from hmatrix.update import StreamingHODLR, StreamingMLR, StreamingSketch

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
    "OverwrittenError",
    "PrecisionError",
    "ShapeError",
    "SingularBlockError",
    "SingularLeafError",
    "StreamingHODLR",
    "StreamingMLR",
    "StreamingSketch",
    "ToleranceError",
    "add",
    "add_low_rank",
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
    "inverse",
    "load",
    "matmul",
    "norm",
    "plot",
    "save",
    "scale",
    "shift",
    "subtract",
    "truncate",
]
