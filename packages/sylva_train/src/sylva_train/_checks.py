"""Exceptions, argument checks and safe writing: the wording every module shares."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

__all__ = [
    "AdapterError",
    "ConfigError",
    "DataError",
    "ModelError",
    "NonFiniteError",
    "OutputExistsError",
    "SylvaError",
    "TargetError",
    "atomic_folder",
    "atomic_write",
    "check_choice",
    "check_columns",
    "check_density",
    "check_integer",
    "check_positive",
    "check_spread",
    "folder_size",
    "occupied",
    "write_text",
]


class SylvaError(Exception):
    """Base of every error that the package raises on purpose."""


class ConfigError(SylvaError, ValueError):
    """An option has a value that cannot be used."""


class TargetError(SylvaError, ValueError):
    """The model has no layer, or not the layer, that was asked for."""


class DataError(SylvaError, ValueError):
    """A data file or a row of it cannot be used; the message has ``file:line``."""


class ModelError(SylvaError, OSError):
    """A pretrained model or its tokenizer cannot be found, reached or read."""


class NonFiniteError(SylvaError, ArithmeticError):
    """A loss, gradient or activation is NaN or infinite."""


class AdapterError(SylvaError, ValueError):
    """An adapter file is damaged, or belongs to another base model."""


class OutputExistsError(SylvaError, FileExistsError):
    """The output path exists and overwriting was not asked for."""


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raise `ConfigError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        msg = f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}."
        raise ConfigError(msg)


def check_density(density: float) -> None:
    """Raise `ConfigError` unless ``0 < density <= 1`` (sparsity in ``[0, 1)``)."""
    if not (isinstance(density, int | float) and 0 < density <= 1):
        msg = (
            "`density` (1 - sparsity), the fraction of weights to train, must be above 0 "
            f"and at most 1, so that sparsity is in [0, 1); got {density!r}."
        )
        raise ConfigError(msg)


def check_columns(max_columns: float, density: float) -> None:
    """Raise `ConfigError` unless ``density <= max_columns <= 1``."""
    if not (isinstance(max_columns, int | float) and density <= max_columns <= 1):
        msg = (
            "`max_columns`, the fraction of a layer's block columns that may have blocks,"
            f" must be at least `density` ({density}), and at most 1; got {max_columns!r}."
        )
        raise ConfigError(msg)


def check_spread(spread: float | None) -> None:
    """Raise `ConfigError` unless ``spread`` is None, 0, or finite and at least 1."""
    if spread is None:
        return
    good = isinstance(spread, int | float)
    if not (good and (spread == 0 or 1 <= spread < math.inf)):
        msg = (
            "`spread`, how many times its share of the blocks a row or column may have,"
            " must be a finite number of at least 1, 0 for no limit, or None for what"
            f" suits the rule; got {spread!r}."
        )
        raise ConfigError(msg)


def check_integer(name: str, value: int, minimum: int) -> None:
    """Raise `ConfigError` unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        msg = f"`{name}` must be an integer of at least {minimum}; got {value!r}."
        raise ConfigError(msg)


def check_positive(name: str, value: float, *, zero: bool = False) -> None:
    """Raise `ConfigError` unless ``value`` is finite and positive (or zero)."""
    good = isinstance(value, int | float) and math.isfinite(value)
    if not good or value < 0 or (value == 0 and not zero):
        kind = "a finite number of at least 0" if zero else "a finite number above 0"
        msg = f"`{name}` must be {kind}; got {value!r}."
        raise ConfigError(msg)


def occupied(path: Path) -> bool:
    """Whether there is something at a path; an empty folder is nothing."""
    if path.is_dir() and not path.is_symlink():
        return any(path.iterdir())
    return path.exists() or path.is_symlink()


def publish(path: Path) -> None:
    """Give a temporary file or folder the permissions that the user's umask says."""
    umask = os.umask(0)
    os.umask(umask)
    for part in (path, *path.rglob("*")):
        part.chmod((0o777 if part.is_dir() else 0o666) & ~umask)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name what could not be written in errors that name no file: those of a full disk."""
    try:
        yield
    except Exception as error:
        # safetensors has one of its own for all that fails; it is not imported for this.
        foreign = type(error).__name__ == "SafetensorError"
        nameless = isinstance(error, OSError) and error.errno and not error.filename
        if not foreign and not nameless:
            raise
        code, words = (errno.EIO, str(error)) if foreign else error.args[:2]
        raise OSError(code, words, str(path)) from error


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a file in a temporary sibling folder, which becomes ``path`` if the block succeeds.

    In a folder, so that what a process that is killed leaves there has one name: safetensors
    writes to a file of its own first.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with naming(path):
            yield folder / path.name
        publish(folder)
        (folder / path.name).replace(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a whole text file, or leave what is there."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def folder_size(path: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


@contextlib.contextmanager
def atomic_folder(
    path: str | os.PathLike[str], *, overwrite: bool = False
) -> Iterator[Path]:
    """Yield a temporary sibling folder that becomes ``path`` if the block succeeds.

    With ``overwrite``, the old folder is moved aside first and deleted only once the
    new one stands in its place, so that a crash at any moment leaves one of them whole.

    Raises
    ------
    OutputExistsError
        If there is something at ``path``, and not ``overwrite``.
    """
    path = Path(path)
    if occupied(path) and not overwrite:
        msg = (
            f"the output `{path}` exists; nothing was written. Choose another path, or "
            "allow overwriting (`overwrite=True`, `--overwrite`)."
        )
        raise OutputExistsError(msg)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    aside = None
    try:
        with naming(path):
            yield temporary
        publish(temporary)
        if path.exists():
            aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.replace(aside / path.name)
        temporary.replace(path)
    except BaseException:
        if aside is not None and not path.exists():
            (aside / path.name).replace(path)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
