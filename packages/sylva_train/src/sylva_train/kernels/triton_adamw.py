"""One AdamW step of all layers' blocks in Triton, through tables of pointers.

Two launches however many layers there are: a small one counts steps and works out each
layer's numbers, one updates every block of every layer and writes it into its dense
weight. The tables are built once; a step uploads nothing but what changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
import triton

from .adamw import BlockState, adamw_
from .capture import Mirror
from .quantize import GROUP, encode
from .triton_programs import adamw_kernel, prepare_kernel, square_kernel

__all__ = ["INTERPRETED", "Tables", "self_check", "supports"]

INTERPRETED: bool = triton.knobs.runtime.interpret

#: Dtypes of dense weights, by their number in the table.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Elements of a program, and layers of one that prepares.
CHUNK, LAYERS = 1024, 256
#: Columns of the table of layers, 64-bit integers, and of the table of their numbers.
FIELDS, SCALARS = 16, 10


def address(tensor: torch.Tensor | None) -> int:
    """Return where a tensor is, or 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


class Tables:
    """What the kernels read about layers, and the launches.

    Parameters
    ----------
    layers : sequence of BlockState
        At least one, all on one device; kept alive as long as the tables.
    steps : torch.Tensor, shape (layers,), float32
        Steps taken by each layer; counted up.
    """

    def __init__(self, layers: Sequence[BlockState], steps: torch.Tensor) -> None:
        self.layers, self.steps = list(layers), steps
        device = steps.device
        rows: list[list[int]] = []
        owners: list[int] = []
        for number, layer in enumerate(self.layers):
            programs = triton.cdiv(layer.values.numel(), CHUNK)
            rows.append(
                [
                    layer.values.data_ptr(),
                    layer.exp_avg.data_ptr(),
                    layer.exp_avg_sq.data_ptr(),
                    layer.weight.data_ptr(),
                    address(layer.base),
                    layer.indices.data_ptr(),
                    len(owners),
                    layer.values.numel(),
                    layer.values.shape[-1],
                    *layer.weight.shape,
                    *layer.weight.stride(),
                    DTYPES.index(layer.weight.dtype),
                    address(layer.exp_avg_scale),
                    address(layer.exp_avg_sq_scale),
                ]
            )
            owners += [number] * programs
        sides = {layer.values.shape[-1] for layer in self.layers}
        # Known when compiled, a side makes divisions cheap.
        self.block = sides.pop() if len(sides) == 1 else 0
        self.to_base = self.layers[0].base is not None
        self.eight_bit = self.layers[0].exp_avg_scale is not None
        # Addresses of masters, moments and bases, and sizes: wide loads need them.
        self.aligned = not any(
            n % 16 for row in rows for n in (*row[:3], row[4], row[7])
        )
        self.lines = all(
            row[12] == 1 and not any(n % 16 for n in (row[3], row[8], row[10], row[11]))
            for row in rows
        )
        self.table = torch.tensor(rows, dtype=torch.int64, device=device)
        self.owners = torch.tensor(owners, dtype=torch.int32, device=device)
        groups = [layer.group for layer in self.layers]
        self.groups = torch.tensor(groups, dtype=torch.int32, device=device)
        self.scalars = torch.empty(
            (len(rows), SCALARS), dtype=torch.float32, device=device
        )
        self.gradients = Mirror((len(rows),), torch.int64, device)
        self.gradients_aligned = True

    def set_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Take the gradients of the next step: contiguous, float32, or None."""
        addresses = [address(g) for g in gradients]
        self.gradients.update(addresses)
        self.gradients_aligned = not any(a % 16 for a in addresses)

    @property
    def options(self) -> dict[str, int | bool]:
        """Return what both kernels over all blocks are compiled for."""
        aligned = self.aligned and self.gradients_aligned
        return {"CHUNK": CHUNK, "ALIGNED": aligned, "FIELDS": FIELDS}

    def square_norm(self) -> torch.Tensor:
        """Return the sum of the squares of all gradients, added up in a fixed order."""
        sums = self.steps.new_empty(len(self.owners))
        with torch.cuda.device_of(sums):
            square_kernel[(len(self.owners),)](
                self.table, self.owners, self.gradients.tensor, sums, **self.options
            )
        return sums.sum()

    def update(
        self, options: torch.Tensor, factor: torch.Tensor, found_inf: torch.Tensor
    ) -> None:
        """Take one step; see `adamw.adamw_` for the arguments."""
        count = len(self.layers)
        with torch.cuda.device_of(self.steps):
            prepare_kernel[(triton.cdiv(count, LAYERS),)](
                self.steps,
                self.groups,
                self.gradients.tensor,
                options,
                factor,
                found_inf,
                self.scalars,
                count,
                LAYERS=LAYERS,
                SCALARS=SCALARS,
            )
            adamw_kernel[(len(self.owners),)](
                self.table,
                self.owners,
                self.gradients.tensor,
                self.scalars,
                BLOCK=self.block,
                LINES=self.lines,
                TO_BASE=self.to_base,
                SCALARS=SCALARS,
                EIGHT_BIT=self.eight_bit,
                GROUP=GROUP,
                **self.options,
            )


def supports(dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernel writes weights of a dtype; blocks may have any size."""
    return dtype in DTYPES and block_size > 0


def self_check(device: torch.device, dtype: torch.dtype, block_size: int) -> float:
    """Return the largest error on small random problems, in units of what is allowed."""
    kinds = ((False, False), (False, True), (True, True))
    return max(check_kind(device, dtype, block_size, *kind) for kind in kinds)


def check_kind(
    device: torch.device,
    dtype: torch.dtype,
    block_size: int,
    eight_bit: bool,
    aligned: bool,
) -> float:
    """Take two steps beside the reference, or one with moments in 8 bits.

    Of two layers with ragged edges, one of them without a gradient at first and, unless
    they are to be aligned, transposed; decaying towards a base.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2 * block_size, block_size + (16 if aligned else 3))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def make_layer(transposed: bool) -> BlockState:
        weight = random(*shape).to(dtype)
        weight = weight.t().contiguous().t() if transposed else weight
        values, m, v, base = (random(2, block_size, block_size) for _ in range(4))
        indices = torch.tensor([[0, 0], [1, 1]], dtype=torch.int32, device=device)
        layer = BlockState(values, m, v.square(), indices, weight, base.to(dtype))
        return in_8_bits(layer) if eight_bit else layer

    layers = [make_layer(False), make_layer(not aligned)]
    copies = copy.deepcopy(layers)
    options = torch.tensor(
        [[0.01, 0.9, 0.999, 1e-4, 0.1, -1.0]], dtype=torch.float64, device=device
    )
    factor, fine = random().fill_(0.5), random().zero_()
    steps, counted = torch.zeros(2, device=device), torch.zeros(2, device=device)
    tables = Tables(layers, steps)
    for missing in (1,) if eight_bit else (1, None):
        gradients: list[torch.Tensor | None] = [
            None if i == missing else random(2, block_size, block_size)
            for i in range(2)
        ]
        tables.set_gradients(gradients)
        tables.update(options, factor, fine)
        adamw_(copies, counted, gradients, options, factor, fine)
    errors = [(steps - counted).abs().max()]
    for found, exact in zip(layers, copies, strict=True):
        names = ("values", "exp_avg", "exp_avg_sq")
        pairs = [(getattr(found, name), getattr(exact, name)) for name in names]
        for mine, other in pairs:
            apart = (mine.float() - other.float()).abs()
            if mine.dtype == torch.float32:
                errors.append((apart / (1e-5 + 1e-5 * other.abs())).max())
            else:
                # Roundings tell a number on a level apart, which is seldom.
                errors += [apart.max(), apart.mean() / 1e-2]
        # As the values, of which two roundings may tell one apart by its last bit.
        limit = 1e-5 + exact.weight.float().abs() * (1e-5 + torch.finfo(dtype).eps)
        errors.append(((found.weight - exact.weight).float().abs() / limit).max())
    return float(torch.stack(errors).max())


def in_8_bits(layer: BlockState) -> BlockState:
    """Return a layer's state with its moments in 8 bits."""
    count = triton.cdiv(layer.values.numel(), GROUP)
    scales = [layer.values.new_zeros(count) for _ in range(2)]
    m = torch.zeros_like(layer.exp_avg, dtype=torch.int8)
    v = torch.zeros_like(layer.exp_avg_sq, dtype=torch.uint8)
    encode(layer.exp_avg, m, scales[0], 0)
    encode(layer.exp_avg_sq, v, scales[1], 1)
    return replace(
        layer,
        exp_avg=m,
        exp_avg_sq=v,
        exp_avg_scale=scales[0],
        exp_avg_sq_scale=scales[1],
    )
