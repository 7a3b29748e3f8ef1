"""Gated PixelCNN (van den Oord et al. 2016b, 1606.05328): two stacks of convolutions, no blind spot.

Legend: b batch · h w rows, columns · f = hidden features · g group · i j a row, a column.

The vertical stack `v` sees the rows above (i, j), all of their colours, to both sides; the horizontal stack `u` sees
its own row to the left as well. A layer, with gate([a, b]) = tanh(a) ⊙ σ(b), each of f features:

    v ← gate(vertical(v))                              2×3, rows i−1 and i, f→2f, no mask: v has not seen row i
    u ← u + up(gate(horizontal(u(i, j−1), u(i, j), v)))     1×3 mask B along the row, f→2f · up 1×1 f→f, mask B

The stem's first f features, which see rows above alone, are v; its others are u. A condition is added to both gates.
"""

import torch
from torch import Tensor, nn

import kernels
from kernels.draw_row import Layers, pack
from models.base import AutoregressiveModel
from models.body import Body, JoinScan
from models.layers import AboveScan, Buffers, ConditionScan, MaskedRowConv, group_slices, initialise, windows


class VerticalConv(nn.Module):
    """The 2×3 convolution over rows i − 1 and i, without a mask: (b h w f) → (b h w 2f)."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(2 * hidden, hidden, 2, 3))
        self.bias = nn.Parameter(torch.zeros(2 * hidden))
        initialise(self.weight, torch.ones_like(self.weight))

    def forward(self, v: Tensor) -> Tensor:
        return kernels.masked_conv(v, self.weight, self.bias)


class GatedLayers(Body):
    """The body: `layers` layers, (b h w 2f) → (b h w f)."""

    stream = 1
    gain = 4.0  # what leaves the gates is small
    vertical = 1

    def make_layers(self) -> None:
        f, groups = self.hidden, self.groups
        self.vertical_conv = nn.ModuleList(VerticalConv(f) for _ in range(self.layers))
        self.horizontal = nn.ModuleList(
            MaskedRowConv(f, 2 * f, groups, parts=2, free=f + self.given) for _ in range(self.layers)
        )
        self.from_condition = self.conditions(2 * f)

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        v, u = u.chunk(2, dim=-1)
        skips, free = 0, () if condition is None else (condition.expand(*u.shape[:3], -1),)
        layers = zip(self.vertical_conv, self.horizontal, self.from_condition, strict=True)
        for layer, (vertical, horizontal, given) in enumerate(layers):
            v = vertical(v)
            v = kernels.gate(v if given is None else v + given(condition))
            u, skips = self.join(layer, u, skips, kernels.gate(horizontal(u, v, *free)))
        return u + skips

    def scan(self, buffers: Buffers, width: int, condition: Tensor | None = None) -> "GatedLayersScan":
        return GatedLayersScan(self, buffers, width, condition)


class GatedLayersScan:
    """All layers at one pixel, group by group.

    Once a row, the whole vertical stack, for all columns, and what it gives the horizontal one: the rows above are all
    that it sees. A sub-pixel then costs a layer its left and centre tap (one product: they stand side by side in
    `row`), the gate, and the 1×1 up.

    The horizontal gates are sorted by group here: tanh and σ of group 0, then of group 1, ….
    """

    def __init__(self, body: GatedLayers, buffers: Buffers, width: int, condition: Tensor | None):
        layers, f, groups, b = body.layers, body.hidden, body.groups, buffers.b
        self.body, self.f = body, f
        gates = group_slices(2 * f, groups, parts=2)
        sort = torch.cat([torch.arange(2 * f)[s] for slices in gates for s in slices])
        weight = torch.stack([m.masked_weight() for m in body.horizontal])[:, sort]  # (layers 2f 3f+d)

        self.v = buffers.new(layers + 1, b, 2, width + 2, f)  # the row above and the row in hand, zeros at both ends
        self.vertical = self.v[0, :, 1, 1:-1]
        self.row = buffers((width + 1) * f, layers=layers)  # u of the row in hand, after a column of zeros
        above_weight = weight[:, :, 2 * f : 3 * f].mT.contiguous()
        above_bias = torch.stack([m.bias for m in body.horizontal])[:, None, sort]
        self.condition = ConditionScan(condition, weight[:, :, 3 * f :] if body.given else None, width)
        self.above = AboveScan(buffers, width, above_weight, above_bias, self.condition)  # from the vertical stack
        # What a layer of the vertical stack reads of each pixel, the same memory for all: both rows' taps, condition.
        inputs, self.vertical_gates = buffers.new(b, width, 6 * f + body.given), buffers.new(b * width, 2 * f)
        self.windows = windows(self.v, 3).transpose(2, 3)  # (layers+1 b w 2 3 f)
        self.taps, self.given = inputs[..., : 6 * f].unflatten(2, (2, 3, f)), inputs[..., 6 * f :]
        self.vertical_inputs, weights = inputs.flatten(0, 1), [m.weight for m in body.vertical_conv]
        weights = [torch.stack(weights).permute(0, 3, 4, 2, 1).flatten(1, 3)]  # (layers row·column·f 2f)
        weights += [body.condition_weights().mT] if body.given else []
        self.vertical_weight = torch.cat(weights, dim=1)
        self.vertical_bias = torch.stack([m.bias for m in body.vertical_conv])
        self.halves = self.vertical_gates.unflatten(0, (b, width)).chunk(2, dim=2)

        self.join = JoinScan(body, buffers)
        narrow = [s for (s,) in group_slices(f, groups)]
        known_hidden, hidden = buffers.after_ones(f, layers=layers)
        above = self.above.out

        def slots(layer: int, j: int, n: slice) -> Tensor:
            """Features n of u at column j."""
            return self.row[layer, :, (j + 1) * f + n.start : (j + 1) * f + n.stop]

        self.inputs = [[slots(0, j, n) for n in narrow] for j in range(width)]
        self.plan = [[[] for _ in range(groups)] for _ in range(width)]
        for g, n in enumerate(narrow):
            columns = slice(2 * n.start, 2 * n.stop)
            for layer in range(layers):
                left_centre = weight[layer, columns, : f + n.stop].contiguous().T
                weights = self.join.weights(layer, g)
                for j in range(width):
                    both = above[layer, :, j, columns]
                    self.plan[j][g].append(
                        (
                            both,
                            self.row[layer, :, j * f : (j + 1) * f + n.stop],
                            left_centre,
                            *both.chunk(2, dim=1),
                            hidden[layer, :, n],
                            known_hidden[layer, :, : 1 + n.stop],
                            slots(layer, j, n),
                            slots(layer + 1, j, n) if layer + 1 < layers else self.join.out[g],
                            weights,
                        )
                    )

    def load(self, i: int, condition: Tensor | None) -> None:
        """What depends on the number of the row in hand goes to where `begin_row` reads it."""
        self.condition.load(i, condition)

    def begin_row(self, first: bool) -> None:
        """Called after the stem wrote `vertical` of the row in hand."""
        if first:
            self.v[:, :, 0].zero_()
        if self.condition.given:
            self.given.copy_(self.condition.row)
        a, b = self.halves
        for layer, (weight, bias) in enumerate(zip(self.vertical_weight, self.vertical_bias, strict=True)):
            self.taps.copy_(self.windows[layer])
            torch.addmm(bias, self.vertical_inputs, weight, out=self.vertical_gates)
            torch.mul(a.tanh_(), b.sigmoid_(), out=self.v[layer + 1, :, 1, 1:-1])
        self.above.inputs.copy_(self.v[1:, :, 1, 1:-1])
        self.above()
        self.v[:, :, 0] = self.v[:, :, 1]  # the next row's row above

    def packed(self) -> Layers:
        """What the row kernel needs to know."""
        f, body = self.f, self.body
        weight = torch.stack([m.masked_weight()[:, : 2 * f] for m in body.horizontal])
        main = pack(weight, None, group_slices(2 * f, body.groups, parts=2))
        row, up = self.row.unflatten(2, (-1, f)), self.join.packed(body)
        return Layers(2, None, main, *up, row[:, :, :-1], 2 * f, row[:, :, 1:], self.above.out)

    def step(self, j: int, g: int) -> Tensor:
        """From group g of the stem at column j, in `inputs[j][g]`, to group g of the head's input (b f_g)."""
        self.join.begin(g)
        for (
            both, known, weight, a, b, hidden_out, hidden, u, following, weights,
        ) in self.plan[j][g]:  # fmt: skip
            both.addmm_(known, weight)
            torch.mul(a.tanh_(), b.sigmoid_(), out=hidden_out)
            self.join(g, u, hidden, following, *weights)
        return self.join.end(g)


class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN. Arguments: see `AutoregressiveModel`."""

    architecture = GatedLayers
