"""The cached sampler, in torch: every activation is computed once.

Legend: b batch · c channel (colour) · w columns of features · v levels · g group · i j a row, a column · f features.

Rows above are finished, so what they give to a row is one product a layer, once a row. What is left is a chain along
the row: column after column, group after group, layer after layer. `models.in_row` says what a layer computes there;
here that becomes a list of calls for each column and group, bound to static memory and to weights, which a step only
has to make. A row reads and writes only this memory, and does the same each time: on a GPU it is a CUDA graph.
`triton_row` and `cpu_row` make one call of a row; `loop.backend_of_rows` says which of the three computes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from models.base import AutoregressiveModel
from models.in_row import GATES, Mirrored, Network, Vertical
from models.sampling.heads import cached_head
from models.sampling.memory import Buffers, ConditionRow, RowProduct, windows, with_bias
from models.sampling.rules import Rule, visit

Call = Callable[[], object]


class Cached:
    """Logits from cached activations: a sub-pixel costs one step along the row.

    Args:
        b: how many images are drawn side by side.
        condition: an example of those to come, which stand in `condition`; None where the model has none.
        images_last: see `Buffers`; None: on a CPU.
        network: the model's, if it should have another layout than `model.in_row()`.
        backend: who computes what the rows above give, "torch" or "triton".
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        b: int,
        condition: Tensor | None = None,
        images_last: bool | None = None,
        network: Network | None = None,
        backend: str = "torch",
    ):
        network = model.in_row() if network is None else network
        images_last = model.device.type == "cpu" if images_last is None else images_last
        buffers = Buffers(b, model.stem.weight, images_last, backend)
        columns = model.width + model.body.extra_columns
        self.table = model.table()
        self.condition, self.outside = condition, range(model.width, columns)
        self.layers = CachedLayers(network, buffers, columns, condition)
        written = self.layers.inputs, self.layers.vertical_input
        self.stem = CachedStem(network, buffers, columns, self.table.shape[1], *written)
        self.head = cached_head(model.head, network.first, network.last, buffers)
        self.groups = network.groups

    def load(self, i: int) -> None:
        """Bring what depends on the row's number to static memory."""
        self.layers.load(i, self.condition)

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        """Choose the values (b c w) of the row that was loaded."""
        if not first:  # the row above has no pixels in the extra columns, but features
            for j in self.outside:
                for g in range(self.groups):
                    self.stem.step(j, g)
                    self.layers.step(j, g)
        self.begin_row(first)
        visit(self, rule, values)

    def begin_row(self, first: bool) -> None:
        """Compute what the rows above give to all columns."""
        self.stem.begin_row(first)
        self.layers.begin_row(first)

    def logits(self, j: int, c: int) -> Tensor:
        """Logits (b v) of colour c at column j."""
        if c < self.groups:  # with one group, all colours of a pixel come from one step
            self.stem.step(j, c)
            self.head.step(self.layers.step(j, c), c)
        return self.head.logits(c)

    def put(self, j: int, c: int, values: Tensor) -> None:
        """Make known the values (b,) of colour c at column j."""
        torch.index_select(self.table, 0, values, out=self.stem.slots[j][c])
        self.head.put(c, values)


class CachedStem:
    """The stem's convolution of the image, at one pixel, group by group.

    Once a row, all taps of the rows above, for all columns. A sub-pixel then costs one product: the left taps and the
    colours already known of the pixel itself are side by side in the last row of `rows`.

    Args:
        width: of the features, with the extra columns.
        k: numbers that are read of a value.
        outputs: where to write, a view (b f_g) for each column and group.
        vertical: where to write the outputs that see only the rows above (b w vertical), once a row.

    `slots[j][c]` (b k) holds colour c of column j as the stem reads it, once it is known.
    """

    def __init__(
        self,
        network: Network,
        buffers: Buffers,
        width: int,
        k: int,
        outputs: list[list[Tensor]],
        vertical: Tensor | None,
    ):
        above, self.taps, reach = network.stem_above, network.stem, network.reach
        self.reach, of_pixel, kernel = reach, self.taps.inputs[-1].size, 2 * reach + 1
        self.rows = buffers(reach + 1, width + 2 * reach, of_pixel)  # those above, the present one; zeros outside
        self.of_above = RowProduct(buffers, width, above.weight, above.bias, ConditionRow(None, None, width))
        taps = windows(self.rows[:, :-1], kernel).transpose(1, 2)  # (b w reach kernel k·colours)
        self.of_above.read(taps.view(1, *taps.shape[:3], -1))
        self.skipped = above.weight.shape[1] - self.taps.weight.shape[1]
        self.vertical, self.above = vertical, self.of_above.out[0][:, :, self.skipped :]  # (b w f)
        row = self.row = self.rows[:, reach].flatten(1)  # (b, padded width · k·colours)
        weights = [self.taps.of_group(g)[0][0].contiguous().T for g in range(network.groups)]
        self.program = [
            [
                partial(
                    torch.addmm,
                    self.above[:, j, s],
                    row[:, j * of_pixel : j * of_pixel + len(weights[g])],
                    weights[g],
                    out=outputs[j][g],
                )
                for g, s in enumerate(self.taps.outputs[0].slices)
            ]
            for j in range(width)
        ]
        pixels = row.unflatten(1, (-1, of_pixel // k, k))
        self.slots = [[pixels[:, j + reach, c] for c in range(of_pixel // k)] for j in range(width)]

    def begin_row(self, first: bool) -> None:
        if first:
            self.rows.zero_()
        for k in range(self.reach):
            self.rows[:, k] = self.rows[:, k + 1]
        self.rows[:, -1].zero_()
        self.of_above()
        if self.vertical is not None:
            self.vertical.copy_(self.of_above.out[0][:, :, : self.skipped])

    def step(self, j: int, g: int) -> None:
        self.program[j][g]()


class CachedLayers:
    """All layers at one pixel, group by group.

    `row` holds, for every layer, a slot for each column with zeros at both ends: what is `here`, and where the left
    neighbour gives its hidden state, that before it. So `main` reads [left, here] as one stretch of memory. The gates
    are sorted by group: those of group 0, then those of group 1, ….

    `inputs[j][g]` is where the stem writes group g at column j.
    """

    def __init__(self, network: Network, buffers: Buffers, width: int, condition: Tensor | None):
        row, up = network.row, network.up
        self.network, self.in_row, self.buffers, self.width = network, row, buffers, width
        self.narrow, self.wide = up.inputs[0], up.outputs[0]
        self.layers, self.f = len(up.weight), self.narrow.size
        self.left_is_hidden, self.hands_down_hidden = row.left == "hidden", row.handed_down == "hidden"
        self.here_size = row.main.inputs[1].size
        self.left_size = self.f if self.left_is_hidden else 0  # of a slot
        self.slot = self.left_size + self.here_size
        layers, f = self.layers, self.f

        self.row = buffers((width + 2 + self.left_is_hidden) * self.slot, layers=layers)
        self.slots = self.row.unflatten(2, (-1, self.slot))  # (layers b columns+2 slot)
        # What `up` reads, behind ones; of all columns where the next row's pixels read the hidden state.
        columns = [width + 2] if self.hands_down_hidden and not self.left_is_hidden else []
        self.behind_ones, self.hidden = buffers.after_ones(*columns, f, layers=layers)
        if row.act == "lstm":  # cells come from the left neighbour, or from the row above
            self.cell = buffers(*([] if self.left_is_hidden else [width]), f, layers=layers, dtype=buffers.state)
        if row.down:
            self.behind_ones_u, self.relu_u = buffers.after_ones(self.wide.size, layers=layers)

        given = None if row.given is None else row.given.sorted_by_group()[0]
        self.condition, bias = ConditionRow(condition, given, width), row.main.sorted_by_group()[1]
        self.above = RowProduct(buffers, width, row.above.sorted_by_group()[0], bias, self.condition)
        self.vertical = CachedVertical(row.vertical, buffers, width, condition) if row.vertical else None
        self.mirrored = CachedMirrored(row.mirrored, buffers, width, condition, self) if row.mirrored else None
        self.vertical_input = self.vertical.input if self.vertical else None
        taps = len(row.above.inputs)  # columns of the row above
        self.above.read(self.views_handed_down(taps))
        self.at_first = self.cleared_at_first()

        self.join = Join(network, buffers, in_place=row.down is not None)
        self.inputs = [
            self.join.out if row.down else [self.here(0, j, w) for w in self.wide.slices] for j in range(width)
        ]
        groups = range(network.groups)
        self.program: list[list[list[Call]]] = [[[] for _ in groups] for _ in range(width)]
        for g in groups:
            tanh = buffers(self.narrow.sizes[g]) if row.act == "lstm" else None
            for layer in range(layers):
                weights = self.weights(layer, g)
                for j in range(width):
                    self.program[j][g] += self.calls(layer, j, g, *weights, tanh)

    def here(self, layer: int, j: int, s: slice) -> Tensor:
        """Features s of `here` at column j: (b features)."""
        return self.slots[layer, :, j + 1, self.left_size + s.start : self.left_size + s.stop]

    def left_and_here(self, layer: int, j: int, k: int) -> Tensor:
        """The first k inputs of `main` at column j: (b k)."""
        start = (j + self.left_is_hidden) * self.slot
        return self.row[layer, :, start : start + k]

    def hidden_at(self, layer: int, j: int, s: slice) -> tuple[Tensor, Tensor, Tensor]:
        """Where an activation's features s at column j go, where `up` reads them, and all that it reads up to them."""
        column = (layer, slice(None), j + 1) if self.hidden.dim() == 4 else (layer, slice(None))
        joined, behind_ones = self.hidden[(*column, s)], self.behind_ones[(*column, slice(0, 1 + s.stop))]
        return self.slots[layer, :, j + 2, s] if self.left_is_hidden else joined, joined, behind_ones

    def weights(self, layer: int, g: int) -> tuple:
        """The weights of a layer for the features of group g, the same in all columns."""
        row, down = self.in_row, None
        if row.down:
            weight, bias = row.down.of_group(g)
            down = with_bias(weight[layer], bias[layer])
        return down, row.main.of_group(g)[0][layer].contiguous().T, self.join.weights(layer, g)

    def calls(
        self, layer: int, j: int, g: int, down: Tensor | None, main: Tensor, join: tuple, tanh: Tensor | None
    ) -> list[Call]:
        """The calls of one layer at column j, for the features of group g."""
        n, w, act, out = self.narrow.slices[g], self.wide.slices[g], self.in_row.act, []
        if down is not None:  # here = ReLU(down(ReLU(u))); the stream is one pixel's, changed in place
            u = following = self.join.stream[g]
            here = self.here(layer, j, n)
            out += [partial(torch.clamp_min, self.join.out[g], 0, out=self.relu_u[layer, :, w])]
            out += [partial(torch.mm, self.behind_ones_u[layer, :, : 1 + w.stop], down, out=here), here.relu_]
        else:
            u = self.here(layer, j, w)
            following = self.here(layer + 1, j, w) if layer + 1 < self.layers else self.join.out[g]
        gates = self.above.out[layer, :, j, GATES[act] * n.start : GATES[act] * n.stop]
        hidden, joined, behind_ones = self.hidden_at(layer, j, n)
        out += [partial(gates.addmm_, self.left_and_here(layer, j, len(main)), main)]
        if act == "relu":
            out += [partial(torch.clamp_min, gates, 0, out=hidden)]
        elif act == "gate":
            a, b = gates.chunk(2, dim=1)
            out += [a.tanh_, b.sigmoid_, partial(torch.mul, a, b, out=hidden)]
        else:
            o, forget, i, candidate = gates.chunk(4, dim=1)
            cell = self.cell[layer, :, n] if self.left_is_hidden else self.cell[layer, :, j, n]
            out += [gates[:, : 3 * o.shape[1]].sigmoid_, candidate.tanh_]
            out += [partial(cell.mul_, forget), partial(cell.addcmul_, i, candidate)]
            out += [partial(torch.tanh, cell, out=tanh), partial(torch.mul, o, tanh, out=hidden)]
        if self.mirrored:
            out += [partial(torch.add, hidden, self.mirrored.hidden[layer, :, j, n], out=joined)]
        elif hidden is not joined:
            out += [partial(joined.copy_, hidden)]
        return out + self.join.calls(g, u, behind_ones, following, *join)

    def views_handed_down(self, taps: int) -> Tensor:
        """The inputs of `above` in the row above: (layers b w taps features), a view."""
        if self.vertical:
            return self.vertical.out[:, :, :, None]
        if self.hands_down_hidden:
            columns = self.slots[:, :, 1:, : self.f] if self.left_is_hidden else self.hidden
        else:
            columns = self.slots[..., self.left_size :]
        start = 1 - taps // 2  # column 0 is the second
        return windows(columns[:, :, start : start + self.width + taps - 1], taps)

    def cleared_at_first(self) -> list[Tensor]:
        """The memory of another image's last row that an image's first row would read."""
        out = []
        if not self.vertical:
            out += [self.hidden if self.hands_down_hidden and not self.left_is_hidden else self.row]
        if self.in_row.act == "lstm" and not self.left_is_hidden:
            out += [self.cell]
        return out

    def load(self, i: int, condition: Tensor | None) -> None:
        """Bring row i of the condition to where `begin_row` reads it."""
        self.condition.load(i, condition)
        for beside in (self.vertical, self.mirrored):
            if beside:
                beside.load(i, condition)

    def begin_row(self, first: bool) -> None:
        """Compute what the rows above give to all columns, after the stem wrote `vertical_input`."""
        if first:
            for x in self.at_first:
                x.zero_()
        for beside in (self.vertical, self.mirrored):
            if beside:
                beside.begin_row(first)
        self.above()
        if self.in_row.act == "lstm" and self.left_is_hidden:
            self.cell.zero_()

    def step(self, j: int, g: int) -> Tensor:
        """From group g of the stem at column j, in `inputs[j][g]`, to group g of the head's input (b features_g)."""
        self.join.begin(g)
        for call in self.program[j][g]:
            call()
        return self.join.end(g)


class Join:
    """How a layer's output joins the stream and the head's input, at one pixel, for one group's features.

    A layer's output is behind a column of ones: biases are a row of the weights. `out` is where the last layer's stream
    goes, (b features_g) for each group. Where layers change their stream `in_place`, it is in `out` from the first
    layer on, and `stream` has the sum of skips beside it: both are one product.
    """

    def __init__(self, network: Network, buffers: Buffers, in_place: bool):
        self.up, self.to_head, self.residual = network.up, network.to_head, network.residual
        self.one_product = in_place and network.residual and network.to_head is not None
        both = [buffers(2 * size) for size in network.up.outputs[0].sizes]
        self.out, self.skips = zip(*(x.chunk(2, dim=1) for x in both), strict=True)
        self.stream = both if self.one_product else self.out

    def weights(self, layer: int, g: int) -> tuple[Tensor, Tensor | None]:
        """Of `up` and `to_head` (1+k features_g) each, or of both in one."""
        up, to_head = (
            None if x is None else with_bias(*(part[layer] for part in x.of_group(g))) for x in (self.up, self.to_head)
        )
        return (torch.cat([up.T, to_head.T]).T, None) if self.one_product else (up, to_head)

    def calls(self, g: int, u: Tensor, hidden: Tensor, out: Tensor, up: Tensor, to_head: Tensor | None) -> list[Call]:
        """From group g of the stream, u (b features_g), and a layer's output (b 1+k), to `out`, which is like u."""
        product = (
            partial(torch.addmm, u, hidden, up, out=out) if self.residual else partial(torch.mm, hidden, up, out=out)
        )
        return [product] if to_head is None else [product, partial(self.skips[g].addmm_, hidden, to_head)]

    def begin(self, g: int) -> None:
        if self.to_head is not None:
            self.skips[g].zero_()

    def end(self, g: int) -> Tensor:
        """The head's input (b features_g)."""
        return self.out[g].add_(self.skips[g]) if self.to_head is not None else self.out[g]


class CachedVertical:
    """The Gated PixelCNN's vertical stack: it sees only the rows above, so it is computed once a row.

    `input` (b w f) is where the stem writes, `out` (layers b w f) what each layer gives the horizontal stack.
    """

    def __init__(self, vertical: Vertical, buffers: Buffers, width: int, condition: Tensor | None):
        weights, b = vertical.main, buffers.b
        layers, f = len(weights.weight), weights.inputs[0].size
        self.v = buffers.new(layers + 1, b, 2, width + 2, f)  # the row above and the present one, zeros at both ends
        self.input, self.out = self.v[0, :, 1, 1:-1], self.v[1:, :, 1, 1:-1]
        given = None if vertical.given is None else vertical.given.weight
        self.condition = ConditionRow(condition, given, width)
        both_rows = windows(self.v, 3).transpose(2, 3).view(layers + 1, b, width, 2, 3 * f)
        beside = [] if given is None else [self.condition.row[None, :, :, None]]
        weight = torch.cat([weights.weight, *([] if given is None else [given])], dim=2)
        in_rows, nothing, self.products = buffers.of_rows(), ConditionRow(None, None, width), []
        for layer in range(layers):  # one after the other, so all in the same memory
            product = RowProduct(
                in_rows, width, weight[layer, None], weights.bias[layer, None], nothing, *self.products[:1]
            )
            product.read(both_rows[layer, None], *beside)
            self.products.append(product)
        self.halves = product.out[0].chunk(2, dim=2)

    def load(self, i: int, condition: Tensor | None) -> None:
        self.condition.load(i, condition)

    def begin_row(self, first: bool) -> None:
        """Called after the stem wrote `input`."""
        if first:
            self.v[:, :, 0].zero_()
        a, b = self.halves
        for layer, product in enumerate(self.products):
            product()
            torch.mul(a.tanh_(), b.sigmoid_(), out=self.v[layer + 1, :, 1, 1:-1])
        self.v[:, :, 0] = self.v[:, :, 1]  # the next row's row above


class CachedMirrored:
    """The Diagonal BiLSTM's direction from the right, over the row just finished: all layers side by side.

    `hidden` (layers b w f) is its hidden state in the row above.
    """

    def __init__(self, mirrored: Mirrored, buffers: Buffers, width: int, condition: Tensor | None, of: CachedLayers):
        layers, f = of.layers, of.f
        self.hidden = buffers(width, f, layers=layers)
        self.condition = ConditionRow(condition, mirrored.given and mirrored.given.weight, width)
        self.gates = RowProduct(buffers, width, mirrored.main.weight, mirrored.main.bias, self.condition)  # o f i g
        row = of.slots[:, :, 1 : width + 1, of.left_size :]
        self.gates.read(self.hidden[:, :, :, None], row[:, :, :, None])
        self.left = mirrored.left.weight.mT.contiguous()
        self.cell = buffers(f, layers=layers, dtype=buffers.state)
        self.tanh, self.f, self.width = buffers(f, layers=layers), f, width

    def load(self, i: int, condition: Tensor | None) -> None:
        self.condition.load(max(i - 1, 0), condition)

    def begin_row(self, first: bool) -> None:
        if first:
            self.hidden.zero_()
            return
        f = self.f
        self.gates()
        cell, tanh = self.cell.zero_(), self.tanh
        for j in range(self.width - 1, -1, -1):
            gates = self.gates.out[:, :, j]
            if j < self.width - 1:
                gates.baddbmm_(self.hidden[:, :, j + 1], self.left)
            gates[..., : 3 * f].sigmoid_()
            o, forget, i, candidate = gates.split(f, dim=2)
            cell.mul_(forget).addcmul_(i, candidate.tanh_())
            torch.mul(o, torch.tanh(cell, out=tanh), out=self.hidden[:, :, j])
