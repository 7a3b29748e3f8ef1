"""The cross-entropy of a softmax over v levels: the loss of the softmax head.

Legend: n sub-pixels, of whatever images · v levels.

    most      = max_l logits_l
    log_sum   = log Σ_l exp(logits_l − most)
    nats      = log_sum + most − logits_target
    d_logits  = d_nats · (exp(logits − most − log_sum) − [level = target])

Each pass reads the logits once and keeps two numbers a sub-pixel, most and log_sum: no probabilities are stored. The
kernels are bound by memory: a program takes whole rows, as many as fill its registers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import backend_for
from kernels.jit import cdiv, jit, launch, next_power_of_2, tl

MOST_LEVELS = 8192  # a row of them fits in a program's registers


def cross_entropy_reference(logits: Tensor, target: Tensor) -> Tensor:
    """Compute `cross_entropy` as the equation is written: the oracle."""
    return logits.exp().sum(-1).log() - logits.gather(-1, target.long()[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------- kernels


@jit(varying=("n",))
def cross_entropy_fwd_kernel(
    logits,  # (n v)
    target,  # (n)
    nats,  # (n), out
    most,  # (n), out
    log_sum,  # (n), out
    n,
    v,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    SUM: tl.constexpr,
):
    row, level = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, LEVELS)
    mask = (row < n)[:, None] & (level < v)[None, :]
    x = tl.load(logits + row[:, None] * v + level[None, :], mask=mask, other=float("-inf")).to(SUM)
    of_most = tl.where(row < n, tl.max(x, 1), 0.0)
    total = tl.log(tl.where(row < n, tl.sum(tl.exp(x - of_most[:, None]), 1), 1.0))
    wanted = tl.load(target + row, mask=row < n, other=0)
    of_target = tl.sum(tl.where(level[None, :] == wanted[:, None], x, 0.0), 1)
    tl.store(nats + row, total + (of_most - of_target), mask=row < n)
    tl.store(most + row, of_most, mask=row < n)
    tl.store(log_sum + row, total, mask=row < n)


@jit(varying=("n",))
def cross_entropy_bwd_kernel(
    d_nats,  # (n)
    logits,  # (n v)
    target,  # (n)
    most,  # (n)
    log_sum,  # (n)
    d_logits,  # (n v), out
    n,
    v,
    ROWS: tl.constexpr,
    LEVELS: tl.constexpr,
    SUM: tl.constexpr,
):
    row, level = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, LEVELS)
    mask = (row < n)[:, None] & (level < v)[None, :]
    at = row[:, None] * v + level[None, :]
    x = tl.load(logits + at, mask=mask, other=float("-inf")).to(SUM)
    of_most = tl.load(most + row, mask=row < n, other=0.0)
    total = tl.load(log_sum + row, mask=row < n, other=0.0)
    wanted = tl.load(target + row, mask=row < n, other=0)
    factor = tl.load(d_nats + row, mask=row < n, other=0.0).to(SUM)
    hit = tl.where(level[None, :] == wanted[:, None], 1.0, 0.0)
    d_x = factor[:, None] * (tl.exp(x - of_most[:, None] - total[:, None]) - hit)
    tl.store(d_logits + at, d_x.to(d_logits.dtype.element_ty), mask=mask)


def constants(v: int, double: bool) -> dict:
    """Choose the blocks of both kernels: some thousand numbers a program."""
    levels = next_power_of_2(v)
    return {
        "ROWS": max(1, 4096 // levels),
        "LEVELS": levels,
        "SUM": tl.float64 if double else tl.float32,
        "num_warps": 8,
        "num_stages": 1,
    }


# --------------------------------------------------------------------------------------------- torch.library, public


@torch.library.custom_op("pixelrnn::cross_entropy", mutates_args=())
def cross_entropy_op(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, v = logits.shape
    double = logits.dtype == torch.float64
    nats, most, log_sum = (logits.new_empty(n, dtype=torch.float64 if double else torch.float32) for _ in range(3))
    if n:
        sizes = constants(v, double)
        tensors = logits.contiguous(), target.contiguous(), nats, most, log_sum
        launch(cross_entropy_fwd_kernel, (cdiv(n, sizes["ROWS"]),), *tensors, n, v, **sizes)
    return nats, most, log_sum


@cross_entropy_op.register_fake
def _(logits, target):
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return tuple(logits.new_empty(len(logits), dtype=dtype) for _ in range(3))


@torch.library.custom_op("pixelrnn::cross_entropy_backward", mutates_args=())
def cross_entropy_backward_op(d_nats: Tensor, logits: Tensor, target: Tensor, most: Tensor, log_sum: Tensor) -> Tensor:
    n, v = logits.shape
    d_logits = logits.new_empty(n, v)
    if n:
        sizes = constants(v, logits.dtype == torch.float64)
        tensors = d_nats.contiguous(), logits.contiguous(), target.contiguous(), most, log_sum, d_logits
        launch(cross_entropy_bwd_kernel, (cdiv(n, sizes["ROWS"]),), *tensors, n, v, **sizes)
    return d_logits


@cross_entropy_backward_op.register_fake
def _(d_nats, logits, target, most, log_sum):
    return logits.new_empty(logits.shape)


def setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the outputs kept for `backward` have no gradient: make no zeros for it
    ctx.save_for_backward(*inputs, *output[1:])


def backward(ctx, d_nats, *_):
    if d_nats is None:
        return None, None
    return cross_entropy_backward_op(d_nats, *ctx.saved_tensors), None


cross_entropy_op.register_autograd(backward, setup_context=setup_context)


def cross_entropy(logits: Tensor, target: Tensor, backend: str | None = None) -> Tensor:
    """Compute the nats of each target under a softmax.

    Args:
        logits: (… v), v from 1 to MOST_LEVELS where Triton computes; sums are in float32 at least.
        target: integers in [0, v), (…).
        backend: see `kernels.backend_for`.

    Returns:
        (…), in float32, or float64 if the logits are.

    Source: 1601.06759, section 3.1 (a softmax over the levels of each sub-pixel).
    """
    v = logits.shape[-1]
    if backend_for(logits, backend) == "triton" and v <= MOST_LEVELS:
        return cross_entropy_op(logits.reshape(-1, v), target.reshape(-1))[0].view(target.shape)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nats = F.cross_entropy(logits.reshape(-1, v), target.reshape(-1).long(), reduction="none")
    return nats.view(target.shape)
