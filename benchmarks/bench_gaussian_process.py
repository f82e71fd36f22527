"""Regression with a Gaussian process on a million points of a line, step by step.

The steps of ``docs/how-to/gaussian-process.md``, once each, on NumPy arrays. Times
depend on the threads that NumPy's BLAS is given (``OMP_NUM_THREADS``).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from _common import setting, write

import hmatrix as hm

LENGTH, NOISE, NEW = 0.05, 0.1, 100


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rational quadratic kernel: a mixture of length scales, not a Markov process."""
    return 1 / (1 + ((x - y) / LENGTH) ** 2 / 2)


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--n", type=int, default=10**6)
    n = options.parse_args().n
    rng = np.random.default_rng(0)
    t = np.sort(rng.random(n))
    new = np.linspace(0, 1, NEW)
    steps: list[dict[str, Any]] = []

    def timed(what: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        found = action()
        seconds = time.perf_counter() - start
        row = {"step": what, "seconds": round(seconds, 2), "peak_GB": peak()}
        steps.append(row)
        print(row, flush=True)
        return found

    H = timed("from_kernel", lambda: hm.from_kernel(kernel, t, rtol=1e-8))
    F = timed("factorize", lambda: hm.factorize(H, shift=NOISE**2))
    y = timed("sample", lambda: F.sample(rng.standard_normal(n)))
    weights = timed("solve", lambda: F.solve(y))
    value = timed(
        "logdet",
        lambda: -(y @ weights + F.logdet() + n * np.log(2 * np.pi)) / 2,
    )
    timed("inverse_diagonal", F.inverse_diagonal)
    timed(
        f"mean at {NEW} new points",
        lambda: np.concatenate([kernel(x[:, None], t) @ weights for x in new[:, None]]),
    )
    results = {
        "setting": setting(packages=("hmatrix",)),
        "n": n,
        "rtol": 1e-8,
        "ranks": f"{min(H.ranks)} to {max(H.ranks)}",
        "matrix_GB": round(H.nbytes / 1e9, 2),
        "log_likelihood": float(value),
        "relative_residual": float(
            f"{np.linalg.norm(H @ weights + NOISE**2 * weights - y) / np.linalg.norm(y):.2g}"
        ),
        "steps": steps,
    }
    print(write("gaussian_process", results))
    return 0


def peak() -> float:
    """Return the most memory that the process has had so far, in GB."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


if __name__ == "__main__":
    sys.exit(main())
