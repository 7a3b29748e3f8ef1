"""PixelCNN (1601.06759, section 3.5): residual blocks of masked convolutions.

Legend: b batch · h w rows, columns · f = hidden features · g group · i j a row, a column.

A block (Figure 5, left), from 2f features to 2f:

    u ← u + up(ReLU(conv(ReLU(down(ReLU(u))))))        down 1×1 2f→f · conv 3×3 f→f · up 1×1 f→2f, all mask B

A condition is added to what the 3×3 gives.
"""

import torch
from torch import Tensor, nn

from kernels.draw_row import Layers, pack
from models.base import AutoregressiveModel
from models.body import Body, JoinScan
from models.layers import (
    AboveScan,
    Buffers,
    ConditionScan,
    MaskedConv,
    MaskedLinear,
    group_slices,
    packed,
    windows,
    with_bias,
)


class ResidualBlocks(Body):
    """The body: `layers` blocks, (b h w 2f) → (b h w 2f)."""

    gain = 12.0  # what leaves three products and ReLUs is small

    def make_layers(self) -> None:
        f, groups = self.hidden, self.groups
        self.down = nn.ModuleList(MaskedLinear(2 * f, f, groups) for _ in range(self.layers))
        self.conv = nn.ModuleList(MaskedConv("B", 3, f, f, groups) for _ in range(self.layers))
        self.from_condition = self.conditions(f)

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        skips = 0
        for layer, (down, conv, given) in enumerate(zip(self.down, self.conv, self.from_condition, strict=True)):
            mid = conv(down(u.relu()), relu=True)
            mid = mid if given is None else mid + given(condition)
            u, skips = self.join(layer, u, skips, mid.relu())
        return u + skips

    def scan(self, buffers: Buffers, width: int, condition: Tensor | None = None) -> "ResidualBlocksScan":
        return ResidualBlocksScan(self, buffers, width, condition)


class ResidualBlocksScan:
    """All blocks at one pixel, group by group.

    Once a row, the three upper taps of every block's 3×3, for all columns: one batched product. A sub-pixel then
    costs a block its 1×1 down, left and centre tap, and 1×1 up, each for group g's features alone.

    `row` holds ReLU(down(·)) of the row in hand, with a zero column at either end. The left tap's features and the
    centre's known groups stand side by side in it, so that both taps are one product.
    """

    def __init__(self, body: ResidualBlocks, buffers: Buffers, width: int, condition: Tensor | None):
        layers, f, groups = body.layers, body.hidden, body.groups
        self.vertical, self.body = None, body
        self.row = buffers(width + 2, f, layers=layers)
        conv_weight = torch.stack([conv.masked_weight() for conv in body.conv])  # (layers out in 2 3)
        self.conv_weight = conv_weight
        above_weight = conv_weight[:, :, :, 0].permute(0, 3, 2, 1).flatten(1, 2).contiguous()
        above_bias = torch.stack([conv.bias for conv in body.conv])[:, None]
        self.condition = ConditionScan(condition, body.condition_weights(), width)
        self.above = AboveScan(buffers, width, above_weight, above_bias, self.condition)
        self.taps, self.windows = self.above.inputs.unflatten(3, (3, f)), windows(self.row, 3)

        down, self.join = [m.steps() for m in body.down], JoinScan(body, buffers, in_place=True)
        (known_u, relu_u), (known_mid, mid) = (buffers.after_ones(n, layers=layers) for n in (2 * f, f))
        wide, narrow = (group_slices(n, groups) for n in (2 * f, f))
        above, row = self.above.out, self.row.flatten(2)
        self.inputs = [self.join.out] * width  # the stream of a pixel, changed in place
        self.plan = [[[] for _ in range(groups)] for _ in range(width)]
        for g, ((w,), (n,)) in enumerate(zip(wide, narrow, strict=True)):
            for layer in range(layers):
                left_centre = conv_weight[layer, n, :, 1, :2]  # (n_g, in, left and centre)
                left_centre = torch.cat([left_centre[:, :, 0], left_centre[:, : n.stop, 1]], dim=1).T
                down_weight, weights = with_bias(*down[layer][g]), self.join.weights(layer, g)
                for j in range(width):
                    self.plan[j][g].append(
                        (
                            relu_u[layer, :, w],
                            known_u[layer, :, : 1 + w.stop],
                            down_weight,
                            row[layer, :, (j + 1) * f + n.start : (j + 1) * f + n.stop],
                            row[layer, :, j * f : (j + 1) * f + n.stop],
                            above[layer, :, j, n],
                            left_centre,
                            mid[layer, :, n],
                            known_mid[layer, :, : 1 + n.stop],
                            weights,
                        )
                    )

    def load(self, i: int, condition: Tensor | None) -> None:
        """What depends on the number of the row in hand goes to where `begin_row` reads it."""
        self.condition.load(i, condition)

    def begin_row(self, first: bool) -> None:
        if first:
            self.row.zero_()
        self.taps.copy_(self.windows)
        self.above()

    def packed(self) -> Layers:
        """What the row kernel needs to know."""
        body, (layers, b, width, f) = self.body, self.above.out.shape
        taps = torch.cat([self.conv_weight[:, :, :, 1, 0], self.conv_weight[:, :, :, 1, 1]], dim=2)
        main = pack(taps, None, group_slices(f, body.groups))
        row = self.row
        u = row.new_zeros(layers, b, 1, 2 * f).expand(-1, -1, width, -1)  # of the pixel in hand
        up, to_head = self.join.packed(body)
        return Layers(
            *(1, packed(body.down), main, up, to_head, row[:, :, :width], 2 * f, u, self.above.out),
            middle=row[:, :, 1:-1],
        )

    def step(self, j: int, g: int) -> Tensor:
        """From group g of the stem at column j, in `inputs[j][g]`, to group g of the head's input (b 2f_g)."""
        u, stream = self.join.out[g], self.join.stream[g]
        self.join.begin(g)
        for (
            relu_out, relu_u, down_w, row_out, row, above, conv_w, mid_out, mid, weights,
        ) in self.plan[j][g]:  # fmt: skip
            torch.clamp_min(u, 0, out=relu_out)
            torch.mm(relu_u, down_w, out=row_out).relu_()
            torch.clamp_min(above.addmm_(row, conv_w), 0, out=mid_out)
            self.join(g, stream, mid, stream, *weights)
        return self.join.end(g)


class PixelCNN(AutoregressiveModel):
    """PixelCNN. Arguments: see `AutoregressiveModel`."""

    architecture = ResidualBlocks
