"""PixelCNN (1601.06759, section 3.5): residual blocks of masked convolutions.

Legend: b batch · h w rows, columns · f = hidden features · g group.

A block (Figure 5, left), from 2f features to 2f:

    u ← u + up(ReLU(conv(ReLU(down(ReLU(u))))))        down 1×1 2f→f · conv 3×3 f→f · up 1×1 f→2f, all mask B

A condition is added to what the 3×3 gives.
"""

from torch import Tensor, nn

from models.base import AutoregressiveModel
from models.body import Body
from models.in_row import InRow
from models.layers import MaskedConv, MaskedLinear, in_rows, side_by_side


class ResidualBlocks(Body):
    """The body: `layers` blocks, (b h w 2f) → (b h w 2f)."""

    gain = 12.0  # three products with ReLUs leave little

    def make_layers(self) -> None:
        self.down = nn.ModuleList(MaskedLinear([self.wide], [self.narrow]) for _ in range(self.layers))
        self.conv = nn.ModuleList(MaskedConv("B", 3, self.narrow, [self.narrow]) for _ in range(self.layers))
        self.from_condition = self.conditions(self.hidden)

    def layer(self, k: int, u: Tensor, condition: Tensor | None) -> Tensor:
        mid = self.conv[k](self.down[k](u.relu()), relu=True)
        return (mid if condition is None else mid + self.from_condition[k](condition)).relu()

    def in_row(self) -> InRow:
        given = self.from_condition_in_row([self.narrow])
        return InRow("relu", *in_rows(self.conv), "here", down=side_by_side(self.down), given=given)


class PixelCNN(AutoregressiveModel):
    """PixelCNN. Arguments: see `AutoregressiveModel`."""

    architecture = ResidualBlocks
