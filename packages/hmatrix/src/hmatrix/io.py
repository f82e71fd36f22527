"""Matrices and factorizations in files: safetensors with a format version, written atomically."""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from hmatrix._backend import Array, Space, dtype_name, to_numpy, transpose
from hmatrix._checks import FileFormatError, HMatrixError, check_array, check_kind
from hmatrix.factor import (
    Factorization,
    HODLRCholesky,
    HODLREquilibrated,
    HODLRFactorization,
    HODLROrthogonal,
    MLRFactorization,
)
from hmatrix.hodlr import HODLR, from_sides
from hmatrix.lowrank import LowRank
from hmatrix.mlr import MLR
from hmatrix.tree import ClusterTree

__all__ = ["load", "save"]

#: Raised when files of older programs could be misread by newer ones, or the reverse.
FORMAT_VERSION = 1

#: Begins the names of a factorization's own arrays, beside those of its matrix.
_PREFIX = "factorization."
_FACTORIZATIONS: dict[str, tuple[type, type[Factorization]]] = {
    "HODLRFactorization": (HODLR, HODLRFactorization),
    "HODLRCholesky": (HODLR, HODLRCholesky),
    "HODLREquilibrated": (HODLR, HODLREquilibrated),
    "HODLROrthogonal": (HODLR, HODLROrthogonal),
    "MLRFactorization": (MLR, MLRFactorization),
}


def save(path: str | os.PathLike[str], H: HODLR | MLR | Factorization) -> None:
    """Write a matrix, or a factorization with its matrix, to a file.

    Parameters
    ----------
    path : path
        The file, in the safetensors format; replaced in one step if it exists, so
        that a reader never sees half of it.
    H : HODLR, MLR or Factorization
        What to write, of any library and device.

    Raises
    ------
    TypeError
        If ``H`` is none of these.
    OverwrittenError
        If a factorization has overwritten its matrix.
    OSError
        If the file cannot be written; one that was there is kept.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> import numpy as np
    >>> import hmatrix as hm
    >>> H = hm.from_dense(np.eye(10), levels=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "eye.safetensors"
    ...     hm.save(path, H)
    ...     print(hm.load(path))
    ...     hm.save(path, hm.factorize(H, shift=3.0))
    ...     print(hm.load(path).solve(np.ones(10)).sum())
    HODLR(n=10, levels=1, ranks=(0,), symmetric, float64, numpy, 400 B, 0.5 of dense)
    2.5
    """
    check_kind("H", H, HODLR, MLR, Factorization)
    if isinstance(H, Factorization):
        header, arrays = _parts(H.matrix)
        header |= {"matrix": type(H.matrix).__name__, "shift": H.shift}
        arrays |= {f"{_PREFIX}{name}": x for name, x in H._arrays().items()}
    else:
        header, arrays = _parts(H)
    numbers = {name: to_numpy(x) for name, x in arrays.items()}
    header["complex"] = [name for name, x in numbers.items() if np.iscomplexobj(x)]
    header["transposed"] = [name for name, x in numbers.items() if _is_transposed(x)]
    for name in header["transposed"]:
        numbers[name] = numbers[name].mT
    numbers = {name: _as_real(x) for name, x in numbers.items()}
    header["crc32"] = {name: zlib.crc32(x.data) for name, x in numbers.items()}
    data = safetensors.numpy.save(
        numbers,
        metadata={
            "format": "hmatrix",
            "version": str(FORMAT_VERSION),
            "kind": type(H).__name__,
            "header": json.dumps(header),
        },
    )
    _write(Path(path), data)


def load(
    path: str | os.PathLike[str], *, like: Array | None = None
) -> HODLR | MLR | Factorization:
    """Read what `save` wrote.

    Parameters
    ----------
    path : path
        The file.
    like : array, optional
        Array whose library and device to use; default NumPy. The dtype is the file's.

    Returns
    -------
    HODLR, MLR or Factorization
        As it was saved. A factorization solves at once, with the same bits on the same
        machine.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    BackendError
        If ``like`` is not an array.
    FileFormatError
        If it is truncated, damaged (each array has a checksum), of another format or of
        a newer version.
    """
    path = Path(path)
    if like is not None:
        check_array("like", like)
    if not path.exists():
        msg = f"`path`: there is no file {path}."
        raise FileNotFoundError(msg)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        msg = f"`path`: {path} is truncated, or no safetensors file ({error})."
        raise FileFormatError(msg) from error
    try:
        header = json.loads(metadata["header"])
        for name, checksum in header.get("crc32", {}).items():
            if zlib.crc32(arrays[name]) != checksum:
                msg = f"{name} does not hold the numbers that were written"
                raise ValueError(msg)
        for name in header.get("complex", ()):
            x = arrays[name]
            arrays[name] = x.view(np.result_type(x.dtype, np.complex64))[..., 0]
        tree = _rebuild_tree(header, arrays)
        if like is not None:
            arrays = {
                name: Space.like(like, dtype_name(x.dtype)).asarray(x)
                for name, x in arrays.items()
            }
        # last, since CuPy takes arrays over row by row
        for name in header.get("transposed", ()):
            arrays[name] = transpose(arrays[name])
        return _rebuild(metadata["kind"], header, tree, arrays)
    except (LookupError, AttributeError, TypeError, ValueError, HMatrixError) as error:
        msg = f"`path`: {path} is damaged: {type(error).__name__}: {error}"
        raise FileFormatError(msg) from error


def _parts(H: HODLR | MLR) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what is in a matrix: a header for JSON, and arrays."""
    header: dict[str, Any] = {"n": H.tree.n, "levels": H.tree.levels}
    if isinstance(H, HODLR):
        header |= {"symmetric": H.symmetric, "error": H.error}
    else:
        header |= {"sign": H.sign}
    tree = {f"tree.{name}": x for name, x in H.tree._arrays().items()}
    return header, H._arrays() | tree


def _is_transposed(x: np.ndarray) -> bool:
    """Tell whether an array has its columns in one piece, not its rows.

    BLAS rounds the two differently, and a factorization should come back with the
    same bits.
    """
    return x.ndim > 1 and not x.flags.c_contiguous and bool(x.mT.flags.c_contiguous)


def _as_real(x: np.ndarray) -> np.ndarray:
    """Give complex numbers an axis of their parts: safetensors has real ones only."""
    if np.iscomplexobj(x):
        return np.stack([x.real, x.imag], axis=-1)
    return np.asarray(x, order="C")


def _check_metadata(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != "hmatrix":
        msg = (
            f"`path`: {path} holds no hierarchical matrix "
            f"(format {metadata.get('format')!r}, expected 'hmatrix')."
        )
        raise FileFormatError(msg)
    if metadata.get("version") != str(FORMAT_VERSION):
        msg = (
            f"`path`: {path} has format version {metadata.get('version')}, this program "
            f"reads version {FORMAT_VERSION}; use the version of hmatrix that wrote it."
        )
        raise FileFormatError(msg)


def _rebuild_tree(header: dict[str, Any], arrays: dict[str, Any]) -> ClusterTree:
    places = (arrays.pop(f"tree.{name}", None) for name in ("sizes", "permutation"))
    return ClusterTree(header["n"], header["levels"], *places)


def _rebuild(
    kind: str, header: dict[str, Any], tree: ClusterTree, arrays: dict[str, Any]
) -> HODLR | MLR | Factorization:
    if kind in _FACTORIZATIONS:
        matrix, factorization = _FACTORIZATIONS[kind]
        H = _rebuild(header["matrix"], header, tree, arrays)
        check_kind("matrix", H, matrix)
        own = {
            name.removeprefix(_PREFIX): x
            for name, x in arrays.items()
            if name.startswith(_PREFIX)
        }
        return factorization._restore(H, header["shift"], own)
    levels = range(tree.levels)
    if kind == "MLR":
        factors = tuple(arrays[f"factors.{k}"] for k in levels)
        return MLR(tree, arrays["leaves"], factors, header["sign"])
    if kind != "HODLR":
        msg = f"unknown kind {kind!r}"
        raise ValueError(msg)
    sides = (
        [LowRank(*(arrays[f"{side}.{k}.{part}"] for part in "USV")) for k in levels]
        for side in (("upper",) if header["symmetric"] else ("upper", "lower"))
    )
    return from_sides(tree, arrays["leaves"], sides, header["error"])


def _write(path: Path, data: bytes) -> None:
    """Write beside ``path`` and rename: the name never holds half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files that only their owner can read
        umask = os.umask(0)
        os.umask(umask)
        Path(name).chmod(0o666 & ~umask)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
