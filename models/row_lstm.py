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
from kernels.draw_row import Layers, pack
from models.base import AutoregressiveModel
from models.body import Body, JoinScan
from models.layers import AboveScan, Buffers, ConditionScan, MaskedRowConv, group_slices, initialise, windows


class RowLSTMLayer(nn.Module):
    """One layer's LSTM: (b h w 2f) → (b h w f)."""

    def __init__(self, hidden: int, groups: int, condition: int):
        super().__init__()
        self.input = MaskedRowConv(2 * hidden, 4 * hidden, groups, parts=4, free=condition)  # gates o f i g
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

    gain = 4.0  # what leaves the gates is small

    def make_layers(self) -> None:
        sizes = self.hidden, self.groups, self.given
        self.lstm = nn.ModuleList(RowLSTMLayer(*sizes) for _ in range(self.layers))

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        skips = 0
        for layer, lstm in enumerate(self.lstm):
            u, skips = self.join(layer, u, skips, lstm(u, condition))
        return u + skips

    def scan(self, buffers: Buffers, width: int, condition: Tensor | None = None) -> "RowLSTMsScan":
        return RowLSTMsScan(self, buffers, width, condition)


class RowLSTMsScan:
    """All layers at one pixel, group by group.

    Once a row, for all columns and all layers, the state-to-state convolution of the row above: one batched product. A
    sub-pixel then costs a layer its input-to-state (one product: left and known inputs stand side by side in `row`),
    the gates, and the 1×1 up.

    `hidden` and `cell` hold the states of the row above to the right of the pixel in hand, and of its own row up to it.
    Gates are sorted by group here: o f i g of group 0, then of group 1, ….
    """

    def __init__(self, body: RowLSTMs, buffers: Buffers, width: int, condition: Tensor | None):
        layers, f, groups = body.layers, body.hidden, body.groups
        self.body, self.f = body, f
        gates = group_slices(4 * f, groups, parts=4)
        sort = torch.cat([torch.arange(4 * f)[s] for slices in gates for s in slices])
        input_weight = torch.stack([lstm.input.masked_weight() for lstm in body.lstm])[:, sort]  # (layers 4f 4f+d)
        state_weight = torch.stack([lstm.state_weight for lstm in body.lstm])[:, sort]  # (layers 4f f taps)

        self.vertical = None
        self.row = buffers((width + 1) * 2 * f, layers=layers)  # u of the row in hand, after a column of zeros
        known_hidden, self.hidden = buffers.after_ones(width + 2, f, layers=layers)
        self.cell = buffers(width, f, layers=layers, dtype=buffers.state)
        above_weight = state_weight.permute(0, 3, 2, 1).flatten(1, 2).contiguous()
        above_bias = torch.stack([lstm.input.bias for lstm in body.lstm])[:, None, sort]
        self.condition = ConditionScan(condition, input_weight[:, :, 4 * f :] if body.given else None, width)
        self.above = AboveScan(buffers, width, above_weight, above_bias, self.condition)  # from the row above
        self.taps, self.windows = self.above.inputs.unflatten(3, (3, f)), windows(self.hidden, 3)

        self.join = JoinScan(body, buffers)
        wide, narrow = (group_slices(n, groups) for n in (2 * f, f))
        above = self.above.out

        def slots(layer: int, j: int, s: slice) -> Tensor:
            """Features s of u at column j."""
            return self.row[layer, :, (j + 1) * 2 * f + s.start : (j + 1) * 2 * f + s.stop]

        self.inputs = [[slots(0, j, w) for (w,) in wide] for j in range(width)]
        self.plan = [[[] for _ in range(groups)] for _ in range(width)]
        for g, ((w,), (n,)) in enumerate(zip(wide, narrow, strict=True)):
            size = n.stop - n.start
            tanh = buffers(size)
            columns = slice(4 * n.start, 4 * n.stop)
            for layer in range(layers):
                weight = input_weight[layer, columns, : 2 * f + w.stop].contiguous().T  # left and known inputs
                weights = self.join.weights(layer, g)
                for j in range(width):
                    gate = above[layer, :, j, columns]
                    self.plan[j][g].append(
                        (
                            gate,
                            self.row[layer, :, j * 2 * f : (j + 1) * 2 * f + w.stop],
                            weight,
                            gate[:, : 3 * size],
                            gate.split(size, dim=1),
                            self.cell[layer, :, j, n],
                            tanh,
                            self.hidden[layer, :, j + 1, n],
                            known_hidden[layer, :, j + 1, : 1 + n.stop],
                            slots(layer, j, w),
                            slots(layer + 1, j, w) if layer + 1 < layers else self.join.out[g],
                            weights,
                        )
                    )

    def load(self, i: int, condition: Tensor | None) -> None:
        """What depends on the number of the row in hand goes to where `begin_row` reads it."""
        self.condition.load(i, condition)

    def begin_row(self, first: bool) -> None:
        if first:
            self.hidden.zero_(), self.cell.zero_()
        self.taps.copy_(self.windows)
        self.above()

    def packed(self) -> Layers:
        """What the row kernel needs to know."""
        f, body = self.f, self.body
        weight = torch.stack([lstm.input.masked_weight()[:, : 4 * f] for lstm in body.lstm])
        main = pack(weight, None, group_slices(4 * f, body.groups, parts=4))
        row, above = self.row.unflatten(2, (-1, 2 * f)), self.above.out
        places = {"cell": self.cell, "hidden": self.hidden[:, :, 1:-1]}
        return Layers(4, None, main, *self.join.packed(body), row[:, :, :-1], 4 * f, row[:, :, 1:], above, **places)

    def step(self, j: int, g: int) -> Tensor:
        """From group g of the stem at column j, in `inputs[j][g]`, to group g of the head's input (b 2f_g)."""
        self.join.begin(g)
        for (
            gate, known, weight, sigmoids, (o, forget, i, candidate), cell, tanh, hidden_out, hidden,
            u, following, weights,
        ) in self.plan[j][g]:  # fmt: skip
            gate.addmm_(known, weight)
            sigmoids.sigmoid_()
            candidate.tanh_()
            cell.mul_(forget).addcmul_(i, candidate)
            torch.tanh(cell, out=tanh)
            torch.mul(o, tanh, out=hidden_out)
            self.join(g, u, hidden, following, *weights)
        return self.join.end(g)


class RowLSTM(AutoregressiveModel):
    """Row LSTM. Arguments: see `AutoregressiveModel`."""

    architecture = RowLSTMs
