"""The row scan on a GPU: all pixels of a row of images in one launch, and what is drawn chosen inside.

Legend: b batch · w columns · i j a row, a column · c colour · g group · f hidden features · v levels · m component.

What the rows above give is there before (`models.sampling.RowScan.begin_above`: one batched product a layer). What is
left is a chain: column after column, group after group, layer after layer, each from what the one before it stored. A
program owns IMAGES images and walks that chain alone, so that programs never wait for each other; weights come from the
L2 cache, where all programs read the same ones.

    stem        u = above + taps of the row in hand                            (mask A)
    a layer     one of four kinds, by its gates:
       1  PixelCNN          row = ReLU(down(ReLU(u)));  hidden = ReLU(above + main[row left, row here])
       2  Gated PixelCNN    hidden = tanh(a) ⊙ σ(b),    [a b] = above + main[u left, u here]
       4  Row LSTM          hidden = o ⊙ tanh(cell),    [o f i g] = above + main[u left, u here]
       4  Diagonal BiLSTM   the same of main[hidden left, u here]; the mirrored direction's hidden is added
                u ← u + up(hidden), and skips ← skips + to_head(hidden)
    head        logits = last(ReLU(first(ReLU(u))))
    choice      inverse CDF of one uniform number, or a known value; it is written where the stem reads it

Each stage is a product of what is known of a pixel with the weights of one group, (IMAGES k) · (k n), in blocks.
Between stages stands a barrier: a stage reads what other threads stored. Only the loops over k, which store nothing,
fetch ahead.

Groups are equally wide, in multiples of 16 (`models.aligned`). Weights are packed by group (`pack`): of features that
group g may not see, the weights are zeros, so a block may read beyond what is known. The gates of a feature stand side
by side, so that one product gives all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.jit import cdiv, jit, launch, next_power_of_2, tl

PADDED = 64  # `pack` fills up with zeros to multiples of this, what any form's blocks divide


class Product(NamedTuple):
    """Weights of one product in all layers: `weight` (layers g k n), `bias` (layers g n) or None."""

    weight: Tensor
    bias: Tensor | None


class Layers(NamedTuple):
    """A body as the kernel sees it. Views are [layer, image, column, feature], features next to each other."""

    gates: int  # 1, 2 or 4
    down: Product | None  # of a PixelCNN's block
    main: Product
    up: Product
    to_head: Product | None
    inputs: Tensor  # of `main`: [left neighbour, this pixel]; the view begins with the left neighbour's features
    num_inputs: int  # of these inputs, all groups
    u: Tensor  # the residual stream
    above: Tensor  # what `main` is added to; gates o f i g of group 0, then of group 1, …
    middle: Tensor | None = None  # where `down` writes
    cell: Tensor | None = None
    hidden: Tensor | None = None  # where an LSTM's hidden state goes beside `up`
    mirrored: Tensor | None = None


class Head(NamedTuple):
    """The two products of a head, as one layer each; how many features lie between, and how many come out."""

    first: Product
    last: Product
    between: int
    outputs: int  # of a group
    mixtures: int  # 0: a softmax


class Stem(NamedTuple):
    """The stem's product, as one layer."""

    product: Product
    rows: Tensor  # (b columns·colours): the row in hand, scaled, with zeros at both ends
    above: Tensor  # (b w f)
    reach: int


class Choice(NamedTuple):
    """How values are chosen and what is kept of it; all of the row in hand."""

    uniforms: Tensor | None = None  # (b c w): draw with them
    temperature: float = 1.0
    given: Tensor | None = None  # (b c w): take these instead,
    known: Tensor | None = None  # (b c w): where this is true; None: everywhere
    log_prob: Tensor | None = None  # (b,): add up how likely the values are
    conditionals: Tensor | None = None  # (b c w v): keep the log-probabilities of all levels


def pack(weight: Tensor, bias: Tensor | None, groups: list[list[slice]]) -> Product:
    """Masked weights (layers outputs inputs) and bias (layers outputs), of which `groups` says whose outputs are whose.

    Where a group's outputs stand in several stretches, its gates, those of one feature become neighbours.
    """

    def of_group(x: Tensor, stretches: list[slice]) -> Tensor:
        """(layers outputs …) → (layers n …), a group's outputs, filled up with zeros."""
        x = torch.stack([x[:, s] for s in stretches], dim=2).flatten(1, 2)
        return F.pad(x, (*[0] * 2 * (x.dim() - 2), 0, width - x.shape[1]))

    width = max(sum(s.stop - s.start for s in stretches) for stretches in groups)
    width = cdiv(width, PADDED) * PADDED
    packed = torch.stack([of_group(weight, stretches) for stretches in groups], dim=1).mT
    packed = F.pad(packed, (0, 0, 0, -packed.shape[2] % PADDED))
    if bias is not None:
        bias = torch.stack([of_group(bias, stretches) for stretches in groups], dim=1).contiguous()
    return Product(packed, bias)


# ------------------------------------------------------------------------------------------------------- kernel


@jit
def place(image, j, layer, layer_stride, image_stride, column_stride):
    """Where the features of images (M,) begin at column j of a layer, in 64 bits."""
    wide = tl.zeros_like(image)
    return image * image_stride + (wide + j) * column_stride + (wide + layer) * layer_stride


@jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def tanh(x):
    """Where e^x overflows, so does nothing here."""
    return 2 * sigmoid(2 * x) - 1


@jit
def product(
    total,
    features,
    at,
    live,
    size,
    upto,
    weight,
    slot,
    column,
    blocks_k,
    blocks_n,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    STATE: tl.constexpr,
):
    """total (M n) + features (M k) · weight (k n), for one block of columns.

    Args:
        at, live: where the features of each image begin, and whether there is such an image.
        size, upto: how many features there are, and how many of them the group sees.
        weight, slot, column: the packed weights, of which layer and group, and of which block of outputs.
        blocks_k, blocks_n: how many blocks these are, down and across.
    """
    tile = tl.arange(0, BLOCK_K)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for block in tl.range(0, tl.cdiv(upto, BLOCK_K), num_stages=STAGES):
        k = block * BLOCK_K + tl.arange(0, BLOCK_K)
        seen = tl.load(features + at[:, None] + k[None, :], mask=live[:, None] & (k < size)[None, :], other=0.0)
        if RELU:
            seen = tl.maximum(seen, 0.0)
        part = tl.load(weight + ((slot * blocks_k + block) * blocks_n + column) * (BLOCK_K * BLOCK_N) + tile)
        total = tl.dot(seen.to(part.dtype), part, total, input_precision="ieee", out_dtype=STATE)
    return total


@jit
def biases(bias, slot, blocks_n, block, IMAGES: tl.constexpr, BLOCK_N: tl.constexpr, STATE: tl.constexpr):
    """What a product begins with: the bias of a block of outputs, for each image (M n)."""
    row = tl.load(bias + (slot * blocks_n + block) * BLOCK_N + tl.arange(0, BLOCK_N)).to(STATE)
    return tl.zeros((IMAGES, BLOCK_N), STATE) + row[None, :]


@jit
def gated(sums, IMAGES: tl.constexpr, FEATURES: tl.constexpr):
    """tanh(a) ⊙ σ(b) of a b side by side, (M n·2) → (M n)."""
    a, b = tl.split(tl.reshape(sums, (IMAGES, FEATURES, 2)))
    return tanh(a) * sigmoid(b)


@jit
def lstm(sums, cell, at, mask, IMAGES: tl.constexpr, FEATURES: tl.constexpr, STATE: tl.constexpr):
    """A step of an LSTM, gates o f i g side by side, (M n·4) → its hidden state (M n); the cell changes in place."""
    o_i, f_g = tl.split(tl.reshape(sums, (IMAGES, FEATURES, 2, 2)))
    o, i = tl.split(o_i)
    forget, candidate = tl.split(f_g)
    state = tl.load(cell + at, mask=mask, other=0.0).to(STATE)
    state = sigmoid(forget) * state + sigmoid(i) * tanh(candidate)
    tl.store(cell + at, state, mask=mask)
    return sigmoid(o) * tanh(state)


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
    logits,
    image,
    live,
    colour,
    j,
    uniforms,
    temperature,
    given,
    known,
    log_prob,
    conditionals,
    width,
    levels,
    COLOURS: tl.constexpr,
    LEVELS: tl.constexpr,
    DRAW: tl.constexpr,
    GREEDY: tl.constexpr,
    GIVEN: tl.constexpr,
    KNOWN: tl.constexpr,
    RECORD: tl.constexpr,
    CONDITIONALS: tl.constexpr,
):
    """The values (M,) of a sub-pixel, from its logits (M v); −∞ stands for levels that there are not."""
    level = tl.arange(0, LEVELS)[None, :]
    at = (image * COLOURS + colour) * width + j
    value = tl.zeros_like(image)
    if DRAW:
        likeliest = tl.max(logits, 1)[:, None]
        if GREEDY:
            value += tl.min(tl.where(logits == likeliest, level, LEVELS), 1)
        else:
            p = tl.exp(tl.maximum(logits - likeliest, -800 * temperature) / temperature)  # e⁻⁸⁰⁰ is 0
            cdf = tl.cumsum(p, 1)
            number = tl.load(uniforms + at, mask=live, other=0.0).to(p.dtype) * tl.max(cdf, 1)
            reached = (p > 0) & (cdf > number[:, None])
            last = tl.max(tl.where(p > 0, level, 0), 1)  # rounding may leave none reached
            value += tl.minimum(tl.min(tl.where(reached, level, LEVELS), 1), last)
    if GIVEN:
        instead = tl.load(given + at, mask=live, other=0)
        value = tl.where(tl.load(known + at, mask=live, other=0) != 0, instead, value) if KNOWN else instead
    if RECORD or CONDITIONALS:
        log_probs = log_softmax(logits)
        if RECORD:
            of_value = tl.sum(tl.where(level == value[:, None], log_probs, 0.0), 1)
            tl.store(log_prob + image, tl.load(log_prob + image, mask=live, other=0.0) + of_value, mask=live)
        if CONDITIONALS:
            where = live[:, None] & (level < levels)
            tl.store(conditionals + at[:, None] * levels + level, log_probs, mask=where)
    return value


@jit(varying=("b", "rows_stride"))
def draw_row_kernel(
    rows,  # (b columns·colours): the row in hand as the stem reads it; values are put there
    stem_above,  # (b w f)
    stem_weight,
    u,
    inputs,
    middle,
    above,
    cell,
    hidden,
    mirrored,
    down_weight,
    down_bias,
    main_weight,
    up_weight,
    up_bias,
    to_head_weight,
    to_head_bias,
    joined,  # (layers b f): what each hands to `up`
    skips,  # (b stream)
    out,  # (b stream): what the last layer hands to the head
    first_weight,
    first_bias,
    last_weight,
    last_bias,
    between,  # (b features): of the head
    outputs,  # (b outputs): logits, or a mixture's parameters
    values,  # (b c w) int64, out
    uniforms,
    given,
    known,
    log_prob,
    conditionals,
    b,
    layers,
    rows_stride,  # from image to image
    u_layer,
    inputs_layer,
    middle_layer,
    above_layer,
    cell_layer,
    hidden_layer,
    mirrored_layer,
    temperature,
    width: tl.constexpr,  # columns of the image
    columns: tl.constexpr,  # and of the features
    f: tl.constexpr,
    stream_features: tl.constexpr,
    main_features: tl.constexpr,  # all that `main` may see
    between_features: tl.constexpr,
    output_features: tl.constexpr,  # of a group
    levels: tl.constexpr,
    mixtures: tl.constexpr,
    stem_stride: tl.constexpr,  # from column to column
    reach: tl.constexpr,
    u_image: tl.constexpr,
    u_column: tl.constexpr,
    inputs_image: tl.constexpr,
    inputs_column: tl.constexpr,
    middle_image: tl.constexpr,
    middle_column: tl.constexpr,
    above_image: tl.constexpr,
    above_column: tl.constexpr,
    cell_image: tl.constexpr,
    cell_column: tl.constexpr,
    hidden_image: tl.constexpr,
    hidden_column: tl.constexpr,
    mirrored_image: tl.constexpr,
    mirrored_column: tl.constexpr,
    stem_k: tl.constexpr,  # blocks of packed weights, down and across, of one group and layer
    stem_n: tl.constexpr,
    down_k: tl.constexpr,
    down_n: tl.constexpr,
    main_k: tl.constexpr,
    main_n: tl.constexpr,
    up_k: tl.constexpr,
    up_n: tl.constexpr,
    first_k: tl.constexpr,
    first_n: tl.constexpr,
    last_k: tl.constexpr,
    last_n: tl.constexpr,
    GATES: tl.constexpr,
    GROUPS: tl.constexpr,
    COLOURS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SKIP: tl.constexpr,
    MIRRORED: tl.constexpr,
    MIXTURE: tl.constexpr,  # components, a power of two; 0: a softmax
    LEVELS: tl.constexpr,  # a power of two
    DRAW: tl.constexpr,
    GREEDY: tl.constexpr,
    GIVEN: tl.constexpr,
    KNOWN: tl.constexpr,
    RECORD: tl.constexpr,
    CONDITIONALS: tl.constexpr,
    IMAGES: tl.constexpr,
    CHOSEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    STATE: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    live = image < b
    block_n = tl.arange(0, BLOCK_N)
    level = tl.arange(0, LEVELS)[None, :]
    scale: tl.constexpr = 2 / (levels - 1)  # value · scale − 1 is what the network reads
    highest: tl.constexpr = (levels - 1) / 2
    at_out = image * stream_features
    at_between = image * between_features
    at_outputs = image * output_features

    for j in range(0, columns):
        for g in range(0, GROUPS):
            narrow_size: tl.constexpr = f // GROUPS
            wide_size: tl.constexpr = stream_features // GROUPS
            narrow, wide = g * narrow_size, g * wide_size

            # stem
            at_u = place(image, j, 0, u_layer, u_image, u_column) + wide
            at_rows = image * rows_stride + j * COLOURS
            at_above = image * columns * stem_stride + j * stem_stride + wide
            for block in range(0, tl.cdiv(wide_size, BLOCK_N)):
                n = block * BLOCK_N + block_n
                mask = live[:, None] & (n < wide_size)[None, :]
                total = tl.load(stem_above + at_above[:, None] + n[None, :], mask=mask, other=0.0).to(STATE)
                known_k = (reach + 1) * COLOURS
                total = product(
                    total, rows, at_rows, live, known_k, known_k, stem_weight, g, block, stem_k, stem_n, False, BLOCK_N,
                    BLOCK_K, STAGES, STATE,
                )  # fmt: skip
                tl.store(u + at_u[:, None] + n[None, :], total, mask=mask)
            tl.debug_barrier()

            for layer in range(0, layers):
                at_u = place(image, j, layer, u_layer, u_image, u_column)
                at_inputs = place(image, j, layer, inputs_layer, inputs_image, inputs_column)
                at_above = place(image, j, layer, above_layer, above_image, above_column) + GATES * narrow
                at_joined = place(image, 0, layer, b * f, f, 0)
                slot = layer * GROUPS + g

                if GATES == 1:
                    at_middle = place(image, j, layer, middle_layer, middle_image, middle_column) + narrow
                    for block in range(0, tl.cdiv(narrow_size, BLOCK_N)):
                        n = block * BLOCK_N + block_n
                        mask = live[:, None] & (n < narrow_size)[None, :]
                        down = biases(down_bias, slot, down_n, block, IMAGES, BLOCK_N, STATE)
                        upto = wide + wide_size
                        down = product(
                            down, u, at_u, live, stream_features, upto, down_weight, slot, block, down_k,
                            down_n, True, BLOCK_N, BLOCK_K, STAGES, STATE,
                        )  # fmt: skip
                        tl.store(middle + at_middle[:, None] + n[None, :], tl.maximum(down, 0.0), mask=mask)
                    tl.debug_barrier()

                if GATES == 1:
                    upto = main_features - f + narrow + narrow_size
                else:
                    upto = main_features - stream_features + wide + wide_size
                for block in range(0, tl.cdiv(GATES * narrow_size, BLOCK_N)):
                    column = block * BLOCK_N + block_n
                    gate = column % GATES * narrow_size + column // GATES
                    mask = live[:, None] & (column < GATES * narrow_size)[None, :]
                    sums = tl.load(above + at_above[:, None] + gate[None, :], mask=mask, other=0.0).to(STATE)
                    sums = product(
                        sums, inputs, at_inputs, live, main_features, upto, main_weight, slot, block, main_k, main_n,
                        False, BLOCK_N, BLOCK_K, STAGES, STATE,
                    )  # fmt: skip
                    n = block * (BLOCK_N // GATES) + tl.arange(0, BLOCK_N // GATES)
                    mask = live[:, None] & (n < narrow_size)[None, :]
                    n = narrow + n
                    if GATES == 1:
                        state = tl.maximum(sums, 0.0)
                    elif GATES == 2:
                        state = gated(sums, IMAGES, BLOCK_N // 2)
                    else:
                        at_cell = place(image, j, layer, cell_layer, cell_image, cell_column)
                        state = lstm(sums, cell, at_cell[:, None] + n[None, :], mask, IMAGES, BLOCK_N // 4, STATE)
                        at_hidden = place(image, j, layer, hidden_layer, hidden_image, hidden_column)
                        tl.store(hidden + at_hidden[:, None] + n[None, :], state, mask=mask)
                        if MIRRORED:
                            at = place(image, j, layer, mirrored_layer, mirrored_image, mirrored_column)
                            state += tl.load(mirrored + at[:, None] + n[None, :], mask=mask, other=0.0).to(STATE)
                    tl.store(joined + at_joined[:, None] + n[None, :], state, mask=mask)
                tl.debug_barrier()

                at_next = place(image, j, layer + 1, u_layer, u_image, u_column)
                for block in range(0, tl.cdiv(wide_size, BLOCK_N)):
                    n = block * BLOCK_N + block_n
                    mask = live[:, None] & (n < wide_size)[None, :]
                    upto = narrow + narrow_size
                    total = biases(up_bias, slot, up_n, block, IMAGES, BLOCK_N, STATE)
                    n_of_all = wide + n
                    if RESIDUAL:
                        total += tl.load(u + at_u[:, None] + n_of_all[None, :], mask=mask, other=0.0).to(STATE)
                    total = product(
                        total, joined, at_joined, live, f, upto, up_weight, slot, block, up_k, up_n, False, BLOCK_N,
                        BLOCK_K, STAGES, STATE,
                    )  # fmt: skip
                    if SKIP:
                        skip = biases(to_head_bias, slot, up_n, block, IMAGES, BLOCK_N, STATE)
                        skip = product(
                            skip, joined, at_joined, live, f, upto, to_head_weight, slot, block, up_k, up_n, False,
                            BLOCK_N, BLOCK_K, STAGES, STATE,
                        )  # fmt: skip
                        at = at_out[:, None] + n_of_all[None, :]
                        if layer > 0:
                            skip += tl.load(skips + at, mask=mask, other=0.0).to(STATE)
                        if layer + 1 < layers:
                            tl.store(skips + at, skip, mask=mask)
                        else:
                            total += skip
                    if layer + 1 < layers:
                        tl.store(u + at_next[:, None] + n_of_all[None, :], total, mask=mask)
                    else:
                        tl.store(out + at_out[:, None] + n_of_all[None, :], total, mask=mask)
                tl.debug_barrier()

            if j < width:  # else: outside of the image, where nothing is drawn
                size: tl.constexpr = between_features // GROUPS
                start = g * size
                for block in range(0, tl.cdiv(size, BLOCK_N)):
                    n = block * BLOCK_N + block_n
                    mask = live[:, None] & (n < size)[None, :]
                    features = biases(first_bias, g, first_n, block, IMAGES, BLOCK_N, STATE)
                    upto = wide + wide_size
                    features = product(
                        features, out, at_out, live, stream_features, upto, first_weight, g, block, first_k, first_n,
                        True, BLOCK_N, BLOCK_K, STAGES, STATE,
                    )  # fmt: skip
                    at = at_between[:, None] + (start + n)[None, :]
                    tl.store(between + at, tl.maximum(features, 0.0), mask=mask)
                tl.debug_barrier()
                for block in range(0, tl.cdiv(output_features, BLOCK_N)):
                    n = block * BLOCK_N + block_n
                    mask = live[:, None] & (n < output_features)[None, :]
                    features = biases(last_bias, g, last_n, block, IMAGES, BLOCK_N, STATE)
                    features = product(
                        features, between, at_between, live, between_features, start + size, last_weight, g, block,
                        last_k, last_n, False, BLOCK_N, BLOCK_K, STAGES, STATE,
                    )  # fmt: skip
                    tl.store(outputs + at_outputs[:, None] + n[None, :], features, mask=mask)
                tl.debug_barrier()

                # A few images at a time: all levels of one stand side by side.
                for chunk in range(0, IMAGES // CHOSEN):
                    some = tl.program_id(0).to(tl.int64) * IMAGES + chunk * CHOSEN + tl.arange(0, CHOSEN)
                    there = some < b
                    at_output = some * output_features
                    if MIXTURE == 0:
                        mask = there[:, None] & (level < levels)
                        logits = tl.load(outputs + at_output[:, None] + level, mask=mask, other=0.0)
                        logits = tl.where(level < levels, logits, -float("inf"))
                        value = choose(
                            logits, some, there, g, j, uniforms, temperature, given, known, log_prob, conditionals,
                            width, levels, COLOURS, LEVELS, DRAW, GREEDY, GIVEN, KNOWN, RECORD, CONDITIONALS,
                        )  # fmt: skip
                        tl.store(values + (some * COLOURS + g) * width + j, value, mask=there)
                        put = some * rows_stride + (j + reach) * COLOURS + g
                        tl.store(rows + put, value.to(STATE) * scale - 1, mask=there)
                        tl.debug_barrier()
                    else:
                        m = tl.arange(0, MIXTURE)[None, :]
                        mask = there[:, None] & (m < mixtures)
                        at = at_output[:, None] + m
                        weights = tl.load(outputs + at, mask=mask, other=0.0).to(STATE)
                        log_weights = log_softmax(tl.where(m < mixtures, weights, -float("inf")))
                        for colour in range(0, COLOURS):
                            # means, in levels from the middle, with what the colours before add
                            mean = (
                                tl.load(outputs + at + (1 + colour) * mixtures, mask=mask, other=0.0).to(STATE)
                                * highest
                            )
                            pair = 1 + 2 * COLOURS + colour * (colour - 1) // 2
                            for before in range(0, colour):
                                slope = tl.load(outputs + at + (pair + before) * mixtures, mask=mask, other=0.0).to(
                                    STATE
                                )
                                at_value = (some * COLOURS + before) * width + j
                                x = tl.load(values + at_value, mask=there, other=0).to(STATE) - highest
                                mean += tanh(slope) * x[:, None]
                            scales = tl.load(outputs + at + (1 + COLOURS + colour) * mixtures, mask=mask, other=0.0)
                            sharpness = -tl.log(tl.zeros((CHOSEN, MIXTURE), STATE) + highest) - scales.to(STATE)
                            sharpness = tl.exp(tl.minimum(tl.maximum(sharpness, -14.0), 3.5))
                            logits = mixture_logits(
                                log_weights, mean, sharpness, mixtures, levels, highest, CHOSEN, MIXTURE, LEVELS, STATE
                            )
                            value = choose(
                                logits, some, there, colour, j, uniforms, temperature, given, known, log_prob,
                                conditionals, width, levels, COLOURS, LEVELS, DRAW, GREEDY, GIVEN, KNOWN, RECORD,
                                CONDITIONALS,
                            )  # fmt: skip
                            tl.store(values + (some * COLOURS + colour) * width + j, value, mask=there)
                            put = some * rows_stride + (j + reach) * COLOURS + colour
                            tl.store(rows + put, value.to(STATE) * scale - 1, mask=there)
                            x = value.to(STATE) - highest
                            mass = log_mass(x[:, None], mean, sharpness, highest)
                            log_weights = log_softmax(tl.where(m < mixtures, log_weights + mass, -float("inf")))
                            tl.debug_barrier()


# ---------------------------------------------------------------------------------------------------------- host


class Form(NamedTuple):
    """How the kernel is cut."""

    images: int  # of a program
    block_n: int  # outputs computed at a time; those of a column of blocks stand together in memory
    block_k: int  # features read at a time
    stages: int  # blocks of weights that are on their way
    warps: int


def form_for(b: int, itemsize: int) -> Form:
    """The form for b images and numbers of `itemsize` bytes.

    A program has as few images as a matrix product has rows, until there are more programs than multiprocessors. The
    blocks are the largest that leave no register on the stack: `python -m bench.compile` compiles them.
    """
    few = b <= 16 * 132
    if itemsize > 2:  # without matrix instructions, all operands are in registers
        block_n, warps = (32, 4) if itemsize == 4 else (16, 8)
        return Form(16, block_n, 16, 1, warps) if few else Form(64, block_n, 16, 1, 8)
    return Form(16, 64, 64, 3, 4) if few else Form(64, 32, 32, 3, 8)


def constants(form: Form, levels: int, mixtures: int, state: torch.dtype) -> dict:
    """The kernel's constexpr arguments and options that do not say what the model is."""
    padded = max(2, next_power_of_2(levels))
    return {
        "MIXTURE": max(2, next_power_of_2(mixtures)) if mixtures else 0,
        "LEVELS": padded,
        "IMAGES": form.images,
        "CHOSEN": min(form.images, max(1, (128 if mixtures else 256) * form.warps // padded)),
        "BLOCK_N": form.block_n,
        "BLOCK_K": form.block_k,
        "STAGES": form.stages,
        "STATE": tl.float64 if state == torch.float64 else tl.float32,
        "num_warps": form.warps,
        "num_stages": 1,
        "maxnreg": 255,
    }


class DrawRow:
    """A launch of the kernel with everything that it reads and writes: `run()` does the row whose part above is there.

    Args:
        stem, layers, head: the network.
        residual, skip: how a layer joins the stream.
        choice: how values are chosen.
        values: where they go (b c w) int64.
        levels: v.
    """

    def __init__(
        self,
        stem: Stem,
        layers: Layers,
        head: Head,
        residual: bool,
        skip: bool,
        choice: Choice,
        values: Tensor,
        levels: int,
    ):
        b, colours, width = values.shape
        n, _, columns, stream = layers.u.shape
        groups, f, new = layers.main.weight.shape[1], layers.above.shape[3] // layers.gates, layers.u.new_zeros
        state = torch.float64 if layers.u.dtype == torch.float64 else torch.float32
        none, self.form = new(1), form_for(b, layers.u.element_size())
        block_k, block_n = self.form.block_k, self.form.block_n

        def in_blocks(weight: Tensor) -> Tensor:
            """(layers g k n) → (layers g k/K n/N K N)."""
            return weight.unflatten(3, (-1, block_n)).unflatten(2, (-1, block_k)).transpose(3, 4).contiguous()

        views = {
            "u": layers.u,
            # as wide as what is read there, features of the left neighbour and of the pixel
            "inputs": layers.inputs.as_strided((*layers.inputs.shape[:3], layers.num_inputs), layers.inputs.stride()),
            "middle": layers.middle,
            "above": layers.above,
            "cell": layers.cell,
            "hidden": layers.hidden,
            "mirrored": layers.mirrored,
        }
        products = {
            "stem": stem.product,
            "down": layers.down,
            "main": layers.main,
            "up": layers.up,
            "to_head": layers.to_head,
            "first": head.first,
            "last": head.last,
        }
        known = None if choice.known is None else choice.known.view(torch.uint8)
        tensors = {
            "rows": stem.rows,
            "stem_above": stem.above,
            **views,
            **{f"{name}_weight": None if p is None else in_blocks(p.weight) for name, p in products.items()},
            **{f"{name}_bias": None if p is None else p.bias for name, p in products.items()},
            "joined": new(n, b, f),
            "skips": new(b, stream),
            "out": new(b, stream),
            "between": new(b, head.between),
            "outputs": new(b, head.outputs, dtype=state),
            "values": values,
            **choice._replace(known=known)._asdict(),
        }
        for name in ("stem_bias", "main_bias", "temperature"):  # no arguments: biases are in what is above
            del tensors[name]
        self.arguments = {name: none if x is None else x for name, x in tensors.items()}
        self.arguments |= {"b": b, "layers": n, "temperature": max(float(choice.temperature), 1e-30)}
        self.arguments |= {
            "width": width,
            "columns": columns,
            "f": f,
            "stream_features": stream,
            "main_features": layers.num_inputs,
            "between_features": head.between,
            "output_features": head.outputs,
            "levels": levels,
            "mixtures": head.mixtures,
            "rows_stride": stem.rows.stride(0),
            "stem_stride": stem.above.stride(1),
            "reach": stem.reach,
        }
        for name, x in views.items():
            assert x is None or x.shape[3] == 1 or x.stride(3) == 1
            strides = (0, 0, 0) if x is None else x.stride()[:3]
            self.arguments |= dict(zip((f"{name}_layer", f"{name}_image", f"{name}_column"), strides, strict=True))
        for name, x in products.items():
            if name != "to_head":  # its shape is that of `up`
                inputs, outputs = (0, 0) if x is None else x.weight.shape[2:]
                self.arguments |= {f"{name}_k": inputs // block_k, f"{name}_n": outputs // block_n}
        self.arguments |= {
            "GATES": layers.gates,
            "GROUPS": groups,
            "COLOURS": colours,
            "RESIDUAL": residual,
            "SKIP": skip,
            "MIRRORED": layers.mirrored is not None,
            "DRAW": choice.uniforms is not None,
            "GREEDY": choice.temperature == 0,
            "GIVEN": choice.given is not None,
            "KNOWN": choice.known is not None,
            "RECORD": choice.log_prob is not None,
            "CONDITIONALS": choice.conditionals is not None,
            **constants(self.form, levels, head.mixtures, state),
        }
        self.grid = (cdiv(b, self.form.images),)

    def run(self) -> None:
        launch(draw_row_kernel, self.grid, **self.arguments)
