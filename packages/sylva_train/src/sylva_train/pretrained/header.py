"""What a GGUF file says of its model, and what transformers leaves out of that."""

from __future__ import annotations

import dataclasses
import mmap
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

from sylva_train._checks import ModelError

__all__ = ["Header", "complete", "read_header"]

# Types of metadata: numbers, as `struct` has them, and what is made of them.
NUMBERS = {**dict(enumerate("BbHhIif?")), 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
#: The type of float32 tensors.
FLOAT32 = 0
#: Where data begin is a multiple of this, unless the file says of what.
ALIGNMENT = 32
#: Layers of Gemma's models of 27 billion weights, which alone scale queries by the width
#: of all heads, not of one; llama.cpp tells them by this too.
LARGE = {("gemma2", 46), ("gemma3_text", 62)}


@dataclasses.dataclass(frozen=True)
class Header:
    """Metadata and tensors of a GGUF file.

    Attributes
    ----------
    path : Path
        The file.
    fields : dict
        Numbers and texts by key. Lists, such as the vocabulary, are left out.
    tensors : dict
        By name a tensor's type, number of elements, and place in the file in bytes.
    order : str
        Byte order of its numbers, as `struct` has it.
    """

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, tuple[int, int, int]]
    order: str

    def vector(self, name: str) -> list[float] | None:
        """Return the numbers of a small float32 tensor; None if there is no such."""
        if name not in self.tensors:
            return None
        kind, count, offset = self.tensors[name]
        if kind != FLOAT32:
            msg = f"`{name}` is of type {kind}; expected float32, which is 0"
            raise ValueError(msg)
        found = np.fromfile(self.path, f"{self.order}f4", count, offset=offset)
        return [float(x) for x in found]


class Cursor:
    """Reads a file's bytes one value after the other."""

    def __init__(self, data: Any):
        self.data, self.at, self.order = data, 0, "<"

    def number(self, kind: str) -> Any:
        """Return a number, of a type of `struct`'s."""
        (value,) = struct.unpack_from(self.order + kind, self.data, self.at)
        self.at += struct.calcsize(self.order + kind)
        return value

    def text(self) -> str:
        """Return a text, which its length precedes."""
        size = self.number("Q")
        self.at += size
        return bytes(self.data[self.at - size : self.at]).decode()

    def value(self, kind: int) -> Any:
        """Return a number or text; None for a list, which is passed over."""
        if kind == TEXT:
            return self.text()
        if kind != LIST:
            return self.number(NUMBERS[kind])
        of, count = self.number("I"), self.number("Q")
        if of == TEXT:
            for _ in range(count):
                size = self.number("Q")
                self.at += size
        else:
            self.at += count * struct.calcsize(self.order + NUMBERS[of])
        return None


def read_header(source: str | Path) -> Header:
    """Read a GGUF file's metadata and names of tensors.

    The reader of the package `gguf` makes some arrays of every token of a vocabulary,
    which takes ten seconds for a large one.

    Raises
    ------
    ModelError
        If the file is one of several that a model was split into.
    ValueError, KeyError
        If the file is damaged.
    """
    path = Path(source)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        try:
            header = parse(path, Cursor(data))
        except struct.error as error:
            msg = "the file ends within its metadata"
            raise ValueError(msg) from error
    pieces = header.fields.get("split.count", 0)
    if pieces > 1:
        first = re.sub(r"\d{5}(?=-of-\d{5})", "00001", path.name)
        msg = (
            f"`{path}` is number {header.fields.get('split.no', 0) + 1} of {pieces} files"
            f" that a model was split into. Join them by `llama-gguf-split --merge {first}"
            " joined.gguf`, a program of llama.cpp, and pass the joined file."
        )
        raise ModelError(msg)
    return header


def parse(path: Path, cursor: Cursor) -> Header:
    """Read a header from the file's beginning."""
    cursor.at = 4  # behind the magic number
    if not cursor.number("I") & 0xFFFF:  # a small number, unless bytes are swapped
        cursor.order = ">"
    tensors, count = cursor.number("Q"), cursor.number("Q")
    fields = {}
    for _ in range(count):
        key = cursor.text()
        fields[key] = cursor.value(cursor.number("I"))
    fields = {key: value for key, value in fields.items() if value is not None}
    places = {}
    for _ in range(tensors):
        name = cursor.text()
        sizes = [cursor.number("Q") for _ in range(cursor.number("I"))]
        size = int(np.prod(sizes, dtype=object))
        places[name] = cursor.number("I"), size, cursor.number("Q")
    step = fields.get("general.alignment", ALIGNMENT)
    start = -(-cursor.at // step) * step
    places = {name: (a, b, start + offset) for name, (a, b, offset) in places.items()}
    return Header(path, fields, places, cursor.order)


def complete(config: Any, header: Header) -> None:
    """Give a configuration what transformers leaves out of a GGUF file.

    Without these a model loads, and computes something else than the model of the file.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        Changed in place.
    header : Header
        Of the file that it was made from.

    Raises
    ------
    ModelError
        If positions are scaled in a way that is not known here.
    """
    kind = header.fields["general.architecture"]
    heads = getattr(config, "num_attention_heads", 1)
    # Gemma 4 has heads of two widths, of which transformers reads both.
    if "head_dim" in vars(config) and not hasattr(config, "global_head_dim"):
        known = config.head_dim or config.hidden_size // heads
        config.head_dim = header.fields.get(f"{kind}.attention.key_length", known)
    if config.model_type == "t5":
        # transformers takes every such file for a model of gated layers, as llama.cpp does
        # where there are gates, but leaves the ReLU of those without.
        config.feed_forward_proj, config.dense_act_fn = "gated-gelu", "gelu_new"
    elif config.model_type == "gpt2":
        length = header.fields.get(f"{kind}.context_length", config.n_positions)
        config.n_positions = length
    elif (config.model_type, config.num_hidden_layers) in LARGE:
        config.query_pre_attn_scalar = config.hidden_size // heads
    rope = getattr(config, "rope_parameters", None) or {}
    # Gemma's layers with a sliding window have a rotation of their own, which is fixed.
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") != "default":
        return
    rope |= rotation(header)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    turned = header.fields.get(f"{kind}.rope.dimension_count", width)
    if turned < width:
        rope["partial_rotary_factor"] = turned / width


def rotation(header: Header) -> dict[str, Any]:
    """Return the rotary positions of a GGUF file, as transformers writes them."""
    kind = header.fields["general.architecture"]
    about = {
        key.removeprefix(f"{kind}.rope."): value for key, value in header.fields.items()
    }
    rope = {"rope_theta": about["freq_base"]} if "freq_base" in about else {}
    length = about.get("scaling.original_context_length")
    length = {
        "original_max_position_embeddings": length or about[f"{kind}.context_length"]
    }
    attention = about.get("scaling.attn_factor")
    short = header.vector("rope_factors_short.weight")
    long = header.vector("rope_factors_long.weight")
    if (divisors := header.vector("rope_freqs.weight")) is not None:
        # Those of LLaMA 3, worked out; transformers takes them in this form alone.
        short, long, attention = divisors, divisors, 1.0
    if short is not None:
        rope |= {"rope_type": "longrope", "short_factor": short, "long_factor": long}
        rope |= length
        return rope if attention is None else rope | {"attention_factor": attention}
    scaling, factor = about.get("scaling.type", "none"), about.get("scaling.factor", 0)
    if scaling not in {"none", "linear", "yarn"}:
        msg = (
            f"`{header.path}` scales positions by {scaling!r} (`{kind}.rope.scaling.type`),"
            " which is not read from GGUF files; get the model in the format of"
            " transformers."
        )
        raise ModelError(msg)
    if scaling == "none" or factor in {0, 1}:
        return rope
    rope |= {"rope_type": scaling, "factor": factor}
    return rope | length if scaling == "yarn" else rope
