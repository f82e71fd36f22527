"""The adapter folder: what is in it, and how it is written, read and verified.

``adapter_config.json`` holds the options, the blocks and shape of each layer, and the
base model's identity; ``adapter_model.safetensors`` holds, for each layer,
``base_model.model.<layer>.sylva_values`` (k, b, b) float32 and ``.sylva_indices`` (k, 2)
int32, and the modules that were trained whole. That is PEFT's layout, and PEFT's own
functions write and read it as well. They add the embeddings of a base whose vocabulary was
resized, which are none of the adapter's own tensors.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sylva_train._checks import AdapterError, ConfigError
from sylva_train._files import atomic_folder
from sylva_train._torch import note_tensors, separate
from sylva_train.config import SylvaConfig, SylvaType
from sylva_train.masks import LayerMask, Masks
from sylva_train.options import KRONECKER
from sylva_train.targets import is_inside

__all__ = [
    "INDICES",
    "PREFIX",
    "VALUES",
    "Adapter",
    "checksum",
    "inspect_adapter",
    "own_tensors",
    "read_adapter",
    "state_blocks",
    "verify",
    "write_adapter",
]

#: What PEFT puts before a module's name in the base model.
PREFIX = "base_model.model."
VALUES, INDICES = "sylva_values", "sylva_indices"
#: Dtypes of values; float64 where the base's weights are.
FLOATS = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Adapter:
    """A verified adapter.

    Attributes
    ----------
    config : SylvaConfig
        As it was written.
    masks : Masks
        By the layer's name in the base model.
    values : dict of str to torch.Tensor
        (k, b, b) for each layer, float32, or float64 as its weight is.
    modules : dict of str to torch.Tensor
        Parameters and buffers of ``modules_to_save``, by name in the base model.
    embeddings : dict of str to torch.Tensor
        Frozen weights of the base, by name, whose vocabulary was resized.
    """

    config: SylvaConfig
    masks: Masks
    values: dict[str, torch.Tensor]
    modules: dict[str, torch.Tensor]
    embeddings: dict[str, torch.Tensor]


def checksum(tensors: Mapping[str, torch.Tensor], config: SylvaConfig) -> str:
    """Hash an adapter: its tensors, and the facts of the configuration to load them by.

    Parameters
    ----------
    tensors : mapping of str to torch.Tensor
        By name, with or without PEFT's prefix.
    config : SylvaConfig
        With the facts filled in.

    Returns
    -------
    str
        Hexadecimal SHA-256.
    """
    facts = (config.block_size, config.block_counts, config.layer_shapes)
    head = json.dumps([*facts, config.base_fingerprint], sort_keys=True)
    digest = hashlib.sha256(head.encode())
    note_tensors({k.removeprefix(PREFIX): t for k, t in tensors.items()}, digest)
    return digest.hexdigest()


def state_blocks(config: SylvaConfig, masks: Mapping[str, LayerMask]) -> None:
    """Write into a configuration which blocks its adapter has.

    Raises
    ------
    ConfigError
        If they have several sizes.
    """
    sizes = {mask.block_size for mask in masks.values()}
    if len(sizes) > 1:
        msg = f"`masks` of one adapter must have one block size; got {sorted(sizes)}."
        raise ConfigError(msg)
    config.masks, config.block_size = None, sizes.pop()
    config.block_counts = {name: len(mask) for name, mask in masks.items()}
    config.layer_shapes = {name: list(mask.shape) for name, mask in masks.items()}


def write_adapter(
    path: str | os.PathLike[str],
    config: SylvaConfig,
    tensors: Mapping[str, torch.Tensor],
    *,
    overwrite: bool = False,
) -> None:
    """Write an adapter folder whole or not at all.

    Raises
    ------
    OutputExistsError
        If there is something at ``path`` and not ``overwrite``.
    """
    config = copy.copy(config)
    config.inference_mode = True
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    separate(kept)
    with atomic_folder(path, overwrite=overwrite) as folder:
        save_file(kept, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(folder))


def read_config(path: Path) -> SylvaConfig:
    """Read and check ``adapter_config.json``."""
    file = path / CONFIG_NAME
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        kind = fields.get("peft_type")
        if kind != SylvaType.SYLVA:
            msg = f"`{path}` is an adapter of the kind {kind!r}, not of Sylva."
            raise AdapterError(msg)
        config: SylvaConfig = SylvaConfig.from_peft_type(**fields)  # type: ignore[no-untyped-call]
        counts, shapes = config.block_counts or {}, config.layer_shapes or {}
        if not (counts and config.checksum) or counts.keys() != shapes.keys():
            msg = f"`{file}` does not say which blocks the adapter has; it is damaged."
            raise AdapterError(msg)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        if isinstance(error, AdapterError):
            raise
        msg = f"`{path}` is not an adapter that can be read: {error}"
        raise AdapterError(msg) from error
    else:
        return config


def read_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read an adapter and verify all of it; no model is needed.

    Raises
    ------
    AdapterError
        If a file is missing, truncated or changed, or its parts do not fit each other.
    """
    path = Path(path)
    config = read_config(path)
    file = path / SAFETENSORS_WEIGHTS_NAME
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        msg = f"`{file}` is missing or damaged ({error}); get the adapter again."
        raise AdapterError(msg) from error
    return verify(tensors, config, str(path))


def own_tensors(
    tensors: Mapping[str, torch.Tensor], config: SylvaConfig
) -> dict[str, torch.Tensor]:
    """Return an adapter's own tensors by name in the base model.

    Left out are embeddings that PEFT adds, frozen ones and those of ``modules_to_save``
    a second and third time, as their wrappers name them.
    """
    plain = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    return {
        name: tensor
        for name, tensor in plain.items()
        if name.endswith((VALUES, INDICES))
        or (
            is_inside(name.rpartition(".")[0], config.modules_to_save)
            and not is_repeated(name)
        )
    }


def is_repeated(name: str) -> bool:
    """Whether PEFT's wrapper of a module that is trained whole gave a tensor this name."""
    return not {"original_module", "modules_to_save"}.isdisjoint(name.split("."))


def verify(
    tensors: Mapping[str, torch.Tensor], config: SylvaConfig, origin: str
) -> Adapter:
    """Sort an adapter's tensors, and check them against its configuration.

    Raises
    ------
    AdapterError
        If a tensor is missing, too many, of another shape, or changed.
    """
    rest = own_tensors(tensors, config)
    digest = checksum(rest, config)
    embeddings = {
        name: tensor
        for key, tensor in tensors.items()
        if (name := key.removeprefix(PREFIX)) not in rest and not is_repeated(name)
    }
    masks, values = {}, {}
    for name in config.block_counts or {}:
        value, table = (rest.pop(f"{name}.{k}", None) for k in (VALUES, INDICES))
        if value is None or table is None:
            msg = f"the adapter `{origin}` is damaged: it has no blocks for `{name}`."
            raise AdapterError(msg)
        masks[name] = checked_mask(name, value, table, config, origin)
        values[name] = value
    for name in rest | embeddings:
        if name.endswith((VALUES, INDICES)) or (
            name in embeddings and not name.endswith((".weight", ".bias"))
        ):
            msg = (
                f"the adapter `{origin}` has a tensor `{name}` that belongs to no layer"
                " of its configuration."
            )
            raise AdapterError(msg)
    if digest != config.checksum:
        msg = (
            f"the adapter `{origin}` was changed after it was written: its checksum is"
            f" {digest[:12]}…, not {str(config.checksum)[:12]}…. Get the adapter again."
        )
        raise AdapterError(msg)
    return Adapter(config, Masks(masks), values, rest, embeddings)


def checked_mask(
    name: str,
    values: torch.Tensor,
    table: torch.Tensor,
    config: SylvaConfig,
    origin: str,
) -> LayerMask:
    """Return the mask of a layer's indices, which fit its values and its shape.

    Raises
    ------
    AdapterError
        If they do not.
    """
    assert config.block_counts is not None
    assert config.layer_shapes is not None
    count, side = config.block_counts[name], config.block_size
    got = (tuple(values.shape), tuple(table.shape))
    if got != ((count, side, side), (count, 2)) or values.dtype not in FLOATS:
        msg = (
            f"the adapter `{origin}` is damaged: `{name}` should have {count} blocks"
            f" of {side} × {side} float values, but has values {got[0]}"
            f" {values.dtype} and indices {got[1]}."
        )
        raise AdapterError(msg)
    try:
        out, inputs = config.layer_shapes[name]
        mask = LayerMask((out, inputs), side, table)
        if torch.equal(mask.indices, table.cpu().long()):
            return mask
    except (ConfigError, ValueError, TypeError):
        pass
    msg = f"the adapter `{origin}` is damaged: the block indices of `{name}`."
    raise AdapterError(msg)


def inspect_adapter(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe an adapter without a model, having verified it.

    Parameters
    ----------
    path : path
        The adapter's folder.

    Returns
    -------
    dict
        ``base`` (``name``, ``fingerprint``), ``importance``, ``curvature``,
        ``block_size``, ``layers`` (for each: ``shape``, ``blocks``, ``trainable``,
        ``density``), their sums ``blocks``, ``trainable``, ``total`` and ``density``,
        ``modules_to_save`` (shape of each tensor), ``modules_trainable``, and ``bytes``
        on disk.

    Raises
    ------
    AdapterError
        If the adapter is damaged.
    """
    adapter = read_adapter(path)
    config, masks = adapter.config, adapter.masks
    layers = {
        name: {
            "shape": mask.shape,
            "blocks": len(mask),
            "trainable": mask.trainable,
            "density": mask.trainable / mask.total,
        }
        for name, mask in masks.items()
    }
    return {
        "base": {
            "name": config.to_dict()["base_model_name_or_path"],
            "fingerprint": config.base_fingerprint,
        },
        "importance": config.importance,
        "curvature": config.curvature if config.importance in KRONECKER else None,
        "block_size": config.block_size,
        "layers": layers,
        "blocks": masks.blocks,
        "trainable": masks.trainable,
        "total": masks.total,
        "density": masks.density,
        "modules_to_save": {k: tuple(t.shape) for k, t in adapter.modules.items()},
        "modules_trainable": sum(t.numel() for t in adapter.modules.values()),
        # Not of its subfolders: other adapters of a PeftModel, checkpoints of Trainer.
        "bytes": sum(f.stat().st_size for f in Path(path).iterdir() if f.is_file()),
    }
