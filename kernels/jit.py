"""Triton, or a stand-in on machines without it, so that the kernels' files can be imported everywhere.

Triton is for Linux only, and takes as long to import as many small draws: it is left out where nothing would run in it.

`jit` makes a kernel and `launch` runs one: all launches pass here, so the rules for every launch are in one place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor

from checks import unexpected

# Where there is a GPU, in Triton's interpreter, and in a program that imported Triton before, to compile for a GPU.
of_use = torch.cuda.device_count() > 0 or "TRITON_INTERPRET" in os.environ or "triton" in sys.modules
try:
    if not of_use:
        raise ImportError
    import triton
    import triton.language as tl
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)

__all__ = ["cdiv", "has_triton", "jit", "launch", "multiprocessors", "next_power_of_2", "tl", "triton"]

# What a launch may tell the compiler.
OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion", "launch_cooperative_grid"}
# What Triton takes from a launch for itself. A kernel's argument of such a name would never reach the kernel.
TAKEN = OPTIONS | {"grid", "warmup", "stream", "device", "device_type", "debug", "instrumentation_mode", "num_ctas"}


def jit(kernel: Callable | None = None, *, varying: tuple[str, ...] = ()) -> Callable:
    """Make a kernel, or a function that kernels call.

    Args:
        varying: integers that differ from launch to launch. Otherwise Triton compiles a kernel once more for an integer
            that is 1 or a multiple of 16.
    """
    if kernel is None:
        return lambda kernel: jit(kernel, varying=varying)
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    assert not TAKEN & set(names), f"{kernel.__name__}: Triton takes {sorted(TAKEN & set(names))} for itself"
    assert set(varying) <= set(names), f"{kernel.__name__} has no {sorted(set(varying) - set(names))}"
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=list(varying))


def has_triton(device: torch.device) -> bool:
    """Say whether the kernels compute on a device by default: on NVIDIA's GPUs they do."""
    return triton is not None and device.type == "cuda" and torch.version.hip is None


def multiprocessors(device: torch.device) -> int:
    """Count a GPU's multiprocessors; where there is none, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def launch(kernel, grid: tuple[int, ...], *arguments, **named) -> None:
    """Run a kernel over a grid of programs, on the device of its tensors.

    Args:
        arguments, named: all of the kernel's arguments, by position and by name, and compiler options. Triton's
            interpreter drops a name that is neither; on a GPU Triton raises an error, which no test without one sees.

    Raises:
        TypeError: an argument is missing, or is none of the kernel's.
        ValueError: Triton is not installed, or there was no GPU when it should have been imported.
    """
    if triton is None:
        raise unexpected("backend", "triton", "torch, where Triton is not installed or there is no GPU")
    given = [*kernel.arg_names[: len(arguments)], *(name for name in named if name not in OPTIONS)]
    given += ["too many"] * (len(arguments) - len(kernel.arg_names))
    if len(given) != len(kernel.arg_names) or set(given) != set(kernel.arg_names):
        missing = sorted(set(kernel.arg_names) - set(given))
        unknown = sorted(set(given) - set(kernel.arg_names))
        raise TypeError(f"{kernel.__name__}: arguments missing: {missing}, unknown: {unknown}, of {len(given)} given")
    if torch.version.hip is not None:
        named.pop("maxnreg", None)  # a limit that the compiler for AMD's GPUs does not have
    named.setdefault("enable_fp_fusion", True)  # x·y + z in one instruction; Triton 3.9 warns if not told
    device = next(x.device for x in (*arguments, *named.values()) if isinstance(x, Tensor))
    # Triton launches on the current device, whatever device the tensors are on.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*arguments, **named)


def next_power_of_2(n: int) -> int:
    """Find the smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """Count the parts of `size` that hold n."""
    return -(-n // size)
