"""The LSTM scans on a GPU: how they are cut, their launches and their gradients.

Legend: b batch · h w rows, columns · d direction · f hidden features · n taps.

`kernels.lstm_scan_kernel` has the kernels, the mathematics and the four forms. If a program of the form "shared" gives
up waiting for another one, `scan` raises an error.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from checks import one_of, unexpected
from kernels.jit import cdiv, launch, multiprocessors, next_power_of_2, tl, triton
from kernels.lstm_scan_kernel import lstm_scan_bwd_kernel, lstm_scan_fwd_kernel

FORMS = ("carried", "streamed", "launches", "shared")
MANY = 128  # features from which "shared" is the usual form: the diagonal scan took about half of the time on an H200
PATIENCE = 10**6  # looks at another program's count: a second or so


class Form(NamedTuple):
    """How a scan is cut: the kernels' constants and the grid."""

    name: str
    images: int  # of a program
    positions: int  # of each of these images in a program, a power of two
    block_n: int  # features computed at a time
    block_k: int  # features read at a time, of one tap
    warps: int
    stages: int  # loads under way at once
    fast: bool = False  # tanh and σ by `tanh_approx`


def form_of(f: int, taps: int, extent: int, itemsize: int, backward: bool, name: str = "auto") -> Form:
    """Choose the form for f features, `taps` taps, `extent` positions, and numbers of `itemsize` bytes.

    The blocks are the quickest, by `python -m bench.model` and by `python -m bench.sweep` on an H200, of those that
    leave no register on the stack (`python -m bench.compile`). Where f is no multiple of 16, each number needs an
    address of its own in a register, so blocks are smaller.

    Raises:
        ValueError: there is no form `name`, or it is not for this size.
    """
    padded = max(16, next_power_of_2(f))
    positions = min(64, next_power_of_2(extent))
    images = max(1, 16 // positions)  # a matrix product has at least 16 rows
    half, even = itemsize == 2, f % 16 == 0
    # What is carried from step to step takes registers, and so do all operands where there are no matrix instructions.
    fits = half and even and padded <= 32 and images * positions * padded <= 1024
    fits = fits and taps * padded <= (64 if backward else 128)
    if name == "auto":
        name = "launches" if extent > 64 or f > 256 else "carried" if fits else "streamed"
    allowed = FORMS if extent <= positions else ("launches",)
    if name not in allowed:
        raise unexpected("form", name, f"{one_of(allowed)} for {extent} positions")
    if not {"carried": fits, "shared": half and even}.get(name, True) and not triton.knobs.runtime.interpret:
        sizes = f"{f} features of {itemsize} bytes at {extent} positions"
        raise unexpected("form", name, f"streamed or launches for {sizes}, which do not fit in registers")
    if name == "carried":
        warps = images * positions // 16 if backward else 8 if padded == 32 else 4
        return Form(name, images, positions, padded, padded, warps, 2 if backward and padded == 32 else 3)
    if not half:
        block_n, block_k, warps = 16, 16, 4
    elif not even:
        block_n, block_k, warps = 32 if backward else 16, 64, 8 if padded > 16 else 4
    elif name == "shared":
        block_n, block_k, warps = 32, 128 if backward else 64, 8
    elif backward:
        few = images * positions <= 32
        block_n, block_k, warps = 32 if name == "launches" else 128 if few else 64, 64, 8
    elif images * positions > 32:
        block_n, block_k, warps = 32, 64, 8
    elif name == "launches":
        block_n, block_k, warps = 64, 64, 8
    else:
        block_n, block_k, warps = 128, 32, 8
    stages = 3 if half and even else 1
    return Form(name, images, positions, min(block_n, padded), min(block_k, padded), warps, stages)


def constants(form: Form, f: int, taps: int, directions: int, diagonal: bool, state: torch.dtype) -> dict:
    """The kernels' constexpr arguments and options."""
    return {
        "DIRECTIONS": directions,
        "TAPS": taps,
        "DIAGONAL": diagonal,
        "CARRIED": form.name == "carried",
        "SHARED": form.name == "shared",
        "IMAGES": form.images,
        "POSITIONS": form.positions,
        "ONE": form.name in ("launches", "shared") or f <= form.block_n,
        "BLOCK_N": form.block_n,
        "BLOCK_K": form.block_k,
        "STAGES": form.stages,
        "PATIENCE": PATIENCE,
        "FAST": form.fast,
        "STATE": tl.float64 if state == torch.float64 else tl.float32,
        "num_warps": form.warps,
        "num_stages": 1,
        "maxnreg": 255,  # all that there are: no two programs share a multiprocessor, and the stack is slow
    }


def grid_of(form: Form, shape: tuple, f: int, diagonal: bool) -> tuple[int, int, int]:
    """The programs of a launch: images and directions, positions, features."""
    b, h, w, d = shape
    parts = 1 if form.name in ("carried", "streamed") else cdiv(f, form.block_n)
    return cdiv(b, form.images) * d, cdiv(h if diagonal else w, form.positions), parts


def scan(kernel, tensors: list[Tensor], shape: tuple, f: int, taps: int, diagonal: bool, form: Form, state) -> None:
    """Run a kernel over all steps: in one launch, or a launch a step, backwards for the backward kernel."""
    b, h, w, d = shape
    steps = h + w - 1 if diagonal else h
    options, grid = constants(form, f, taps, d, diagonal, state), grid_of(form, shape, f, diagonal)
    if form.name in ("carried", "streamed"):
        launch(kernel, grid, *tensors, None, b, h, w, f, 0, steps, **options)
        return
    if form.name == "shared":
        if (programs := prod(grid)) > (processors := multiprocessors(tensors[0].device)):
            raise unexpected("form", "shared", f"another form: {programs} programs for {processors} multiprocessors")
        counts = tensors[0].new_zeros(grid[0] + 1, dtype=torch.int32)
        launch(kernel, grid, *tensors, counts, b, h, w, f, 0, steps, launch_cooperative_grid=True, **options)
        torch._assert_async(counts[-1] == 0, "a scan's program waited in vain for another one")
        return
    order = range(steps) if kernel is lstm_scan_fwd_kernel else reversed(range(steps))
    for step in order:
        launch(kernel, grid, *tensors, None, b, h, w, f, step, step + 1, **options)


def may_share(f: int, itemsize: int) -> bool:
    """Whether "shared" is for such features, and programs run beside each other, as the interpreter's do not."""
    return f >= MANY and f % 16 == 0 and itemsize == 2 and not triton.knobs.runtime.interpret


def sizes_of(pre: Tensor, state_weight: Tensor, diagonal: bool, form: str, fast: bool, backward: bool):
    """Find the shape (b h w d), f, the number of taps, the form and the type of states."""
    if fast and pre.dtype != torch.bfloat16:
        raise unexpected("fast", fast, f"False for {pre.dtype}: it is for torch.bfloat16")
    b, h, w, d, gates = pre.shape
    f, taps = gates // 4, state_weight.shape[2] // (gates // 4)
    of = f, taps, h if diagonal else w, pre.element_size(), backward
    cut = form_of(*of, form)
    if form == "auto" and cut.name == "streamed" and may_share(f, pre.element_size()):
        shared = form_of(*of, "shared")
        if prod(grid_of(shared, (b, h, w, d), f, diagonal)) <= multiprocessors(pre.device):
            cut = shared
    cut = cut._replace(fast=True) if fast else cut
    return (b, h, w, d), f, taps, cut, torch.float64 if pre.dtype == torch.float64 else torch.float32


@torch.library.custom_op("pixelrnn::lstm_scan", mutates_args=())
def lstm_scan_op(
    pre: Tensor, state_weight: Tensor, diagonal: bool, form: str, fast: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape, f, taps, cut, state = sizes_of(pre, state_weight, diagonal, form, fast, False)
    pre = pre.contiguous()
    gates, hidden = torch.empty_like(pre), pre.new_empty(*shape, f)
    cells = pre.new_empty(*shape, f, dtype=state)
    if pre.numel():
        weight = state_weight.to(pre.dtype).mT.contiguous()  # (d n·f 4f)
        scan(lstm_scan_fwd_kernel, [pre, weight, gates, hidden, cells], shape, f, taps, diagonal, cut, state)
    return hidden, gates, cells


@lstm_scan_op.register_fake
def _(pre, state_weight, diagonal, form, fast):
    f = pre.shape[4] // 4
    state = torch.float64 if pre.dtype == torch.float64 else torch.float32
    hidden = pre.new_empty(*pre.shape[:4], f)
    return hidden, pre.new_empty(pre.shape), pre.new_empty(*pre.shape[:4], f, dtype=state)


@torch.library.custom_op("pixelrnn::lstm_scan_backward", mutates_args=())
def lstm_scan_backward_op(
    d_hidden: Tensor,
    state_weight: Tensor,
    hidden: Tensor,
    gates: Tensor,
    cells: Tensor,
    diagonal: bool,
    form: str,
    fast: bool,
) -> tuple[Tensor, Tensor]:
    shape, f, taps, cut, state = sizes_of(gates, state_weight, diagonal, form, fast, True)
    b, d, extent = shape[0], shape[3], shape[1] if diagonal else shape[2]
    d_pre = torch.empty_like(gates)
    if not gates.numel():
        return d_pre, state_weight.new_zeros(state_weight.shape)
    weight = state_weight.to(gates.dtype).contiguous()  # (d 4f n·f)
    d_cells = cells.new_zeros(b, d, extent, f)
    tensors = [d_hidden.contiguous(), weight, gates, cells, d_pre, d_cells]
    scan(lstm_scan_bwd_kernel, tensors, shape, f, taps, diagonal, cut, state)
    read = what_taps_read(hidden, taps, diagonal).view(-1, d, taps * f).transpose(0, 1)  # (d bhw n·f)
    d_gates = d_pre.view(-1, d, 4 * f).permute(1, 2, 0)  # (d 4f bhw)
    if gates.dtype == torch.bfloat16 and gates.is_cuda:
        d_weight = torch.bmm(d_gates, read, out_dtype=torch.float32)
    else:
        d_weight = torch.bmm(d_gates, read)
    return d_pre, d_weight.to(state_weight.dtype)


@lstm_scan_backward_op.register_fake
def _(d_hidden, state_weight, hidden, gates, cells, diagonal, form, fast):
    return torch.empty_like(gates), state_weight.new_empty(state_weight.shape)


def what_taps_read(hidden: Tensor, taps: int, diagonal: bool) -> Tensor:
    """Gather the hidden states (b h w d f) that each pixel's gates were computed from: (b h w d n f)."""
    out = hidden.new_zeros(*hidden.shape[:4], taps, hidden.shape[4])
    if diagonal:
        out[:, :, 1:, 0, 0] = hidden[:, :, :-1, 0]
        out[:, :, :-1, 1, 0] = hidden[:, :, 1:, 1]
        out[:, 1:, :, :, 1] = hidden[:, :-1]
        return out
    w = hidden.shape[2]
    for tap in range(taps):
        shift = tap - taps // 2
        if abs(shift) < w:
            at, read = slice(max(0, -shift), w - max(0, shift)), slice(max(0, shift), w - max(0, -shift))
            out[:, 1:, at, :, tap] = hidden[:, :-1, read]
    return out


def setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the outputs kept for `backward` have no gradient: make no zeros for it
    ctx.save_for_backward(inputs[1], *output)
    ctx.named = inputs[2:]


def backward(ctx, d_hidden, *_):
    if d_hidden is None:
        return (None,) * 5
    return *lstm_scan_backward_op(d_hidden, *ctx.saved_tensors, *ctx.named), None, None, None


lstm_scan_op.register_autograd(backward, setup_context=setup_context)


def lstm_scan(pre: Tensor, state_weight: Tensor, diagonal: bool, form: str = "auto", fast: bool = False) -> Tensor:
    """Scan images whose input-to-state product is given.

    Args:
        pre: gates before activation, without what states add (b h w d 4f); bfloat16, float32 or float64.
        state_weight: (d 4f n·f), the taps side by side; products are in `pre`'s type, sums in float32 at least.
        diagonal: the Diagonal BiLSTM's scan (d = n = 2), else the Row LSTM's (d = 1, n odd).
        form: one of `FORMS`, or "auto".
        fast: in bfloat16, compute tanh and σ in one instruction that is off by 2⁻¹¹ of its result at most. Only
            NVIDIA's GPUs have it; the interpreter does not. On an H200 the scan forward was 15 % quicker with 128
            features and slower with 16, so it is off by default.

    Returns:
        The hidden states (b h w d f), in `pre`'s type.
    """
    return lstm_scan_op(pre, state_weight, diagonal, form, fast)[0]
