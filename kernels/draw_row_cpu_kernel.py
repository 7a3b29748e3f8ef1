"""The operations that a row on a CPU is a list of, and the function that runs such a list for a tile.

Legend: tile: images side by side, one in each lane of a vector · n outputs, k inputs of a product · d features of the
condition · i j a row, a column · c colour.

`kernels.draw_row_cpu` says how operations and tiles are laid out in memory. An operand's vectors stand in the tile's
arena, those of column j `step` vectors behind those of column j − 1. An operation does one column, or several of which
none needs what another gives.

Every lane does the same arithmetic in the same order whatever is beside it. So an image's numbers are the same bits in
any batch, tile and thread, and on any CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from llvmlite import ir

from kernels.vector import Code, Value
from kernels.vector_math import sigmoid, tanh

# The integers of an operation in memory, those of a stage, and those of what a batch is drawn with: addresses, 0 for
# none, how values are drawn, and sizes.
FIELDS = ("kind", "out", "out_step", "n", "blocks", "x", "x_step", "k", "start", "start_step", "weight", "bias", "more")
STAGE = ("operations", "count", "first", "times", "step", "columns")
ADDRESSES = ("uniforms", "given", "known", "log_prob", "conditionals", "temperature", "values", "condition")
BATCH = (*ADDRESSES, "how", "height", "width", "colours", "levels", "room", "d", "condition_image", "condition_row")


def blocks(registers: int, many: bool) -> tuple[int, int]:
    """How many outputs a product sums side by side, and how many of those that are left: arguments as of `Code`.

    As many as there are registers for, so that each input is loaded seldom and no sum waits for itself: two units do an
    addition each cycle, and it takes four.
    """
    if many:
        return 8, 8  # of three columns, perhaps, see `for_columns`
    return {1: (12, 4), 2: (6, 4)}.get(registers, (4, 4))


class Tile(NamedTuple):
    """What an operation works on, beside its own fields."""

    arena: Value
    parameters: Value
    batch: Value  # the integers of `BATCH`
    image: Value  # the tile's first,
    live: Value  # and how many it has
    i: Value  # the row
    j: Value  # the column, the first
    columns: Value  # of so many


class Fields:
    """An operation in memory, at a column of a tile."""

    def __init__(self, code: Code, operation: Value, tile: Tile):
        self.code, self.operation, self.tile, self.columns = code, operation, tile, tile.columns

    def __getitem__(self, field: str) -> Value:
        return self.code.load_integer(self.operation, FIELDS.index(field))

    def place(self, field: str, column: Value | int = 0) -> Value:
        """Where an operand stands, of one of the operation's columns."""
        return self.code.address(self.tile.arena, self[field] + (self.tile.j + column) * self[f"{field}_step"])

    def batch(self, name: str) -> Value:
        return self.code.load_integer(self.tile.batch, BATCH.index(name))

    def pointer(self, name: str) -> Value:
        return self.code.pointer(self.batch(name))

    def place_of(self, lane: Value) -> Value:
        """Where the sub-pixel of an image stands in a tensor (b c h w)."""
        row = ((self.tile.image + lane) * self.batch("colours") + self["more"]) * self.batch("height") + self.tile.i
        return row * self.batch("width") + self.tile.j

    def of_images(self, name: str, kind: ir.Type) -> Value:
        """What a tensor (b c h w) says of the sub-pixel, for each image."""
        pointer = self.pointer(name)
        return self.code.gather(
            self.tile.live, lambda lane: self.code.load_as_number(pointer, self.place_of(lane), kind)
        )


def product(code: Code, o: Fields) -> None:
    """out[:n] ← start + bias + weight · x[:k], ReLU of it where `more` is 1; weights as of `Parameters.products`.

    Where a tile has few images, several columns of all of them are packed in the lanes of one vector.
    """
    per, columns, n, k = code.variable(code.integer(1)), code.variable(o.columns), o["n"], o["k"]
    places = {name: (code.variable(o.place(name)), code.variable(o[f"{name}_step"])) for name in ("x", "start", "out")}
    with code.when(o.columns > 1):
        per.set(code.integer(code.lanes) / o.tile.live)
    with code.when(per.get() > 1):
        columns.set((o.columns + (per.get() - 1)) / per.get())
        at_x = code.address(o.tile.arena, o.batch("room"))
        at_out = code.address(at_x, columns.get() * k)
        repack(code, o, "x", at_x, k, per.get())
        with code.when(o["start"] >= 0):
            repack(code, o, "start", at_out, n, per.get())
        for name, *packed in (("x", at_x, k), ("start", at_out, n), ("out", at_out, n)):
            for variable, value in zip(places[name], packed, strict=True):
                variable.set(value)

    def place(name: str, c: Value) -> Value:
        start, step = places[name]
        return code.address(start.get(), c * step.get())

    for_columns(code, o, columns.get(), place)
    with code.when(per.get() > 1):
        repack(code, o, "out", places["out"][0].get(), n, per.get(), back=True)


def repack(code: Code, o: Fields, field: str, to: Value, count: Value, per: Value, back: bool = False) -> None:
    """Bring `count` vectors of each column, with `live` numbers each, to `to`, `per` columns to a vector, or back."""
    live = o.tile.live
    with code.loop(o.columns) as c:
        place, first, row = o.place(field, c), c % per * live, c / per * count
        with code.loop(count) as i, code.loop(live) as lane:
            single, packed = (place, i, lane), (to, row + i, first + lane)
            a, b = (packed, single) if back else (single, packed)
            code.store_number(code.load_as_number(code.address(*a[:2]), a[2], code.float), code.address(*b[:2]), b[2])


def for_columns(code: Code, o: Fields, columns: Value, place: Callable[[str, Value], Value]) -> None:
    """`products` of several columns side by side where a CPU has registers for them: each number is loaded less often.

    `place(field, c)` is where an operand of the c-th column stands.
    """
    together = 3 if code.many else 1
    blocks = columns / together
    with code.loop(blocks) as c:
        products(code, o, [c * together + j for j in range(together)], place)
    if together > 1:
        with code.loop(columns, blocks * together) as c:
            products(code, o, [c], place)


def products(code: Code, o: Fields, columns: list[Value], place: Callable[[str, Value], Value]) -> None:
    """The products of some columns: first `blocks` blocks of many outputs, then the rest in blocks of few."""
    many, few = blocks(code.registers, code.many)
    weight = code.address(o.tile.parameters, o["weight"], code.float)
    places = {field: [place(field, c) for c in columns] for field in ("x", "start", "out")}
    if many > few:
        with code.loop(o["blocks"]) as b:
            sums = block(code, o, places, b * many, code.address(weight, b * many * o["k"], code.float), many)
            for at, totals in zip(places["out"], sums, strict=True):
                for r, total in enumerate(totals):
                    code.store(total, at, b * many + r)
    done, rest = o["blocks"] * many, code.room(few)
    with code.loop((o["n"] - done + (few - 1)) / few) as b:
        first = done + b * few
        sums = block(code, o, places, first, code.address(weight, first * o["k"], code.float), few)
        for at, totals in zip(places["out"], sums, strict=True):
            with code.choice(first + few <= o["n"]) as (then, otherwise):
                with then:
                    for r, total in enumerate(totals):
                        code.store(total, at, first + r)
                with otherwise:
                    for r, total in enumerate(totals):
                        code.store(total, rest, r)
                    with code.loop(o["n"] - first) as r:
                        code.store(code.load(rest, r), at, first + r)


def block(code: Code, o: Fields, places: dict, first: Value, weight: Value, count: int) -> list[list[Value]]:
    """The sums of outputs `first`, … for each column, side by side; weights (k count)."""
    bias = code.address(o.tile.parameters, o["bias"] + first, code.float)
    sums = [[code.variable(code.number(0)) for _ in range(count)] for _ in places["x"]]
    with code.when(o["start"] >= 0):
        for at, totals in zip(places["start"], sums, strict=True):
            for r, total in enumerate(totals):
                total.set(code.load(at, first + r))
    with code.when(o["bias"] >= 0):
        for r in range(count):
            one = code.load_one(bias, r)
            for totals in sums:
                totals[r].set(totals[r].get() + one)
    with code.loop(o["k"]) as i:
        row, seen = code.address(weight, i * count, code.float), [code.load(at, i) for at in places["x"]]
        for r in range(count):
            one = code.load_one(row, r)
            for totals, of_column in zip(sums, seen, strict=True):
                totals[r].set(code.fma(one, of_column, totals[r].get()))
    least = code.where(o["more"].equals(1), code.number(0), code.number(-math.inf))
    return [[code.larger(total.get(), least) for total in totals] for totals in sums]


def relu(code: Code, o: Fields) -> None:
    """out[:n] ← ReLU(x[:n])."""
    with code.loop(o.columns) as c, code.loop(o["n"]) as i:
        out, x = o.place("out", c), o.place("x", c)
        code.store(code.larger(code.load(x, i), code.number(0)), out, i)


def add(code: Code, o: Fields) -> None:
    """out[:n] ← start[:n] + x[:n]."""
    with code.loop(o.columns) as c, code.loop(o["n"]) as i:
        out, x, start = o.place("out", c), o.place("x", c), o.place("start", c)
        code.store(code.load(start, i) + code.load(x, i), out, i)


def copy(code: Code, o: Fields) -> None:
    """out[:n] ← x[:n], the first first."""
    with code.loop(o.columns) as c, code.loop(o["n"]) as i:
        out, x = o.place("out", c), o.place("x", c)
        code.store(code.load(x, i), out, i)


def zero(code: Code, o: Fields) -> None:
    """out[:n] ← 0."""
    with code.loop(o.columns) as c, code.loop(o["n"]) as i:
        code.store(code.number(0), o.place("out", c), i)


def condition(code: Code, o: Fields) -> None:
    """out[:d] ← the condition (b h w d), of the row `more` rows higher if there is one."""
    pointer, d, row = o.pointer("condition"), o.batch("d"), code.variable(o.tile.i - o["more"])
    with code.when(row.get() < 0):
        row.set(code.integer(0))
    with code.loop(o.columns) as c:
        at, out = row.get() * o.batch("condition_row") + (o.tile.j + c) * d, o.place("out", c)
        with code.loop(d) as k:

            def of_lane(lane: Value, at=at + k) -> Value:
                image = (o.tile.image + lane) * o.batch("condition_image")
                return code.load_as_number(pointer, image + at, code.float)

            code.store(code.gather(o.tile.live, of_lane), out, k)


def gate(code: Code, o: Fields) -> None:
    """out[:n] ← tanh(a) ⊙ σ(b), x = [a b]."""
    with code.loop(o.columns) as c:
        out, n, x = o.place("out", c), o["n"], o.place("x", c)

        def some(code: Code, i: Value) -> None:
            a, b = code.load(x, i), code.load(x, n + i)
            code.store(tanh(code, a) * sigmoid(code, b), out, i)

        code.each_vector(n, some)


def lstm(code: Code, o: Fields) -> None:
    """cell ← σ(f) ⊙ cell + σ(i) ⊙ tanh(g), out[:n] ← σ(o) ⊙ tanh(cell); x = [o f i g], the cell is `start`."""
    with code.loop(o.columns) as c:
        out, n, x, cell = o.place("out", c), o["n"], o.place("x", c), o.place("start", c)

        def some(code: Code, i: Value) -> None:
            of_out, forget, into, candidate = (code.load(x, n * gate + i) for gate in range(4))
            new = sigmoid(code, into) * tanh(code, candidate)
            state = code.fma(sigmoid(code, forget), code.load(cell, i), new)
            code.store(state, cell, i)
            code.store(sigmoid(code, of_out) * tanh(code, state), out, i)

        code.each_vector(n, some)
