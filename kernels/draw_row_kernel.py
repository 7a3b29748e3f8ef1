"""The kernel that draws a row of images in one launch: all its pixels, their values chosen inside.

Legend: b batch · w columns · i j a row, a column · c colour · g group · f hidden features · v levels · m component ·
M images of a program.

The rows above are finished: what they contribute is in memory before (one batched product a layer). The rest is a
chain: column after column, group after group, layer after layer, each from what the one before it stored. A program
owns M = IMAGES images and walks that chain by itself, so programs never wait for each other; weights come from the L2
cache, where all programs read the same ones.

    stem        u = above + weight · the row in hand                           (mask A)
    a layer     here = u, or ReLU(down(ReLU(u)));  gates = above + main[left, here]
                hidden = act(gates), by the number of gates of a feature:  1  ReLU · 2  tanh ⊙ σ · 4  LSTM
                u ← u + up(hidden + mirrored), and skips ← skips + to_head(hidden + mirrored)
    head        logits = last(ReLU(first(ReLU(u))))
    choice      inverse CDF of one uniform number, or a known value; it is written where the stem reads it

Each stage multiplies a pixel's features with the weights of one group, (M k) · (k n), in blocks of n and k. A stage
reads what other threads stored in the one before, so there is a barrier between them. The kernel at the end of this
file walks the chain, and all barriers are there. Only the loops over k, which store nothing, fetch ahead.

`kernels.draw_row.pack` lays out the weights by group: of features that group g may not see, they are zeros, so a block
may read beyond what is seen. The gates of a feature are neighbours, so one product gives all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kernels.activations import sigmoid, tanh
from kernels.jit import jit, tl


class View(NamedTuple):
    """Features [layer, image, column, feature], the last next to each other: where they begin, and their strides."""

    start: Any
    layer: Any
    image: Any
    column: Any


class Weights(NamedTuple):
    """A product's packed weights and biases; each layer and group has k blocks of inputs by n blocks of outputs."""

    weight: Any
    bias: Any
    k: Any
    n: Any


class Rule(NamedTuple):
    """How values are chosen, as in `kernels.draw_row.Choice`."""

    uniforms: Any
    temperature: Any
    given: Any
    known: Any
    log_prob: Any
    conditionals: Any


# ------------------------------------------------------------------------------------------------------- products


@jit
def place(view, image, j, layer):
    """Where the features of images (M,) begin at column j of a layer, in 64 bits."""
    wide = tl.zeros_like(image)
    return image * view.image + (wide + j) * view.column + (wide + layer) * view.layer


@jit
def outputs_of(block, size, live, BLOCK_N: tl.constexpr):
    """A block of `size` outputs (n), and which of them exist for which image (M n)."""
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, live[:, None] & (n < size)[None, :]


@jit
def biases(weights, slot, block, IMAGES: tl.constexpr, BLOCK_N: tl.constexpr, STATE: tl.constexpr):
    """Start a product with the biases of a block of outputs, for each image (M n)."""
    row = tl.load(weights.bias + (slot * weights.n + block) * BLOCK_N + tl.arange(0, BLOCK_N)).to(STATE)
    return tl.zeros((IMAGES, BLOCK_N), STATE) + row[None, :]


@jit
def product(
    total, features, at, live, size, upto, weights, slot, block, RELU: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Add features (M k) · weights (k n) to total (M n), for one block of outputs.

    float32 is multiplied as three products of tf32, which have matrix instructions: each number is cut in
    two of 11 bits, and the two small parts are not multiplied. A product of two numbers is off by 2⁻¹⁹ of it at most.

    Args:
        at, live: where the features of each image begin, and whether there is such an image.
        size, upto: how many features there are, and how many of them the group sees.
        weights, slot, block: the packed weights, which layer and group of them, and which block of outputs.
        RELU: whether features pass through a ReLU first.
    """
    tile = tl.arange(0, BLOCK_K)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for block_k in tl.range(0, tl.cdiv(upto, BLOCK_K), num_stages=STAGES):
        k = block_k * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = tl.load(features + at[:, None] + k[None, :], mask=live[:, None] & (k < size)[None, :], other=0.0)
        if RELU:
            seen = tl.maximum(seen, 0.0)
        at_part = ((slot * weights.k + block_k) * weights.n + block) * (BLOCK_K * BLOCK_N)
        part = tl.load(weights.weight + at_part + tile)
        precision: tl.constexpr = "tf32x3" if part.dtype == tl.float32 else "ieee"
        total = tl.dot(seen.to(part.dtype), part, total, input_precision=precision, out_dtype=STATE)
    return total


# --------------------------------------------------------------------------------------------------------- stages


@jit
def stem(
    u, above, rows, weights, image, live, j, g, SEEN: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """u of the first layer, group g: `above` + the weights · SEEN sub-pixels of the row in hand."""
    at_u = place(u, image, j, 0) + g * WIDE
    at_above = place(above, image, j, 0) + g * WIDE
    at_rows = place(rows, image, j, 0)
    for block in range(0, tl.cdiv(WIDE, BLOCK_N)):
        n, mask = outputs_of(block, WIDE, live, BLOCK_N)
        total = tl.load(above.start + at_above[:, None] + n[None, :], mask=mask, other=0.0).to(STATE)
        total = product(
            total, rows.start, at_rows, live, SEEN, SEEN, weights, g, block, False, BLOCK_N, BLOCK_K, STAGES, STATE
        )
        tl.store(u.start + at_u[:, None] + n[None, :], total, mask=mask)


@jit
def down(
    middle, u, weights, image, live, j, layer, g, GROUPS: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Of a PixelCNN's layer: middle = ReLU(down(ReLU(u))), group g."""
    at_u = place(u, image, j, layer)
    at_middle = place(middle, image, j, layer) + g * NARROW
    slot = layer * GROUPS + g
    for block in range(0, tl.cdiv(NARROW, BLOCK_N)):
        n, mask = outputs_of(block, NARROW, live, BLOCK_N)
        total = biases(weights, slot, block, live.shape[0], BLOCK_N, STATE)
        total = product(
            total, u.start, at_u, live, WIDE * GROUPS, (g + 1) * WIDE, weights, slot, block, True, BLOCK_N, BLOCK_K,
            STAGES, STATE,
        )  # fmt: skip
        tl.store(middle.start + at_middle[:, None] + n[None, :], tl.maximum(total, 0.0), mask=mask)


@jit
def gated(sums, IMAGES: tl.constexpr, FEATURES: tl.constexpr):
    """tanh(a) ⊙ σ(b) of a b side by side, (M n·2) → (M n)."""
    a, b = tl.split(tl.reshape(sums, (IMAGES, FEATURES, 2)))
    return tanh(a) * sigmoid(b)


@jit
def lstm(sums, cell, at, mask, IMAGES: tl.constexpr, FEATURES: tl.constexpr, STATE: tl.constexpr):
    """One step of an LSTM, gates o f i g side by side, (M n·4) → its hidden state (M n); the cell changes in place."""
    o_i, f_g = tl.split(tl.reshape(sums, (IMAGES, FEATURES, 2, 2)))
    o, i = tl.split(o_i)
    forget, candidate = tl.split(f_g)
    state = tl.load(cell + at, mask=mask, other=0.0).to(STATE)
    state = sigmoid(forget) * state + sigmoid(i) * tanh(candidate)
    tl.store(cell + at, state, mask=mask)
    return sigmoid(o) * tanh(state)


@jit
def gates(
    joined, inputs, above, cell, hidden, mirrored, weights, image, live, j, layer, g, upto, NUM_INPUTS: tl.constexpr,
    GATES: tl.constexpr, GROUPS: tl.constexpr, NARROW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """joined = act(above + main · inputs), group g; act: ReLU, tanh ⊙ σ or an LSTM's step, by GATES."""
    at_inputs = place(inputs, image, j, layer)
    at_above = place(above, image, j, layer) + g * (GATES * NARROW)
    at_joined = place(joined, image, j, layer)
    slot = layer * GROUPS + g
    for block in range(0, tl.cdiv(GATES * NARROW, BLOCK_N)):
        column, mask = outputs_of(block, GATES * NARROW, live, BLOCK_N)
        of_gate = column % GATES * NARROW + column // GATES
        sums = tl.load(above.start + at_above[:, None] + of_gate[None, :], mask=mask, other=0.0).to(STATE)
        sums = product(
            sums, inputs.start, at_inputs, live, NUM_INPUTS, upto, weights, slot, block, False, BLOCK_N, BLOCK_K,
            STAGES, STATE,
        )  # fmt: skip
        n, mask = outputs_of(block, NARROW, live, BLOCK_N // GATES)
        n = g * NARROW + n
        if GATES == 1:
            state = tl.maximum(sums, 0.0)
        elif GATES == 2:
            state = gated(sums, live.shape[0], BLOCK_N // 2)
        else:
            at_cell = place(cell, image, j, layer)
            state = lstm(sums, cell.start, at_cell[:, None] + n[None, :], mask, live.shape[0], BLOCK_N // 4, STATE)
        if hidden.start is not None:
            at_hidden = place(hidden, image, j, layer)
            tl.store(hidden.start + at_hidden[:, None] + n[None, :], state, mask=mask)
        if mirrored.start is not None:
            at = place(mirrored, image, j, layer)
            state += tl.load(mirrored.start + at[:, None] + n[None, :], mask=mask, other=0.0).to(STATE)
        tl.store(joined.start + at_joined[:, None] + n[None, :], state, mask=mask)


@jit
def join(
    u, out, skips, joined, up, to_head, image, live, j, layer, layers, g, GROUPS: tl.constexpr, WIDE: tl.constexpr,
    NARROW: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    STATE: tl.constexpr,
):  # fmt: skip
    """u of the next layer, or `out` of the last one: u + up(joined), group g; skips + to_head(joined) beside it."""
    at_u, at_next = place(u, image, j, layer), place(u, image, j, layer + 1)
    at_out = place(out, image, j, layer)
    at_joined = place(joined, image, j, layer)
    slot, size, upto = layer * GROUPS + g, NARROW * GROUPS, (g + 1) * NARROW
    for block in range(0, tl.cdiv(WIDE, BLOCK_N)):
        n, mask = outputs_of(block, WIDE, live, BLOCK_N)
        n = g * WIDE + n
        total = biases(up, slot, block, live.shape[0], BLOCK_N, STATE)
        if RESIDUAL:
            total += tl.load(u.start + at_u[:, None] + n[None, :], mask=mask, other=0.0).to(STATE)
        total = product(
            total, joined.start, at_joined, live, size, upto, up, slot, block, False, BLOCK_N, BLOCK_K, STAGES, STATE
        )
        if skips is not None:
            skip = biases(to_head, slot, block, live.shape[0], BLOCK_N, STATE)
            skip = product(
                skip, joined.start, at_joined, live, size, upto, to_head, slot, block, False, BLOCK_N, BLOCK_K, STAGES,
                STATE,
            )  # fmt: skip
            at = at_out[:, None] + n[None, :]
            if layer > 0:
                skip += tl.load(skips + at, mask=mask, other=0.0).to(STATE)
            if layer + 1 < layers:
                tl.store(skips + at, skip, mask=mask)
            else:
                total += skip
        if layer + 1 < layers:
            tl.store(u.start + at_next[:, None] + n[None, :], total, mask=mask)
        else:
            tl.store(out.start + at_out[:, None] + n[None, :], total, mask=mask)


@jit
def head(
    out, features, weights, image, live, g, first, upto, SEEN: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """One of the head's two products, for group g: SIZE outputs from `first` on, of ReLU(features)."""
    at_out, at_features = place(out, image, 0, 0), place(features, image, 0, 0)
    for block in range(0, tl.cdiv(SIZE, BLOCK_N)):
        n, mask = outputs_of(block, SIZE, live, BLOCK_N)
        n = first + n
        total = biases(weights, g, block, live.shape[0], BLOCK_N, STATE)
        total = product(
            total, features.start, at_features, live, SEEN, upto, weights, g, block, True, BLOCK_N, BLOCK_K, STAGES,
            STATE,
        )  # fmt: skip
        tl.store(out.start + at_out[:, None] + n[None, :], total, mask=mask)


# --------------------------------------------------------------------------------------------------------- choice


@jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1 + tl.exp(-tl.abs(x)))


@jit
def log_mass(x, mean, sharpness, highest):
    """log of a logistic's mass in the bin of x: see `models.logistic_mixture`."""
    below = tl.where(x == -highest, 1e30, 0.5)
    above = tl.where(x == highest, 1e30, 0.5)
    distance = x - mean
    a = (below + above) * sharpness
    few = tl.minimum(a, 0.25)  # 1 − e^−a, where a is small by its series
    small = 1 - few / 5 * (1 - few / 6 * (1 - few / 7 * (1 - few / 8)))
    small = few * (1 - few / 2 * (1 - few / 3 * (1 - few / 4 * small)))
    inside = tl.log(tl.where(a < 0.25, small, 1 - tl.exp(-a)))
    return log_sigmoid((distance + above) * sharpness) + log_sigmoid((below - distance) * sharpness) + inside


@jit
def log_softmax(x):
    """Of (M n), over n; −∞ stays."""
    x = x - tl.max(x, 1)[:, None]
    return x - tl.log(tl.sum(tl.exp(x), 1))[:, None]


@jit
def mixture_logits(
    log_weights, mean, sharpness, mixtures, levels, highest, CHOSEN: tl.constexpr, MIXTURE: tl.constexpr,
    LEVELS: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Logistics (M m) → log-probabilities of all levels (M v): log Σ_m, one component after another."""
    m, level = tl.arange(0, MIXTURE)[None, :], tl.arange(0, LEVELS)[None, :]
    most = tl.zeros((CHOSEN, LEVELS), STATE) - 1e30
    total = tl.zeros((CHOSEN, LEVELS), STATE)
    for component in range(0, mixtures):
        this = m == component
        mass = log_mass(
            level.to(STATE) - highest,
            tl.sum(tl.where(this, mean, 0.0), 1)[:, None],
            tl.sum(tl.where(this, sharpness, 0.0), 1)[:, None],
            highest,
        )
        mass += tl.sum(tl.where(this, log_weights, 0.0), 1)[:, None]
        more = tl.maximum(most, mass)
        total = total * tl.exp(most - more) + tl.exp(mass - more)
        most = more
    return tl.where(level < levels, most + tl.log(total), -float("inf"))


@jit
def choose(
    rule, logits, image, live, colour, j, width, levels, COLOURS: tl.constexpr, LEVELS: tl.constexpr,
    GREEDY: tl.constexpr,
):  # fmt: skip
    """Choose the values (M,) of a sub-pixel from its logits (M v), −∞ for levels that do not exist, and record them."""
    level = tl.arange(0, LEVELS)[None, :]
    at = (image * COLOURS + colour) * width + j
    value = tl.zeros_like(image)
    if rule.uniforms is not None:
        likeliest = tl.max(logits, 1)[:, None]
        if GREEDY:
            value += tl.min(tl.where(logits == likeliest, level, LEVELS), 1)
        else:
            temperature = rule.temperature
            p = tl.exp(tl.maximum(logits - likeliest, -800 * temperature) / temperature)  # e⁻⁸⁰⁰ is 0
            cdf = tl.cumsum(p, 1)
            number = tl.load(rule.uniforms + at, mask=live, other=0.0).to(p.dtype) * tl.max(cdf, 1)
            reached = (p > 0) & (cdf > number[:, None])
            last = tl.max(tl.where(p > 0, level, 0), 1)  # rounding may leave none reached
            value += tl.minimum(tl.min(tl.where(reached, level, LEVELS), 1), last)
    if rule.given is not None:
        instead = tl.load(rule.given + at, mask=live, other=0)
        if rule.known is not None:
            value = tl.where(tl.load(rule.known + at, mask=live, other=0) != 0, instead, value)
        else:
            value = instead
    if rule.log_prob is not None or rule.conditionals is not None:
        log_probs = log_softmax(logits)
        if rule.log_prob is not None:
            of_value = tl.sum(tl.where(level == value[:, None], log_probs, 0.0), 1)
            before = tl.load(rule.log_prob + image, mask=live, other=0.0)
            tl.store(rule.log_prob + image, before + of_value, mask=live)
        if rule.conditionals is not None:
            where = live[:, None] & (level < levels)
            tl.store(rule.conditionals + at[:, None] * levels + level, log_probs, mask=where)
    return value


@jit
def choose_by_softmax(
    rule, outputs, image, live, colour, j, width, levels, NUM_OUTPUTS: tl.constexpr, COLOURS: tl.constexpr,
    LEVELS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """Choose the values (M,) of a sub-pixel; outputs: its logits."""
    level = tl.arange(0, LEVELS)[None, :]
    mask = live[:, None] & (level < levels)
    logits = tl.load(outputs + (image * NUM_OUTPUTS)[:, None] + level, mask=mask, other=0.0)
    logits = tl.where(level < levels, logits, -float("inf"))
    return choose(rule, logits, image, live, colour, j, width, levels, COLOURS, LEVELS, GREEDY)


@jit
def mixture_weights(
    outputs, image, live, mixtures, NUM_OUTPUTS: tl.constexpr, MIXTURE: tl.constexpr, STATE: tl.constexpr
):
    """log-probabilities of the components (M m), before any colour of the pixel is known."""
    m = tl.arange(0, MIXTURE)[None, :]
    at = (image * NUM_OUTPUTS)[:, None] + m
    weights = tl.load(outputs + at, mask=live[:, None] & (m < mixtures), other=0.0).to(STATE)
    return log_softmax(tl.where(m < mixtures, weights, -float("inf")))


@jit
def choose_by_mixture(
    rule, outputs, values, log_weights, image, live, colour, j, width, levels, mixtures, NUM_OUTPUTS: tl.constexpr,
    COLOURS: tl.constexpr, MIXTURE: tl.constexpr, LEVELS: tl.constexpr, GREEDY: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Choose the values (M,) of a colour, given the pixel's colours before it, which `values` holds.

    Returns:
        The values, and the log-probabilities of the components (M m) given them too.
    """
    highest: tl.constexpr = (levels - 1) / 2
    m = tl.arange(0, MIXTURE)[None, :]
    mask = live[:, None] & (m < mixtures)
    at = outputs + (image * NUM_OUTPUTS)[:, None] + m  # of the weights; then means, scales and slopes
    # means, in levels from the middle, with what the colours before add
    mean = tl.load(at + (1 + colour) * mixtures, mask=mask, other=0.0).to(STATE) * highest
    pair = 1 + 2 * COLOURS + colour * (colour - 1) // 2
    for before in range(0, colour):
        slope = tl.load(at + (pair + before) * mixtures, mask=mask, other=0.0).to(STATE)
        x = tl.load(values + (image * COLOURS + before) * width + j, mask=live, other=0).to(STATE) - highest
        mean += tanh(slope) * x[:, None]
    scales = tl.load(at + (1 + COLOURS + colour) * mixtures, mask=mask, other=0.0)
    sharpness = -tl.log(tl.zeros_like(mean) + highest) - scales.to(STATE)
    sharpness = tl.exp(tl.minimum(tl.maximum(sharpness, -14.0), 3.5))
    logits = mixture_logits(
        log_weights, mean, sharpness, mixtures, levels, highest, live.shape[0], MIXTURE, LEVELS, STATE
    )
    value = choose(rule, logits, image, live, colour, j, width, levels, COLOURS, LEVELS, GREEDY)
    mass = log_mass((value.to(STATE) - highest)[:, None], mean, sharpness, highest)
    return value, log_softmax(tl.where(m < mixtures, log_weights + mass, -float("inf")))


@jit
def put(
    values, rows, table, value, image, live, colour, j, width, levels, reach, of_value, COLOURS: tl.constexpr,
    OF_VALUE: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Store values (M,) of a sub-pixel as they leave the kernel, and what the stem reads of them."""
    tl.store(values + (image * COLOURS + colour) * width + j, value, mask=live)
    at = place(rows, image, j + reach, 0) + colour * of_value
    if table is None:
        scale: tl.constexpr = 2 / (levels - 1)
        tl.store(rows.start + at, value.to(STATE) * scale - 1, mask=live)
    else:
        n = tl.arange(0, OF_VALUE)[None, :]
        mask = live[:, None] & (n < of_value)
        level = tl.minimum(tl.maximum(value, 0), levels - 1)  # a given value may be none
        read = tl.load(table + level[:, None] * of_value + n, mask=mask, other=0.0)
        tl.store(rows.start + at[:, None] + n, read, mask=mask)


# --------------------------------------------------------------------------------------------------------- kernel


@jit(varying=("b", "rows_stride", "groups"))
def draw_row_kernel(
    rows,  # (b columns·colours·of_value): the row in hand as the stem reads it; values are put there
    table,  # (v of_value): what the stem reads of a level; None: the level, scaled to [−1, 1]
    stem_above,  # (b w f)
    stem_weight,
    down_weight, down_bias,
    main_weight,
    up_weight, up_bias,
    to_head_weight, to_head_bias,  # None: no skips
    first_weight, first_bias,
    last_weight, last_bias,
    joined,  # (layers b f): hidden, which `up` reads
    skips,  # (b stream), or None
    out,  # (b stream): what the last layer hands to the head
    between,  # (b features): of the head
    outputs,  # (b outputs): logits, or a mixture's parameters
    values,  # (b c w) int64, out
    uniforms, temperature, given, known, log_prob, conditionals,  # the rule; None where it does not say
    b, layers,
    groups,  # GROUPS again, but unknown to the compiler, which would unroll the loops over k if it could count them
    rows_stride,  # from image to image
    # Views and their strides from layer to layer, image to image, column to column; None where there is none.
    u, u_layer, u_image: tl.constexpr, u_column: tl.constexpr,
    inputs, inputs_layer, inputs_image: tl.constexpr, inputs_column: tl.constexpr,
    middle, middle_layer, middle_image: tl.constexpr, middle_column: tl.constexpr,
    above, above_layer, above_image: tl.constexpr, above_column: tl.constexpr,
    cell, cell_layer, cell_image: tl.constexpr, cell_column: tl.constexpr,
    hidden, hidden_layer, hidden_image: tl.constexpr, hidden_column: tl.constexpr,
    mirrored, mirrored_layer, mirrored_image: tl.constexpr, mirrored_column: tl.constexpr,
    # Blocks of packed weights, down and across, of one group and layer.
    stem_k: tl.constexpr, stem_n: tl.constexpr,
    down_k: tl.constexpr, down_n: tl.constexpr,
    main_k: tl.constexpr, main_n: tl.constexpr,
    up_k: tl.constexpr, up_n: tl.constexpr,  # and of `to_head`
    first_k: tl.constexpr, first_n: tl.constexpr,
    last_k: tl.constexpr, last_n: tl.constexpr,
    width: tl.constexpr,  # columns of the image
    columns: tl.constexpr,  # and of the features
    f: tl.constexpr,
    stream_features: tl.constexpr,
    num_inputs: tl.constexpr,  # of `main`, all groups
    between_features: tl.constexpr,
    num_outputs: tl.constexpr,  # of a group
    levels: tl.constexpr,
    mixtures: tl.constexpr,
    stem_stride: tl.constexpr,  # from column to column
    reach: tl.constexpr,
    of_value: tl.constexpr,  # numbers that the stem reads of a value
    GATES: tl.constexpr, GROUPS: tl.constexpr, COLOURS: tl.constexpr, RESIDUAL: tl.constexpr, GREEDY: tl.constexpr,
    MIXTURE: tl.constexpr,  # components, a power of two; 0: a softmax
    LEVELS: tl.constexpr,  # a power of two
    OF_VALUE: tl.constexpr,  # a power of two
    IMAGES: tl.constexpr,
    CHOSEN: tl.constexpr,  # images whose values are chosen at a time: all levels of one are side by side
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """Draw a row: columns × groups × layers, a stage after another, in IMAGES images a program."""
    image = tl.program_id(0).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    live = image < b
    NARROW: tl.constexpr = f // GROUPS  # features of a group in a layer,
    WIDE: tl.constexpr = stream_features // GROUPS  # in the stream,
    BETWEEN: tl.constexpr = between_features // GROUPS  # in the head

    rows = View(rows, 0, rows_stride, COLOURS * of_value)
    stem_above = View(stem_above, 0, columns * stem_stride, stem_stride)
    u = View(u, u_layer, u_image, u_column)
    inputs = View(inputs, inputs_layer, inputs_image, inputs_column)
    middle = View(middle, middle_layer, middle_image, middle_column)
    above = View(above, above_layer, above_image, above_column)
    cell = View(cell, cell_layer, cell_image, cell_column)
    hidden = View(hidden, hidden_layer, hidden_image, hidden_column)
    mirrored = View(mirrored, mirrored_layer, mirrored_image, mirrored_column)
    joined = View(joined, b * f, f, 0)
    stream = View(out, 0, stream_features, 0)
    inner = View(between, 0, between_features, 0)
    last_out = View(outputs, 0, num_outputs, 0)
    rule = Rule(uniforms, temperature, given, known, log_prob, conditionals)
    of_stem = Weights(stem_weight, None, stem_k, stem_n)  # its biases are in `stem_above`, those of `main` in `above`
    of_down = Weights(down_weight, down_bias, down_k, down_n)
    of_main = Weights(main_weight, None, main_k, main_n)
    of_up = Weights(up_weight, up_bias, up_k, up_n)
    of_to_head = Weights(to_head_weight, to_head_bias, up_k, up_n)
    of_first = Weights(first_weight, first_bias, first_k, first_n)
    of_last = Weights(last_weight, last_bias, last_k, last_n)

    # disable_licm: without it the compiler keeps every stage's addresses in registers, and there are not enough.
    for j in tl.range(0, columns, disable_licm=True):
        for g in tl.range(0, groups, disable_licm=True):
            stem(
                u, stem_above, rows, of_stem, image, live, j, g, (reach + 1) * COLOURS * of_value, WIDE, BLOCK_N,
                BLOCK_K, STAGES, STATE,
            )  # fmt: skip
            tl.debug_barrier()
            for layer in tl.range(0, layers, disable_licm=True):
                if down_weight is not None:
                    upto = num_inputs - f + (g + 1) * NARROW
                    down(
                        middle, u, of_down, image, live, j, layer, g, GROUPS, WIDE, NARROW, BLOCK_N, BLOCK_K, STAGES,
                        STATE,
                    )  # fmt: skip
                    tl.debug_barrier()
                else:
                    upto = num_inputs - stream_features + (g + 1) * WIDE
                gates(
                    joined, inputs, above, cell, hidden, mirrored, of_main, image, live, j, layer, g, upto, num_inputs,
                    GATES, GROUPS, NARROW, BLOCK_N, BLOCK_K, STAGES, STATE,
                )  # fmt: skip
                tl.debug_barrier()
                join(
                    u, stream, skips, joined, of_up, of_to_head, image, live, j, layer, layers, g, GROUPS, WIDE, NARROW,
                    RESIDUAL, BLOCK_N, BLOCK_K, STAGES, STATE,
                )  # fmt: skip
                tl.debug_barrier()

            if j < width:  # else: outside of the image, where nothing is drawn
                head(
                    inner, stream, of_first, image, live, g, g * BETWEEN, (g + 1) * WIDE, stream_features, BETWEEN,
                    BLOCK_N, BLOCK_K, STAGES, STATE,
                )  # fmt: skip
                tl.debug_barrier()
                head(
                    last_out, inner, of_last, image, live, g, 0, (g + 1) * BETWEEN, between_features, num_outputs,
                    BLOCK_N, BLOCK_K, STAGES, STATE,
                )  # fmt: skip
                tl.debug_barrier()
                for chunk in tl.range(0, IMAGES // CHOSEN, disable_licm=True):
                    some = tl.program_id(0).to(tl.int64) * IMAGES + chunk * CHOSEN + tl.arange(0, CHOSEN)
                    there = some < b
                    if MIXTURE == 0:
                        value = choose_by_softmax(
                            rule, outputs, some, there, g, j, width, levels, num_outputs, COLOURS, LEVELS, GREEDY
                        )
                        put(
                            values, rows, table, value, some, there, g, j, width, levels, reach, of_value, COLOURS,
                            OF_VALUE, STATE,
                        )  # fmt: skip
                        tl.debug_barrier()
                    else:
                        log_weights = mixture_weights(outputs, some, there, mixtures, num_outputs, MIXTURE, STATE)
                        for colour in range(0, COLOURS):
                            value, log_weights = choose_by_mixture(
                                rule, outputs, values, log_weights, some, there, colour, j, width, levels, mixtures,
                                num_outputs, COLOURS, MIXTURE, LEVELS, GREEDY, STATE,
                            )  # fmt: skip
                            put(
                                values, rows, table, value, some, there, colour, j, width, levels, reach, of_value,
                                COLOURS, OF_VALUE, STATE,
                            )  # fmt: skip
                            tl.debug_barrier()
