"""The cached sampler with all pixels of a row in one compiled call on a CPU (`kernels.draw_row_cpu`).

Legend: b batch · w columns · c colour · v levels · g group · i j a row, a column · f hidden features.

What `models.in_row` says of a layer becomes here a list of the kernel's operations, as it becomes a list of torch's
calls in `models.sampling.cached`; so do the products of the rows above. Memory is the same in both, but that the images
of a tile are next to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock

import torch
from torch import Tensor

from kernels import native
from kernels.draw_row import Choice
from kernels.draw_row_cpu import NOWHERE, Arena, Batch, Operation, Parameters, Place, Stage, Tiles
from kernels.draw_row_cpu_kernel import STAGE
from models.base import AutoregressiveModel
from models.in_row import GATES, Network, Weights
from models.sampling.heads import in_levels
from models.sampling.rules import Rule, visit


class CpuRow:
    """Logits, or values chosen as a rule's `choice` says, from compiled rows.

    Args:
        b: how many images are drawn side by side.
        condition: an example of those to come, which stand in `condition`; None where the model has none.
    """

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None):
        network, columns = model.in_row(), model.width + model.body.extra_columns
        weight = model.stem.weight
        parameters = Parameters(weight, native.lanes_of_tile(b, weight.dtype == torch.float64))
        arena = Arena(packed_of(network, columns))
        self.model, self.b, self.condition, self.groups = model, b, condition, network.groups
        given = ConditionInRow(arena, condition, columns)
        layers = LayersInRow(network, columns, given, arena, parameters)
        stem = StemInRow(network, columns, model.channels, layers, arena, parameters)
        head = HeadInRow(model, network, layers, stem, arena, parameters)
        self.logits_at, colours, groups = head.logits, range(model.channels), range(network.groups)
        self.tiles = Tiles(b, arena, parameters, head.mixtures > 0)

        step = [stem.step(g) + layers.step(g) for g in groups]
        nothing = Stage([Operation("zero", Place(0), arena.size)])  # another image was there
        first = [nothing, *given.begin_row(), *stem.begin_row(), *layers.begin_row(first=True)]
        later = [Stage([o for g in groups for o in step[g]], model.width, columns - model.width)]
        later += [*given.begin_row(), *stem.shift(), *stem.begin_row(), *layers.begin_row(first=False)]
        logits = [(step[c] + head.step(c) if c in groups else []) + head.logits_of(c) for c in colours]
        chain = Stage([o for c in colours for o in logits[c] + head.put(c, "choose")], 0, model.width)
        self.begin, self.whole = {True: first, False: later}, {True: [*first, chain], False: [*later, chain]}
        self.of_pixel = [[Stage(operations)] for operations in logits]
        self.told = [[Stage(head.put(c, "put"))] for c in colours]
        self.programs: dict[tuple, Tensor] = {}

    def program(self, name: str, key: int) -> Tensor:
        """The program of this name, laid out in memory when it is first asked for."""
        if (name, key) not in self.programs:
            self.programs[name, key] = self.tiles.program(getattr(self, name)[key])
        return self.programs[name, key]

    def images(self, rule: Rule, values: Tensor, tell: Callable[[], None]) -> None:
        """Choose the values (b c h w) of whole images, tile after tile; `tell` is called as often as there are rows."""
        batch = Batch(values, self.model.levels, Choice(**rule.choice(whole=True)), self.condition)
        in_memory, self.kept = batch.in_memory(self.tiles)
        done, lock, whole = 0, Lock(), [self.program("whole", first) for first in (False, True)]

        def tile(k: int) -> Iterator[None]:
            nonlocal done
            for i in range(values.shape[2]):
                self.tiles.run(whole[i == 0], in_memory, k, i)
                with lock:
                    done += 1
                    if done % self.tiles.count == 0:
                        tell()
                yield

        native.share(tile, self.tiles.count)

    def load(self, i: int) -> None:
        """Make row i the present one."""
        self.i = i

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        """Choose the values (b c w) of the row that was loaded, each as the rule says when it is called."""
        self.values = values[:, :, None]
        self.batch, self.kept = Batch(self.values, self.model.levels, condition=self.condition).in_memory(self.tiles)
        self.run(self.program("begin", first), self.i)
        visit(self, rule, values)

    def run_at(self, program: Tensor, j: int) -> None:
        """Run a program of one column."""
        program[:, STAGE.index("first")] = j
        self.run(program)

    def run(self, program: Tensor, i: int = 0) -> None:
        def tile(k: int) -> Iterator[None]:
            yield self.tiles.run(program, self.batch, k, i)

        native.share(tile, self.tiles.count)

    def logits(self, j: int, c: int) -> Tensor:
        """Logits (b v) of colour c at column j."""
        self.run_at(self.program("of_pixel", c), j)
        return self.tiles.images_of(self.logits_at, self.model.levels)

    def put(self, j: int, c: int, values: Tensor) -> None:
        """Make known the values (b,) of colour c at column j."""
        self.values[:, c, 0, j] = values
        self.run_at(self.program("told", c), j)


class ConditionInRow:
    """The condition's present row, and that of the row above, for the direction that is computed a row late."""

    def __init__(self, arena: Arena, condition: Tensor | None, columns: int):
        self.columns = 1 if condition is None else condition.shape[2]
        self.d = 0 if condition is None else condition.shape[3]
        self.here, self.above = (arena.take(self.d, self.columns) for _ in range(2))

    def begin_row(self) -> list[Stage]:
        loads = [Operation("condition", place, self.d, more=k) for k, place in enumerate((self.here, self.above))]
        return [Stage(loads if self.d else [], 0, self.columns, together=True)]


def packed_of(network: Network, columns: int) -> int:
    """The vectors that the largest product of a row's columns takes, with two of them in a vector."""

    def size(x) -> int:
        if isinstance(x, Weights):
            return sum(x.weight.shape[1:])
        return max(map(size, x), default=0) if isinstance(x, tuple) else 0

    return (columns + 1) // 2 * max(size(network.stem_above), size(network.row))


def product(out: Place, x: Place, of: dict[str, int], start: Place = NOWHERE, relu: bool = False) -> Operation:
    """out ← start + bias + weight · x, whose parameters stand as one of `Parameters.products` says."""
    return Operation("product", out, x=x, **of, start=start, more=int(relu))


class StemInRow:
    """The stem's convolution: a row's taps above for all columns, and at a pixel those of the row itself."""

    def __init__(
        self,
        network: Network,
        columns: int,
        colours: int,
        layers: LayersInRow,
        arena: Arena,
        parameters: Parameters,
    ):
        above, taps, self.reach, self.columns = network.stem_above, network.stem, network.reach, columns
        self.of_pixel, self.of_value = taps.inputs[-1].size, taps.inputs[-1].size // colours
        self.row_size = (columns + 2 * self.reach) * self.of_pixel
        self.rows = [Place(arena.take(self.row_size).at, self.of_pixel) for _ in range(self.reach + 1)]
        skipped, outputs = above.weight.shape[1] - taps.weight.shape[1], taps.weight.shape[1]
        self.above = arena.take(outputs, columns)
        self.begin = []
        for part, out in ((slice(skipped), layers.vertical_input), (slice(skipped, None), self.above)):
            weight, bias = above.weight[:, part], above.bias[:, part]
            for k, (row, weights) in enumerate(zip(self.rows, weight.chunk(self.reach, dim=2), strict=False)):
                if weights.numel():
                    (of,) = parameters.products(weights, None if k else bias)
                    self.begin.append(product(out, row, of, start=out if k else NOWHERE))
        self.steps = []
        for g, s in enumerate(taps.outputs[0].slices):
            (of,) = parameters.products(taps.of_group(g)[0])
            self.steps.append(product(layers.input(g), self.rows[-1], of, start=self.above + s.start))

    def slot(self, c: int) -> Place:
        """Where the stem reads colour c of a column."""
        return self.rows[-1] + (self.reach * self.of_pixel + c * self.of_value)

    def shift(self) -> list[Stage]:
        """Another row begins: each row takes the place of the one above it."""
        moved = [Operation("copy", Place(self.rows[0].at), self.row_size * self.reach, Place(self.rows[1].at))]
        return [Stage([*moved, Operation("zero", Place(self.rows[-1].at), self.row_size)])]

    def begin_row(self) -> list[Stage]:
        return [Stage(self.begin, 0, self.columns, together=True)]

    def step(self, g: int) -> list[Operation]:
        return [self.steps[g]]


class LayersInRow:
    """All layers. Places are as in `models.sampling.cached.CachedLayers`.

    `input(g)` is where the stem writes group g, `out` the head's input.
    """

    def __init__(self, network: Network, columns: int, given: ConditionInRow, arena: Arena, parameters: Parameters):
        row, up = network.row, network.up
        self.network, self.in_row, self.columns, self.given = network, row, columns, given
        self.parameters, self.narrow, self.wide = parameters, up.inputs[0], up.outputs[0]
        self.layers, f = len(up.weight), self.narrow.size
        self.left_is_hidden = row.left == "hidden"
        self.left_size = f if self.left_is_hidden else 0  # of a slot
        self.slot = self.left_size + row.main.inputs[1].size
        layers, lstm = range(self.layers), row.act == "lstm"
        self.slots = [arena.take(self.slot, columns + 2 + self.left_is_hidden) for _ in layers]
        of_columns = row.handed_down == "hidden" and not self.left_is_hidden
        self.hidden = [arena.take(f, columns + 2 if of_columns else 1) for _ in layers]
        self.cells = [arena.take(f, 1 if self.left_is_hidden else columns) for _ in layers] if lstm else []
        self.above = [arena.take(GATES[row.act] * f, columns) for _ in layers]
        self.gates = arena.take(GATES[row.act] * f)
        self.stream, self.skips = arena.take(self.wide.size), arena.take(self.wide.size)
        self.relu_u = [arena.take(self.wide.size) for _ in layers] if row.down else []
        self.out = self.stream if row.down else arena.take(self.wide.size)
        # the vertical stack's row above, for each layer; its present row, of one layer and of the next
        self.v, self.present = ([arena.take(f, columns + 2) for _ in x] if row.vertical else [] for x in (layers, "ab"))
        self.vertical_input = self.present[0].column(1) if row.vertical else NOWHERE
        self.vertical_gates = arena.take(2 * f if row.vertical else 0, columns)
        if row.mirrored:
            self.mirrored = [arena.take(f, columns + 1) for _ in layers]
            self.mirrored_cells = [arena.take(f) for _ in layers]
        self.steps = []
        for g in range(network.groups):
            weights = {name: parameters.products(*x.of_group(g)) for name, x in self.products().items()}
            self.steps.append([o for layer in layers for o in self.layer(layer, g, weights)] + self.end(g))
        self.from_above, self.from_the_right = self.above_stages(), self.right_to_left()

    def input(self, g: int) -> Place:
        return (self.stream if self.in_row.down else self.here(0)) + self.wide.slices[g].start

    def here(self, layer: int) -> Place:
        """`here` of a layer at a column."""
        return self.slots[layer].column(1) + self.left_size

    def products(self) -> dict[str, Weights]:
        """The products of a layer inside the row."""
        row, network = self.in_row, self.network
        main = row.main._replace(bias=None)  # it is in `above`
        out = {"down": row.down, "main": main, "up": network.up, "to_head": network.to_head}
        return {name: weights for name, weights in out.items() if weights}

    def layer(self, layer: int, g: int, of: dict) -> list[Operation]:
        """The operations of one layer at a column, for the features of group g: products have the weights `of` it."""
        row, n, w, out = self.in_row, self.narrow.slices[g], self.wide.slices[g], []
        size = n.stop - n.start
        here = self.here(layer)
        if row.down:  # here = ReLU(down(ReLU(u))); the stream is one pixel's, changed in place
            u = following = self.stream + w.start
            out += [Operation("relu", self.relu_u[layer] + w.start, w.stop - w.start, u)]
            out += [product(here + n.start, self.relu_u[layer], of["down"][layer], relu=True)]
        else:
            u = here + w.start
            following = (self.here(layer + 1) if layer + 1 < self.layers else self.out) + w.start
        gates = self.above[layer] + GATES[row.act] * n.start
        left_and_here = self.slots[layer].column(self.left_is_hidden)
        joined = self.hidden[layer].column(1) if self.hidden[layer].step else self.hidden[layer]
        hidden = (self.slots[layer].column(2) if self.left_is_hidden else joined) + n.start
        if row.act == "relu":
            out += [product(hidden, left_and_here, of["main"][layer], start=gates, relu=True)]
        else:
            out += [product(self.gates, left_and_here, of["main"][layer], start=gates)]
            cell = self.cells[layer] + n.start if row.act == "lstm" else NOWHERE
            out += [Operation(row.act, hidden, size, self.gates, start=cell)]
        if row.mirrored:
            out += [Operation("add", joined + n.start, size, self.mirrored[layer] + n.start, start=hidden)]
        elif self.left_is_hidden:
            out += [Operation("copy", joined + n.start, size, hidden)]
        out += [product(following, joined, of["up"][layer], start=u if self.network.residual else NOWHERE)]
        if "to_head" in of:
            skips = self.skips + w.start
            out += [product(skips, joined, of["to_head"][layer], start=skips if layer else NOWHERE)]
        return out

    def end(self, g: int) -> list[Operation]:
        w = self.wide.slices[g]
        if not self.network.to_head:
            return []
        out = self.out + w.start
        return [Operation("add", out, w.stop - w.start, self.skips + w.start, start=out)]

    def step(self, g: int) -> list[Operation]:
        """From group g of the stem at a column, at `input(g)`, to group g of the head's input, in `out`."""
        return self.steps[g]

    def begin_row(self, first: bool) -> list[Stage]:
        """What the rows above give to all columns, after the stem wrote `vertical_input`."""
        return [*([] if first else self.from_the_right), *self.from_above]

    def above_stages(self) -> list[Stage]:
        row, taps, out = self.in_row, len(self.in_row.above.inputs), []
        above = self.parameters.products(row.above.sorted_by_group()[0], row.main.sorted_by_group()[1])
        given = row.given and self.parameters.products(row.given.sorted_by_group()[0])
        stack = self.vertical() if row.vertical else [[]] * self.layers
        for layer, (place, operations) in enumerate(zip(self.above, stack, strict=True)):
            operations = [*operations, product(place, self.handed_down(layer, taps), above[layer])]
            if given:
                operations += [product(place, self.given.here, given[layer], start=place)]
            out.append(Stage(operations, 0, self.columns, together=True))
        emptied = self.cells if self.left_is_hidden else []
        return [*out, Stage([Operation("zero", cell, self.narrow.size) for cell in emptied])]

    def handed_down(self, layer: int, taps: int) -> Place:
        """What `above` reads of the row above, of so many columns side by side."""
        if self.in_row.vertical:
            return self.present[(layer + 1) % 2].column(1)
        columns = self.slots[layer] + self.left_size
        if self.in_row.handed_down == "hidden":
            columns = self.slots[layer].column(1) if self.left_is_hidden else self.hidden[layer]
        assert taps == 1 or columns.step == self.in_row.above.inputs[0].size, "columns are not side by side"
        return columns.column(1 - taps // 2)

    def vertical(self) -> list[list[Operation]]:
        """The stack that sees only the rows above, for each layer: its present row becomes the row above."""
        stack, f, gates, out = self.in_row.vertical, self.narrow.size, self.vertical_gates, []
        of_above, of_here = stack.main.weight.chunk(2, dim=2)
        of_above, of_here = self.parameters.products(of_above, stack.main.bias), self.parameters.products(of_here)
        given = stack.given and self.parameters.products(stack.given.weight)
        for layer, above in enumerate(self.v):
            here, following = self.present[layer % 2], self.present[(layer + 1) % 2]
            operations = [product(gates, above, of_above[layer]), product(gates, here, of_here[layer], start=gates)]
            if given:
                operations += [product(gates, self.given.here, given[layer], start=gates)]
            operations += [Operation("gate", following.column(1), f, gates)]
            out.append([*operations, Operation("copy", above.column(1), f, here.column(1))])
        return out

    def right_to_left(self) -> list[Stage]:
        """The direction from the right, over the row just finished. Its gates stand where `above` is not needed yet."""
        mirrored, f, apart, chain = self.in_row.mirrored, self.narrow.size, [], []
        if not mirrored:
            return []
        main, products = mirrored.main, self.parameters.products
        of_hidden, of_u = products(main.weight[:, :, :f], main.bias), products(main.weight[:, :, f:])
        left, given = products(mirrored.left.weight), mirrored.given and products(mirrored.given.weight)
        for layer, (gates, hidden) in enumerate(zip(self.above, self.mirrored, strict=True)):
            apart += [product(gates, hidden, of_hidden[layer]), product(gates, self.here(layer), of_u[layer], gates)]
            if given:
                apart += [product(gates, self.given.above, given[layer], start=gates)]
            chain += [product(self.gates, hidden.column(1), left[layer], start=gates)]
            chain += [Operation("lstm", hidden, f, self.gates, start=self.mirrored_cells[layer])]
        zeros, last = [Operation("zero", cell, f) for cell in self.mirrored_cells], self.columns - 1
        apart = Stage(apart, 0, self.columns, together=True)
        return [Stage(zeros), apart, Stage(chain, last, self.columns, -1)]


class HeadInRow:
    """The head at a pixel, and the choice of a value.

    `step(g)` takes group g's features to `parameters` of the likelihood, `logits_of(c)` those to logits, which stand at
    `logits`; `put(c, how)` chooses a value or takes one, and makes it known to what comes after.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        network: Network,
        layers: LayersInRow,
        stem: StemInRow,
        arena: Arena,
        parameters: Parameters,
    ):
        head, self.stem, self.colours, levels = model.head, stem, model.channels, model.levels
        (inputs,), (between,) = network.first.inputs, network.first.outputs
        relu_u, mid = arena.take(inputs.size), arena.take(between.size)
        self.mixtures = getattr(head, "mixtures", 0)
        self.chosen, self.room = arena.take(self.colours), arena.take(levels)
        self.table = parameters.add(model.table())
        last = [network.last.of_group(g) for g in range(network.groups)]
        self.outputs = self.logits = arena.take(last[0][0].shape[1])
        if self.mixtures:
            last = [in_levels(head, *last[0])]
            self.logits = arena.take(levels)
            self.follows = arena.take((3 + self.colours) * self.mixtures)
        self.steps = []
        for g, (u, b, of_last) in enumerate(zip(inputs.slices, between.slices, last, strict=True)):
            (of_first,), (of_last,) = parameters.products(*network.first.of_group(g)), parameters.products(*of_last)
            self.steps.append([Operation("relu", relu_u + u.start, u.stop - u.start, layers.out + u.start)])
            self.steps[g] += [product(mid + b.start, relu_u, of_first, relu=True), product(self.outputs, mid, of_last)]
            if self.mixtures:
                self.steps[g].append(self.mixture("mixture_begin"))

    def mixture(self, kind: str, c: int = 0) -> Operation:
        places = {"x": self.outputs, "start": self.follows, "k": self.chosen.at}
        return Operation(kind, self.logits, self.mixtures, **places, more=c)

    def step(self, g: int) -> list[Operation]:
        return self.steps[g]

    def logits_of(self, c: int) -> list[Operation]:
        return [self.mixture("mixture_logits", c)] if self.mixtures else []

    def put(self, c: int, how: str) -> list[Operation]:
        """The value of colour c: "choose" or "put", see `kernels.draw_row_cpu`."""
        places = {"x": self.logits, "start": self.room, "k": self.chosen.at, "weight": self.table}
        out = [Operation(how, self.stem.slot(c), self.stem.of_value, **places, more=c)]
        return [*out, self.mixture("mixture_put", c)] if self.mixtures and c + 1 < self.colours else out
