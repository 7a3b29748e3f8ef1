"""Operations that the models call; each is a plain function of tensors, documented in its own file.

Each has two forms: Triton kernels, for NVIDIA's GPUs, and torch, for everything else. `backend_for` holds that choice.
A call's own `backend=` is above `with use(…):`, which is above what the tensors' device says.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from checks import one_of, unexpected
from kernels.jit import has_triton

BACKENDS = ("triton", "torch")
chosen: str | None = None  # by `use`


def backend_for(x: Tensor, backend: str | None = None) -> str:
    """The form that computes with x: "triton" or "torch".

    Raises:
        ValueError: `backend` is neither.
    """
    backend = backend or chosen or ("triton" if has_triton(x.device) else "torch")
    if backend not in BACKENDS:
        raise unexpected("backend", backend, one_of(BACKENDS))
    return backend


def in_use() -> str | None:
    """The form that `use` says, or None."""
    return chosen


@contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Within, every operation takes this form, wherever its tensors are."""
    global chosen
    before, chosen = chosen, backend
    try:
        yield
    finally:
        chosen = before


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a matrix product would read: under autocast, tensors in its type."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def in_float32(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What keeps states: under autocast, tensors in float32."""
    if not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(x if x.dtype == torch.float64 else x.float() for x in tensors)


from kernels.cross_entropy import cross_entropy  # noqa: E402 - these import what is above
from kernels.diagonal_lstm import diagonal_lstm  # noqa: E402
from kernels.gate import gate  # noqa: E402
from kernels.masked_conv import masked_conv  # noqa: E402
from kernels.row_lstm import row_lstm  # noqa: E402

__all__ = ["backend_for", "cross_entropy", "diagonal_lstm", "gate", "masked_conv", "row_lstm", "use"]
