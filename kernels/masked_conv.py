"""Masked convolution (1601.06759, section 3.4): only rows up to the centre, optionally of the ReLU of its input.

Legend: b batch · h w rows, columns · k input features · f output features · R rows of the kernel, the last of which is
its centre row · C columns of the kernel (odd) · taps: the R·C positions of the kernel, row by row.

    out(i, j) = bias + Σ_{y < R} Σ_{x < C} weight[:, :, y, x] · act(u(i + y − (R − 1), j + x − C//2))

with zeros outside the image and act the identity or ReLU. The weight arrives masked: the caller decides what it may see
in the centre row; the rows below the centre, all masked, are left out. Of the other taps only the first `live` are
read: a 3×3 of mask B has R, C = 2, 3 and 5 live taps, of mask A 4 where it hides all of the centre; a 1×3 has
R, C = 1, 3 and 2 live taps. Channels are last.

The Triton form is an implicit matrix product: pixels × (live taps · input features) × output features, whose first
operand is gathered from the map by address. The gradient of the map is the same product, with the kernel turned; that
of the weight is (live taps · input features) × pixels × output features, in parts of the pixels that are summed
afterwards, in the same order each time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import autocast, backend_for
from kernels.jit import cdiv, jit, launch, next_power_of_2, tl


def masked_conv_reference(
    u: Tensor, weight: Tensor, bias: Tensor, relu: bool = False, extra: int = 0, live: int | None = None
) -> Tensor:
    """Compute `masked_conv` as a dense convolution with the rows below the centre set to zero: the oracle."""
    rows, columns = weight.shape[2:]
    if live is not None:
        weight = weight * (torch.arange(rows * columns, device=weight.device) < live).view(rows, columns)
    u = F.pad(u.relu() if relu else u, (0, 0, 0, extra)).permute(0, 3, 1, 2)
    whole = F.pad(weight, (0, 0, 0, rows - 1))
    return F.conv2d(u, whole, bias, padding=(rows - 1, columns // 2)).permute(0, 2, 3, 1)


# ------------------------------------------------------------------------------------------------------- kernels


@jit
def tap_of(k_tap, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TURNED: tl.constexpr):
    """How far from a pixel, in rows and columns, a tap reads; turned, how far the pixel is that reads it."""
    di = k_tap // COLUMNS - (ROWS - 1)
    dj = k_tap % COLUMNS - COLUMNS // 2
    if TURNED:
        return -di, -dj
    else:
        return di, dj


@jit
def place_of(pixel, h, w):
    """Find the row of all images, in 64 bits, then the row and the column of pixels.

    There are fewer than 2³¹ pixels, and a division of 64-bit numbers is a call of a function.
    """
    pixel = pixel.to(tl.int32)
    line = pixel // w
    return line.to(tl.int64), line % h, pixel % w


@jit(varying=("pixels", "h", "w_in", "w_out"))
def masked_conv_kernel(
    u,  # (b h w_in k)
    weight,  # (taps k f)
    bias,  # (f)
    seen,  # (b h w_out f): where it is not positive, the output is zero
    out,  # (b h w_out f)
    pixels,  # b · h · w_out
    h,
    w_in,
    w_out,
    k,
    f,
    TAPS: tl.constexpr,  # live ones
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TURNED: tl.constexpr,
    RELU: tl.constexpr,
    BIAS: tl.constexpr,
    SEEN: tl.constexpr,
    FEW: tl.constexpr,  # taps and features in one index: features are too few to fill a block
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    line, i, j = place_of(m, h, w_out)
    centre = (line * w_in + j) * k
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    blocks = tl.cdiv(TAPS * k, BLOCK_K) if FEW else TAPS * tl.cdiv(k, BLOCK_K)
    for block in range(0, blocks):
        if FEW:
            index = block * BLOCK_K + tl.arange(0, BLOCK_K)
            tap, feature, live = (index // k)[None, :], index % k, index < TAPS * k
            row = index
        else:
            tap = block // tl.cdiv(k, BLOCK_K)
            feature = block % tl.cdiv(k, BLOCK_K) * BLOCK_K + tl.arange(0, BLOCK_K)
            live = feature < k
            row = tap * k + feature
        di, dj = tap_of(tap, ROWS, COLUMNS, TURNED)
        y, x = i[:, None] + di, j[:, None] + dj
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w_in) & (m < pixels)[:, None]
        at = centre[:, None] + (di * w_in + dj) * k + feature[None, :]
        a = tl.load(u + at, mask=inside & live[None, :], other=0.0)
        if RELU:
            a = tl.where(a > 0, a, 0.0).to(a.dtype)
        b = tl.load(weight + row[:, None] * f + n[None, :], mask=live[:, None] & (n < f)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=SUM)
    if BIAS:
        total += tl.load(bias + n, mask=n < f, other=0.0).to(SUM)[None, :]
    at_out = m[:, None] * f + n[None, :]
    mask = (m < pixels)[:, None] & (n < f)[None, :]
    if SEEN:
        total = tl.where(tl.load(seen + at_out, mask=mask, other=0.0) > 0, total, 0.0)
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=mask)


@jit(varying=("pixels", "pixels_of_part", "h", "w_in", "w_out"))
def masked_conv_weight_kernel(
    u,  # (b h w_in k)
    d_out,  # (b h w_out f)
    parts,  # (parts taps·k f), out: the sums over the pixels of each part
    pixels,  # b · h · w_out
    pixels_of_part,  # a multiple of BLOCK_P
    h,
    w_in,
    w_out,
    k,
    f,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    SUM: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * pixels_of_part
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # of TAPS · k
    n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    di, dj = tap_of(m // k, ROWS, COLUMNS, False)
    offset = (di * w_in + dj) * k + m % k
    total = tl.zeros((BLOCK_M, BLOCK_N), SUM)
    for block in range(0, pixels_of_part // BLOCK_P):
        p = first + block * BLOCK_P + tl.arange(0, BLOCK_P)
        line, i, j = place_of(p, h, w_out)
        y, x = i[None, :] + di[:, None], j[None, :] + dj[:, None]
        inside = (y >= 0) & (y < h) & (x >= 0) & (x < w_in) & (p < pixels)[None, :] & (m < TAPS * k)[:, None]
        a = tl.load(u + ((line * w_in + j) * k)[None, :] + offset[:, None], mask=inside, other=0.0)  # (m p)
        if RELU:
            a = tl.where(a > 0, a, 0.0).to(a.dtype)
        b = tl.load(d_out + p[:, None] * f + n[None, :], mask=(p < pixels)[:, None] & (n < f)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee", out_dtype=SUM)
    at = (tl.program_id(0).to(tl.int64) * TAPS * k + m)[:, None] * f + n[None, :]
    tl.store(parts + at, total, mask=(m < TAPS * k)[:, None] & (n < f)[None, :])


def block(size: int, most: int) -> int:
    """A power of two from 16 to `most` that holds `size`, if one does."""
    return max(16, min(most, next_power_of_2(size)))


def by_number(k: int, f: int) -> dict:
    """Choose options where sixteen does not divide k or f, so that each number needs its own load and address.

    Unless told how many registers there are, the assembler puts some of these many addresses on the stack, to make room
    for another program.
    """
    return {"maxnreg": 255} if k % 16 or f % 16 else {}


def product_constants(taps: int, k: int, f: int, itemsize: int) -> dict:
    """Choose the blocks of `masked_conv_kernel`. Exact products of float32 have no matrix instruction: smaller ones.

    Where each number has an address of its own (`by_number`), more threads and smaller blocks hold them in registers.
    A loop of four rounds needs no third block on its way, whose addresses took more registers than there were on sm_80.
    """
    few, odd = k < 16, k % 16 > 0 or f % 16 > 0
    if itemsize > 2:
        sizes = {"BLOCK_M": 256 // itemsize, "BLOCK_N": block(f, 128 // itemsize), "BLOCK_K": 16}
        return {"FEW": few, **sizes, "num_warps": 4, "num_stages": 2, **by_number(k, f)}
    return {
        "FEW": few,
        "BLOCK_M": 128,
        "BLOCK_N": block(f, 64 if f % 16 else 128),
        "BLOCK_K": 32 if few else block(k, 32 if odd or f <= 32 else 64),
        "num_warps": 8 if f % 16 or f > (32 if odd else 64) else 4,
        "num_stages": 3 if taps * k > 256 else 2,
        **by_number(k, f),
    }


def weight_constants(taps: int, k: int, f: int, itemsize: int) -> dict:
    """Choose the blocks of `masked_conv_weight_kernel`; of wide outputs, fewer on their way, as above."""
    rows, options = taps * k, by_number(k, f)
    if itemsize > 2:
        sizes = {"BLOCK_M": block(rows, 128 // itemsize), "BLOCK_N": block(f, 128 // itemsize), "BLOCK_P": 16}
        return {**sizes, "num_warps": 4, "num_stages": 2, **options}
    if k % 16 or f % 16:
        sizes = {"BLOCK_M": block(rows, 64), "BLOCK_N": block(f, 64), "BLOCK_P": 32}
        return {**sizes, "num_warps": 8, "num_stages": 3, **options}
    sizes = {"BLOCK_M": block(rows, 64), "BLOCK_N": block(f, 128), "BLOCK_P": 64}
    return {**sizes, "num_warps": 4, "num_stages": 3 if f <= 128 else 2}


def sum_type(x: Tensor):
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def product(u: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor | None, shape: tuple, kernel: tuple, **flags):
    """Multiply a map u (b h w_in k) with a weight (taps k f), for an output of `shape` (b h w_out f)."""
    (b, h, w_out, f), (taps, k, _), (rows, columns) = shape, weight.shape, kernel
    out = u.new_empty(shape)
    pixels = b * h * w_out
    assert pixels < 2**31
    if pixels:
        constants = product_constants(taps, k, f, u.element_size())
        grid = cdiv(pixels, constants["BLOCK_M"]), cdiv(f, constants["BLOCK_N"])
        sizes = pixels, h, u.shape[2], w_out, k, f
        given = {"TAPS": taps, "ROWS": rows, "COLUMNS": columns, "BIAS": bias is not None, "SEEN": seen is not None}
        nothing = [out if x is None else x for x in (bias, seen)]
        flags = {**given, **flags, "SUM": sum_type(u)}
        launch(masked_conv_kernel, grid, u, weight, *nothing, out, *sizes, **flags, **constants)
    return out


@torch.library.custom_op("pixelrnn::masked_conv", mutates_args=())
def masked_conv_op(u: Tensor, weight: Tensor, bias: Tensor, relu: bool, extra: int, live: int) -> Tensor:
    b, h, w, _ = u.shape
    taps = weight.to(u.dtype).flatten(2)[:, :, :live].permute(2, 1, 0).contiguous()  # (live k f)
    shape = b, h, w + extra, weight.shape[0]
    return product(u.contiguous(), taps, bias.contiguous(), None, shape, weight.shape[2:], TURNED=False, RELU=relu)


@masked_conv_op.register_fake
def _(u, weight, bias, relu, extra, live):
    return u.new_empty(*u.shape[:2], u.shape[2] + extra, weight.shape[0])


@torch.library.custom_op("pixelrnn::masked_conv_input_gradient", mutates_args=())
def input_gradient_op(d_out: Tensor, u: Tensor, weight: Tensor, relu: bool, live: int) -> Tensor:
    taps = weight.to(u.dtype).flatten(2)[:, :, :live].permute(2, 0, 1).contiguous()  # (live f k)
    seen = u.contiguous() if relu else None
    d_out = d_out.to(u.dtype).contiguous()
    return product(d_out, taps, None, seen, u.shape, weight.shape[2:], TURNED=True, RELU=False)


@input_gradient_op.register_fake
def _(d_out, u, weight, relu, live):
    return u.new_empty(u.shape)


@torch.library.custom_op("pixelrnn::masked_conv_weight_gradient", mutates_args=())
def weight_gradient_op(d_out: Tensor, u: Tensor, weight: Tensor, relu: bool, live: int) -> Tensor:
    (b, h, w_out, f), (w_in, k), (rows, columns) = d_out.shape, u.shape[2:], weight.shape[2:]
    u, d_out, pixels = u.contiguous(), d_out.to(u.dtype).contiguous(), b * h * w_out
    assert pixels < 2**31
    d_weight = weight.new_zeros(weight.shape)
    if pixels:
        constants = weight_constants(live, k, f, u.element_size())
        tiles = cdiv(live * k, constants["BLOCK_M"]), cdiv(f, constants["BLOCK_N"])
        # Enough parts to give each multiprocessor about two programs, none shorter than eight blocks.
        num_parts = max(1, min(256 // (tiles[0] * tiles[1]), cdiv(pixels, 8 * constants["BLOCK_P"])))
        part = cdiv(cdiv(pixels, num_parts), constants["BLOCK_P"]) * constants["BLOCK_P"]
        num_parts = cdiv(pixels, part)
        state = torch.float64 if u.dtype == torch.float64 else torch.float32
        parts = u.new_empty(num_parts, live * k, f, dtype=state)
        sizes = pixels, part, h, w_in, w_out, k, f
        flags = {"TAPS": live, "ROWS": rows, "COLUMNS": columns, "RELU": relu, "SUM": sum_type(u)}
        launch(masked_conv_weight_kernel, (num_parts, *tiles), u, d_out, parts, *sizes, **flags, **constants)
        d_weight.flatten(2)[:, :, :live] = parts.sum(0).view(live, k, f).permute(2, 1, 0)
    return d_weight


@weight_gradient_op.register_fake
def _(d_out, u, weight, relu, live):
    return weight.new_empty(weight.shape)


def setup_context(ctx, inputs, output) -> None:
    u, weight, _, ctx.relu, _, ctx.live = inputs
    ctx.save_for_backward(u, weight)


def backward(ctx, d_out):
    u, weight = ctx.saved_tensors
    arguments = d_out, u, weight, ctx.relu, ctx.live
    d_u = input_gradient_op(*arguments) if ctx.needs_input_grad[0] else None
    d_weight = weight_gradient_op(*arguments) if ctx.needs_input_grad[1] else None
    d_bias = None
    if ctx.needs_input_grad[2]:
        d_bias = d_out.sum((0, 1, 2), dtype=weight.dtype)
    return d_u, d_weight, d_bias, None, None, None


masked_conv_op.register_autograd(backward, setup_context=setup_context)

# ---------------------------------------------------------------------------------------------------- torch form


def channels_first(u: Tensor) -> Tensor:
    """(b h w k) → a view (b k h w), whose memory is what torch calls channels last."""
    return u.permute(0, 3, 1, 2)


def channels_last(u: Tensor) -> Tensor:
    """(b k h w) → (b h w k), a view of memory that is channels last already."""
    return u.permute(0, 2, 3, 1)


class MaskedConv(torch.autograd.Function):
    """The torch form. Both gradients are convolutions of padded maps too, so all of it stays channels last."""

    @staticmethod
    def forward(ctx, u, weight, bias, relu, extra):
        b, h, w, k = u.shape
        above, beside = weight.shape[2] - 1, weight.shape[3] // 2
        padded = u.new_zeros(b, h + above, w + 2 * beside + extra, k)
        padded[:, above:, beside : beside + w] = u.relu() if relu else u
        ctx.save_for_backward(padded, weight)
        ctx.relu, ctx.extra = relu, extra
        return channels_last(F.conv2d(channels_first(padded), weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        padded, weight = ctx.saved_tensors
        d_u = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            # u(i, j) is seen from rows i and below, with the kernel turned by half a turn.
            above, beside = weight.shape[2] - 1, weight.shape[3] // 2
            around = F.pad(d_out, (0, 0, beside, beside - ctx.extra, 0, above))
            turned = weight.transpose(0, 1).flip(2, 3).contiguous(memory_format=torch.channels_last)
            d_u = channels_last(F.conv2d(channels_first(around), turned))
            if ctx.relu:
                inside = padded[:, above:, beside : beside + d_u.shape[2]]
                d_u = torch.ops.aten.threshold_backward(d_u, inside, 0)
        if ctx.needs_input_grad[1]:
            stride, none, dilation = [1, 1], [0, 0], [1, 1]
            arguments = channels_first(d_out), channels_first(padded), weight, None, stride, none, dilation
            wanted = [False, True, False]  # its sum for the bias takes as long as the weight's gradient
            _, d_weight, _ = torch.ops.aten.convolution_backward(*arguments, False, none, 1, wanted)
        if ctx.needs_input_grad[2]:
            d_bias = d_out.flatten(0, 2).sum(0)
        return d_u, d_weight, d_bias, None, None


def masked_conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool = False,
    extra: int = 0,
    live: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve with the rows of a masked kernel up to its centre.

    Args:
        u: features (b h w k).
        weight: (f k R C), masked by the caller; its last row is the kernel's centre row.
        bias: (f).
        relu: whether u passes through a ReLU first.
        extra: columns more than u has, at most C//2, at the right end, where the centre is outside the image.
        live: how many taps, row by row, are read; what weight holds for the others must be zero, and their gradient
            is not computed where that saves time. None: all.
        backend: see `kernels.backend_for`.

    Returns:
        (b h w+extra f).

    Source: 1601.06759, section 3.4.
    """
    u, weight, bias = autocast(u, weight, bias)
    if backend_for(u, backend) == "triton":
        live = weight.shape[2] * weight.shape[3] if live is None else live
        return masked_conv_op(u, weight, bias, relu, extra, live)
    return MaskedConv.apply(u, weight, bias, relu, extra)
