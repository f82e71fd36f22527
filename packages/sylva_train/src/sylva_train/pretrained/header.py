"""What a GGUF file says of its model, and what transformers leaves out of that."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from sylva_train._checks import ModelError

__all__ = ["Header", "complete", "read_header"]

#: Small tensors of numbers that positions are turned by.
VECTORS = (
    "rope_factors_short.weight", "rope_factors_long.weight", "rope_freqs.weight",
)  # fmt: skip
#: Layers of Gemma's models of 27 billion weights, which alone scale queries by the width
#: of all heads, not of one; llama.cpp tells them by this too.
LARGE = {("gemma2", 46), ("gemma3_text", 62)}


@dataclasses.dataclass(frozen=True)
class Header:
    """What is read of a GGUF file.

    Attributes
    ----------
    path : Path
        The file.
    fields : dict
        Numbers and texts by key. Lists, such as the vocabulary, are left out.
    vectors : dict of str to list of float
        Those of `VECTORS` that are there.
    """

    path: Path
    fields: dict[str, Any]
    vectors: dict[str, list[float]]


def read_header(source: str | Path) -> Header:
    """Read a GGUF file's metadata and small tensors.

    Raises
    ------
    ModelError
        If the file is one of several that a model was split into.
    ValueError, LookupError
        If the file is damaged.
    """
    from gguf import GGUFReader, GGUFValueType, dequantize

    path, reader = Path(source), GGUFReader(source)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if field.types[0] != GGUFValueType.ARRAY
    }
    pieces = fields.get("split.count", 0)
    if pieces > 1:
        first = re.sub(r"\d{5}(?=-of-\d{5})", "00001", path.name)
        msg = (
            f"`{path}` is number {fields.get('split.no', 0) + 1} of {pieces} files"
            f" that a model was split into. Join them by `llama-gguf-split --merge {first}"
            " joined.gguf`, a program of llama.cpp, and pass the joined file."
        )
        raise ModelError(msg)
    vectors = {
        tensor.name: dequantize(tensor.data, tensor.tensor_type).tolist()
        for tensor in reader.tensors
        if tensor.name in VECTORS
    }
    return Header(path, fields, vectors)


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
    short, long, divisors = map(header.vectors.get, VECTORS)
    if divisors is not None:
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
