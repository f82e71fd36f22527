"""Dense oracles, array libraries and the one table of tolerances."""

from __future__ import annotations

import importlib
import tracemalloc
from dataclasses import dataclass

import numpy as np

import hmatrix as hm

#: Largest error ratio ``‖a − b‖ / ‖b‖`` of an operation in a dtype. "exact" is what
#: rounding alone may do, "solve" is multiplied by the condition number.
TOLERANCES = {
    ("float64", "exact"): 1e-13,
    ("float64", "stream"): 1e-12,
    ("float64", "solve"): 1e-14,
    ("float32", "exact"): 5e-6,
    ("float32", "stream"): 1e-4,
    ("float32", "solve"): 1e-5,
}


@dataclass(frozen=True)
class Library:
    """An array library on a device."""

    name: str
    device: str | None = None

    def asarray(self, x, dtype=None):
        """Copy a NumPy array there."""
        x = np.array(x, dtype=dtype or x.dtype)
        if self.name == "numpy":
            return x
        module = importlib.import_module(self.name)
        if self.name == "torch":
            return module.asarray(x, device=self.device or "cpu")
        return module.asarray(x)

    def __str__(self):
        return self.name + (f"-{self.device}" if self.device else "")


def to_numpy(x):
    """Copy an array of any library into a NumPy array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu().numpy()
    elif hasattr(x, "get"):
        x = x.get()
    elif not isinstance(x, np.ndarray):
        x = np.from_dlpack(x)
    return np.array(x)


def dense(H):
    """Return a hierarchical matrix as a NumPy array in double precision."""
    return double(H.to_dense())


def double(x):
    """Return an array of any library as one of NumPy in double precision."""
    x = to_numpy(x)
    return x.astype(np.result_type(x.dtype, np.float64))


def error_ratio(actual, expected):
    """Return ``‖actual − expected‖ / ‖expected‖`` in double precision."""
    a, b = double(actual), double(expected)
    assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    difference, norm = np.linalg.norm(a - b), np.linalg.norm(b)
    return difference / norm if norm else difference


def assert_close(actual, expected, tolerance, factor=1.0):
    """Check the error ratio against a (dtype, operation) entry of the table."""
    bound = factor * TOLERANCES[tolerance]
    ratio = error_ratio(actual, expected)
    assert ratio <= bound, f"error ratio {ratio:.2e} above {bound:.2e}"


def assert_in(x, like):
    """Check that an array is of the library, dtype and device of another."""
    assert type(x) is type(like)
    assert x.dtype == like.dtype
    assert getattr(x, "device", None) == getattr(like, "device", None)


def condition(A):
    """Return the 2-norm condition number of a dense matrix, at least 1."""
    return max(1.0, float(np.linalg.cond(A))) if A.size else 1.0


def definite_matrix(n, rng, *, is_complex=False, smallest=0.3):
    """Hermitian, eigenvalues from ``smallest``: kernel-like plus random."""
    t = np.sort(rng.random(n))
    B = rng.standard_normal((n, 3)) / np.sqrt(n)
    if is_complex:
        B = B + 1j * rng.standard_normal((n, 3)) / np.sqrt(n)
    A = np.exp(-3 * abs(t[:, None] - t)) + B @ B.conj().T
    A = (A + A.conj().T) / 2
    return A + (smallest - min(0.0, np.linalg.eigvalsh(A)[0])) * np.eye(n)


def traced(run):
    """Return what ``run()`` gives, and the most bytes that NumPy held meanwhile."""
    tracemalloc.start()
    try:
        return run(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def relative(H, A):
    """Return the relative error of a matrix in the Frobenius norm."""
    return error_ratio(H.to_dense(), A)


def padded_parts(H):
    """Yield what a matrix has in padded rows and columns."""
    tree = H.tree
    padded = tree.rows >= tree.n
    leaves = to_numpy(H.leaves)
    rows = padded.reshape(leaves.shape[:2])
    yield from (leaves[rows], leaves.transpose(0, 2, 1)[rows])
    if isinstance(H, hm.MLR):
        for F in map(to_numpy, H.factors):
            yield F.reshape(tree.padded, -1)[padded]
        return
    for level in range(tree.levels):
        halves = padded.reshape(tree.nodes(level), 2, -1)
        for side, block in enumerate(H.blocks(level)):
            yield to_numpy(block.U)[halves[:, side]]
            yield to_numpy(block.V)[halves[:, 1 - side]]


def assert_padding_is_zero(*matrices):
    """Check that padded rows and columns of matrices are zero, to the last bit."""
    for H in matrices:
        assert not any(part.any() for part in padded_parts(H))
