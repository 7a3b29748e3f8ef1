"""Diagonal BiLSTM (1601.06759, section 3.2): a context of everything before, in both directions.

Legend: b batch · h w rows, columns · d direction (2) · f = hidden features · g group · i j a row, a column.

A layer, from 2f features to 2f; `kernels/diagonal_lstm.py` has the recurrence:

    hidden (d f) = diagonal_lstm(u)                          input-to-state 1×1 mask B, state-to-state no mask
    u(i, j) ← u(i, j) + up(hidden_0(i, j) + hidden_1(i−1, j))       up 1×1 f→2f, mask B

Direction 1 comes from the right, so its state at (i, j) has seen what lies right of j in row i: it is moved down one
row, where all of that is past.

Features at (i, j) do not contain the pixel (i, j) itself, so direction 1 would miss the last pixel of each row: the
next row's left part would never see it. The layers therefore run on w + 1 columns. Column w lies outside the image; its
features hold the row's last pixels, and direction 1 begins there.

A condition is added to the gates of both directions, as more inputs of the LSTM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.base import AutoregressiveModel
from models.body import Body
from models.features import Stretch, visible
from models.in_row import InRow, Mirrored, Weights
from models.layers import initialise, stack


class DiagonalLSTMLayer(nn.Module):
    """Both directions of one layer's LSTM: (b h w 2f) → the sum of both, the second moved down a row (b h w f).

    Args:
        narrow, wide: the features of the layer and of the residual stream.
        free: the features of the condition, if there is one.
    """

    def __init__(self, narrow: Stretch, wide: Stretch, free: list[Stretch]):
        super().__init__()
        hidden = narrow.size
        self.input_weight = nn.Parameter(torch.empty(2, 4 * hidden, wide.size))  # gates o f i g
        mask = visible("B", [narrow] * 4, [wide]).to(self.input_weight)
        self.register_buffer("mask", mask, persistent=False)
        self.state_weight = nn.Parameter(torch.empty(2, 4 * hidden, 2 * hidden))  # left, up
        self.bias = nn.Parameter(torch.zeros(2, 4 * hidden))
        for direction in range(2):
            initialise(self.input_weight[direction], mask)
            initialise(self.state_weight[direction], torch.ones_like(self.state_weight[direction]))
        with torch.no_grad():
            self.bias[:, hidden : 2 * hidden] = 1.0  # forget gate: open at first
        if free:
            bound, condition = free[0].size ** -0.5, free[0].size
            self.condition_weight = nn.Parameter(torch.empty(2, 4 * hidden, condition).uniform_(-bound, bound))

    def masked_input_weight(self) -> Tensor:
        return self.input_weight * self.mask

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        weight = self.masked_input_weight()
        if condition is not None:  # more inputs, which no mask hides
            u = torch.cat([u, condition.expand(*u.shape[:3], -1)], dim=-1)
            weight = torch.cat([weight, self.condition_weight], dim=-1)
        hidden = kernels.diagonal_lstm(u, weight, self.bias, self.state_weight)
        forward, mirrored = hidden.unbind(3)
        return forward + F.pad(mirrored[:, :-1], (0, 0, 0, 0, 1, 0))


class DiagonalLSTMs(Body):
    """The body: `layers` layers, (b h w+1 2f) → (b h w 2f)."""

    extra_columns = 1
    gain = 4.0  # gates leave little

    def make_layers(self) -> None:
        self.lstm = nn.ModuleList(DiagonalLSTMLayer(self.narrow, self.wide, self.free) for _ in range(self.layers))

    def layer(self, k: int, u: Tensor, condition: Tensor | None) -> Tensor:
        return self.lstm[k](u, condition)

    def in_row(self) -> InRow:
        gates, before = [self.narrow] * 4, self.narrow.of_pixels_before()

        def direction(d: int) -> tuple[Weights, Weights, Weights, Weights | None]:
            """Weights from the left neighbour's hidden state, the upper one's, u, and the condition."""
            left, up = stack(lstm.state_weight[d] for lstm in self.lstm).chunk(2, dim=2)
            inputs = stack(lstm.masked_input_weight()[d] for lstm in self.lstm)
            bias = stack(lstm.bias[d] for lstm in self.lstm)
            given = stack(lstm.condition_weight[d] for lstm in self.lstm) if self.free else None
            return (
                Weights(left, bias, gates, [before]),
                Weights(up, bias, gates, [before]),
                Weights(inputs, None, gates, [self.wide]),
                Weights(given, None, gates, self.free) if self.free else None,
            )

        left, up, here, given = direction(1)
        mirrored = Mirrored(beside(up, here), left, given)
        left, up, here, given = direction(0)
        return InRow("lstm", beside(left, here), up, "hidden", left="hidden", given=given, mirrored=mirrored)


def beside(a: Weights, b: Weights) -> Weights:
    """One product of the inputs of both, with the bias of the first."""
    return a._replace(weight=torch.cat([a.weight, b.weight], dim=2), inputs=[*a.inputs, *b.inputs])


class DiagBiLSTM(AutoregressiveModel):
    """Diagonal BiLSTM. Arguments: see `AutoregressiveModel`."""

    architecture = DiagonalLSTMs
