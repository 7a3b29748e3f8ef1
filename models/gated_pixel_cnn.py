"""Gated PixelCNN (van den Oord et al. 2016b, 1606.05328): two stacks of convolutions, no blind spot.

Legend: b batch · h w rows, columns · f = hidden features · g group · i j a row, a column.

The vertical stack `v` sees the rows above (i, j), all of their colours, to both sides; the horizontal stack `u` sees
its own row to the left as well. A layer, with gate([a, b]) = tanh(a) ⊙ σ(b), each of f features:

    v ← gate(vertical(v))                              2×3, rows i−1 and i, f→2f, no mask: v has not seen row i
    u ← u + up(gate(horizontal(u(i, j−1), u(i, j), v)))     1×3 mask B along the row, f→2f · up 1×1 f→f, mask B

The stem's first f features, which see only rows above, are v; its others are u. A condition is added to both gates.
"""

import torch
from torch import Tensor, nn

import kernels
from models.base import AutoregressiveModel
from models.body import Body
from models.in_row import InRow, Vertical, Weights
from models.layers import MaskedLinear, initialise, left_and_here, side_by_side, stack


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

    stream_factor = 1
    vertical_factor = 1
    gain = 4.0  # gates leave little

    def make_layers(self) -> None:
        before = self.narrow.of_pixels_before()
        inputs = [before, self.narrow, before, *self.free]  # left, here, the vertical stack, the condition
        self.vertical_conv = nn.ModuleList(VerticalConv(self.hidden) for _ in range(self.layers))
        self.horizontal = nn.ModuleList(MaskedLinear(inputs, [self.narrow] * 2) for _ in range(self.layers))
        self.from_condition = self.conditions(2 * self.hidden)

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        v, u = u.chunk(2, dim=-1)
        skips, free = 0, () if condition is None else (condition.expand(*u.shape[:3], -1),)
        for k in range(self.layers):
            v = self.vertical_conv[k](v)
            v = kernels.gate(v if condition is None else v + self.from_condition[k](condition))
            u, skips = self.join(k, u, skips, kernels.gate(self.horizontal[k](left_and_here(u, v, *free))))
        return u + skips

    def in_row(self) -> InRow:
        horizontal, before = side_by_side(self.horizontal), self.narrow.of_pixels_before()
        row, above, given = (horizontal.part(inputs=part) for part in (slice(2), slice(2, 3), slice(3, None)))
        taps = stack(conv.weight.permute(0, 2, 3, 1).flatten(1) for conv in self.vertical_conv)
        bias = stack(conv.bias for conv in self.vertical_conv)
        stack_above = Vertical(
            Weights(taps, bias, [before] * 2, [before] * 6), self.from_condition_in_row([before] * 2)
        )
        return InRow("gate", row, above, "vertical", given=given if self.free else None, vertical=stack_above)


class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN. Arguments: see `AutoregressiveModel`."""

    architecture = GatedLayers
