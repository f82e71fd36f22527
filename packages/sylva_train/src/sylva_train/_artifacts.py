"""What scores and masks are: layers by name, in a file of tensors with a JSON header.

And nested state as such a header and such tensors.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ._checks import AdapterError, ConfigError
from ._files import atomic_write
from ._torch import note_tensors

__all__ = [
    "Layers",
    "as_read",
    "flatten",
    "read_tensors",
    "unflatten",
    "write_tensors",
]

Layer = TypeVar("Layer")


class Layers(Mapping[str, Layer]):
    """Something of each of a model's layers, by name, and what is worth knowing of it."""

    def __init__(
        self, layers: Mapping[str, Layer], metadata: Mapping[str, Any]
    ) -> None:
        self.layers = dict(layers)
        self.metadata = dict(metadata)

    def __getitem__(self, name: str) -> Layer:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def as_read(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return content as JSON gives it back: no tuples, and no keys but strings."""
    read: dict[str, Any] = json.loads(json.dumps(content))
    return read


def flatten(value: Any, tensors: dict[str, torch.Tensor], key: str) -> Any:
    """Return nested state as JSON, its tensors moved to ``tensors`` under their path.

    Dicts become lists of pairs, so that keys which are numbers stay numbers.
    """
    if isinstance(value, torch.Tensor):
        tensors[key] = value.detach().cpu().contiguous()
        return {"tensor": key}
    if isinstance(value, Mapping):
        pairs = [[k, flatten(v, tensors, f"{key}/{k}")] for k, v in value.items()]
        if all(isinstance(k, str | int) for k in value):
            return {"dict": pairs}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [flatten(v, tensors, f"{key}/{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    msg = (
        f"the state `{key.lstrip('/')}` is a {type(value).__name__}; a checkpoint holds"
        " tensors, numbers, text, and lists and dicts of them. Train without `output`,"
        " or with an optimizer and scheduler whose state is made of these."
    )
    raise ConfigError(msg)


def unflatten(tree: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Undo `flatten`."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {k: unflatten(v, tensors) for k, v in content}
    items = [unflatten(v, tensors) for v in content]
    return tuple(items) if kind == "tuple" else items


def checksum(tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> str:
    """Hash tensors, by name, and their header."""
    total = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    note_tensors(tensors, total)
    return total.hexdigest()


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    header: Mapping[str, Any],
) -> None:
    """Write tensors and a header with a ``format`` and a checksum, or nothing."""
    kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    plain = as_read(header)
    plain["sha256"] = checksum(kept, plain)
    with atomic_write(path) as temporary:
        save_file(kept, temporary, metadata={"sylva": json.dumps(plain)})


def read_tensors(
    path: str | os.PathLike[str], file_format: str, what: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote.

    Parameters
    ----------
    path : path
        The file.
    file_format : str
        The ``format`` that the header must have.
    what : str
        What the file is called in messages.

    Returns
    -------
    tensors : dict of str to torch.Tensor
    header : dict

    Raises
    ------
    AdapterError
        If the file is missing, damaged, was changed, or is not of this format.
    """
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("sylva", "{}"))
            names = file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, ValueError) as error:
        msg = f"the {what} file `{path}` is damaged ({error}); make it again."
        raise AdapterError(msg) from error
    except OSError as error:
        # safetensors' own errors do not name a folder.
        why = "it is a folder" if Path(path).is_dir() else error
        msg = f"the {what} file `{path}` cannot be read ({why})."
        raise AdapterError(msg) from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != file_format:
        other = f"; its format is {found}" if found else ""
        msg = f"`{path}` is not a {what} file of the format {file_format}{other}."
        raise AdapterError(msg)
    if header.pop("sha256", None) != checksum(tensors, header):
        msg = f"the {what} file `{path}` was changed; make it again."
        raise AdapterError(msg)
    return tensors, header
