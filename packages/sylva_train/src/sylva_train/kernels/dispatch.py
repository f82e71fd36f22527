"""Which kernel runs: Triton's on a GPU once they proved right there, or plain PyTorch.

The environment variable ``SYLVA_KERNELS`` decides otherwise: ``torch`` for the reference
everywhere, ``triton`` for Triton or an error, ``auto`` for the rule above.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import warnings
from types import ModuleType

import torch

from sylva_train._checks import ConfigError, check_choice

from .capture import check_not_capturing

__all__ = ["check_kernels", "find_kernel", "find_mode", "give_up", "is_demanded"]

VARIABLE = "SYLVA_KERNELS"
MODES = ("auto", "triton", "torch")


@functools.cache
def load(kernel: str) -> ModuleType | None:
    """Import a Triton kernel's module, or return None where there is no Triton."""
    try:
        return importlib.import_module(f".triton_{kernel}", __package__)
    except ImportError:
        return None


def find_mode() -> str:
    """Return what the environment asks for, one of `MODES`.

    Raises
    ------
    ConfigError
        If it is none of them.
    """
    mode = os.environ.get(VARIABLE, "auto")
    check_choice(VARIABLE, mode, MODES)
    return mode


def is_demanded() -> bool:
    """Whether Triton is to run or to fail."""
    return find_mode() == "triton"


def find_kernel(
    kernel: str, device: torch.device, dtype: torch.dtype, block_size: int
) -> ModuleType | None:
    """Return the module of a Triton kernel that is to run, or None for the reference.

    Parameters
    ----------
    kernel : str
        ``"sddmm"`` or ``"adamw"``.
    device, dtype, block_size
        Of the operands.

    Raises
    ------
    ConfigError
        If ``SYLVA_KERNELS`` has no such choice, or demands Triton where it cannot run;
        or if a kernel would be tried while a CUDA graph is captured.
    """
    mode = find_mode()
    if mode == "torch" or (mode == "auto" and device.type != "cuda"):
        return None
    module = load(kernel)
    if mode == "triton":
        if module is None:
            msg = (
                f"`{VARIABLE}=triton` needs Triton, which is not installed: `pip install"
                " 'sylva-train[triton]'`, or set it to `auto`."
            )
            raise ConfigError(msg)
        if device.type != "cuda" and not module.INTERPRETED:
            msg = (
                f"`{VARIABLE}=triton` needs a CUDA device, or TRITON_INTERPRET=1 before"
                f" Triton is imported; the operands are on {device.type!r}."
            )
            raise ConfigError(msg)
    if module is None or not module.supports(dtype, block_size):
        return None
    problem = find_problem(kernel, device, dtype, block_size)
    if problem and mode == "triton":
        raise ConfigError(problem)
    return None if problem else module


#: What is wrong with each kernel that was tried: device, dtype and block size.
_problems: dict[tuple[str, torch.device, torch.dtype, int], str | None] = {}


def find_problem(
    kernel: str, device: torch.device, dtype: torch.dtype, block_size: int
) -> str | None:
    """Try a kernel once on a device, and warn if it fails or computes something else."""
    key = (kernel, device, dtype, block_size)
    if key not in _problems:
        check_not_capturing(device, f"the kernel `{kernel}` is tried")
        _problems[key] = None
        module = load(kernel)
        assert module is not None
        try:
            error = module.self_check(device, dtype, block_size)
            if not error <= 1:
                give_up(*key, f"its error is {error:.3g} times the allowed")
        except Exception as failure:  # noqa: BLE001 - whatever a compiler raises
            give_up(*key, f"{type(failure).__name__}: {failure}")
    return _problems[key]


def give_up(
    kernel: str, device: torch.device, dtype: torch.dtype, block_size: int, trouble: str
) -> None:
    """Leave a kernel alone from now on, with one warning."""
    problem = (
        f"the Triton kernel `{kernel}` does not work for {dtype} and blocks of"
        f" {block_size} on {device}: {trouble}."
    )
    _problems[kernel, device, dtype, block_size] = problem
    warnings.warn(
        f"{problem} Plain PyTorch computes the same instead, from now on.",
        RuntimeWarning,
        stacklevel=4,
    )


def check_kernels(device: torch.device | str = "cuda") -> list[str | None]:
    """Try every Triton kernel on a device, beside the reference.

    Returns
    -------
    list of str or None
        What is wrong with each kernel for each dtype and block size, None where nothing
        is; empty where there is no Triton.
    """
    device = torch.device(device)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return [
            find_problem(kernel, device, dtype, block)
            for kernel, dtype, block in itertools.product(
                ("sddmm", "adamw"), dtypes, (16, 32, 64, 128)
            )
            if (module := load(kernel)) is not None and module.supports(dtype, block)
        ]
