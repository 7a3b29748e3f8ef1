"""The gate of the Gated PixelCNN (van den Oord et al. 2016b, 1606.05328, equation 2).

Legend: … any dimensions · f features that leave. The 2f features that come in are a, then b.

    gate([a, b]) = tanh(a) ⊙ σ(b)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.activations import sigmoid, tanh
from kernels.backend import backend_for
from kernels.gate_cpu import gate_cpu_op, takes
from kernels.jit import cdiv, jit, launch, tl


def gate_reference(u: Tensor) -> Tensor:
    """Compute `gate` as the equation is written: the oracle."""
    a, b = u.chunk(2, dim=-1)
    return a.tanh() * b.sigmoid()


# ------------------------------------------------------------------------------------------------------- kernels


@jit
def gate_fwd_kernel(
    u,  # (pixels 2f)
    out,  # (pixels f)
    size,  # pixels · f
    f,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    of_a = at + at // f * f  # row · 2f + feature
    a = tl.load(u + of_a, mask=mask, other=0.0).to(SUM)
    b = tl.load(u + of_a + f, mask=mask, other=0.0).to(SUM)
    tl.store(out + at, (tanh(a) * sigmoid(b)).to(out.dtype.element_ty), mask=mask)


@jit
def gate_bwd_kernel(
    d_out,  # (pixels f)
    u,  # (pixels 2f)
    d_u,  # (pixels 2f), out
    size,
    f,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    of_a = at + at // f * f
    tanh_a = tanh(tl.load(u + of_a, mask=mask, other=0.0).to(SUM))
    sigmoid_b = sigmoid(tl.load(u + of_a + f, mask=mask, other=0.0).to(SUM))
    d = tl.load(d_out + at, mask=mask, other=0.0).to(SUM)
    tl.store(d_u + of_a, (d * sigmoid_b * (1 - tanh_a * tanh_a)).to(d_u.dtype.element_ty), mask=mask)
    tl.store(d_u + of_a + f, (d * tanh_a * sigmoid_b * (1 - sigmoid_b)).to(d_u.dtype.element_ty), mask=mask)


def constants(double: bool) -> dict:
    """The kernels' constexpr arguments and options."""
    return {"BLOCK": 1024, "SUM": tl.float64 if double else tl.float32, "num_warps": 4, "num_stages": 1}


@torch.library.custom_op("pixelrnn::gate", mutates_args=())
def gate_op(u: Tensor) -> Tensor:
    f = u.shape[-1] // 2
    out, sizes = u.new_empty(*u.shape[:-1], f), constants(u.dtype == torch.float64)
    if out.numel():
        launch(gate_fwd_kernel, (cdiv(out.numel(), sizes["BLOCK"]),), u.contiguous(), out, out.numel(), f, **sizes)
    return out


@gate_op.register_fake
def _(u):
    return u.new_empty(*u.shape[:-1], u.shape[-1] // 2)


@torch.library.custom_op("pixelrnn::gate_backward", mutates_args=())
def gate_backward_op(d_out: Tensor, u: Tensor) -> Tensor:
    d_u, sizes = u.new_empty(u.shape), constants(u.dtype == torch.float64)
    size = d_out.numel()
    if size:
        tensors = d_out.contiguous(), u.contiguous(), d_u
        launch(gate_bwd_kernel, (cdiv(size, sizes["BLOCK"]),), *tensors, size, d_out.shape[-1], **sizes)
    return d_u


@gate_backward_op.register_fake
def _(d_out, u):
    return u.new_empty(u.shape)


gate_op.register_autograd(
    lambda ctx, d_out: gate_backward_op(d_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

# ---------------------------------------------------------------------------------------------------- torch form


class Gate(torch.autograd.Function):
    """The torch form. tanh(x) is 2σ(2x) − 1: one sigmoid serves both halves, at a third of the time of tanh."""

    @staticmethod
    def forward(ctx, u):
        f = u.shape[-1] // 2
        doubled = u.new_ones(2 * f)
        doubled[:f].fill_(2)
        both = (u * doubled).sigmoid_()
        tanh, sigmoid = both.split(f, dim=-1)
        tanh.mul_(2).sub_(1)
        ctx.save_for_backward(both)
        return tanh * sigmoid

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (both,) = ctx.saved_tensors
        f = both.shape[-1] // 2
        tanh, sigmoid = both.split(f, dim=-1)
        d_u = torch.empty_like(both)
        tanh_backward, sigmoid_backward = torch.ops.aten.tanh_backward, torch.ops.aten.sigmoid_backward
        tanh_backward.grad_input(d_out * sigmoid, tanh, grad_input=d_u.narrow(-1, 0, f))
        sigmoid_backward.grad_input(d_out * tanh, sigmoid, grad_input=d_u.narrow(-1, f, f))
        return d_u


def gate(u: Tensor, backend: str | None = None) -> Tensor:
    """Multiply tanh of the first half of the features by σ of the second: (… 2f) → (… f).

    Args:
        u: any floating type; computed in float32 at least where Triton computes. The CPU's kernel takes whole vectors
            of features; torch computes other numbers of them.
        backend: see `kernels.backend_for`.

    Source: 1606.05328, equation 2.
    """
    computed_by = backend_for(u, backend, compiled=True if takes(u.shape[-1] // 2, u.dtype) else None)
    if computed_by == "torch":
        return Gate.apply(u)
    return (gate_op if computed_by == "triton" else gate_cpu_op)(u)
