"""Cost of hierarchical second moments beside the dense XᵀX, in one run.

Bars: streaming 4096 samples at n = 1024 costs at most 6 times the dense product, and at
n = 4096 the accumulator holds at most a fifth of the dense factor. Both sides are timed
in turn; the ratio is that of the fastest runs, which other work on the machine disturbs
least, and the medians are recorded beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _common import interleave, parser, setting, write

import hmatrix as hm

SAMPLES, FEW, RANK, DAMPING = 4096, 256, 32, 1e-2
#: (n, levels)
SHAPES = [(384, 3), (1024, 4), (4096, 6)]
TIME_BAR, MEMORY_BAR = 6.0, 0.2


def samples(n: int, device: str) -> torch.Tensor:
    """Draw samples with a power-law spectrum in a mixed basis, a hard case."""
    generator = torch.Generator().manual_seed(n)
    X = torch.randn(SAMPLES, n, generator=generator) / torch.arange(1, n + 1.0)
    for v in torch.nn.functional.normalize(torch.randn(8, n, generator=generator)):
        X -= 2 * torch.outer(X @ v, v)
    return X.to(device)


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def timed(action: Callable[[], Any], device: str) -> Callable[[], None]:
    """Return an action that ends when the device is done with it."""

    def run() -> None:
        action()
        wait(device)

    return run


def accuracy(stream: Any, X: torch.Tensor) -> dict[str, Any]:
    """Error of the mean after one batch, and the bytes that hold it."""
    n = X.shape[1]
    stream.update(X)
    exact = X.T @ X / len(X)
    norm = torch.linalg.norm(exact)
    error = float(torch.linalg.norm(stream.result().to_dense() - exact) / norm)
    return {
        "samples": len(X),
        "bytes": stream.nbytes,
        "of_dense": round(stream.nbytes / (4 * n * n), 4),
        "error": float(f"{error:.3g}"),
        "discarded": float(f"{stream.discarded / len(X) / float(norm):.3g}"),
    }


def streaming(n: int, levels: int, device: str, repeats: int) -> dict[str, Any]:
    """Time a large batch, and a small one for the incremental SVD."""
    X, few = samples(n, device), samples(n, device)[:FEW]
    mlr = hm.StreamingMLR(n, levels, RANK, like=X)
    hodlr = hm.StreamingHODLR(n, levels, RANK, like=X)
    sketch = hm.StreamingSketch(n, levels, RANK, like=X)
    found = {
        "mlr": accuracy(mlr, X),
        "sketch": accuracy(sketch, X),
        "hodlr": accuracy(hodlr, few),
    }

    dense, one, linear = interleave(
        repeats,
        timed(lambda: X.T @ X, device),
        timed(lambda: mlr.update(X), device),
        timed(lambda: sketch.update(X), device),
    )
    small, two = interleave(
        repeats,
        timed(lambda: few.T @ few, device),
        timed(lambda: hodlr.update(few), device),
    )
    found["mlr"] |= {"seconds": one, "dense_seconds": dense, **_ratio(one, dense)}
    found["sketch"] |= {
        "seconds": linear,
        "dense_seconds": dense,
        **_ratio(linear, dense),
    }
    found["hodlr"] |= {"seconds": two, "dense_seconds": small, **_ratio(two, small)}
    return {"n": n, "levels": levels, "rank": RANK, **found}


def inverting(n: int, levels: int, device: str, repeats: int) -> dict[str, Any]:
    """Time factorization and inverse diagonal beside the dense Cholesky's."""
    X = samples(n, device)
    stream = hm.StreamingMLR(n, levels, RANK, like=X)
    stream.update(X)
    H = stream.result()
    shift = DAMPING * H.trace() / n
    A = H.to_dense() + shift * torch.eye(n, device=device)

    def hierarchical() -> None:
        hm.factorize(H, shift).inverse_diagonal()
        wait(device)

    def dense() -> None:
        torch.cholesky_inverse(torch.linalg.cholesky(A)).diagonal()
        wait(device)

    base, fast = interleave(repeats, dense, hierarchical)
    exact = torch.linalg.inv(A.double()).diagonal()
    found = hm.factorize(H, shift).inverse_diagonal().double()
    return {
        "n": n,
        "levels": levels,
        "dense_seconds": base,
        "mlr_seconds": fast,
        **_ratio(fast, base),
        "largest_relative_error": float(
            f"{float((found / exact - 1).abs().max()):.3g}"
        ),
    }


def many_vectors(n: int, levels: int, device: str, repeats: int) -> dict[str, Any]:
    """Time products and solves with n vectors at a time beside dense ones."""
    X = samples(n, device)
    stream = hm.StreamingMLR(n, levels, RANK, like=X)
    stream.update(X)
    H, vectors = stream.result(), torch.randn(n, n, device=device)
    shift = DAMPING * H.trace() / n
    A, F = H.to_dense(), hm.factorize(H, shift)
    L = torch.linalg.cholesky(A + shift * torch.eye(n, device=device))

    base, fast = interleave(
        repeats, timed(lambda: A @ vectors, device), timed(lambda: H @ vectors, device)
    )
    solve, solved = interleave(
        repeats,
        timed(lambda: torch.cholesky_solve(vectors, L), device),
        timed(lambda: F.solve(vectors, refine=0), device),
    )
    return {
        "n": n,
        "levels": levels,
        "product": {"seconds": fast, "dense_seconds": base, **_ratio(fast, base)},
        "solve": {"seconds": solved, "dense_seconds": solve, **_ratio(solved, solve)},
    }


def _ratio(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {
        "times_dense": round(one["min"] / other["min"], 3),
        "times_dense_of_medians": round(one["median"] / other["median"], 3),
    }


def main() -> int:
    options = parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    run = (options.device, options.repeats)
    results: dict[str, Any] = {
        "setting": setting(options.device, ("hmatrix",)),
        "dtype": "float32",
        "bars": {"times_dense at n=1024": TIME_BAR, "of_dense at n=4096": MEMORY_BAR},
        "streaming": [],
        "inverse_diagonal": [],
        "many_vectors": [],
    }
    for n, levels in SHAPES:
        row = streaming(n, levels, *run)
        results["streaming"].append(row)
        print(
            f"n={n:5d}  MLR {row['mlr']['times_dense']:5.2f} x dense XᵀX, "
            f"{row['mlr']['of_dense']:.3f} of its bytes, error {row['mlr']['error']:.1e}; "
            f"sketch {row['sketch']['times_dense']:5.2f} x, "
            f"error {row['sketch']['error']:.1e}; "
            f"HODLR {row['hodlr']['times_dense']:5.2f} x, "
            f"error {row['hodlr']['error']:.1e}",
            flush=True,
        )
    for n, levels in SHAPES:
        row = inverting(n, levels, *run)
        results["inverse_diagonal"].append(row)
        print(
            f"n={n:5d}  inverse diagonal {row['times_dense']:5.2f} x dense", flush=True
        )
    for n, levels in SHAPES:
        row = many_vectors(n, levels, *run)
        results["many_vectors"].append(row)
        product, solve = (row[name]["times_dense"] for name in ("product", "solve"))
        print(
            f"n={n:5d}  {product:.2f} x dense product, {solve:.2f} x solve", flush=True
        )
    by_n = {row["n"]: row["mlr"] for row in results["streaming"]}
    kept = (
        by_n[1024]["times_dense"] <= TIME_BAR and by_n[4096]["of_dense"] <= MEMORY_BAR
    )
    print(write("hmatrix", results), "bars kept" if kept else "BARS MISSED")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
