"""Scoring in progress, kept in a folder: sums of the layers, and how far they are."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sylva_train._artifacts import flatten, read_tensors, unflatten, write_tensors
from sylva_train._checks import ConfigError, check_positive
from sylva_train._torch import on_device, sampled, tensor_bytes
from sylva_train.config import SylvaConfig
from sylva_train.options import SCORING, samples_to_score
from sylva_train.processes import is_first, rank_and_size
from sylva_train.targets import weight_device, weight_view

from .factors import revive
from .hooks import Collector
from .layer import Accumulators

__all__ = ["Store", "settings"]

FORMAT = "sylva-scoring/3"
#: Options that change the statistics, and the scores beside them.
OPTIONS = ("importance", "samples", "block_size", *SCORING)


def settings(
    model: nn.Module, targets: Mapping[str, nn.Module], config: SylvaConfig
) -> dict[str, Any]:
    """Return what must be the same where scoring goes on, as JSON."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(tensor_bytes(sampled(parameter)))
    shapes = {name: list(weight_view(m).shape) for name, m in targets.items()}
    found = {name: getattr(config, name) for name in OPTIONS}
    found |= {"samples": samples_to_score(config.samples)}
    found |= {"model": digest.hexdigest(), "layers": shapes}
    return found | {"processes": rank_and_size()[1]}


class Store:
    """The folder in which scoring keeps how far it has come.

    Parameters
    ----------
    folder : path
        It is made where it is not there.
    minutes : float
        Time between two savings.
    settings : mapping
        From `settings`.
    """

    def __init__(
        self, folder: Path, minutes: float, settings: Mapping[str, Any]
    ) -> None:
        check_positive("checkpoint_minutes", minutes, zero=True)
        self.folder = folder
        self.minutes = minutes
        self.settings = dict(settings)
        self.saved = time.monotonic()
        self.path = folder / f"sums-{rank_and_size()[0]}.safetensors"
        if is_first():
            # What processes left that were killed while they saved: gigabytes each.
            for leftover in folder.glob(".*.safetensors.*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def check(self, found: Mapping[str, Any]) -> None:
        """Raise `ConfigError` where a file there was made with other settings."""
        differ = [n for n, value in self.settings.items() if found.get(n) != value]
        if differ:
            said = "; ".join(
                f"`{name}` is {found.get(name)!r} there and {self.settings[name]!r} here"
                for name in differ
                if name not in {"model", "layers"}
            )
            names = " and ".join(name for name in differ if name in {"model", "layers"})
            other = f"it is of another model ({names} differ)" if names else ""
            msg = (
                f"`{self.folder}` has scoring to go on with, but not this one:"
                f" {'; '.join(part for part in (said, other) if part)}. Use the same"
                " options, or another folder."
            )
            raise ConfigError(msg)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self.saved >= 60 * self.minutes

    def save(self, collector: Collector, batches: int, data: str) -> None:
        """Write the sums of a pass over some batches, whose digest is ``data``."""
        state = {
            name: vars(sums)
            | {"A": sums.A and sums.A.state(), "G": sums.G and sums.G.state()}
            for name, sums in collector.sums.items()
        }
        tensors: dict[str, torch.Tensor] = {}
        header = {
            "format": FORMAT,
            "settings": self.settings,
            "names": list(collector.names),
            "owner": collector.owner,
            "sums": flatten(state, tensors, ""),
            "batches": batches,
            "data": data,
        }
        write_tensors(self.path, tensors, header)
        self.saved = time.monotonic()

    def clear(self) -> None:
        """Take the sums of a pass away, whose layers are scored."""
        self.path.unlink(missing_ok=True)

    def load(self, collector: Collector) -> tuple[int, str]:
        """Put back what `save` wrote of the same pass; return its batches and digest.

        Raises
        ------
        ConfigError
            If the folder is of scoring with other settings.
        AdapterError
            If the file is damaged.
        """
        if not self.path.exists():
            return 0, ""
        tensors, header = read_tensors(self.path, FORMAT, "scoring")
        self.check(header["settings"])
        if header["names"] != list(collector.names):
            return 0, ""
        collector.owner = header["owner"]
        # Copies: numbers in a file lie wherever its header ends, and products of memory that is
        # not aligned as PyTorch's own is may round differently.
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        for name, parts in unflatten(header["sums"], tensors).items():
            here = on_device(parts, weight_device(collector.targets[name]))
            sums = collector.sums[name] = Accumulators(**here)
            if sums.gradient is not None:
                sums.gradient = collector.placed(sums.gradient)
            sums.A, sums.G = (part and revive(part) for part in (sums.A, sums.G))
        return header["batches"], header["data"]
