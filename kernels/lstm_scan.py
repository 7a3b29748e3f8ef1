"""The LSTM scans on a GPU: one Triton kernel each way for both the Diagonal BiLSTM and the Row LSTM.

Legend: b batch · h w rows, columns · i j a row, a column · d direction · f hidden features · n taps · M positions of
all images of a program. Gates are in the order o f i g, so `4f` is cut in four parts of f.

Both scans compute `positions` of an image together, step after step, each from the step before:

                      step        position      tap t of n reads, at the step before,
    Row LSTM          row i       column j      position j + t − n//2
    Diagonal BiLSTM   i + j       row i         position i − t: t = 0 left (i, j−1), t = 1 up (i−1, j)

    [o f i g] = [σ σ σ tanh](pre + Σ_t state_weight[:, tap t] · hidden(step − 1, what t reads))
    cell      = f ⊙ cell(step − 1, same position) + i ⊙ g
    hidden    = o ⊙ tanh(cell)

`pre` is the input-to-state product with its bias: one matrix product over all pixels, done before. Everything stays
(b h w ·): a diagonal is address arithmetic (`pixel`), nothing is skewed in memory, and a pixel outside the image is a
masked load of zero. Direction 1 counts columns from the right.

One product makes all four gates of a block of features, side by side, and one formula activates them: tanh(x) is
2σ(2x) − 1.

A program owns some images of one direction and walks all steps. One kernel has four forms:

    carried    all weights are loaded once, before the first step, and stay in shared memory; states and cells stay in
               registers. A tap moves the rows of the states by a product with a matrix of zeros and ones, which is
               exact. Nothing that the kernel wrote is read, so the next steps' numbers may be loaded ahead.
    streamed   features in blocks; each block's weights come from the L2 cache at each step
    launches   one launch a step, blocks of positions and features in parallel: for scans too large for one program
    shared     as streamed, but the features of an image are shared out to several programs. A program counts its steps
               in memory, and waits until the others have made the step that it reads. All must run at once: it is a
               cooperative launch, which fails if they do not fit.

The last three read back at each step what the step before stored. So there is a barrier after each block, and nothing
may be loaded ahead of it: only the loops over features that are read fetch ahead, in which nothing is stored, and the
kernels are compiled with `num_stages=1`. Only in the last form programs wait for each other. None waits forever: it
gives up after `PATIENCE` looks, says so in memory, and then `scan` fails. That form has not run on a GPU yet and is
chosen by its name alone.

The backward kernel walks the steps in reverse. The gradient of a pixel's hidden state is gathered from the gate
gradients of those that read it, and the gradient of the weights is one matrix product over all pixels afterwards. The
activated gates are kept for it, in the type of the products; cells are kept in float32.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from checks import one_of, unexpected
from kernels.activations import sigmoid, tanh, tanh_approx
from kernels.jit import cdiv, jit, launch, multiprocessors, next_power_of_2, tl, triton

FORMS = ("carried", "streamed", "launches", "shared")
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

    The blocks are the quickest by `python -m bench.model` of those that leave no register on the stack
    (`python -m bench.compile`). `python -m bench.sweep` times them on a GPU, and has not since one product makes all
    gates. Where f is no multiple of 16, each number is loaded from an address of its own, and only smaller blocks fit
    in registers.

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


# ------------------------------------------------------------------------------------------------------- kernels


@jit
def pixel(step, position, direction, h, w, DIAGONAL: tl.constexpr):
    """Find the pixel of a step and position in its image, and whether there is one."""
    if DIAGONAL:
        i = position
        j = step - position
    else:
        i = tl.zeros_like(position) + step  # a vector like j: Triton 3.9's interpreter cannot broadcast a scalar mask
        j = position
    inside = (i >= 0) & (i < h) & (j >= 0) & (j < w)
    column = tl.where(direction == 0, j, w - 1 - j)
    return i * w + column, inside


@jit
def shift_of(tap, TAPS: tl.constexpr, DIAGONAL: tl.constexpr):
    """How far from its own position a tap reads."""
    if DIAGONAL:
        return -tap
    else:
        return tap - TAPS // 2


@jit
def images_of(DIRECTIONS: tl.constexpr, IMAGES: tl.constexpr, POSITIONS: tl.constexpr):
    """Say what a program owns: one direction, and M pairs of an image, in 64 bits, and a position."""
    direction = tl.program_id(0) % DIRECTIONS
    tile = tl.arange(0, IMAGES * POSITIONS)
    image = (tl.program_id(0) // DIRECTIONS).to(tl.int64) * IMAGES + tile // POSITIONS
    position = tl.program_id(1) * POSITIONS + tile % POSITIONS
    return direction, image, position


@jit
def rows_of(base, step, position, direction, h, w, DIRECTIONS: tl.constexpr, DIAGONAL: tl.constexpr):
    """Find the row of features of each position's pixel at a step, and whether there is such a pixel.

    Args:
        base: the row of each image's first pixel; below zero: there is no such image.
    """
    index, inside = pixel(step, position, direction, h, w, DIAGONAL)
    return base + index * DIRECTIONS, inside & (base >= 0)


@jit
def neighbours(base, step, position, shift, feature, live, direction, h, w, width, DIRECTIONS, DIAGONAL):
    """Find features of other positions at a step, in rows of `width`: offsets (M k) and a mask.

    `shift` is one number, or (1 k): each feature may come from another position.
    """
    row, inside = rows_of(base[:, None], step, position[:, None] + shift, direction, h, w, DIRECTIONS, DIAGONAL)
    return row * width + feature[None, :], inside & live[None, :]


@jit
def shuffle_of(image, position, shift, type: tl.constexpr):
    """Make the matrix (M M) of zeros and ones that has a one where its row is read by its column's position.

    `shift` is how far a position reads. A product with it is exact, as each sum has one term.
    """
    same_image = image[:, None] == image[None, :]
    return (same_image & (position[:, None] == position[None, :] + shift)).to(type)


@jit
def gates_of(block, f, BLOCK_N: tl.constexpr):
    """Where all gates o f i g of a block of features are in rows of 4f: places (4n), and whether they exist."""
    column = tl.arange(0, 4 * BLOCK_N)
    feature = block * BLOCK_N + column % BLOCK_N
    return column // BLOCK_N * f + feature, feature < f


@jit
def activated(sums, FAST: tl.constexpr):
    """Activate sums of the gates o f i g (M 4n)."""
    column = tl.arange(0, sums.shape[1])[None, :]
    slope = tl.where(column < sums.shape[1] // 4 * 3, 1.0, 2.0).to(sums.dtype)
    if FAST:
        half = slope / 2
        return tanh_approx(sums * half) * half + (1 - half)
    return sigmoid(sums * slope) * slope - (slope - 1)


@jit
def split_gates(gates):
    """Cut gates (M 4n) in o f i g (M n)."""
    M: tl.constexpr = gates.shape[0]
    o_i, f_g = tl.split(tl.permute(tl.reshape(gates, (M, 2, 2, gates.shape[1] // 4)), (0, 3, 1, 2)))
    o, i = tl.split(o_i)
    forget, g = tl.split(f_g)
    return o, forget, i, g


@jit
def load_gates(first, stride, mask):
    """Load a block of each gate o f i g: pointers to the first one, and how many numbers further the next one is."""
    o = tl.load(first, mask=mask, other=0.0)
    forget = tl.load(first + stride, mask=mask, other=0.0)
    i = tl.load(first + 2 * stride, mask=mask, other=0.0)
    g = tl.load(first + 3 * stride, mask=mask, other=0.0)
    return o, forget, i, g


@jit
def load_kept(gates, cells, row, before, had_before, n, f, mask):
    """Load what the forward kernel kept of a block of features n: gates o f i g, cells, cells of the step before.

    Outside the image all gates are zeros, and so their gradients are zeros.
    """
    o, forget, i, g = load_gates(gates + row[:, None] * (4 * f) + n[None, :], f, mask)
    cell = tl.load(cells + row[:, None] * f + n[None, :], mask=mask, other=0.0)
    cell_mask = had_before[:, None] & (n < f)[None, :]
    cell_before = tl.load(cells + before[:, None] * f + n[None, :], mask=cell_mask, other=0.0)
    return o, forget, i, g, cell, cell_before


@jit
def store_gates(first, stride, mask, o, forget, i, g):
    """Store a block of each gate, where `load_gates` finds them."""
    type = first.dtype.element_ty
    tl.store(first, o.to(type), mask=mask)
    tl.store(first + stride, forget.to(type), mask=mask)
    tl.store(first + 2 * stride, i.to(type), mask=mask)
    tl.store(first + 3 * stride, g.to(type), mask=mask)


@jit
def join_gates(o, forget, i, g):
    """Put gates o f i g (M n) side by side: (M 4n)."""
    every = tl.join(tl.join(o, i), tl.join(forget, g))  # (M n 2 2)
    return tl.reshape(tl.permute(every, (0, 2, 3, 1)), (o.shape[0], 4 * o.shape[1]))


@jit
def wait(counts, steps, patience):
    """Wait until the programs of one image and direction have made that many steps together, for `patience` looks.

    Returns:
        The patience for the next time: none, if this was in vain.
    """
    made, looks = tl.atomic_add(counts + tl.program_id(0), 0, sem="acquire"), 0
    while (made < steps) & (looks < patience):
        made = tl.atomic_add(counts + tl.program_id(0), 0, sem="acquire")
        looks += 1
    return tl.where(made < steps, 0, patience)


@jit
def made_a_step(counts):
    """Let the other programs see what this one has stored."""
    tl.debug_barrier()
    tl.atomic_add(counts + tl.program_id(0), 1, sem="release")


@jit
def add_product(total, a, b):
    """total + a · b, summed in total's type."""
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@jit(varying=("b", "h", "w", "first", "last"))
def lstm_scan_fwd_kernel(
    pre,  # (b h w d 4f)
    weight,  # (d n·f 4f)
    gates,  # (b h w d 4f), out
    hidden,  # (b h w d f), out
    cells,  # (b h w d f), out
    counts,  # (programs along the first axis + 1) of form "shared", else None: steps made; then how many gave up; zeros
    b,
    h,
    w,
    f,
    first,  # the steps: first … last − 1
    last,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    CARRIED: tl.constexpr,
    SHARED: tl.constexpr,
    IMAGES: tl.constexpr,
    POSITIONS: tl.constexpr,
    ONE: tl.constexpr,  # a program computes one block of features, else all
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,  # how many loads of one loop's are under way: of steps, where carried, else of features
    PATIENCE: tl.constexpr,  # of form "shared"
    FAST: tl.constexpr,  # tanh and σ by `tanh_approx`
    STATE: tl.constexpr,  # the type of sums and cells
):
    direction, image, position = images_of(DIRECTIONS, IMAGES, POSITIONS)
    base = tl.where(image < b, image * h * w * DIRECTIONS + direction, -1)
    weight += direction * TAPS * f * 4 * f
    type = hidden.dtype.element_ty

    if CARRIED or SHARED:
        cell = tl.zeros((IMAGES * POSITIONS, BLOCK_N), STATE)
        patience = tl.zeros((), tl.int32) + PATIENCE
    if CARRIED:
        weights, shuffles = (), ()
        k = tl.arange(0, BLOCK_N)
        column, live = gates_of(0, f, BLOCK_N)
        for tap in tl.static_range(TAPS):
            at_weight = weight + (tap * f + k)[:, None] * (4 * f) + column[None, :]
            weights += (tl.load(at_weight, mask=(k < f)[:, None] & live[None, :], other=0.0),)
            shuffles += (shuffle_of(image, position, shift_of(tap, TAPS, DIAGONAL), type),)
        state = tl.zeros((IMAGES * POSITIONS, BLOCK_N), type)

    for step in tl.range(first, last, num_stages=STAGES if CARRIED else 1):
        row, inside = rows_of(base, step, position, direction, h, w, DIRECTIONS, DIAGONAL)
        for block in range(0, 1 if ONE else tl.cdiv(f, BLOCK_N)):
            n = (tl.program_id(2) + block) * BLOCK_N + tl.arange(0, BLOCK_N)
            column, live = gates_of(tl.program_id(2) + block, f, BLOCK_N)
            mask = inside[:, None] & (n < f)[None, :]
            at_gates = row[:, None] * (4 * f) + column[None, :]
            sums = tl.load(pre + at_gates, mask=inside[:, None] & live[None, :], other=0.0).to(STATE)
            if CARRIED:
                for tap in tl.static_range(TAPS):
                    read = state
                    if not DIAGONAL or tap > 0:  # in columns: no warp then computes what another one does
                        nothing = tl.zeros((BLOCK_N, IMAGES * POSITIONS), STATE)
                        read = tl.trans(add_product(nothing, tl.trans(state), shuffles[tap]).to(type))
                    sums = add_product(sums, read, weights[tap])
            else:
                if SHARED:
                    patience = wait(counts, (step - first) * tl.num_programs(2), patience)
                else:
                    before, had_before = rows_of(base, step - 1, position, direction, h, w, DIRECTIONS, DIAGONAL)
                    cell_mask = had_before[:, None] & (n < f)[None, :]
                    cell = tl.load(cells + before[:, None] * f + n[None, :], mask=cell_mask, other=0.0)
                blocks_k = tl.cdiv(f, BLOCK_K)
                for block_k in tl.range(0, TAPS * blocks_k, num_stages=STAGES):
                    tap = block_k // blocks_k
                    k = block_k % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
                    shift = shift_of(tap, TAPS, DIAGONAL)
                    at_k, read = neighbours(
                        base, step - 1, position, shift, k, k < f, direction, h, w, f, DIRECTIONS, DIAGONAL
                    )
                    states = tl.load(hidden + at_k, mask=read, other=0.0)
                    at_weight = weight + (tap * f + k)[:, None] * (4 * f) + column[None, :]
                    weights = tl.load(at_weight, mask=(k < f)[:, None] & live[None, :], other=0.0)
                    sums = add_product(sums, states, weights)
            o, forget, i, g = split_gates(activated(sums, FAST))
            cell = forget * cell + i * g
            if CARRIED or SHARED:  # nothing is carried out of a pixel outside the image
                cell = tl.where(inside[:, None], cell, 0.0)
            state = (o * (tanh_approx(cell) if FAST else tanh(cell))).to(type)
            at = row[:, None] * f + n[None, :]
            tl.store(hidden + at, state, mask=mask)
            if SHARED:
                made_a_step(counts)
            store_gates(gates + row[:, None] * (4 * f) + n[None, :], f, mask, o, forget, i, g)
            tl.store(cells + at, cell, mask=mask)
            if not (CARRIED or SHARED):
                tl.debug_barrier()  # the next step reads what this one stored
    if SHARED:
        tl.atomic_add(counts + tl.num_programs(0), tl.where(patience == 0, 1, 0))


@jit(varying=("b", "h", "w", "first", "last"))
def lstm_scan_bwd_kernel(
    d_hidden,  # (b h w d f)
    weight,  # (d 4f n·f)
    gates,  # (b h w d 4f)
    cells,  # (b h w d f)
    d_pre,  # (b h w d 4f), out
    d_cells,  # (b d positions f): what each position hands to the step before; zeros at first
    counts,
    b,
    h,
    w,
    f,
    first,  # the steps: last − 1 … first
    last,
    DIRECTIONS: tl.constexpr,
    TAPS: tl.constexpr,
    DIAGONAL: tl.constexpr,
    CARRIED: tl.constexpr,
    SHARED: tl.constexpr,
    IMAGES: tl.constexpr,
    POSITIONS: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PATIENCE: tl.constexpr,
    FAST: tl.constexpr,
    STATE: tl.constexpr,
):
    direction, image, position = images_of(DIRECTIONS, IMAGES, POSITIONS)
    base = tl.where(image < b, image * h * w * DIRECTIONS + direction, -1)
    extent = h if DIAGONAL else w
    scratch = (image * DIRECTIONS + direction) * extent + position
    weight += direction * TAPS * f * 4 * f
    type = d_pre.dtype.element_ty

    if CARRIED or SHARED:
        dc = tl.zeros((IMAGES * POSITIONS, BLOCK_N), STATE)
        patience = tl.zeros((), tl.int32) + PATIENCE
    if CARRIED:
        weights, shuffles = (), ()
        n = tl.arange(0, BLOCK_N)
        k, live = gates_of(0, f, BLOCK_N)
        for tap in tl.static_range(TAPS):
            at_weight = weight + k[:, None] * (TAPS * f) + tap * f + n[None, :]
            weights += (tl.load(at_weight, mask=live[:, None] & (n < f)[None, :], other=0.0),)
            shuffles += (shuffle_of(image, position, shift_of(tap, TAPS, DIAGONAL), type),)
        d_gates = tl.zeros((IMAGES * POSITIONS, 4 * BLOCK_N), type)

    for back in tl.range(0, last - first, num_stages=STAGES if CARRIED else 1):
        step = last - 1 - back
        row, inside = rows_of(base, step, position, direction, h, w, DIRECTIONS, DIAGONAL)
        before, had_before = rows_of(base, step - 1, position, direction, h, w, DIRECTIONS, DIAGONAL)
        for block in range(0, 1 if ONE else tl.cdiv(f, BLOCK_N)):
            n = (tl.program_id(2) + block) * BLOCK_N + tl.arange(0, BLOCK_N)
            mask = inside[:, None] & (n < f)[None, :]
            at = row[:, None] * f + n[None, :]
            dh = tl.load(d_hidden + at, mask=mask, other=0.0).to(STATE)
            at_gates = row[:, None] * (4 * f) + n[None, :]
            handed = d_cells + scratch[:, None] * f + n[None, :]
            if STAGES > 1 and not CARRIED:  # on their way while it waits and multiplies; else there are no registers
                o, forget, i, g, cell, cell_before = load_kept(gates, cells, row, before, had_before, n, f, mask)
            if CARRIED:
                for tap in tl.static_range(TAPS):
                    of_reader = d_gates
                    if not DIAGONAL or tap > 0:
                        nothing = tl.zeros((IMAGES * POSITIONS, 4 * BLOCK_N), STATE)
                        of_reader = add_product(nothing, shuffles[tap], d_gates).to(type)
                    dh = add_product(dh, of_reader, weights[tap])
            else:
                if SHARED:
                    patience = wait(counts, back * tl.num_programs(2), patience)
                else:
                    dc = tl.load(handed, mask=mask, other=0.0)
                blocks_k = tl.cdiv(4 * f, BLOCK_K)
                for block_k in tl.range(0, TAPS * blocks_k, num_stages=STAGES):
                    tap = block_k // blocks_k
                    k = block_k % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
                    shift = -shift_of(tap, TAPS, DIAGONAL)
                    at_k, read = neighbours(
                        base, step + 1, position, shift, k, k < 4 * f, direction, h, w, 4 * f, DIRECTIONS, DIAGONAL
                    )
                    d_gates = tl.load(d_pre + at_k, mask=read, other=0.0)
                    at_weight = weight + (k * TAPS * f + tap * f)[:, None] + n[None, :]
                    weights = tl.load(at_weight, mask=(k < 4 * f)[:, None] & (n < f)[None, :], other=0.0)
                    dh = add_product(dh, d_gates, weights)
            if STAGES == 1 or CARRIED:
                o, forget, i, g, cell, cell_before = load_kept(gates, cells, row, before, had_before, n, f, mask)
            o, forget, i, g = o.to(STATE), forget.to(STATE), i.to(STATE), g.to(STATE)
            tanh_cell = tanh_approx(cell) if FAST else tanh(cell)
            dc += dh * o * (1 - tanh_cell * tanh_cell)
            d_o = (dh * tanh_cell * o * (1 - o)).to(type)
            tl.store(d_pre + at_gates, d_o, mask=mask)  # before the next is computed: registers are few
            d_forget = (dc * cell_before * forget * (1 - forget)).to(type)
            tl.store(d_pre + at_gates + f, d_forget, mask=mask)
            d_i = (dc * g * i * (1 - i)).to(type)
            tl.store(d_pre + at_gates + 2 * f, d_i, mask=mask)
            d_g = (dc * i * (1 - g * g)).to(type)
            tl.store(d_pre + at_gates + 3 * f, d_g, mask=mask)
            dc *= forget
            if CARRIED:
                d_gates = join_gates(d_o, d_forget, d_i, d_g)
            elif SHARED:
                made_a_step(counts)
            else:
                tl.store(handed, dc, mask=mask)
            if not (CARRIED or SHARED):
                tl.debug_barrier()
    if SHARED:
        tl.atomic_add(counts + tl.num_programs(0), tl.where(patience == 0, 1, 0))


# ------------------------------------------------------------------------------------------------- host and autograd


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


def scan(kernel, tensors: list[Tensor], shape: tuple, f: int, taps: int, diagonal: bool, form: Form, state) -> None:
    """Run a kernel over all steps: in one launch, or a launch a step, backwards for the backward kernel."""
    b, h, w, d = shape
    extent, steps = (h, h + w - 1) if diagonal else (w, h)
    options = constants(form, f, taps, d, diagonal, state)
    grid = (cdiv(b, form.images) * d, cdiv(extent, form.positions), 1)
    if form.name in ("carried", "streamed"):
        launch(kernel, grid, *tensors, None, b, h, w, f, 0, steps, **options)
        return
    grid = (*grid[:2], cdiv(f, form.block_n))
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


def sizes_of(pre: Tensor, state_weight: Tensor, diagonal: bool, form: str, fast: bool, backward: bool):
    """Find the shape (b h w d), f, the number of taps, the form and the type of states."""
    if fast and pre.dtype != torch.bfloat16:
        raise unexpected("fast", fast, f"False for {pre.dtype}: it is for torch.bfloat16")
    b, h, w, d, gates = pre.shape
    f, taps = gates // 4, state_weight.shape[2] // (gates // 4)
    cut = form_of(f, taps, h if diagonal else w, pre.element_size(), backward, form)
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
        fast: in bfloat16, compute tanh and σ in one instruction that is off by 2⁻¹¹ of its result at most; NVIDIA's
            GPUs alone have it, and no interpreter. Not timed on a GPU yet, so not the default.

    Returns:
        The hidden states (b h w d f), in `pre`'s type.
    """
    return lstm_scan_op(pre, state_weight, diagonal, form, fast)[0]
