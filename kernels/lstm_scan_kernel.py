"""The kernels of the LSTM scans: one each way for both the Diagonal BiLSTM and the Row LSTM.

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
gives up after `PATIENCE` looks and says so in memory.

The backward kernel walks the steps in reverse. The gradient of a pixel's hidden state is gathered from the gate
gradients of those that read it, and the gradient of the weights is one matrix product over all pixels afterwards. The
activated gates are kept for it, in the type of the products; cells are kept in float32.
"""

from __future__ import annotations

from kernels.activations import sigmoid, tanh, tanh_approx
from kernels.jit import jit, tl


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
