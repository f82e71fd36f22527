"""Likelihood of a Gaussian process, and the inverse of a streamed covariance.

``python examples/hmatrix_covariance.py [--n 2000]``. Needs hmatrix only.
"""

from __future__ import annotations

import argparse

import numpy as np

import hmatrix as hm


def likelihood(n: int) -> None:
    """Compress a kernel matrix; its log-likelihood comes from one factorization."""
    t = np.linspace(0, 1, n)
    covariance = np.exp(-5 * abs(t[:, None] - t)) + 0.1 * np.eye(n)
    y = np.sin(20 * t)

    matrix = hm.from_dense(covariance, leaf_size=64, rtol=1e-10)
    factorization = hm.factorize(matrix)
    value = -0.5 * (
        y @ factorization.solve(y) + factorization.logdet() + n * np.log(2 * np.pi)
    )

    exact = -0.5 * (
        y @ np.linalg.solve(covariance, y)
        + np.linalg.slogdet(covariance)[1]
        + n * np.log(2 * np.pi)
    )
    print(matrix)
    print(f"bytes        {matrix.nbytes:>12,} of {covariance.nbytes:,}")
    print(f"likelihood   {value:12.6f}, dense {exact:.6f}")


def stream(n: int) -> None:
    """Gather second moments batch by batch, in both formats, and invert them.

    Fewer samples than dimensions, as for a wide layer: a truncated HODLR matrix is then
    in general indefinite, an MLR matrix never is.
    """
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(1 + np.arange(n))
    basis = np.linalg.qr(rng.standard_normal((n, n)))[0] * scale
    samples = rng.standard_normal((n // 4, n)) @ basis.T
    exact = samples.T @ samples / len(samples)
    shift = 1e-2 * np.trace(exact) / n
    reference = np.diag(np.linalg.inv(exact + shift * np.eye(n)))

    print(f"\n{'':15} negative entries   rank correlation")
    for kind in (hm.StreamingHODLR, hm.StreamingMLR):
        accumulator = kind(n, levels=4, rank=16)
        for batch in np.array_split(samples, 8):
            accumulator.update(batch)
        result = accumulator.result()
        diagonal = hm.factorize(result, shift=shift).inverse_diagonal()
        ranks = [np.argsort(np.argsort(d)) for d in (diagonal, reference)]
        correlation = np.corrcoef(*ranks)[0, 1]
        name = type(result).__name__
        print(f"{name:15} {np.count_nonzero(diagonal <= 0):16d} {correlation:18.2f}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--n", type=int, default=1024, help="rows of the matrices")
    n = options.parse_args().n
    likelihood(n)
    stream(n // 2)


if __name__ == "__main__":
    main()
