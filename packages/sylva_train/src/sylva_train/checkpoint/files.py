"""Nested state as two files in a folder, written whole or not at all.

A checkpoint is a folder ``checkpoint-<step>`` of two files: ``state.safetensors`` with
every tensor, and ``state.json`` with everything else, its own checksum and the other
file's. It is written beside its place and renamed, so a run that is killed at any moment
leaves whole checkpoints only; what a power cut or a full disk may damage, the checksums
find.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from sylva_train._artifacts import flatten, unflatten
from sylva_train._checks import OutputExistsError, SylvaError
from sylva_train._files import atomic_folder, write_text
from sylva_train._torch import separate

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "checkpoints",
    "claimed",
    "load_checkpoint",
    "save_checkpoint",
    "update_record",
]

FORMAT = "sylva-checkpoint/1"
TENSORS, STATE = "state.safetensors", "state.json"
#: Checkpoints that are kept: the last, and one more should the last be damaged.
KEEP = 2


class CheckpointError(SylvaError, ValueError):
    """A training checkpoint is damaged, or belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read.

    Attributes
    ----------
    step : int
        Optimizer steps done.
    state : dict
        From `capture`: tensors and numbers, nested; tensors on the CPU.
    record : dict
        What else the run wrote (JSON): its position in the data, its history.
    """

    step: int
    state: dict[str, Any]
    record: dict[str, Any]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(body: Any) -> str:
    """Return the SHA-256 of JSON content, however it is spaced."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def checkpoints(output: str | os.PathLike[str]) -> dict[int, Path]:
    """Return the checkpoints in a folder by step, the last first."""
    found = {}
    for path in Path(output).glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


@contextlib.contextmanager
def claimed(output: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a folder of checkpoints to one process, which others cannot claim meanwhile.

    The claim ends with the process, however that ends. There is none where the system
    or the file system knows no locks.

    Raises
    ------
    OutputExistsError
        If another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            msg = (
                f"another process is training in `{folder}`: wait for its end, or choose"
                " another folder."
            )
            raise OutputExistsError(msg) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


def save_checkpoint(
    output: str | os.PathLike[str], checkpoint: Checkpoint, identity: Mapping[str, Any]
) -> Path:
    """Write ``checkpoint-<step>`` into a folder and keep only the one before it.

    Parameters
    ----------
    output : path
        The run's folder.
    checkpoint : Checkpoint
        The step, the state from `capture`, and what else to keep.
    identity : mapping
        From `identify`; `load_checkpoint` compares it.

    Returns
    -------
    pathlib.Path
        The new folder.

    Raises
    ------
    ConfigError
        If the state has something other than tensors, numbers and text.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = flatten(checkpoint.state, tensors, "")
    separate(tensors)
    path = Path(output) / f"checkpoint-{checkpoint.step}"
    # A folder of this name is a damaged one that the run went back from.
    with atomic_folder(path, overwrite=True) as temporary:
        save_file(tensors, temporary / TENSORS)
        body = {
            "format": FORMAT,
            "step": checkpoint.step,
            "identity": identity,
            "record": checkpoint.record,
            "state": tree,
            TENSORS: file_digest(temporary / TENSORS),
        }
        (temporary / STATE).write_text(signed(body), encoding="utf-8")
    prune(Path(output), checkpoint.step)
    return path


def signed(body: Mapping[str, Any]) -> str:
    """Return a state file's text: its content and the checksum of it."""
    return json.dumps({"sha256": text_digest(body), "body": body})


def update_record(
    output: str | os.PathLike[str], step: int, record: Mapping[str, Any]
) -> None:
    """Replace a checkpoint's ``record``, and no tensor of it."""
    file = Path(output) / f"checkpoint-{step}" / STATE
    body = json.loads(file.read_text(encoding="utf-8"))["body"]
    write_text(file, signed(body | {"record": record}))


def prune(output: Path, step: int) -> None:
    """Delete old checkpoints, those of a future that was given up, and leftovers."""
    kept = [s for s in checkpoints(output) if s <= step][:KEEP]
    for other, path in checkpoints(output).items():
        if other not in kept:
            # Renamed first: a half-deleted folder must not pass for a checkpoint.
            path.rename(output / f".checkpoint-{other}.deleted")
    for leftover in output.glob(".checkpoint-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return the body and the tensors of a checkpoint, or say which file is damaged."""
    file = path / STATE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        body: dict[str, Any] = content["body"]
        if content["sha256"] != text_digest(body):
            msg = f"the checkpoint file `{file}` was changed after it was written."
            raise CheckpointError(msg)
        if body["format"] != FORMAT:
            msg = f"`{path}` has the format {body['format']!r}, and not {FORMAT!r}."
            raise CheckpointError(msg)
        file = path / TENSORS
        if file_digest(file) != body[TENSORS]:
            msg = f"the checkpoint file `{file}` was cut off or changed."
            raise CheckpointError(msg)
        return body, load_file(file)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        msg = f"the checkpoint file `{file}` is damaged: {error}."
        raise CheckpointError(msg) from error


def load_checkpoint(
    output: str | os.PathLike[str], identity: Mapping[str, Any]
) -> Checkpoint | None:
    """Read the last whole checkpoint of a run.

    A damaged one is passed over with a warning, in favour of the one before it.

    Parameters
    ----------
    output : path
        The run's folder.
    identity : mapping
        From `identify`, for the run that is to go on.

    Returns
    -------
    Checkpoint or None
        None if there is none at all.

    Raises
    ------
    CheckpointError
        If every checkpoint is damaged, or the last whole one is of another run.
    """
    damage = None
    for step, path in checkpoints(output).items():
        try:
            body, tensors = read(path)
        except CheckpointError as error:
            damage = error
            warnings.warn(
                f"{error} The checkpoint before it is taken, if there is one.",
                stacklevel=2,
            )
            continue
        compare(path, body["identity"], identity)
        return Checkpoint(step, unflatten(body["state"], tensors), body["record"])
    if damage is not None:
        msg = (
            f"no checkpoint in `{output}` is whole: {damage} Start again without"
            " `resume`, in another folder."
        )
        raise CheckpointError(msg) from damage
    return None


def compare(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where a checkpoint is of another run, saying how."""
    for part, expected in here.items():
        found = saved.get(part)
        if found == expected:
            continue
        msg = f"`{path}` is a checkpoint of another run: its {part} "
        if isinstance(found, dict) and isinstance(expected, dict):
            keys = [k for k in found | expected if found.get(k) != expected.get(k)]
            shown = "; ".join(
                f"`{k}` is {brief(found.get(k))}, here {brief(expected.get(k))}"
                for k in keys[:3]
            )
            more = f"; and {len(keys) - 3} more" if len(keys) > 3 else ""
            msg += f"differ: {shown}{more}."
        else:
            msg += f"differ: {brief(found)}, here {brief(expected)}."
        msg += " Resume with the model, data and options of that run, or start anew."
        raise CheckpointError(msg)


def brief(value: Any) -> str:
    """Return a value as text that fits a message."""
    text = "missing" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
