"""Kernel matrices on sorted points: hmatrix beside SciPy dense, george and celerite2.

The matrix is ``k(|x − y|) + 0.01 I``, x uniform in [0, 1] and sorted, compressed to a
relative Frobenius error of 1e-10. Times are the fastest of a few runs in one process;
errors are those of a product and a solution against exact row sums, where a solution's
is the relative error of x for the right-hand side A·1. Peers are measured where they are
installed (``pip install george celerite2``). celerite2 is exact for the exponential
kernel at any size, and gives its log-determinant. Bytes are those of the matrix, and of
the factorization without it; peaks are what NumPy allocates on the way to either, as
``tracemalloc`` sees it in a run that is not timed; ``overwrite_peak`` is of matrix and
factor together, the one written over the other. Methods for matrices that are not
definite are measured on the Gaussian kernel too. Seconds over those of SciPy dense in the
same run stand beside the same ratios of HODLRlib, which was measured by hand.

``results/kernels_growth.json`` is of ``--kernels gaussian --libraries numpy --name
kernels_growth --sizes 4096 16384 65536 262144 1048576``.
"""

from __future__ import annotations

import functools
import resource
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import torch
from _common import parser, setting, write

import hmatrix as hm

NUGGET, RTOL, LEAF = 0.01, 1e-10, 32
#: The largest size of the dense reference.
DENSE = 4096
#: Seconds of HODLRlib, a C++ library, with the flags that it comes with, and of SciPy dense
#: on an EPYC, two threads: Gaussian kernel, n = 4096, tolerance 1e-10, leaves of 64.
ELSEWHERE = {
    "HODLRlib": {"construct": 0.0063, "factor": 0.0041, "solve": 0.00043},
    "SciPy dense": {"construct": 0.054, "factor": 0.354, "solve": 0.0178},
}


def exponential(xp: Any) -> Callable[..., Any]:
    return lambda x, y: xp.exp(-abs(x - y))


def gaussian(xp: Any) -> Callable[..., Any]:
    return lambda x, y: xp.exp((x - y) ** 2 * (-0.5 / 0.1**2))


def matern(xp: Any) -> Callable[..., Any]:
    def kernel(x: Any, y: Any) -> Any:
        d = abs(x - y) * 3**0.5
        return (1 + d) * xp.exp(-d)

    return kernel


KERNELS = {"exponential": exponential, "gaussian": gaussian, "matern32": matern}


def fastest(repeats: int, run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the least time of some runs, and what the last gave."""
    best, found = float("inf"), None
    for _ in range(repeats):
        found = None  # its memory, before the next
        start = time.perf_counter()
        found = run()
        best = min(best, time.perf_counter() - start)
    return float(f"{best:.4g}"), found


def ours(library: str, kernel: str, x: np.ndarray, repeats: int) -> dict[str, Any]:
    xp: Any = np if library == "numpy" else torch
    points = xp.asarray(x)
    function = KERNELS[kernel](xp)
    row: dict[str, Any] = {"who": f"hmatrix ({library})"}

    def construct() -> hm.HODLR:
        return hm.from_kernel(
            function, points, nugget=NUGGET, rtol=RTOL, leaf_size=LEAF
        )

    row["construct"], H = fastest(repeats, construct)
    ones = xp.ones_like(points)
    row["matvec"], b = fastest(3 * repeats, lambda: H @ ones)
    row["factor"], F = fastest(repeats, lambda: hm.factorize(H))
    row["solve"], found = fastest(3 * repeats, lambda: F.solve(b, refine=0))
    row["logdet_time"], row["logdet"] = fastest(1, F.logdet)
    row |= {"bytes": H.nbytes, "factor_bytes": F.nbytes}
    if library == "numpy" and len(x) <= 2**17:
        row["construct_peak"] = peak(construct)
        row["factor_peak"] = peak(lambda: hm.factorize(H))
        row["overwrite_peak"] = overwrite_peak(construct)
    row |= {"ranks": list(H.ranks), "error": H.error}
    rows = np.random.default_rng(1).integers(0, len(x), 64)
    exact = KERNELS[kernel](np)(x[rows, None], x).sum(axis=1) + NUGGET
    row["matvec_error"] = relative(np.asarray(b)[rows], exact)
    row["solve_error"] = relative(np.asarray(found), np.ones_like(x))
    return row


def peak(run: Callable[[], Any]) -> int:
    """Return the most bytes that NumPy holds during a run, beside those before."""
    tracemalloc.start()
    run()
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


def overwrite_peak(construct: Callable[[], hm.HODLR]) -> int:
    """Return the most bytes of a matrix and the factor that is written over it."""

    def run() -> None:
        H = construct()
        tracemalloc.reset_peak()
        hm.factorize(H, overwrite=True)

    return peak(run)


def other_methods(kernel: str, x: np.ndarray) -> list[dict[str, Any]]:
    """Factorizations for matrices that are not definite."""
    H = hm.from_kernel(KERNELS[kernel](np), x, nugget=NUGGET, rtol=RTOL, leaf_size=LEAF)
    ones, rows = np.ones_like(x), []
    b = H @ ones
    for method in ("inversion", "orthogonal"):
        row: dict[str, Any] = {"who": f'hmatrix (numpy), method="{method}"'}
        run = functools.partial(hm.factorize, H, method=method)
        row["factor"], F = fastest(2, run)
        row["solve"], found = fastest(3, functools.partial(F.solve, b, refine=0))
        row |= {"logdet": F.logdet(), "bytes": H.nbytes, "factor_bytes": F.nbytes}
        rows.append(row | {"solve_error": relative(found, ones)})
    return rows


def dense(kernel: str, x: np.ndarray) -> dict[str, Any]:
    def construct() -> np.ndarray:
        return KERNELS[kernel](np)(x[:, None], x) + NUGGET * np.eye(len(x))

    row: dict[str, Any] = {"who": "SciPy dense"}
    row["construct"], A = fastest(2, construct)
    row["matvec"], b = fastest(5, lambda: A @ np.ones(len(x)))
    row["factor"], c = fastest(2, lambda: scipy.linalg.cho_factor(A))
    row["solve"], found = fastest(5, lambda: scipy.linalg.cho_solve(c, b))
    row["logdet"] = 2 * float(np.log(np.diag(c[0])).sum())
    return row | {"bytes": A.nbytes, "solve_error": relative(found, np.ones(len(x)))}


def george(kernel: str, x: np.ndarray, repeats: int) -> dict[str, Any] | None:
    try:
        import george
        from george import kernels
    except ImportError:
        return None
    # blocks of exact rank 1 or 2 it stores at full rank: minutes, gigabytes
    if kernel != "gaussian" and len(x) > 2048:
        return None
    metric = {"exponential": 1.0, "gaussian": 0.1**2, "matern32": 1.0}[kernel]
    kind = {
        "exponential": kernels.ExpKernel,
        "gaussian": kernels.ExpSquaredKernel,
        "matern32": kernels.Matern32Kernel,
    }[kernel](metric)

    def construct() -> Any:
        gp = george.GP(kind, solver=george.HODLRSolver, tol=RTOL, min_size=100)
        gp.compute(x, np.sqrt(NUGGET))
        return gp

    row: dict[str, Any] = {"who": f"george {george.__version__}"}
    row["construct_and_factor"], gp = fastest(repeats, construct)
    b = np.ones_like(x)
    row["solve"], _ = fastest(repeats, lambda: gp.solver.apply_inverse(b))
    return row | {"logdet": float(gp.solver.log_determinant)}


def celerite(kernel: str, x: np.ndarray, repeats: int) -> dict[str, Any] | None:
    try:
        import celerite2
        from celerite2 import terms
    except ImportError:
        return None
    if kernel != "exponential":
        return None
    gp = celerite2.GaussianProcess(terms.RealTerm(a=1.0, c=1.0))
    row: dict[str, Any] = {"who": f"celerite2 {celerite2.__version__}"}
    row["construct_and_factor"], _ = fastest(
        repeats, lambda: gp.compute(x, diag=np.full_like(x, NUGGET))
    )
    row["solve"], _ = fastest(repeats, lambda: gp.apply_inverse(np.ones_like(x)))
    return row | {"logdet": -2 * float(gp._norm) - len(x) * float(np.log(2 * np.pi))}


def over_dense(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return seconds over those of SciPy dense in the same run, here and elsewhere."""
    here = {
        row["who"]: row
        for row in table
        if row["n"] == DENSE and row["kernel"] == "gaussian"
    }
    found = []
    for run in (here, ELSEWHERE):
        for who, row in run.items():
            if who.startswith(("hmatrix", "HODLRlib")):
                reference = run["SciPy dense"]
                ratios = {
                    name: float(f"{row[name] / reference[name]:.3g}")
                    for name in ("construct", "factor", "solve")
                    if name in row
                }
                found.append({"who": who, **ratios})
    return found


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    return float(f"{np.linalg.norm(found - exact) / np.linalg.norm(exact):.3g}")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sizes", type=int, nargs="+", default=[4096, 65536])
    options.add_argument("--kernels", nargs="+", default=list(KERNELS))
    options.add_argument("--libraries", nargs="+", default=["numpy", "torch"])
    options.add_argument("--name", default="kernels")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    repeats = min(chosen.repeats, 5)
    table = []
    for n in chosen.sizes:
        x = np.sort(np.random.default_rng(0).random(n))
        for kernel in chosen.kernels:
            few = repeats if n <= 2**17 else 2
            found = [ours(name, kernel, x, few) for name in chosen.libraries]
            if n <= DENSE:
                found.append(dense(kernel, x))
            if n <= 2**16 and kernel == "gaussian":
                found += other_methods(kernel, x)
            if n <= 2**16:
                found += [george(kernel, x, few), celerite(kernel, x, few)]
            for row in filter(None, found):
                table.append({"n": n, "kernel": kernel, **row})
                print(line(table[-1]), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results = {
        "setting": setting("cpu", ("hmatrix", "scipy")),
        "problem": {"nugget": NUGGET, "rtol": RTOL, "leaf_size": LEAF},
        "peak_bytes_of_the_process": peak,
        "table": table,
        f"seconds over those of SciPy dense, Gaussian, n = {DENSE}": over_dense(table),
    }
    print(write(chosen.name, results))


def line(row: dict[str, Any]) -> str:
    """One row for people: seconds, megabytes, errors."""
    times = " ".join(
        f"{name} {row[name]:.4f}"
        for name in ("construct", "construct_and_factor", "matvec", "factor", "solve")
        if name in row
    )
    size = f" {row['bytes'] / 1e6:.0f} MB" if "bytes" in row else ""
    return (
        f"{row['n']:8d} {row['kernel']:12s} {row['who']:18s} {times}{size}"
        f" logdet {row['logdet']:.6f}"
    )


if __name__ == "__main__":
    main()
