"""Kronecker factors: exact, PSD multilevel low rank, or HODLR."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import hmatrix as hm
from sylva_train._checks import ConfigError
from sylva_train.config import SylvaConfig

__all__ = [
    "DenseCovariance",
    "Factor",
    "accumulator",
    "add_product",
    "describe",
    "is_narrow",
    "revive",
    "strips",
]

#: Rows of a leaf below which a hierarchy is not worth its bookkeeping.
SMALLEST_LEAF = 8
#: Rows of a leaf above which there are more levels than asked for: of the output embedding
#: of a vocabulary of 128,000, four would leave leaves that are larger than its gradient.
LARGEST_LEAF = 2048
#: Numbers of a matrix that a factor is applied to at once: copies are of no more.
LARGEST_PART = 1 << 23
#: Side of the pictures of a factor.
PICTURE = 128


def is_narrow(*tensors: torch.Tensor) -> bool:
    """Whether they are of 16 bits, of one kind, on a GPU: `add_product` is for them."""
    dtype = tensors[0].dtype
    return all(x.is_cuda and x.dtype == dtype and x.itemsize < 4 for x in tensors)


def add_product(
    total: torch.Tensor, g: torch.Tensor, x: torch.Tensor, factor: float
) -> None:
    """Add ``factor · gᵀ x`` of 16 bits on a GPU to a matrix in float32.

    Their products are exact in float32, and have tensor cores, as those of float32 have
    not. By parts, so that no other matrix as large as this one is there.
    """
    out, inputs = total.shape
    for part in strips(out, inputs, multiple=128):
        product = torch.mm(g[:, part].T, x, out_dtype=torch.float32)
        total[part].add_(product, alpha=factor)


class DenseCovariance:
    """Exact ``Σ z zᵀ``, with the streaming interface of `hmatrix.StreamingSketch`."""

    def __init__(self, n: int, like: torch.Tensor) -> None:
        self.sum = like.new_zeros(n, n)
        self.count = 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers."""
        return self.sum.nbytes

    def update(self, Z: torch.Tensor, scale: float = 1.0) -> None:
        """Add the rows of ``Z`` (c, n), multiplied by ``scale``."""
        if is_narrow(Z) and self.sum.dtype == torch.float32:
            add_product(self.sum, Z, Z, scale**2)
        else:
            Z = Z.to(self.sum.dtype)
            self.sum.addmm_(Z.T, Z, alpha=scale**2)
        self.count += len(Z)

    def merge(self, other: DenseCovariance) -> None:
        """Add what another one holds."""
        self.sum += other.sum
        self.count += other.count

    def result(self) -> torch.Tensor:
        """Return the mean ``E[z zᵀ]``."""
        return self.sum / max(self.count, 1)

    def state(self) -> dict[str, Any]:
        """Return everything needed to go on."""
        return {"kind": type(self).__name__, "count": self.count, "sum": self.sum}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> DenseCovariance:
        """Rebuild from `state`."""
        total: torch.Tensor = state["sum"]
        self = cls(0, total)
        self.sum, self.count = total.clone(), float(state["count"])
        return self


@dataclass(frozen=True)
class Factor:
    """A Kronecker factor: positive semidefinite up to its format's approximation.

    Parameters
    ----------
    matrix : hmatrix.MLR, hmatrix.HODLR or torch.Tensor (n, n)
        As it was accumulated, in float32 but for a float64 model; results are
        computed in float64.
    """

    matrix: Any

    @property
    def nbytes(self) -> int:
        """Bytes of the stored numbers."""
        return int(self.matrix.nbytes)

    def double(self) -> Any:
        """Return the matrix in float64."""
        if isinstance(self.matrix, torch.Tensor):
            return self.matrix.double()
        return self.matrix.to(dtype="float64")

    def mean_eigenvalue(self) -> float:
        """Return trace / n."""
        mean: float = float(self.matrix.trace()) / self.matrix.shape[0]
        return mean

    def inverse_diagonal(self, shift: float) -> torch.Tensor:
        """Diagonal of ``(matrix + shift·I)⁻¹``, float64 (n,).

        Raises
        ------
        ConfigError
            If the shifted matrix is singular to working precision.
        """
        with invertible():
            if isinstance(self.matrix, torch.Tensor):
                factor = torch.linalg.cholesky(self.shifted(shift))
                return torch.cholesky_inverse(factor).diagonal().clone()
            diagonal: torch.Tensor = hm.factorize(
                self.double(), shift
            ).inverse_diagonal()
            return diagonal

    def quadratic_forms(self, X: torch.Tensor, shift: float) -> torch.Tensor:
        """Return ``diag Xᵀ (matrix + shift·I) X`` for ``X`` (n, q): float64 (q,)."""
        matrix, forms = self.double(), []
        for part in parts_of(X):
            columns = part.double()
            products = (matrix @ columns).mul_(columns).sum(0)
            forms.append(products + shift * columns.square().sum(0))
        return torch.cat(forms)

    def solve(
        self, X: torch.Tensor, shift: float, *, overwrite: bool = False
    ) -> torch.Tensor:
        """Return ``(matrix + shift·I)⁻¹ X`` of ``X`` (n, q), float64.

        ``overwrite``: in the memory of ``X``, which is float64.

        Raises
        ------
        ConfigError
            If the shifted matrix is singular to working precision.
        """
        apply: Callable[[torch.Tensor], torch.Tensor]
        with invertible():
            if isinstance(self.matrix, torch.Tensor):
                lower = torch.linalg.cholesky(self.shifted(shift))
                apply = lambda b: torch.cholesky_solve(b, lower)
            else:
                # Refinement would gain digits that the sums do not have.
                inverse = hm.factorize(self.double(), shift)
                apply = functools.partial(inverse.solve, refine=0)
            result = X if overwrite else X.to(torch.float64, copy=True)
            for part in parts_of(result):
                part.copy_(apply(part))
        return result

    def block_choleskys(self, size: int, shift: float) -> torch.Tensor:
        """Cholesky factors of the blocks on the diagonal, each with ``shift`` added.

        Parameters
        ----------
        size : int
            Side of a block. A last one that is cut off is filled up with the identity.
        shift : float
            Added to the diagonal.

        Returns
        -------
        torch.Tensor, shape (ceil(n / size), size, size), float64
            Lower triangular.

        Raises
        ------
        ConfigError
            If a shifted block is not positive definite.
        """
        n, matrix = self.matrix.shape[0], self.double()
        indices = torch.arange(n + -n % size).view(-1, size)
        inside = indices.lt(n)
        indices = indices.clamp(max=n - 1)
        rows, columns = indices[:, :, None], indices[:, None, :]
        if isinstance(matrix, torch.Tensor):
            blocks = matrix[rows, columns]
        else:
            blocks = matrix.entries(rows.numpy(), columns.numpy())
        inside = (inside[:, :, None] & inside[:, None, :]).to(blocks.device)
        identity = torch.eye(size, dtype=blocks.dtype, device=blocks.device)
        blocks = torch.where(inside, blocks + shift * identity, identity)
        with invertible():
            return torch.linalg.cholesky(blocks)  # type: ignore[no-any-return]

    def shifted(self, shift: float) -> torch.Tensor:
        """Return the exact matrix with ``shift`` added to its diagonal, float64."""
        matrix: torch.Tensor = self.double().clone()
        matrix.diagonal().add_(shift)
        return matrix


def strips(count: int, length: int, multiple: int = 1) -> list[slice]:
    """Divide so many rows of a length into parts as large as are worked on at once.

    Each but the last is of a ``multiple`` of rows.
    """
    step = multiple * max(1, LARGEST_PART // max(1, multiple * length))
    return [slice(i, min(i + step, count)) for i in range(0, count, step)]


def parts_of(X: torch.Tensor) -> list[torch.Tensor]:
    """Divide a matrix (n, q) by columns, into parts as large as are worked on at once."""
    return [X[:, part] for part in strips(X.shape[1], len(X))]


@contextlib.contextmanager
def invertible() -> Iterator[None]:
    """Turn the errors of matrices that are singular into advice."""
    try:
        yield
    except (torch.linalg.LinAlgError, hm.HMatrixError) as error:  # type: ignore[attr-defined]
        msg = f"a Kronecker factor cannot be inverted ({error}); raise `damping`."
        raise ConfigError(msg) from error


def accumulator(n: int, like: torch.Tensor, config: SylvaConfig) -> Any:
    """Make an empty covariance of the configured kind, on the device of ``like``.

    Below ``config.exact_below`` rows it is exact. A very large one has as many levels as
    leave its leaves no more than `LARGEST_LEAF` rows. It adds up in float32, or in float64
    where ``like`` is of it.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    like = torch.empty(0, device=like.device, dtype=dtype)
    if config.curvature == "dense" or n < config.exact_below:
        return DenseCovariance(n, like)
    most = max(0, (n // SMALLEST_LEAF).bit_length() - 1)
    least = (-(-n // LARGEST_LEAF) - 1).bit_length()
    levels = max(min(config.levels, most), least)
    # A linear sketch: in a fraction of the cascade's time, and the same from any number of
    # processes.
    kind = hm.StreamingSketch if config.curvature == "mlr" else hm.StreamingHODLR
    return kind(n, levels=levels, rank=config.rank, like=like)


def revive(state: Mapping[str, Any]) -> Any:
    """Make an accumulator of what its ``state()`` was."""
    kinds = (DenseCovariance, hm.StreamingSketch, hm.StreamingHODLR)
    kind: Any = {kind.__name__: kind for kind in kinds}[state["kind"]]
    return kind.from_state(state)


def describe(approximate: Factor, exact: Factor) -> dict[str, Any]:
    """Hold a hierarchical factor against the dense one, as JSON for the report.

    Returns
    -------
    dict
        ``kind``, ``n``, ``levels``, ``rank``; ``level_ranks`` and ``level_bytes`` (the
        leaves last); ``singular_values`` of each level's blocks together and of the
        leaves, ``spectrum_dense``, largest first; ``magnitude`` and ``approximation``,
        both matrices' entries reduced to at most 128 × 128 maxima; ``bytes``,
        ``dense_bytes``, and the relative Frobenius ``error``.
    """
    matrix, dense = approximate.double(), exact.double()
    restored = matrix if isinstance(matrix, torch.Tensor) else matrix.to_dense()
    entry: dict[str, Any] = {
        "kind": "exact",
        "n": len(dense),
        "levels": 0,
        "rank": 0,
        "level_ranks": [],
        "level_bytes": [exact.nbytes],
        "singular_values": [spectrum(dense[None])],
    }
    if isinstance(matrix, hm.MLR | hm.HODLR):
        # A level's blocks are F Fᵀ for an MLR matrix, U S Vᵀ for HODLR.
        if isinstance(matrix, hm.MLR):
            sizes = [F.nbytes // 2 for F in matrix.factors]
            values = [
                torch.linalg.svdvals(F).square().flatten() for F in matrix.factors
            ]
        else:
            parts = [(block.U, block.S, block.V) for block in matrix.upper]
            sizes = [sum(part.nbytes for part in level) // 2 for level in parts]
            values = [block.S.flatten() for block in matrix.upper]
        levels = matrix.tree.levels
        entry |= {
            "kind": type(matrix).__name__,
            "levels": levels,
            "rank": max(matrix.ranks, default=0),
            "level_ranks": list(matrix.ranks),
            "level_bytes": [*sizes, matrix.leaves.nbytes // 2],
            "singular_values": [
                *(v.sort(descending=True).values.tolist() for v in values),
                spectrum(matrix.leaves),
            ],
        }
    return entry | {
        "spectrum_dense": spectrum(dense[None]),
        "magnitude": picture(dense),
        "approximation": picture(restored),
        "bytes": approximate.nbytes,
        "dense_bytes": exact.nbytes,
        "error": float((restored - dense).norm() / dense.norm()),
    }


def spectrum(blocks: torch.Tensor) -> list[float]:
    """Absolute eigenvalues of symmetric blocks (k, m, m) together, largest first."""
    values = torch.linalg.eigvalsh(blocks).abs().flatten()
    largest_first: list[float] = values.sort(descending=True).values.tolist()
    return largest_first


def picture(matrix: torch.Tensor) -> list[list[float]]:
    """Reduce a matrix to the maxima of its magnitude over a coarser grid."""
    side = min(PICTURE, len(matrix))
    return F.adaptive_max_pool2d(matrix.abs()[None], side)[0].tolist()
