"""The gate on a CPU, compiled: one pass over memory forward, and one backward, which computes tanh and σ again.

Legend: … any dimensions · f features that leave · row: what one place in … has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels import native
from kernels.vector import Code, Value
from kernels.vector_math import tanh_and_sigmoid

NUMBERS = 1 << 15  # of a job


def least_lanes(dtype: torch.dtype) -> int:
    """How many numbers the shortest vectors have."""
    return 4 if dtype == torch.float64 else 8


def takes(f: int, dtype: torch.dtype) -> bool:
    """Whether f fills whole vectors. It does not ask the CPU, so torch.compile can trace it."""
    return f % least_lanes(dtype) == 0


def lanes_of(f: int, dtype: torch.dtype) -> int:
    """How many numbers a vector has: as many as the CPU's have, if f fills whole ones of them."""
    lanes = native.lanes(f, dtype == torch.float64)
    return lanes if f % lanes == 0 else least_lanes(dtype)


def forward(code: Code, u: Value, out: Value, rows: Value, vectors: Value) -> None:
    with code.loop(rows) as row, code.loop(vectors) as v:
        a = row * vectors * 2 + v
        tanh, sigmoid = tanh_and_sigmoid(code, code.load(u, a), code.load(u, a + vectors))
        code.store(tanh * sigmoid, out, row * vectors + v)


def backward(code: Code, u: Value, d_out: Value, d_u: Value, rows: Value, vectors: Value) -> None:
    with code.loop(rows) as row, code.loop(vectors) as v:
        a = row * vectors * 2 + v
        tanh, sigmoid = tanh_and_sigmoid(code, code.load(u, a), code.load(u, a + vectors))
        d = code.load(d_out, row * vectors + v) * sigmoid
        code.store(d * (1 - tanh * tanh), d_u, a)
        code.store(d * tanh * (1 - sigmoid), d_u, a + vectors)


def write(code: Code) -> None:
    """Write both, functions of where tensors begin, how many rows there are, and how many vectors leave one."""
    code.job(forward, "ppii", "forward")
    code.job(backward, "pppii", "backward")


def run(name: str, *tensors: Tensor) -> None:
    """Run "forward" or "backward"; of the tensors (… f) or (… 2f), all contiguous, the first has 2f."""
    f = tensors[0].shape[-1] // 2
    rows, lanes = tensors[0].numel() // (2 * f), lanes_of(f, tensors[0].dtype)
    job = native.library(write, {"forward": 1, "backward": 1}, lanes, tensors[0].dtype == torch.float64)[name]
    places = [(x.data_ptr(), x.shape[-1] * x.element_size()) for x in tensors]
    of_job = max(1, NUMBERS // f)
    parts = ((first, min(of_job, rows - first)) for first in range(0, rows, of_job))
    native.in_parallel(job, [(*(at + first * size for at, size in places), n, f // lanes) for first, n in parts])


@torch.library.custom_op("pixelrnn::gate_cpu", mutates_args=(), device_types="cpu")
def gate_cpu_op(u: Tensor) -> Tensor:
    out = u.new_empty(*u.shape[:-1], u.shape[-1] // 2)
    run("forward", u.contiguous(), out)
    return out


@gate_cpu_op.register_fake
def _(u):
    return u.new_empty(*u.shape[:-1], u.shape[-1] // 2)


@torch.library.custom_op("pixelrnn::gate_cpu_backward", mutates_args=(), device_types="cpu")
def gate_cpu_backward_op(d_out: Tensor, u: Tensor) -> Tensor:
    d_u = u.new_empty(u.shape)
    run("backward", u.contiguous(), d_out.contiguous(), d_u)
    return d_u


@gate_cpu_backward_op.register_fake
def _(d_out, u):
    return u.new_empty(u.shape)


gate_cpu_op.register_autograd(
    lambda ctx, d_out: gate_cpu_backward_op(d_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
