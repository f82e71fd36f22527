"""What a file or folder of Sylva's is, and what is in it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from sylva_train._checks import AdapterError, ConfigError, check_density, check_integer
from sylva_train.importance import Scores
from sylva_train.masks import Masks
from sylva_train.overlaps import usual_block_size

__all__ = [
    "describe_masks",
    "describe_scores",
    "kind_of",
    "load_choice",
    "mask_entries",
    "score_entries",
]

#: The file that tells what a folder is, in the order in which they are looked for.
FOLDERS = {
    "sylva.json": "run",
    "table.csv": "table",  # of `sylva reproduce`, whose results.json is of another form
    "results.json": "comparison",
    "adapter_config.json": "adapter",
}
#: The beginning of a file's format.
FILES = {"sylva-masks": "masks", "sylva-scores": "scores"}
#: Blocks of a layer of which a picture is drawn: of many more it would take gigabytes.
MOST_DRAWN = 1 << 20


def kind_of(path: str | os.PathLike[str]) -> str:
    """Tell what is at a path.

    Returns
    -------
    str
        ``"run"``, ``"table"``, ``"comparison"`` or ``"adapter"`` for a folder,
        ``"comparison"``, ``"masks"`` or ``"scores"`` for a file.

    Raises
    ------
    ConfigError
        If it is none of them, or nothing is there.
    AdapterError
        If a safetensors file is damaged.
    """
    path = Path(path)
    if not path.exists():
        msg = f"there is nothing at `{path}`."
        raise ConfigError(msg)
    kind = None
    if path.is_dir():
        kind = next((k for name, k in FOLDERS.items() if (path / name).is_file()), None)
    elif path.suffix == ".json":
        kind = "comparison"
    else:
        try:
            kind = FILES.get(format_of(path).partition("/")[0])
        except AdapterError:
            # Scores and masks are found under any name; others may be of any kind.
            if path.suffix == ".safetensors":
                raise
    if kind is None:
        msg = (
            f"`{path}` is none of these: the folder of a fine-tuning, of a comparison, of"
            " a table or of an adapter, a file of masks or scores, or a results.json."
        )
        raise ConfigError(msg)
    return kind


def format_of(path: Path) -> str:
    """Return the format that a safetensors file states, or nothing."""
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("sylva", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        msg = f"`{path}` is damaged or is not a safetensors file ({error})."
        raise AdapterError(msg) from error
    found = header.get("format") if isinstance(header, dict) else None
    return found if isinstance(found, str) else ""


def load_choice(path: str | os.PathLike[str]) -> Scores | Masks:
    """Read scores or masks, of a fine-tuning those that it trained.

    Raises
    ------
    ConfigError
        If there is something else, or nothing.
    AdapterError
        If the file is damaged or was changed.
    """
    kind = kind_of(path)
    if kind == "scores":
        return Scores.load(path)
    if kind == "masks":
        return Masks.load(path)
    if kind == "run" and (Path(path) / "masks.safetensors").is_file():
        return Masks.load(Path(path) / "masks.safetensors")
    msg = (
        f"`{path}` has neither scores nor masks to compare: give a file of them, or the"
        " folder of a fine-tuning that has chosen its blocks."
    )
    raise ConfigError(msg)


def describe_masks(masks: Masks) -> dict[str, Any]:
    """Return what masks hold, as JSON.

    Returns
    -------
    dict
        ``metadata``; for each of ``layers`` its ``shape``, ``block_size``, ``blocks``,
        ``trainable`` weights and ``density``; and their sums.
    """
    layers = {
        name: {
            "shape": list(mask.shape),
            "block_size": mask.block_size,
            "blocks": len(mask),
            "trainable": mask.trainable,
            "density": mask.trainable / mask.total,
        }
        for name, mask in masks.items()
    }
    return {
        "metadata": masks.metadata,
        "layers": layers,
        "blocks": masks.blocks,
        "trainable": masks.trainable,
        "density": masks.density,
    }


def describe_scores(
    scores: Scores, density: float = 0.05, block_size: int | None = None
) -> dict[str, Any]:
    """Return how the importance of each layer is spread over its blocks, as JSON.

    Parameters
    ----------
    scores : Scores
        From `sylva_train.score`.
    density : float
        Fraction of the blocks whose share of the scores is told, rounded down to whole
        blocks, as `sylva_train.select` does.
    block_size : int, optional
        Side of a block; by default 32, or what the scores can be summed over.

    Returns
    -------
    dict
        ``metadata``, ``density``, ``block_size``; for each of ``layers`` its ``shape``,
        number of ``blocks``, how many of them are in the ``top``, ``top_share``, the part of
        the layer's score that these have, and ``effective``, the exponential of the
        entropy of the scores over the number of blocks: 1 if all are alike, the less the
        more a few stand out.

    Raises
    ------
    ConfigError
        If an option cannot be used, or the scores cannot be summed over such blocks.
    """
    check_density(density)
    if block_size is None:
        block_size = usual_block_size(scores.values())
    check_integer("block_size", block_size, 1)
    layers = {}
    for name, layer in scores.items():
        # Truncated HODLR factors make scores that are below zero.
        flat = layer.blocks(block_size).flatten().clamp(min=0).sort(descending=True)[0]
        total = float(flat.sum())
        share = flat / total if total > 0 else torch.full_like(flat, 1 / len(flat))
        top = math.floor(density * len(flat) + 1e-9)
        entropy = float(torch.special.entr(share).sum())
        layers[name] = {
            "shape": list(layer.shape),
            "blocks": len(flat),
            "top": top,
            "top_share": float(share[:top].sum()),
            "effective": math.exp(entropy) / len(flat),
        }
    return {
        "metadata": scores.metadata,
        "density": density,
        "block_size": block_size,
        "layers": layers,
    }


def mask_entries(masks: Masks) -> dict[str, Any]:
    """Return masks as JSON for the report."""
    return {
        name: {
            "shape": list(mask.shape),
            "block_size": mask.block_size,
            "indices": mask.indices.tolist(),
        }
        for name, mask in masks.items()
    }


def score_entries(scores: Scores, masks: Masks) -> dict[str, Any]:
    """Return quantiles of the block scores and the selection threshold as JSON.

    The scores of all blocks, ``grid``, are of one layer alone, which the report draws: all
    layers' are millions of numbers.
    """
    names = list(masks)
    chosen = [name for name in names if len(masks[name])] or names
    # The middle one's factor is what a comparison describes.
    middle = names[len(names) // 2]
    drawn = middle if middle in chosen else chosen[len(chosen) // 2]
    entries: dict[str, Any] = {}
    for name, mask in masks.items():
        blocks = scores[name].blocks(mask.block_size)
        best = blocks[mask.indices[:, 0], mask.indices[:, 1]]
        # torch's own takes 2²⁴ numbers at most.
        quantiles = np.quantile(blocks.numpy(), np.linspace(0, 1, 101))
        entries[name] = {
            "block_scores_quantiles": quantiles.tolist(),
            "threshold": float(best.min()) if len(best) else None,
        }
        if name == drawn and blocks.numel() <= MOST_DRAWN:
            entries[name]["grid"] = blocks.tolist()
    return entries
