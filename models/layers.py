"""Masked convolutions over groups of colours (1601.06759, section 3.4).

Legend: b batch · h w rows, columns · f features · g group · i j a row, a column.

Features are cut in `groups` contiguous parts, one a colour. The output at a pixel sees all groups of the pixels
above and to the left; at the pixel itself, group g sees the groups before g (mask A) or up to g (mask B).

Everything is channels last: features (b h w f). A kernel keeps only its rows up to the centre; of the last row,
the taps right of the centre are masked.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from kernels.draw_row import Product, Stem, pack


def group_sizes(features: int, groups: int) -> list[int]:
    """Cut `features` in `groups` parts that differ by at most one: 128 in 3 → 43 43 42."""
    if features < groups:
        raise ValueError(f"{features} features cannot be cut in {groups} groups: at least one a group is needed")
    return [features // groups + (g < features % groups) for g in range(groups)]


def group_slices(features: int, groups: int, parts: int = 1) -> list[list[slice]]:
    """Where group g's features stand, once in each of `parts` equal stretches of features (an LSTM has 4 gates)."""
    each = features // parts
    starts = [sum(group_sizes(each, groups)[:g]) for g in range(groups + 1)]
    return [
        [slice(part * each + starts[g], part * each + starts[g + 1]) for part in range(parts)] for g in range(groups)
    ]


def group_index(features: int, groups: int, parts: int = 1) -> Tensor:
    """The group that each feature belongs to (f,)."""
    sizes = group_sizes(features // parts, groups)
    return torch.tensor([g for g in range(groups) for _ in range(sizes[g])] * parts)


def colour_mask(kind: str, inputs: int, outputs: int, groups: int, parts: int = 1) -> Tensor:
    """Which input features each output feature may see at the same pixel: (outputs inputs), of mask A or B."""
    out, into = group_index(outputs, groups, parts)[:, None], group_index(inputs, groups)[None]
    return (out > into if kind == "A" else out >= into).float()


def initialise(weight: Tensor, mask: Tensor, gain: float = 1.0) -> None:
    """Uniform numbers of variance gain² / (3 · number of live inputs), output by output: masked inputs do not count."""
    live = mask.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (mask.dim() - 1))
    with torch.no_grad():
        weight.uniform_(-1, 1).mul_(gain / live.sqrt())


class MaskedLinear(nn.Module):
    """A 1×1 convolution with mask B: (… inputs) → (… outputs). `parts` stretches of outputs carry groups each."""

    def __init__(self, inputs: int, outputs: int, groups: int, parts: int = 1, gain: float = 1.0):
        super().__init__()
        self.inputs, self.outputs, self.groups, self.parts = inputs, outputs, groups, parts
        self.register_buffer("mask", colour_mask("B", inputs, outputs, groups, parts), persistent=False)
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        initialise(self.weight, self.mask, gain)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, u: Tensor) -> Tensor:
        return F.linear(u, self.masked_weight(), self.bias)

    def steps(self) -> list[tuple[Tensor, Tensor]]:
        """For each group, what computes its outputs alone: weight (prefix outputs_g) and bias (outputs_g).

        The inputs that group g sees are the first `prefix` features: groups are contiguous and in order. In memory the
        weights of an output stand together, as a product of few images wants them.
        """
        weight, out = self.masked_weight(), []
        for into, rows in zip(
            group_slices(self.inputs, self.groups),
            group_slices(self.outputs, self.groups, self.parts),
            strict=True,
        ):
            prefix = into[0].stop
            out.append(
                (
                    torch.cat([weight[r, :prefix] for r in rows]).T,
                    torch.cat([self.bias[r] for r in rows]),
                )
            )
        return out


def packed(layers: Sequence[MaskedLinear]) -> Product:
    """The same 1×1 of each layer, as the row kernel reads them."""
    weight, first = torch.stack([layer.masked_weight() for layer in layers]), layers[0]
    groups = group_slices(first.outputs, first.groups, first.parts)
    return pack(weight, torch.stack([layer.bias for layer in layers]), groups)


class MaskedConv(nn.Module):
    """A k×k convolution of mask A or B: (b h w inputs) → (b h w outputs).

    `weight` is (outputs, inputs, (k+1)/2, k): the rows above and the centre row. With `extra` the output has that many
    more columns at the right end, where the kernel's centre stands outside the image: w becomes w + extra. The first
    `vertical` outputs see the rows above alone; the groups are those of the others.
    """

    def __init__(
        self, kind: str, kernel: int, inputs: int, outputs: int, groups: int, extra: int = 0, vertical: int = 0
    ):
        super().__init__()
        assert kind in ("A", "B") and kernel % 2 == 1
        self.reach, self.groups, self.extra, self.vertical = kernel // 2, groups, extra, vertical
        mask = torch.ones(outputs, inputs, self.reach + 1, kernel)
        mask[vertical:, :, -1, self.reach] = colour_mask(kind, inputs, outputs - vertical, groups)
        mask[:, :, -1, self.reach + 1 :] = 0
        mask[:vertical, :, -1] = 0
        self.register_buffer("mask", mask, persistent=False)
        self.weight = nn.Parameter(torch.empty(mask.shape))
        self.bias = nn.Parameter(torch.zeros(outputs))
        initialise(self.weight, self.mask)
        self.live = self.reach * kernel + self.reach + (kind == "B" or groups > 1)  # taps that any output may see

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, u: Tensor, relu: bool = False) -> Tensor:
        """The convolution of u, or of ReLU(u)."""
        return kernels.masked_conv(u, self.masked_weight(), self.bias, relu, self.extra, self.live)


class MaskedRowConv(nn.Module):
    """A 1×3 convolution of mask B along the row: (b h w inputs) → (b h w outputs).

    The tap to the right is masked, so it is one product of the left neighbour's features and the pixel's own, side by
    side: `weight` is (outputs, 2·inputs), the left tap first. `free` more inputs, which come after these, are not
    masked: features that have seen nothing at or after the pixel.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, parts: int = 1, free: int = 0):
        super().__init__()
        self.inputs, self.groups, self.parts = inputs, groups, parts
        left, centre = torch.ones(outputs, inputs), colour_mask("B", inputs, outputs, groups, parts)
        self.register_buffer("mask", torch.cat([left, centre, torch.ones(outputs, free)], dim=1), persistent=False)
        self.weight = nn.Parameter(torch.empty(self.mask.shape))
        self.bias = nn.Parameter(torch.zeros(outputs))
        initialise(self.weight, self.mask)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask

    def forward(self, u: Tensor, *free: Tensor) -> Tensor:
        taps = torch.cat([F.pad(u[:, :, :-1], (0, 0, 1, 0)), u, *free], dim=-1)
        return F.linear(taps, self.masked_weight(), self.bias)


def state_dtype(weight: Tensor) -> torch.dtype:
    """What sums over many steps are kept in: float32 where weights are bfloat16."""
    return torch.promote_types(weight.dtype, torch.float32)


class Buffers:
    """Zeros that a row scan keeps: of b images, like `weight`, in one of two orders in memory.

    With `images_last` the images stand next to each other, so that any features of a pixel are one stretch of memory:
    on a CPU products with few images are quicker then. The row kernel reads features that stand next to each other.
    """

    def __init__(self, b: int, weight: Tensor, images_last: bool = False):
        self.b, self.new, self.images_last, self.state = b, weight.new_zeros, images_last, state_dtype(weight)

    def __call__(self, *shape: int, layers: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(b shape), or with `layers` (layers b shape)."""
        before = () if layers is None else (layers,)
        if self.images_last:
            return self.new((*before, *shape, self.b), dtype=dtype).movedim(-1, len(before))
        return self.new((*before, self.b, *shape), dtype=dtype)

    def after_ones(
        self, *shape: int, layers: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features ([layers] b … f) behind a column of ones ([layers] b … 1+f), and the features alone."""
        known = self(*shape[:-1], 1 + shape[-1], layers=layers, dtype=dtype)
        known[..., 0] = 1
        return known, known[..., 1:]


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """Weights (k n) for what stands behind a column of ones: (1+k n)."""
    return torch.cat([bias[:, None], weight.T], dim=1).T


def windows(rows: Tensor, k: int) -> Tensor:
    """Of each of w columns, k side by side from the one of its number on: (… w+k-1 f) → (… w k f), a view."""
    return rows.unfold(-2, k, 1).mT


class ConditionScan:
    """What a condition adds to every layer's pre-activations, a row at a time.

    Args:
        condition: one like those to come: (b h w d), or (b 1 1 d) where it is the same everywhere, or None.
        weight: (layers outputs d), None without a condition.
        width: w, the columns of a row.

    `row` (b w d) is the condition's row in hand.
    """

    def __init__(self, condition: Tensor | None, weight: Tensor | None, width: int):
        self.given = condition is not None
        if self.given:
            self.weight, self.row = weight.mT.contiguous(), condition[:, 0].expand(-1, width, -1).clone()

    def load(self, i: int, condition: Tensor | None) -> None:
        """Row i of the condition is the one that `add_to` adds from now on."""
        if self.given:
            self.row.copy_(condition[:, min(i, condition.shape[1] - 1)])

    def add_to(self, above: Tensor) -> None:
        """Add the row's part to pre-activations (layers b·w outputs)."""
        if self.given:
            above.baddbmm_(self.row.flatten(0, 1).expand(len(above), -1, -1), self.weight)


class AboveScan:
    """What the rows above and the condition give to every layer's pre-activations: once a row, for all columns.

    Args:
        weight, bias: (layers k outputs) and (layers 1 outputs).
        condition: what it adds.

    From `inputs` (layers b w k), which whoever calls it has filled, to `out` (layers b w outputs). What a step adds to
    them it may add in place: each row has its own.
    """

    def __init__(self, buffers: Buffers, width: int, weight: Tensor, bias: Tensor, condition: ConditionScan):
        self.weight, self.bias, self.condition, (layers, k, outputs) = weight, bias, condition, weight.shape
        self.inputs = buffers.new(layers, buffers.b, width, k)
        self.flat_inputs = self.inputs.flatten(1, 2)
        self.product = buffers.new(layers, buffers.b * width, outputs)
        self.out = self.rows = self.product.view(layers, buffers.b, width, outputs)
        if buffers.images_last:
            self.out = buffers(width, outputs, layers=layers)

    def __call__(self) -> None:
        torch.baddbmm(self.bias, self.flat_inputs, self.weight, out=self.product)
        self.condition.add_to(self.product)
        if self.out is not self.rows:
            self.out.copy_(self.rows)


class MaskedConvScan:
    """A mask-A convolution of an image, at one pixel, group by group.

    Once a row, all taps of the rows above, for all columns. A sub-pixel then costs one product: the left taps and the
    colours already known of the pixel itself stand side by side in the last row of `rows`.

    Args:
        conv: the convolution; its inputs are the colours themselves.
        buffers, width: how many images of which width, with the extra columns.
        outputs: where to write, a view (b f_g) for each column and group.
        vertical: where to write what sees the rows above alone (b w vertical), once a row.

    `slots[j][c]` (b,) is where colour c of column j goes, scaled, once it is known.
    """

    def __init__(
        self,
        conv: MaskedConv,
        buffers: Buffers,
        width: int,
        outputs: list[list[Tensor]],
        vertical: Tensor | None = None,
    ):
        weight, reach = conv.masked_weight(), conv.reach
        features, colours, _, kernel = weight.shape
        self.groups = conv.groups
        self.rows = buffers(reach + 1, width + 2 * reach, colours)  # those above, the row in hand; zeros outside
        above_weight = weight[:, :, :reach].permute(2, 3, 1, 0).flatten(0, 2)[None]  # (1 row·column·colour f)
        nothing = ConditionScan(None, None, width)
        self.of_above = AboveScan(buffers, width, above_weight, conv.bias[None, None], nothing)
        self.above = self.of_above.out[0]  # (b w f)
        self.above_taps = self.of_above.inputs[0].view(buffers.b, width, reach, kernel, colours)
        self.above_windows = windows(self.rows[:, :-1], kernel).transpose(1, 2)
        self.vertical = vertical
        self.taps = weight[conv.vertical :, :, reach, : reach + 1].permute(0, 2, 1).flatten(1)  # (f column·colour)
        groups = [s for (s,) in group_slices(features - conv.vertical, conv.groups)]
        weights = [self.taps[s, : reach * colours + g].contiguous().T for g, s in enumerate(groups)]
        self.skipped, self.reach = conv.vertical, reach
        above, row = self.above[:, :, conv.vertical :], self.rows[:, reach].flatten(1)  # (b, padded width · colours)
        self.plan = [
            [
                (above[:, j, s], row[:, j * colours : (j + reach) * colours + g], weights[g], outputs[j][g])
                for g, s in enumerate(groups)
            ]
            for j in range(width)
        ]
        self.slots = [[row[:, (j + reach) * colours + c] for c in range(colours)] for j in range(width)]

    def begin_row(self, first: bool) -> None:
        if first:
            self.rows.zero_()
        for k in range(self.reach):
            self.rows[:, k] = self.rows[:, k + 1]
        self.rows[:, -1].zero_()
        self.above_taps.copy_(self.above_windows)
        self.of_above()
        if self.vertical is not None:
            self.vertical.copy_(self.above[:, :, : self.skipped])

    def step(self, j: int, g: int) -> None:
        above, known, weight, out = self.plan[j][g]
        torch.addmm(above, known, weight, out=out)

    def packed(self) -> Stem:
        """What the row kernel needs to know."""
        product = pack(self.taps[None], None, group_slices(len(self.taps), self.groups))
        return Stem(product, self.rows[:, self.reach].flatten(1), self.above[:, :, self.skipped :], self.reach)
