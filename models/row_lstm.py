"""Row LSTM (1601.06759, section 3.1): a context of the triangle above, and of the row to the left.

Legend: b batch · h w rows, columns · f = hidden features · g group · i j a row, a column.

A layer, from 2f features to 2f; `kernels/row_lstm.py` has the recurrence:

    hidden = row_lstm(u)     input-to-state 1×3 mask B, state-to-state 1×3 over the row above, no mask
    u      ← u + up(hidden)  up 1×1 f→2f, mask B

The input-to-state has two taps, left and centre: the one to the right is masked. A condition is added to the gates.
"""

import torch
from torch import Tensor, nn

import kernels
from models.base import AutoregressiveModel
from models.body import Body
from models.features import Stretch
from models.in_row import InRow, Weights
from models.layers import MaskedLinear, initialise, side_by_side, stack


class RowLSTMLayer(nn.Module):
    """One layer's LSTM: (b h w 2f) → (b h w f).

    Args:
        narrow, wide: the features of the layer and of the residual stream.
        free: the features of the condition, if there is one.
    """

    def __init__(self, narrow: Stretch, wide: Stretch, free: list[Stretch]):
        super().__init__()
        self.input = MaskedLinear([wide.of_pixels_before(), wide, *free], [narrow] * 4)  # gates o f i g
        hidden = narrow.size
        self.state_weight = nn.Parameter(torch.empty(4 * hidden, hidden, 3))
        initialise(self.state_weight, torch.ones(4 * hidden, hidden, 3))
        with torch.no_grad():
            self.input.bias[hidden : 2 * hidden] = 1.0  # forget gate: open at first

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        k = u.shape[3]
        if condition is not None:  # more inputs, which no mask hides
            u = torch.cat([u, condition.expand(*u.shape[:3], -1)], dim=-1)
        weight, bias = self.input.masked_weight(), self.input.bias
        return kernels.row_lstm(u, weight[:, k:], bias, self.state_weight, weight[:, :k])


class RowLSTMs(Body):
    """The body: `layers` layers, (b h w 2f) → (b h w 2f)."""

    gain = 4.0  # gates leave little

    def make_layers(self) -> None:
        self.lstm = nn.ModuleList(RowLSTMLayer(self.narrow, self.wide, self.free) for _ in range(self.layers))

    def layer(self, k: int, u: Tensor, condition: Tensor | None) -> Tensor:
        return self.lstm[k](u, condition)

    def in_row(self) -> InRow:
        inputs, before = side_by_side([lstm.input for lstm in self.lstm]), self.narrow.of_pixels_before()
        states = stack(lstm.state_weight.mT.flatten(1) for lstm in self.lstm)
        above = Weights(states, None, [self.narrow] * 4, [before] * 3)
        given = inputs.part(inputs=slice(2, None)) if self.free else None
        return InRow("lstm", inputs.part(inputs=slice(2)), above, "hidden", given=given)


class RowLSTM(AutoregressiveModel):
    """Row LSTM. Arguments: see `AutoregressiveModel`."""

    architecture = RowLSTMs
