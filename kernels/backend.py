"""Who computes an operation: Triton kernels on NVIDIA's GPUs, compiled ones on CPUs for some, or torch, everywhere.

A call's own `backend=` goes before `with use(…):`, which goes before what the tensors' device suggests.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from checks import check_one_of, unexpected
from kernels.jit import has_triton

BACKENDS = ("triton", "torch", "cpu")
chosen: str | None = None  # by `use`


def backend_for(x: Tensor, backend: str | None = None, compiled: bool | None = None) -> str:
    """Say who computes with x: "triton", "torch" or "cpu".

    Args:
        backend: the caller's choice. None: the choice of `use`, or of x's device.
        compiled: whether the operation's kernel for CPUs is what computes float32 there if nobody chose. None: there is
            no such kernel, and where "cpu" is chosen, torch computes.

    Raises:
        ValueError: the choice is none of these, or the CPU's kernel cannot compute with x.
    """
    asked, kind = backend or chosen, x.device.type
    if asked is None:
        if has_triton(x.device):
            return "triton"
        return "cpu" if compiled and kind == "cpu" and x.dtype == torch.float32 else "torch"
    check_one_of("backend", asked, BACKENDS)
    if asked != "cpu" or compiled is None:
        return "torch" if asked == "cpu" else asked
    if kind != "cpu" or x.dtype not in (torch.float32, torch.float64):
        raise unexpected("backend", asked, f"triton or torch with {x.dtype} on {kind}")
    return asked


def in_use() -> str | None:
    """Say what `use` chose, or None."""
    return chosen


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Choose who computes every operation within, wherever its tensors are. None: leave it to the device."""
    global chosen
    before, chosen = chosen, backend
    try:
        yield
    finally:
        chosen = before


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Convert what a matrix product reads to autocast's type, where autocast is on; float64 and None stay."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Convert what an operation that keeps states reads to float32, where autocast is on; float64 stays."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)
