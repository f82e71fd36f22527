"""Files and folders: written whole or not at all, as large as they are, in the way or not."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from ._checks import OutputExistsError

__all__ = ["atomic_folder", "atomic_write", "folder_size", "occupied", "write_text"]


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
    except SafetensorError as error:  # its own for all that fails
        raise OSError(errno.EIO, str(error), str(path)) from error
    except OSError as error:
        if not error.errno or error.filename:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


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
