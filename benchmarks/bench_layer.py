"""Ways to take blocks of ``dyᵀ x`` on a CPU: what the cost model in kernels rests on.

For each shape: the product of the active rows and columns, a product for each block row,
a stack of products of a block each, and what `block_sddmm` chose, all relative to the
dense gradient that full fine-tuning computes: ``dy.T @ x`` in the operands' dtype, into
memory of its own. Processor time of one thread, or wall time of several: the ways take
turns, and the ratios are of their fastest runs, which other work on the machine disturbs
least.
"""

from __future__ import annotations

import itertools
import time

import torch
from _common import interleave, parser, setting, write

from sylva_train.kernels import reference


def ways(dy: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, b: int) -> list:
    """Return the ways as functions, by forcing the cost model's hand."""

    def forced(way: str):
        def run() -> torch.Tensor:
            kept, reference.find_way = reference.find_way, lambda *_: way
            try:
                return reference.block_sddmm(dy, x, indices, b)
            finally:
                reference.find_way = kept

        return run

    return [
        lambda: dy.T @ x,
        forced("rows"),
        forced("cartesian"),
        forced("stack"),
        lambda: reference.block_sddmm(dy, x, indices, b),
    ]


SHAPES = [(384, 384), (384, 1536), (1536, 384), (1024, 4096), (1000, 777)]
#: Tokens by dtype: few of them, and what a batch has.
TOKENS = {torch.float32: [8, 64, 512, 2048], torch.bfloat16: [64, 512]}


def main() -> None:
    options = parser(__doc__)
    options.set_defaults(threads=1)
    options = options.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    generator = torch.Generator().manual_seed(0)
    rows = []
    cases = [(dtype, n) for dtype, tokens in TOKENS.items() for n in tokens]
    for (dtype, tokens), (out, inputs), b, density in itertools.product(
        cases, SHAPES, [16, 64], [0.01, 0.05, 0.2, 0.5, 1.0]
    ):
        dy = torch.randn(tokens, out, generator=generator).to(dtype)
        x = torch.randn(tokens, inputs, generator=generator).to(dtype)
        columns = -(-inputs // b)
        blocks = -(-out // b) * columns
        flat = torch.randperm(blocks, generator=generator)[
            : max(1, int(density * blocks))
        ]
        flat = flat.sort().values
        indices = torch.stack([flat // columns, flat % columns], 1)
        times = interleave(options.repeats, *ways(dy, x, indices, b), clock=clock)
        dense, rows_, cartesian, stack, chosen = (t["min"] for t in times)
        active = len(indices[:, 0].unique()), len(indices[:, 1].unique())
        row = {
            "dtype": str(dtype).removeprefix("torch."),
            "tokens": tokens,
            "shape": [out, inputs],
            "block_size": b,
            "density": density,
            "active_rows_times_columns": active[0] * active[1] / blocks,
            "rows": rows_ / dense,
            "cartesian": cartesian / dense,
            "stack": stack / dense,
            "way": reference.find_way(dy, x, indices, b),
            "chosen": chosen / dense,
        }
        rows.append(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        )
        print(rows[-1])
    worst = [
        max(
            (r for r in rows if (r["dtype"], r["tokens"]) == case),
            key=lambda r: r["chosen"],
        )
        for case in dict.fromkeys((r["dtype"], r["tokens"]) for r in rows)
    ]
    print(write("layer", {"setting": setting(), "worst": worst, "rows": rows}))


if __name__ == "__main__":
    main()
