"""The cached sampler's row on a GPU: a network's description and layout in memory, and the launch of the kernel.

Legend: b batch · w columns · c colour · g group · f hidden features · k n inputs, outputs of a product · v levels.

`kernels.draw_row_kernel` has the kernel and the mathematics. A network is described by `Stem`, `Layers` and `Head`,
whose tensors are views of the sampler's memory, and a rule by `Choice`; `DrawRow` launches the kernel on them. Groups
are equally wide, in multiples of 16 (`models.aligned`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.draw_row_kernel import draw_row_kernel
from kernels.jit import cdiv, launch, multiprocessors, next_power_of_2, tl

PADDED = 64  # `pack` fills up with zeros to multiples of this, which the blocks of every form divide


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
    rows: Tensor  # (b columns·colours·n): the row in hand as the stem reads it, with zeros at both ends
    above: Tensor  # (b w f)
    reach: int
    table: Tensor | None = None  # (v n): each level as the stem reads it; None: scaled to [−1, 1], n = 1


class Choice(NamedTuple):
    """The rule of the present row: how to choose values, and what to record of the choice."""

    uniforms: Tensor | None = None  # (b c w): draw with them
    temperature: float = 1.0
    given: Tensor | None = None  # (b c w): take these instead,
    known: Tensor | None = None  # (b c w): where this is true; None: everywhere
    log_prob: Tensor | None = None  # (b,): add up how likely the values are
    conditionals: Tensor | None = None  # (b c w v): keep the log-probabilities of all levels


def pack(weight: Tensor, bias: Tensor | None, groups: list[list[slice]]) -> Product:
    """Lay out masked weights (layers outputs inputs) and biases (layers outputs) by group.

    Args:
        groups: the stretches of outputs that belong to each group. Where they are several, a group's gates, the gates
            of one feature become neighbours.
    """

    def of_group(x: Tensor, stretches: list[slice]) -> Tensor:
        """Take a group's outputs and fill up with zeros: (layers outputs …) → (layers n …)."""
        x = torch.stack([x[:, s] for s in stretches], dim=2).flatten(1, 2)
        return F.pad(x, (*[0] * 2 * (x.dim() - 2), 0, width - x.shape[1]))

    width = max(sum(s.stop - s.start for s in stretches) for stretches in groups)
    width = cdiv(width, PADDED) * PADDED
    packed = torch.stack([of_group(weight, stretches) for stretches in groups], dim=1).mT
    packed = F.pad(packed, (0, 0, 0, -packed.shape[2] % PADDED))
    if bias is not None:
        bias = torch.stack([of_group(bias, stretches) for stretches in groups], dim=1).contiguous()
    return Product(packed, bias)


# --------------------------------------------------------------------------------------------------------- launch


class Form(NamedTuple):
    """How the kernel is cut."""

    images: int  # of a program
    block_n: int  # outputs computed at a time; a column of blocks is contiguous in memory
    block_k: int  # features read at a time
    stages: int  # blocks of weights that are on their way
    warps: int


def form_for(b: int, itemsize: int, processors: int, narrow: bool = False, skip: bool = False) -> Form:
    """Choose the form for b images and numbers of `itemsize` bytes, on a GPU with that many multiprocessors.

    A program has as few images as a matrix product has rows, until there are more programs than run at once: of 128
    threads two to a multiprocessor. `python -m bench.sweep` times the forms; they leave no register on the stack
    (`python -m bench.compile`), which twice as many images would in networks that are narrow or have skips.
    """
    if itemsize == 8:  # without matrix instructions, all operands are in registers
        return Form(16 if b <= 16 * processors else 64, 16, 16, 1, 8)
    if itemsize == 4:  # of 32 images, sm_80 keeps some on the stack
        return Form(16, 64, 32, 3, 4)
    few = b <= 16 * 2 * processors or narrow or skip
    return Form(16, 64, 64, 4, 4) if few else Form(32, 64, 64, 3, 4)


def constants(form: Form, levels: int, mixtures: int, state: torch.dtype) -> dict:
    """Choose the constexpr arguments and options that follow from the form, the levels and the type of sums."""
    padded = max(2, next_power_of_2(levels))
    chosen = 8 if mixtures else form.images  # of a mixture, 16 took a register too many on sm_90
    return {
        "MIXTURE": max(2, next_power_of_2(mixtures)) if mixtures else 0,
        "LEVELS": padded,
        "IMAGES": form.images,
        "CHOSEN": min(chosen, max(1, (128 if mixtures else 256) * form.warps // padded)),
        "BLOCK_N": form.block_n,
        "BLOCK_K": form.block_k,
        "STAGES": form.stages,
        "STATE": tl.float64 if state == torch.float64 else tl.float32,
        "num_warps": form.warps,
        "num_stages": 1,
        "maxnreg": 255,
    }


class DrawRow:
    """A launch of the kernel with everything that it reads and writes.

    `run()` draws the row in hand, once what the rows above contribute to it is in `stem.above` and `layers.above`.

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
        num_layers, _, columns, stream = layers.u.shape
        f, groups = layers.above.shape[3] // layers.gates, layers.main.weight.shape[1]
        new = layers.u.new_zeros  # a block may read what no group has written yet, times zero
        state = torch.float64 if layers.u.dtype == torch.float64 else torch.float32
        form = form_for(b, layers.u.element_size(), multiprocessors(values.device), narrow=f < 64, skip=skip)
        self.grid = (cdiv(b, form.images),)
        self.arguments = {
            "rows": stem.rows,
            "rows_stride": stem.rows.stride(0),
            "stem_above": stem.above,
            "stem_stride": stem.above.stride(1),
            "reach": stem.reach,
            "table": stem.table,
            "of_value": 1 if stem.table is None else stem.table.shape[1],
            "OF_VALUE": 1 if stem.table is None else next_power_of_2(stem.table.shape[1]),
            "joined": new(num_layers, b, f),
            "skips": new(b, stream) if skip else None,
            "out": new(b, stream),
            "between": new(b, head.between),
            "outputs": new(b, head.outputs, dtype=state),
            "values": values,
            **choice._asdict(),
            "known": None if choice.known is None else choice.known.view(torch.uint8),
            "temperature": choice.temperature or 1.0,  # which GREEDY leaves unused
            "b": b,
            "layers": num_layers,
            "groups": groups,
            "width": width,
            "columns": columns,
            "f": f,
            "stream_features": stream,
            "num_inputs": layers.num_inputs,
            "between_features": head.between,
            "num_outputs": head.outputs,
            "levels": levels,
            "mixtures": head.mixtures,
            "GATES": layers.gates,
            "GROUPS": groups,
            "COLOURS": colours,
            "RESIDUAL": residual,
            "GREEDY": choice.temperature == 0,
            **constants(form, levels, head.mixtures, state),
        }
        # as wide as what `main` reads: the left neighbour's features and the pixel's own
        inputs = layers.inputs.as_strided((*layers.inputs.shape[:3], layers.num_inputs), layers.inputs.stride())
        for name in ("u", "middle", "above", "cell", "hidden", "mirrored"):
            self.arguments |= strided(name, getattr(layers, name))
        self.arguments |= strided("inputs", inputs)
        for name in ("down", "main", "up", "to_head"):
            self.arguments |= in_blocks(name, getattr(layers, name), form)
        for name, product in (("stem", stem.product), ("first", head.first), ("last", head.last)):
            self.arguments |= in_blocks(name, product, form)
        # The kernel has no such arguments: these biases are in `stem.above` and `layers.above`, and `to_head` has the
        # shape of `up`.
        for name in ("stem_bias", "main_bias", "to_head_k", "to_head_n"):
            del self.arguments[name]

    def run(self) -> None:
        """Draw the row in hand: its values go to `values` and to `stem.rows`."""
        launch(draw_row_kernel, self.grid, **self.arguments)


def strided(name: str, view: Tensor | None) -> dict:
    """Make the kernel's arguments for a view [layer, image, column, feature]: itself and its strides."""
    assert view is None or view.shape[3] == 1 or view.stride(3) == 1
    layer, image, column = (0, 0, 0) if view is None else view.stride()[:3]
    return {name: view, f"{name}_layer": layer, f"{name}_image": image, f"{name}_column": column}


def in_blocks(name: str, product: Product | None, form: Form) -> dict:
    """Make the kernel's arguments for a product: weights (layers g k/K n/N K N), biases, numbers of blocks."""
    if product is None:
        return {f"{name}_weight": None, f"{name}_bias": None, f"{name}_k": 0, f"{name}_n": 0}
    weight = product.weight.unflatten(3, (-1, form.block_n)).unflatten(2, (-1, form.block_k)).transpose(3, 4)
    blocks_k, blocks_n = weight.shape[2:4]
    return {
        f"{name}_weight": weight.contiguous(),
        f"{name}_bias": product.bias,
        f"{name}_k": blocks_k,
        f"{name}_n": blocks_n,
    }
