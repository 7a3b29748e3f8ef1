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
from kernels.draw_row import Layers, pack
from models.base import AutoregressiveModel
from models.body import Body, JoinScan
from models.layers import AboveScan, Buffers, ConditionScan, colour_mask, group_slices, initialise


class DiagonalLSTMLayer(nn.Module):
    """Both directions of one layer's LSTM: (b h w 2f) → the sum of both, the second moved down a row (b h w f)."""

    def __init__(self, hidden: int, groups: int, condition: int):
        super().__init__()
        mask = colour_mask("B", 2 * hidden, 4 * hidden, groups, parts=4)
        self.register_buffer("mask", mask, persistent=False)
        self.input_weight = nn.Parameter(torch.empty(2, 4 * hidden, 2 * hidden))  # gates o f i g
        self.state_weight = nn.Parameter(torch.empty(2, 4 * hidden, 2 * hidden))  # left, up
        self.bias = nn.Parameter(torch.zeros(2, 4 * hidden))
        for direction in range(2):
            initialise(self.input_weight[direction], mask)
            initialise(self.state_weight[direction], torch.ones_like(mask))
        with torch.no_grad():
            self.bias[:, hidden : 2 * hidden] = 1.0  # forget gate: open at first
        if condition:
            bound = condition**-0.5
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
    gain = 4.0  # what leaves the gates is small

    def make_layers(self) -> None:
        sizes = self.hidden, self.groups, self.given
        self.lstm = nn.ModuleList(DiagonalLSTMLayer(*sizes) for _ in range(self.layers))

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        skips = 0
        for layer, lstm in enumerate(self.lstm):
            u, skips = self.join(layer, u, skips, lstm(u, condition))
        return (u + skips)[:, :, : -self.extra_columns]

    def scan(self, buffers: Buffers, width: int, condition: Tensor | None = None) -> "DiagonalLSTMsScan":
        return DiagonalLSTMsScan(self, buffers, width, condition)


class DiagonalLSTMsScan:
    """All layers at one pixel, group by group.

    Once a row, for all columns and all layers: the mirrored direction over the row just finished (its inputs are known
    by then), and the upper neighbour's product of direction 0. A sub-pixel then costs a layer the left neighbour's
    product with the input-to-state (one product: both stand side by side in `row`), the gates, and the 1×1 up.

    Slot j of `row` holds [hidden_0(j − 1) (f), u(j) (2f)]. Gates are sorted by group here: o f i g of group 0, then of
    group 1, ….
    """

    def __init__(self, body: DiagonalLSTMs, buffers: Buffers, width: int, condition: Tensor | None):
        layers, f, groups = body.layers, body.hidden, body.groups
        self.body, self.width, self.f = body, width, f
        gates = group_slices(4 * f, groups, parts=4)
        sort = torch.cat([torch.arange(4 * f)[s] for slices in gates for s in slices])
        input_weight = torch.stack([lstm.masked_input_weight() for lstm in body.lstm])  # (layers d 4f 2f)
        state_weight = torch.stack([lstm.state_weight for lstm in body.lstm])
        bias = torch.stack([lstm.bias for lstm in body.lstm])  # (layers d 4f)

        self.vertical = None
        self.row = buffers(width + 1, 3 * f, layers=layers)
        self.cell = buffers(f, layers=layers, dtype=buffers.state)
        given = torch.stack([lstm.condition_weight for lstm in body.lstm]) if body.given else None
        self.condition = ConditionScan(condition, None if given is None else given[:, 0, sort], width)
        self.mirrored_condition = ConditionScan(condition, None if given is None else given[:, 1], width)
        above_weight = state_weight[:, 0, sort, f:].mT.contiguous()
        self.above = AboveScan(buffers, width, above_weight, bias[:, 0, None, sort], self.condition)  # of direction 0
        # The mirrored direction: gates o f i g of a whole row, one matrix for [hidden_1(i−1, j), u(i, j)].
        self.mirrored = buffers(width, f, layers=layers)  # hidden_1 of the row above
        weight = torch.cat([state_weight[:, 1, :, f:], input_weight[:, 1]], dim=2).mT.contiguous()
        self.mirrored_gates = AboveScan(buffers, width, weight, bias[:, 1, None], self.mirrored_condition)
        self.mirrored_left = state_weight[:, 1, :, :f].mT.contiguous()
        self.mirrored_cell = buffers(f, layers=layers, dtype=buffers.state)
        self.mirrored_tanh = buffers(f, layers=layers)

        self.join = JoinScan(body, buffers)
        wide, narrow = (group_slices(n, groups) for n in (2 * f, f))
        known_summed, summed = buffers.after_ones(f, layers=layers)
        above = self.above.out
        self.inputs = [[self.row[0, :, j, f + w.start : f + w.stop] for (w,) in wide] for j in range(width)]
        self.plan = [[[] for _ in range(groups)] for _ in range(width)]
        for g, ((w,), (n,)) in enumerate(zip(wide, narrow, strict=True)):
            size = n.stop - n.start
            tanh = buffers(size)
            columns = slice(4 * n.start, 4 * n.stop)
            for layer in range(layers):
                weight = torch.cat([state_weight[layer, 0, :, :f], input_weight[layer, 0, :, : w.stop]], dim=1)
                weight = weight[sort[columns]].T  # (left and known input, gates of group g)
                weights = self.join.weights(layer, g)
                for j in range(width):
                    gate = above[layer, :, j, columns]
                    u = self.row[layer, :, j, f + w.start : f + w.stop]
                    following = (
                        self.row[layer + 1, :, j, f + w.start : f + w.stop] if layer + 1 < layers else self.join.out[g]
                    )
                    self.plan[j][g].append(
                        (
                            gate,
                            self.row[layer, :, j, : f + w.stop],
                            weight,
                            gate[:, : 3 * size],
                            gate.split(size, dim=1),
                            self.cell[layer, :, n],
                            tanh,
                            self.row[layer, :, j + 1, n],
                            self.mirrored[layer, :, j, n],
                            summed[layer, :, n],
                            known_summed[layer, :, : 1 + n.stop],
                            u,
                            following,
                            weights,
                        )
                    )

    def load(self, i: int, condition: Tensor | None) -> None:
        """What depends on the number of the row in hand goes to where `begin_row` reads it."""
        self.condition.load(i, condition)
        self.mirrored_condition.load(max(i - 1, 0), condition)

    def begin_row(self, first: bool) -> None:
        if first:
            self.row.zero_(), self.mirrored.zero_()
        else:
            self.finish_row()
        self.above.inputs.copy_(self.row[:, :, 1:, : self.f])
        self.above()
        self.cell.zero_()

    def finish_row(self) -> None:
        """Run the mirrored direction over the row just finished, all layers side by side."""
        f = self.f
        inputs = self.mirrored_gates.inputs
        inputs[..., :f] = self.mirrored
        inputs[..., f:] = self.row[:, :, : self.width, f:]
        self.mirrored_gates()
        cell, tanh = self.mirrored_cell.zero_(), self.mirrored_tanh
        for j in range(self.width - 1, -1, -1):
            gates = self.mirrored_gates.out[:, :, j]
            if j < self.width - 1:
                gates.baddbmm_(self.mirrored[:, :, j + 1], self.mirrored_left)
            gates[..., : 3 * f].sigmoid_()
            o, forget, i, candidate = gates.split(f, dim=2)
            cell.mul_(forget).addcmul_(i, candidate.tanh_())
            torch.mul(o, torch.tanh(cell, out=tanh), out=self.mirrored[:, :, j])

    def packed(self) -> Layers:
        """What the row kernel needs to know."""
        f, w, body = self.f, self.width, self.body
        inputs = torch.stack([lstm.masked_input_weight()[0] for lstm in body.lstm])
        left = torch.stack([lstm.state_weight[0, :, :f] for lstm in body.lstm])
        main = pack(torch.cat([left, inputs], dim=2), None, group_slices(4 * f, body.groups, parts=4))
        row, above = self.row, self.above.out
        places = {"cell": self.cell[:, :, None].expand(-1, -1, w, -1), "hidden": row[:, :, 1:, :f]}
        places["mirrored"] = self.mirrored
        up = self.join.packed(body)
        return Layers(4, None, main, *up, row[:, :, :w], 3 * f, row[:, :, :w, f:], above, **places)

    def step(self, j: int, g: int) -> Tensor:
        """From group g of the stem at column j, in `inputs[j][g]`, to group g of the head's input (b 2f_g)."""
        self.join.begin(g)
        for (
            gate, known, weight, sigmoids, (o, forget, i, candidate), cell, tanh, hidden, mirrored,
            summed_out, summed, u, following, weights,
        ) in self.plan[j][g]:  # fmt: skip
            gate.addmm_(known, weight)
            sigmoids.sigmoid_()
            candidate.tanh_()
            cell.mul_(forget).addcmul_(i, candidate)
            torch.tanh(cell, out=tanh)
            torch.mul(o, tanh, out=hidden)
            torch.add(hidden, mirrored, out=summed_out)
            self.join(g, u, summed, following, *weights)
        return self.join.end(g)


class DiagBiLSTM(AutoregressiveModel):
    """Diagonal BiLSTM. Arguments: see `AutoregressiveModel`."""

    architecture = DiagonalLSTMs
