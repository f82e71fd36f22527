"""Which blocks are best: of a layer, of all together, in few columns or spread out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch

from sylva_train._checks import ConfigError

__all__ = [
    "best_of_all",
    "caps",
    "concentrate",
    "share_out",
    "spread_out",
    "top_blocks",
]


def top_blocks(
    blocks: torch.Tensor, count: int, preferred: torch.Tensor | None = None
) -> torch.Tensor:
    """Flat indices of the ``count`` largest entries; ties go to the smaller index.

    Entries that are not ``preferred`` (bool, the shape of ``blocks``) come after all
    that are.
    """
    order = blocks.flatten().sort(descending=True, stable=True).indices
    if preferred is not None:
        first = preferred.flatten()[order].long()
        order = order[first.sort(descending=True, stable=True).indices]
    return order[:count]


def best_columns(
    blocks: list[torch.Tensor], density: float, max_columns: float
) -> torch.Tensor:
    """Choose the block columns that layers with one input may have blocks in.

    A column is worth the most that it can give: the sum of its ``m`` best blocks, where
    ``m`` is the number of blocks to a column if the budget is spread evenly; over several
    layers the sum of that relative to the layer's mean block. For scores of rank one no
    other columns would allow a higher total.

    Parameters
    ----------
    blocks : list of torch.Tensor, shapes (rows, columns)
        The layers' block scores, with as many columns each.
    density, max_columns : float
        As in `select`.

    Returns
    -------
    torch.Tensor, shape (columns,), bool
    """
    columns = blocks[0].shape[1]
    count = max(
        math.floor(max_columns * columns + 1e-9), math.ceil(density * columns - 1e-9)
    )
    worth = torch.zeros(columns, dtype=torch.float64)
    for block in blocks:
        best = min(len(block), math.ceil(density * block.numel() / count))
        mean = block.mean()
        worth += block.topk(best, 0).values.sum(0) / (mean if mean > 0 else 1)
    chosen = torch.zeros(columns, dtype=torch.bool)
    chosen[top_blocks(worth, count)] = True
    return chosen


def concentrate(
    blocks: Mapping[str, torch.Tensor],
    density: float,
    max_columns: float,
    together: Iterable[Iterable[str]],
) -> dict[str, torch.Tensor]:
    """Rule blocks outside the best columns out: their scores become minus infinity."""
    kept = dict(blocks)
    groups = [[n for n in names if n in blocks] for names in together]
    single = blocks.keys() - {name for names in groups for name in names}
    for names in [*filter(None, groups), *([name] for name in sorted(single))]:
        if len({blocks[name].shape[1] for name in names}) > 1:
            msg = (
                "`together` must name layers with inputs of one size; got"
                f" {', '.join(f'`{n}`: {blocks[n].shape[1]} blocks' for n in names)}."
            )
            raise ConfigError(msg)
        chosen = best_columns([blocks[n] for n in names], density, max_columns)
        for name in names:
            kept[name] = blocks[name].masked_fill(~chosen, -math.inf)
    return kept


def caps(shape: torch.Size, share: float) -> tuple[int, ...]:
    """Return how many blocks a row and a column may have: a share of its own, at least 1."""
    return tuple(max(math.ceil(share * n - 1e-9), 1) for n in reversed(shape))


def spread_out(blocks: torch.Tensor, row_cap: int, column_cap: int) -> torch.Tensor:
    """Mark blocks that share their rows and columns with few better ones.

    Taken one by one from the best down, a block is marked if fewer than ``row_cap`` of
    its row and ``column_cap`` of its column are.

    Parameters
    ----------
    blocks : torch.Tensor, shape (rows, columns)
        Their scores; ties go to the smaller index.
    row_cap, column_cap : int
        At least 1.

    Returns
    -------
    torch.Tensor, shape (rows, columns), bool
    """
    size = blocks.numel()
    place = torch.empty(size, dtype=torch.int64)
    place[top_blocks(blocks, size)] = torch.arange(size)
    place = place.view(blocks.shape)
    # The best first. Sorted once: what follows only counts those that are left.
    by_row, by_column = place.argsort(1), place.T.contiguous().argsort(1)
    marked = torch.zeros(blocks.shape, dtype=torch.bool)
    possible = torch.ones_like(marked)
    # All at once that are sure: those with room enough for every better one that is still
    # possible in their row and column. The best of these always is, so this comes to an
    # end, with what the greedy choice takes.
    while bool(possible.any()):
        in_row, in_column = counted(possible, by_row), counted(possible.T, by_column).T
        room = row_cap - marked.sum(1, keepdim=True), column_cap - marked.sum(0)
        marked |= possible & (in_row <= room[0]) & (in_column <= room[1])
        full = (marked.sum(1, keepdim=True) >= row_cap) | (marked.sum(0) >= column_cap)
        possible &= ~(marked | full)
    return marked


def counted(which: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Count the marked ones (bool) up to each place of a row, in the row's ``order``."""
    counts = which.gather(1, order).cumsum(1, dtype=torch.int32)
    return torch.empty_like(counts).scatter_(1, order, counts)


def share_out(
    means: torch.Tensor, sizes: torch.Tensor, budget: int, exponent: float
) -> torch.Tensor:
    """Share a budget of blocks out among layers by what their blocks score on average.

    A layer's density is proportional to its mean score to the power of ``exponent``. A
    layer that this would give more blocks than it has room for is filled, and the others
    share what is left.

    Parameters
    ----------
    means : torch.Tensor, shape (layers,), float64
        Mean score of a layer's blocks; below zero counts as zero.
    sizes : torch.Tensor, shape (layers,), int64
        How many blocks each has room for.
    budget : int
        At most the sum of ``sizes``.
    exponent : float
        At least 0.

    Returns
    -------
    torch.Tensor, shape (layers,), int64
        Adds up to ``budget``.
    """
    means = means.clamp(min=0)
    best = means.max()
    relative = means / best if best > 0 else torch.ones_like(means)
    weights = sizes * relative**exponent
    full = torch.zeros(len(sizes), dtype=torch.bool)
    while True:
        weights = weights.masked_fill(full, 0)
        if not bool(weights.any()):  # only layers without a score are left, or none
            weights = sizes.double().masked_fill(full, 0)
        left = budget - int(sizes[full].sum())
        shares = torch.where(
            full, sizes, left * weights / weights.sum().clamp(min=1e-300)
        )
        over = ~full & (shares > sizes)
        if not bool(over.any()):
            break
        full |= over
    counts = (shares + 1e-9).floor().long()
    rest = (shares - counts).sort(descending=True, stable=True).indices
    counts[rest[: budget - int(counts.sum())]] += 1
    return counts


def best_of_all(
    blocks: Mapping[str, torch.Tensor],
    density: float,
    preferred: Mapping[str, torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """Return the flat indices of the best blocks of all layers together, by layer."""
    scores = torch.cat([torch.zeros(0), *(b.flatten() for b in blocks.values())])
    marks = [mark.flatten() for mark in preferred.values() if mark is not None]
    count = math.floor(density * len(scores) + 1e-9)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[top_blocks(scores, count, torch.cat(marks) if marks else None)] = True
    parts = kept.split([block.numel() for block in blocks.values()])
    return {n: part.nonzero()[:, 0] for n, part in zip(blocks, parts, strict=True)}
