"""Covariance of ten million samples of 128 numbers: time, memory and error of a stream.

The samples are those of ``docs/how-to/streaming-covariance.md``. The dense sum is made
beside it, for the error and for a time to compare with. Times are the process's own, so that
other work on the machine does not count.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator

import numpy as np
from _common import parser, setting, write

import hmatrix as hm


def batches(n: int, batch: int, count: int) -> Iterator[np.ndarray]:
    """Smooth random curves with white noise."""
    rng = np.random.default_rng(0)
    t = np.linspace(0, 1, n)
    waves = np.sin(np.pi * np.outer(np.arange(1, 41), t)) / np.arange(1, 41)[:, None]
    for _ in range(count):
        smooth = rng.standard_normal((batch, 40)) @ waves
        yield smooth + 0.1 * rng.standard_normal((batch, n))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=10_000_000)
    options.add_argument("--n", type=int, default=128)
    options.add_argument("--levels", type=int, default=3)
    options.add_argument("--rank", type=int, default=24)
    options.add_argument("--batch", type=int, default=5000)
    options = options.parse_args()
    n, batch = options.n, options.batch
    stream = hm.StreamingMLR(n, options.levels, options.rank)
    dense, seconds = np.zeros((n, n)), {"update": 0.0, "dense": 0.0}
    after = {}
    for number, Z in enumerate(batches(n, batch, options.samples // batch)):
        start = time.process_time()
        stream.update(Z)
        middle = time.process_time()
        dense += Z.T @ Z
        seconds["update"] += middle - start
        seconds["dense"] += time.process_time() - middle
        if number in (0, options.samples // batch - 1):
            # in kilobytes, of the whole process
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            after[f"{stream.count:.0f}"] = {
                "peak_kB": peak,
                "stream_bytes": stream.nbytes,
            }
    D = stream.result(normalize=False).to_dense()
    norm = float(np.linalg.norm(dense))
    figures = {
        "setting": setting(),
        "n": n,
        "levels": options.levels,
        "rank": options.rank,
        "batch": batch,
        "samples": int(stream.count),
        "cpu_seconds": {name: float(f"{s:.4g}") for name, s in seconds.items()},
        "memory_after": after,
        "dense_bytes": dense.nbytes,
        "relative_error": float(np.linalg.norm(D - dense)) / norm,
        "relative_bound": stream.discarded / norm,
        "diagonal_error": float(np.max(abs(np.diag(D) / np.diag(dense) - 1))),
        "smallest_eigenvalue": float(np.linalg.eigvalsh(D)[0]) / norm,
    }
    print(write("stream", figures))


if __name__ == "__main__":
    main()
