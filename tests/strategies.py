"""Hypothesis strategies of the mathematical objects that the tests are about."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

import hmatrix as hm

#: Sizes that find off-by-ones: 1, primes, powers of two and their neighbours.
SIZES = st.one_of(
    st.integers(1, 70), st.sampled_from([1, 2, 3, 31, 32, 33, 61, 64, 65, 97, 101])
)
SEEDS = st.integers(0, 2**32 - 1)
KINDS = ("gaussian", "walk", "decaying", "few", "repeated", "sparse", "zero")


@st.composite
def trees(draw, max_levels=5):
    """Draw ``(n, levels)`` of a valid cluster tree."""
    n = draw(SIZES)
    return n, draw(st.integers(0, min(max_levels, n.bit_length() - 1)))


def make_samples(kind, c, n, rng):
    """Return samples (c, n) of one kind."""
    X = rng.standard_normal((c, n))
    match kind:
        case "walk":  # smooth covariance: off-diagonal blocks of low rank
            return X.cumsum(axis=1) / np.sqrt(n)
        case "decaying":  # spectrum over ten orders of magnitude
            return X * np.logspace(0, -5, n)
        case "few":  # rank one or two
            return rng.standard_normal((c, 2)) @ rng.standard_normal((2, n))
        case "repeated":  # the same sample again and again
            return np.broadcast_to(X[:1], X.shape).copy()
        case "sparse":  # whole halves of a sample are zero
            return np.where(rng.random((c, n)) < 0.1, X, 0)
        case "zero":
            return np.zeros((c, n))
    return X


def mlr_matrix(n, levels, seed, rank=3):
    """Return an MLR matrix, the second moments of smooth samples."""
    stream = hm.StreamingMLR(n, levels, rank)
    stream.update(make_samples("walk", 30, n, np.random.default_rng(seed)))
    return stream.result()


@st.composite
def samples(draw, n, max_samples=40):
    """Draw a batch (c, n) of samples, c = 0 included."""
    c = draw(st.integers(0, max_samples))
    kind = draw(st.sampled_from(KINDS))
    return make_samples(kind, c, n, np.random.default_rng(draw(SEEDS)))


@st.composite
def batches(draw, n, max_batches=4):
    """Draw a list of batches of samples."""
    return draw(st.lists(samples(n), min_size=1, max_size=max_batches))


def moment(data):
    """Return the exact sum of zzᵀ over batches, in float64."""
    Z = np.concatenate(data).astype(np.float64)
    return Z.T @ Z


def fed(kind, data, levels, rank, **options):
    """Return an accumulator of a kind that has seen batches."""
    stream = kind(data[0].shape[1], levels, rank, like=data[0], **options)
    for Z in data:
        stream.update(Z)
    return stream


@st.composite
def square_matrices(draw, n):
    """Draw a matrix (n, n): symmetric or not, smooth, random, low rank or zero."""
    rng = np.random.default_rng(draw(SEEDS))
    kind = draw(st.sampled_from(["kernel", "gaussian", "low-rank", "zero", "triangle"]))
    t = np.sort(rng.random(n))
    if kind == "kernel":
        A = np.exp(-3 * abs(t[:, None] - t)) + 0.3 * np.eye(n)
    elif kind == "low-rank":
        A = rng.standard_normal((n, 2)) @ rng.standard_normal((2, n))
    elif kind == "zero":
        A = np.zeros((n, n))
    elif kind == "triangle":
        A = np.triu(rng.standard_normal((n, n)))
    else:
        A = rng.standard_normal((n, n))
    return A + A.T if draw(st.booleans()) else A


@st.composite
def invertible_matrices(draw, n):
    """Draw a matrix (n, n) whose diagonal blocks are all well conditioned.

    The symmetric part is at least 0.1 times the norm, so every diagonal block inherits
    the bound. (A block of a merely invertible matrix may be singular, and no recursive
    block inversion can do anything about that.)
    """
    A = draw(square_matrices(n))
    lowest = np.linalg.eigvalsh((A + A.T) / 2)[0]
    return A + (0.1 * np.linalg.norm(A, 2) + max(0.0, -lowest) + 0.01) * np.eye(n)


@st.composite
def cluster_trees(draw):
    """Draw a cluster tree: plain, or permuted with uneven leaves, some empty."""
    n, levels = draw(trees(max_levels=4))
    if draw(st.booleans()):
        return hm.ClusterTree(n, levels)
    rng = np.random.default_rng(draw(SEEDS))
    sizes = rng.multinomial(n, rng.dirichlet(np.ones(2**levels)))
    return hm.ClusterTree(n, levels, sizes, rng.permutation(n))


@st.composite
def hodlr_matrices(draw, tree=None, max_rank=4):
    """Draw a real or complex HODLR matrix, Hermitian or not."""
    tree = draw(cluster_trees()) if tree is None else tree
    A = draw(square_matrices(tree.n))
    if draw(st.booleans()):
        B = draw(square_matrices(tree.n))
        A = A + 1j * (B - B.T if np.array_equal(A, A.T) else B)
    return hm.from_dense(A, tree=tree, max_rank=max_rank)
