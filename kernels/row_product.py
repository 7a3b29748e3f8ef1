"""What finished rows give to a row: one product a layer, for all columns and layers in one launch.

Legend: b batch · w columns · k features read at a place · taps: the places that a column reads · f outputs.

    out[layer, image, j] = bias[layer] + Σ_source Σ_tap weight[layer, tap] · source[layer, image, j, tap]

A source (layers b w taps k) is a view, of windows for instance, which overlap in memory. torch multiplies only what has
been copied side by side; the kernel reads a source where it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import cdiv, jit, launch, next_power_of_2, tl


@jit
def add_products(
    total,
    x,
    at,  # where each pixel's first tap is
    x_tap,
    weight,  # of the layer, from this source on
    n,
    live,  # which pixels there are
    k,
    f,
    TAPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Add what a source gives to each pixel and output."""
    precision: tl.constexpr = "tf32x3" if x.dtype.element_ty == tl.float32 else "ieee"
    blocks = tl.cdiv(k, BLOCK_K)
    for block in range(0, TAPS * blocks):
        tap, feature = block // blocks, block % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(x + at[:, None] + (tap * x_tap + feature)[None, :], mask=live & (feature < k)[None, :], other=0.0)
        rows = weight + (tap * k + feature)[:, None] * f + n[None, :]
        b = tl.load(rows, mask=(feature < k)[:, None] & (n < f)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=precision, out_dtype=total.dtype)
    return total


@jit(varying=("pixels", "width"))
def row_product_kernel(
    x,  # [layer, image, column, tap, feature], features next to each other
    x_image,
    x_column,
    x_tap,
    x_k,
    y,  # a second source, or None
    y_image,
    y_column,
    y_tap,
    y_k,
    weight,  # (layers inputs f), those of x first
    bias,  # (layers f)
    out,  # (layers b w f)
    pixels,  # b · w
    width,
    f,
    X_TAPS: tl.constexpr,
    Y_TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUM: tl.constexpr,
):
    # Programs that read the same pixels follow one another, so that the L2 cache has them.
    blocks = tl.cdiv(f, BLOCK_N)
    m = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pixel = m.to(tl.int32)  # a division of 64-bit numbers is a call of a function
    layer, column = tl.program_id(1).to(tl.int64), pixel % width
    image = layer * (pixels // width) + pixel // width  # of all layers
    live, total = (m < pixels)[:, None], tl.zeros((BLOCK_M, BLOCK_N), SUM)
    of_layer = weight + layer * (X_TAPS * x_k + Y_TAPS * y_k) * f
    at = image * x_image + column * x_column
    total = add_products(total, x, at, x_tap, of_layer, n, live, x_k, f, X_TAPS, BLOCK_K)
    if Y_TAPS > 0:
        at = image * y_image + column * y_column
        total = add_products(total, y, at, y_tap, of_layer + X_TAPS * x_k * f, n, live, y_k, f, Y_TAPS, BLOCK_K)
    total += tl.load(bias + layer * f + n, mask=n < f, other=0.0).to(SUM)[None, :]
    at_out = (layer * pixels + m)[:, None] * f + n[None, :]
    tl.store(out + at_out, total.to(out.dtype.element_ty), mask=live & (n < f)[None, :])


def strides(x: Tensor) -> tuple[int, int, int]:
    """Find how far apart the images of all layers are, the columns, and the taps."""
    layers, b, _, _, k = x.shape
    image = x.stride(1) if layers == 1 else x.stride(0) // b
    assert (k == 1 or x.stride(4) == 1) and (b == 1 or x.stride(1) == image), "a source that is no such view"
    return image, *x.stride()[2:4]


def constants(sources: tuple[Tensor, ...], f: int) -> dict:
    """Choose the blocks. They are smaller where 16 does not divide a size: each number then needs its own address."""
    itemsize = sources[0].element_size()
    odd = any(n % 16 for x in sources for n in (*strides(x), x.shape[4])) or f % 16 > 0
    if itemsize == 8:  # without matrix instructions, all operands are in registers
        m, n, k, warps, stages = 16, 16, 16, 4, 1
    elif itemsize == 4 or odd:
        m, n, k, warps, stages = 64, 64, 32, 4, 2
    else:
        m, n, k, warps, stages = 128, 128, 64, 8, 3
    n, k = (max(16, min(size, next_power_of_2(need))) for size, need in ((n, f), (k, max(x.shape[4] for x in sources))))
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages, "maxnreg": 255}


def row_product(sources: tuple[Tensor, ...], weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """Multiply one or two sources, on a GPU, with the weights of each layer.

    Args:
        sources: views (layers b w taps k), features next to each other, and images of all layers evenly spaced.
        weight: (layers inputs f), the inputs of the first source first, tap after tap.
        bias: (layers f).
        out: where to write (layers b w f).
    """
    layers, b, w, f = out.shape
    assert b * w < 2**31 and weight.is_contiguous() and bias.is_contiguous() and out.is_contiguous()
    arguments = []
    for x in (*sources, None)[:2]:
        arguments += [None, 0, 0, 0, 0] if x is None else [x, *strides(x), x.shape[4]]
    taps = [x.shape[3] for x in sources]
    chosen = constants(sources, f)
    grid = cdiv(b * w, chosen["BLOCK_M"]) * cdiv(f, chosen["BLOCK_N"]), layers
    flags = {"X_TAPS": taps[0], "Y_TAPS": taps[1] if len(taps) > 1 else 0}
    flags["SUM"] = tl.float64 if out.dtype == torch.float64 else tl.float32
    launch(row_product_kernel, grid, *arguments, weight, bias, out, b * w, w, f, **flags, **chosen)
