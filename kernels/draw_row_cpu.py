"""A row of images on a CPU: the operations that a network's row is a list of, and the compiled function that runs it.

Legend: tile: images side by side, one in each lane of a vector · n outputs, k inputs of a product · j a column · c colour
· v levels · m mixture component.

Each number of the network is a vector with one lane for each image of a tile, and all that a tile needs is in one
stretch of memory, its arena. A row is a list of `Operation`s, each for one column of one layer; a `Stage` does some of
them for one column after another. `models.sampling.cpu_row` makes the list from the one description of a row. An
operation's operands stand in the arena at `at + j · step`, in vectors:

    product     out ← start + bias + weight · x, perhaps ReLU of it; a sum begins with start, then the bias, then one
                input after another, each by a fused multiply-add
    relu · add · copy · zero
    gate · lstm     as in `kernels.gate` and `kernels.lstm`, of gates one after another
    mixture …       logits of all levels from a mixture of logistics: `models.logistic_mixture`
    choose          a value from logits, as the rule says: `kernels.draw_row.Choice`

Every lane does the same arithmetic in the same order whatever is beside it. So an image's numbers are the same bits for
any batch, tile, thread and CPU. The kernel knows nothing of architectures: one compiled function serves all models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from torch import Tensor

from kernels import native
from kernels.draw_row import Choice
from kernels.jit import cdiv
from kernels.vector import I64, Code, Value
from kernels.vector_math import decay, exp, expm1, log, log1p, sigmoid, tanh

# As in `models.logistic_mixture`
SHARPNESS = (-14.0, 3.5)
SOFTPLUS_IS_LINEAR = 40.0
BLOCK = 8  # outputs that a product sums side by side: enough to keep two units of four cycles busy


class Place(NamedTuple):
    """Where vectors stand in the arena: the first one at column 0, and how far apart columns are."""

    at: int
    step: int = 0

    def __add__(self, vectors: int) -> Place:
        return Place(self.at + vectors, self.step)

    def column(self, j: int) -> Place:
        """This place at another column: column 0 is then what column j was."""
        return Place(self.at + j * self.step, self.step)


NOWHERE = Place(-1)


class Operation(NamedTuple):
    """One step of a row. What the numbers are for depends on the kind; see `Row`."""

    kind: str
    out: Place
    n: int = 0
    x: Place = NOWHERE
    k: int = 0
    start: Place = NOWHERE
    weight: int = 0  # where it stands among the parameters
    bias: int = -1
    more: int = 0


class Stage(NamedTuple):
    """Operations for `count` columns: all for one column, then all for the next, first + step, …

    Or `together`: the first operation for all columns, then the next one. They must not need what a column before made.
    """

    operations: Sequence[Operation]
    first: int = 0
    count: int = 1
    step: int = 1
    together: bool = False


FIELDS = 12  # integers of an operation in memory
(KIND, OUT, OUT_STEP, N, X, X_STEP, K, START, START_STEP, WEIGHT, BIAS, MORE) = range(FIELDS)
STAGE, FIRST = 6, 2  # integers of a stage; which is its first column
# What a batch is drawn with: addresses, 0 for none, how values are drawn, and sizes.
ADDRESSES = ("uniforms", "given", "known", "log_prob", "conditionals", "temperature", "values", "condition")
BATCH = (*ADDRESSES, "how", "height", "width", "colours", "levels", "room", "d", "condition_image", "condition_row")
GIVEN, LIKELIEST, DRAWN, TEMPERED = range(4)


# ------------------------------------------------------------------------------------------------------- the kernel


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

    def __getitem__(self, field: int) -> Value:
        return self.code.load_integer(self.operation, field)

    def place(self, field: int, column: Value | int = 0) -> Value:
        """Where an operand stands, of one of the operation's columns; its step follows `field`."""
        return self.code.address(self.tile.arena, self[field] + (self.tile.j + column) * self[field + 1])

    def batch(self, name: str) -> Value:
        return self.code.load_integer(self.tile.batch, BATCH.index(name))

    def pointer(self, name: str) -> Value:
        return self.code.pointer(self.batch(name))

    def place_of(self, lane: Value) -> Value:
        """Where the sub-pixel of an image stands in a tensor (b c h w)."""
        row = ((self.tile.image + lane) * self.batch("colours") + self[MORE]) * self.batch("height") + self.tile.i
        return row * self.batch("width") + self.tile.j

    def of_images(self, name: str, kind: ir.Type) -> Value:
        """What a tensor (b c h w) says of the sub-pixel, for each image."""
        pointer = self.pointer(name)
        return self.code.gather(
            self.tile.live, lambda lane: self.code.load_as_number(pointer, self.place_of(lane), kind)
        )


def product(code: Code, o: Fields) -> None:
    """out[:n] ← start + bias + weight · x[:k], ReLU of it where `more` is 1; weights (n/8 k 8) and biases (n).

    Where a tile has few images, several columns of all of them are packed in the lanes of one vector.
    """
    of_vector = code.variable(code.integer(1))
    with code.when(o.columns > 1):
        of_vector.set(code.integer(code.lanes) / o.tile.live)
    with code.choice(of_vector.get() > 1) as (packed, plain):
        with plain:
            for_columns(code, o, o.columns, o.place)
        with packed:
            per, n, k = of_vector.get(), o[N], o[K]
            vectors = (o.columns + (per - 1)) / per
            at_x = code.address(o.tile.arena, o.batch("room"))
            at_out = code.address(at_x, vectors * k)
            places = {X: (at_x, k), START: (at_out, n), OUT: (at_out, n)}
            repack(code, o, X, at_x, k, per)
            with code.when(o[START] >= 0):
                repack(code, o, START, at_out, n, per)
            for_columns(code, o, vectors, lambda field, c: code.address(places[field][0], c * places[field][1]))
            repack(code, o, OUT, at_out, n, per, back=True)


def repack(code: Code, o: Fields, field: int, to: Value, count: Value, per: Value, back: bool = False) -> None:
    """Bring `count` vectors of each column, with `live` numbers each, to `to`, `per` columns to a vector, or back."""
    live = o.tile.live
    with code.loop(o.columns) as c:
        place, first = o.place(field, c), c % per * live
        with code.loop(count) as i, code.loop(live) as lane:
            single, packed = (place, i, lane), (to, c / per * count + i, first + lane)
            a, b = (packed, single) if back else (single, packed)
            code.store_number(code.load_as_number(code.address(*a[:2]), a[2], code.float), code.address(*b[:2]), b[2])


def for_columns(code: Code, o: Fields, columns: Value, place: Callable[[int, Value], Value]) -> None:
    """`products` of several columns side by side where a CPU has registers for them: each number is loaded less often.

    `place(field, c)` is where an operand of the c-th column stands.
    """
    together = 3 if code.wide else 1
    blocks = columns / together
    with code.loop(blocks) as c:
        products(code, o, [c * together + j for j in range(together)], place)
    if together > 1:
        with code.loop(columns, blocks * together) as c:
            products(code, o, [c], place)


def products(code: Code, o: Fields, columns: list[Value], place: Callable[[int, Value], Value]) -> None:
    """The products of some columns, `BLOCK` outputs side by side."""
    out, x, start = ([place(field, c) for c in columns] for field in (OUT, X, START))
    n, k, has_start, has_bias = o[N], o[K], o[START] >= 0, o[BIAS] >= 0
    weight = code.variable(code.address(o.tile.parameters, o[WEIGHT], code.float))
    bias = code.address(o.tile.parameters, o[BIAS], code.float)
    least = code.where(o[MORE].equals(1), code.number(0), code.number(-math.inf))
    sums = [[code.variable(code.number(0)) for _ in range(BLOCK)] for _ in columns]
    with code.loop((n + (BLOCK - 1)) / BLOCK) as b:
        first = b * BLOCK
        for totals in sums:
            for total in totals:
                total.set(code.number(0))
        with code.when(has_start):
            for at, totals in zip(start, sums, strict=True):
                for r, total in enumerate(totals):
                    total.set(code.load(at, first + r))
        with code.when(has_bias):
            for r in range(BLOCK):
                one = code.load_one(bias, first + r)
                for totals in sums:
                    totals[r].set(totals[r].get() + one)
        with code.loop(k) as i:
            row, seen = weight.get(), [code.load(at, i) for at in x]
            for r in range(BLOCK):
                one = code.load_one(row, r)
                for totals, of_column in zip(sums, seen, strict=True):
                    totals[r].set(code.fma(one, of_column, totals[r].get()))
            weight.set(code.address(row, BLOCK, code.float))
        for at, totals in zip(out, sums, strict=True):
            for total in totals:
                total.set(code.larger(total.get(), least))
            with code.choice(first + BLOCK <= n) as (then, otherwise):
                with then:
                    for r, total in enumerate(totals):
                        code.store(total.get(), at, first + r)
                with otherwise:
                    for r, total in enumerate(totals):
                        with code.when(first + r < n):
                            code.store(total.get(), at, first + r)


def relu(code: Code, o: Fields) -> None:
    """out[:n] ← ReLU(x[:n])."""
    with code.loop(o.columns) as c, code.loop(o[N]) as i:
        out, x = o.place(OUT, c), o.place(X, c)
        code.store(code.larger(code.load(x, i), code.number(0)), out, i)


def add(code: Code, o: Fields) -> None:
    """out[:n] ← start[:n] + x[:n]."""
    with code.loop(o.columns) as c, code.loop(o[N]) as i:
        out, x, start = o.place(OUT, c), o.place(X, c), o.place(START, c)
        code.store(code.load(start, i) + code.load(x, i), out, i)


def copy(code: Code, o: Fields) -> None:
    """out[:n] ← x[:n], the first first."""
    with code.loop(o.columns) as c, code.loop(o[N]) as i:
        out, x = o.place(OUT, c), o.place(X, c)
        code.store(code.load(x, i), out, i)


def zero(code: Code, o: Fields) -> None:
    """out[:n] ← 0."""
    with code.loop(o.columns) as c, code.loop(o[N]) as i:
        code.store(code.number(0), o.place(OUT, c), i)


def condition(code: Code, o: Fields) -> None:
    """out[:d] ← the condition (b h w d), of the row `more` rows higher if there is one."""
    pointer, d, row = o.pointer("condition"), o.batch("d"), code.variable(o.tile.i - o[MORE])
    with code.when(row.get() < 0):
        row.set(code.integer(0))
    with code.loop(o.columns) as c:
        at, out = row.get() * o.batch("condition_row") + (o.tile.j + c) * d, o.place(OUT, c)
        with code.loop(d) as k:

            def of_lane(lane: Value, at=at + k) -> Value:
                image = (o.tile.image + lane) * o.batch("condition_image")
                return code.load_as_number(pointer, image + at, code.float)

            code.store(code.gather(o.tile.live, of_lane), out, k)


def gate(code: Code, o: Fields) -> None:
    """out[:n] ← tanh(a) ⊙ σ(b), x = [a b]."""
    with code.loop(o.columns) as c:
        out, n, x = o.place(OUT, c), o[N], o.place(X, c)

        def some(code: Code, i: Value) -> None:
            a, b = code.load(x, i), code.load(x, n + i)
            code.store(tanh(code, a) * sigmoid(code, b), out, i)

        code.each_vector(n, some)


def lstm(code: Code, o: Fields) -> None:
    """cell ← σ(f) ⊙ cell + σ(i) ⊙ tanh(g), out[:n] ← σ(o) ⊙ tanh(cell); x = [o f i g], the cell is `start`."""
    with code.loop(o.columns) as c:
        out, n, x, cell = o.place(OUT, c), o[N], o.place(X, c), o.place(START, c)

        def some(code: Code, i: Value) -> None:
            of_out, forget, into, candidate = (code.load(x, n * gate + i) for gate in range(4))
            new = sigmoid(code, into) * tanh(code, candidate)
            state = code.fma(sigmoid(code, forget), code.load(cell, i), new)
            code.store(state, cell, i)
            code.store(sigmoid(code, of_out) * tanh(code, state), out, i)

        code.each_vector(n, some)


# --------------------------------------------------------------------------------------------------------- a mixture


def softplus(code: Code, x: Value) -> tuple[Value, Value]:
    """log(1 + exp(x)) and log(1 + exp(−x))."""
    both = log1p(code, decay(code, code.smaller(code.absolute(x), code.number(SOFTPLUS_IS_LINEAR))))
    zero = code.number(0)
    return code.larger(x, zero) + both, code.larger(0 - x, zero) + both


def log_softmax(code: Code, x: Value, n: Value) -> None:
    """x[:n] ← log_softmax(x[:n])."""
    most, total = code.variable(code.load(x, 0)), code.variable(code.number(0))
    with code.loop(n) as i:
        most.set(code.larger(code.load(x, i), most.get()))
    with code.loop(n) as i:
        total.set(total.get() + exp(code, code.load(x, i) - most.get()))
    of_total = log(code, total.get())
    with code.loop(n) as i:
        code.store(code.load(x, i) - most.get() - of_total, x, i)


class Mixture:
    """Where a mixture's numbers stand: as the head gave them, and beside them what follows.

    x: weights (m) · means in levels (c m) · log(1 / scale) (c m) · coefficients (pairs m); the last two are replaced by
    1 / scale and their tanh. start: log-weights (m) · log(1 − exp(−1 / scale)) (c m) · room for (2 m).
    """

    def __init__(self, code: Code, o: Fields):
        self.m, colours, self.colour = o[N], o.batch("colours"), o[MORE]
        self.highest = code.of_integer(o.batch("levels") - 1) * 0.5
        self.given, x = o.place(X), o.place(X)
        self.colours, self.weights = colours, o.place(START)
        self.means = code.address(x, self.m + self.colour * self.m)
        self.sharpness = code.address(self.means, colours * self.m)
        before = self.colour * (self.colour - 1) / 2
        self.slopes = code.address(x, self.m * (colours * 2 + before + 1))
        self.within = code.address(self.weights, self.m + self.colour * self.m)
        self.edges = code.address(self.weights, self.m + colours * self.m)
        self.masses = code.address(self.edges, self.m)


def mixture_begin(code: Code, o: Fields) -> None:
    """What follows from a pixel's parameters (see `Mixture`; `more` is 0) before any of its colours is known."""
    x = Mixture(code, o)
    with code.loop(x.m) as i:
        code.store(code.load(x.given, i), x.weights, i)
    log_softmax(code, x.weights, x.m)
    low, high = SHARPNESS
    with code.loop(x.colours * x.m) as i:
        of_scale = code.smaller(code.larger(code.load(x.sharpness, i), code.number(low)), code.number(high))
        sharpness = exp(code, of_scale)
        code.store(sharpness, x.sharpness, i)
        code.store(log(code, 0 - expm1(code, 0 - sharpness)), x.within, i)
    with code.loop(x.colours * (x.colours - 1) / 2 * x.m) as i:
        code.store(tanh(code, code.load(x.slopes, i)), x.slopes, i)


def mixture_logits(code: Code, o: Fields) -> None:
    """out[:levels] ← log-probabilities of colour `more`, once the colours before it stand from `k` on.

    The upper edge of a level's bin is the lower of the next: softplus is computed once for both.
    """
    x, out, chosen = Mixture(code, o), o.place(OUT), code.address(o.tile.arena, o[K])
    levels = o.batch("levels")
    with code.loop(x.colour) as before:
        value, slopes = code.load(chosen, before) - x.highest, code.address(x.slopes, before * x.m)
        with code.loop(x.m) as i:
            code.store(code.fma(code.load(slopes, i), value, code.load(x.means, i)), x.means, i)
    with code.loop(x.m) as i:
        code.store(code.number(0), x.edges, i)
    with code.loop(levels) as v:
        last = (v + 1).equals(levels)
        edge = code.of_integer(v) - x.highest + 0.5
        bounded = code.where(last | v.equals(0), code.number(0), code.number(1))
        most, total = code.variable(code.number(-math.inf)), code.variable(code.number(0))
        with code.loop(x.m) as i:
            below, above = softplus(code, (edge - code.load(x.means, i)) * code.load(x.sharpness, i))
            inside = code.fma(code.load(x.within, i), bounded, code.load(x.weights, i))
            mass = inside - code.load(x.edges, i) - code.where(last, code.number(0), above)
            code.store(below, x.edges, i)
            code.store(mass, x.masses, i)
            most.set(code.larger(mass, most.get()))
        with code.loop(x.m) as i:
            total.set(total.get() + exp(code, code.load(x.masses, i) - most.get()))
        code.store(most.get() + log(code, total.get()), out, v)


def mixture_put(code: Code, o: Fields) -> None:
    """The log-weights once colour `more`, which stands from `k` on, is known too."""
    x, chosen = Mixture(code, o), code.address(o.tile.arena, o[K])
    value, zero = code.load(chosen, x.colour) - x.highest, code.number(0)
    first, last = value.equals(0 - x.highest), value.equals(x.highest)
    with code.loop(x.m) as i:
        distance, sharpness = value - code.load(x.means, i), code.load(x.sharpness, i)
        below, _ = softplus(code, (distance - 0.5) * sharpness)
        _, above = softplus(code, (distance + 0.5) * sharpness)
        mass = code.where(first, zero, code.where(last, zero, code.load(x.within, i)))
        mass = mass - code.where(first, zero, below) - code.where(last, zero, above)
        code.store(code.load(x.weights, i) + mass, x.weights, i)
    log_softmax(code, x.weights, x.m)


# --------------------------------------------------------------------------------------------------------- the choice


def choose(code: Code, o: Fields) -> None:
    """Choose the value of colour `more` from the logits x (levels), as the rule says, and record it.

    `start` has room for (levels). The value goes to the rule's `values`, and where `put` puts it.
    """
    x, sums, n, how = o.place(X), o.place(START), o.batch("levels"), o.batch("how")
    most, total, value = code.variable(code.load(x, 0)), code.variable(code.number(0)), code.variable(code.number(0))
    with code.loop(n, 1) as v:
        new = code.load(x, v)
        value.set(code.where(new > most.get(), code.of_integer(v), value.get()))
        most.set(code.larger(new, most.get()))

    with code.when(how > LIKELIEST):
        temperature = code.load_one(o.pointer("temperature"))
        with code.loop(n) as v:
            above = code.variable(code.load(x, v) - most.get())
            with code.when(how.equals(TEMPERED)):
                above.set(above.get() / temperature)
            total.set(total.get() + exp(code, above.get()))
            code.store(total.get(), sums, v)
        number, reached = o.of_images("uniforms", code.float) * total.get(), code.number(0)
        value.set(reached)
        with code.loop(n - 1) as v:
            value.set(value.get() + code.where(code.load(sums, v) <= number, code.number(1), code.number(0)))

    with code.when(o.batch("given") > 0):
        given = o.of_images("given", I64)
        with code.choice(o.batch("known") > 0) as (then, otherwise):
            with then:
                known = o.of_images("known", ir.IntType(8)) > 0
                value.set(code.where(known, given, value.get()))
            with otherwise:
                value.set(given)

    of_images, of_levels = o.batch("log_prob"), o.batch("conditionals")
    with code.when((of_images > 0) | (of_levels > 0)):
        total.set(code.number(0))
        with code.loop(n) as v:
            total.set(total.get() + exp(code, code.load(x, v) - most.get()))
        of_total, of_value = log(code, total.get()), code.variable(code.number(0))
        with code.loop(n) as v:
            log_prob = code.load(x, v) - most.get() - of_total
            of_value.set(code.where(value.get().equals(code.of_integer(v)), log_prob, of_value.get()))
            with code.when(of_levels > 0), code.each(o.tile.live, log_prob) as (lane, one):
                code.store_number(one, o.pointer("conditionals"), o.place_of(lane) * n + v)
        with code.when(of_images > 0), code.each(o.tile.live, of_value.get()) as (lane, one):
            pointer, image = o.pointer("log_prob"), o.tile.image + lane
            code.store_number(code.load_as_number(pointer, image, code.float) + one, pointer, image)

    with code.each(o.tile.live, value.get()) as (lane, one):
        code.store_integer(code.as_integer(one), o.pointer("values"), o.place_of(lane))
    known_to_the_rest(code, o, value.get())


def put(code: Code, o: Fields) -> None:
    """Make the value of colour `more` in the rule's `values` known to what comes after it."""
    known_to_the_rest(code, o, o.of_images("values", I64))


def known_to_the_rest(code: Code, o: Fields, value: Value) -> None:
    """Put a value where the stem reads it, `out`, scaled to [−1, 1], and where a mixture does, from `k` on."""
    code.store(value, code.address(o.tile.arena, o[K] + o[MORE]))
    with code.each(o.tile.live, value) as (lane, one):
        scaled = code.load_as_number(o.tile.parameters, o[WEIGHT] + code.as_integer(one), code.float)
        code.store_number(scaled, o.place(OUT), lane)


OPERATIONS = {
    f.__name__: f
    for f in (product, relu, add, copy, zero, condition, gate, lstm, mixture_begin, mixture_logits, mixture_put, choose, put)
}


def write(code: Code) -> None:
    """Write the function `run`: stages of operations for one tile."""
    functions = {}
    for name, body in OPERATIONS.items():

        def operation(code: Code, *arguments: Value, body=body) -> None:
            body(code, Fields(code, arguments[0], Tile(*arguments[1:])))

        functions[name] = code.function(operation, "ppppiiiii")

    def run(code: Code, stages, count, arena, parameters, batch, image, live, i) -> None:
        with code.loop(count) as s:
            stage = code.address(stages, s * STAGE, I64)
            operations, number, first, times, step, together = (code.load_integer(stage, f) for f in range(STAGE))
            with code.loop(times) as time, code.loop(number) as k:
                operation = code.address(code.pointer(operations), k * FIELDS, I64)
                arguments = operation, arena, parameters, batch, image, live, i, first + time * step, together
                cases = [lambda f=f: f(*arguments) for f in functions.values()]
                code.switch(code.load_integer(operation, KIND), cases)

    code.function(run, "pipppiii", name="run")


# --------------------------------------------------------------------------------------------------- from Python


def encode(operation: Operation) -> list[int]:
    """The integers of an operation in memory."""
    o = operation
    fields = [list(OPERATIONS).index(o.kind), *o.out, o.n, *o.x, o.k, *o.start, o.weight, o.bias, o.more]
    assert len(fields) == FIELDS
    return fields


class Parameters:
    """The parameters of a network in one stretch of memory, of the type of its weights."""

    def __init__(self, like: Tensor):
        self.like, self.parts, self.size = like, [], 0

    def add(self, x: Tensor) -> int:
        """Take numbers in; return where they stand."""
        at, x = self.size, x.detach().to(self.like).flatten()
        self.parts.append(F.pad(x, (0, -len(x) % BLOCK)))
        self.size += len(self.parts[-1])
        return at

    def products(self, weight: Tensor, bias: Tensor | None = None) -> list[dict[str, int]]:
        """Take a product in all layers in: weights (layers n k), biases (layers n).

        Returns:
            For each layer what says in an `Operation` where they stand.
        """
        layers, n, k = weight.shape
        room = cdiv(n, BLOCK) * BLOCK
        at = self.add(F.pad(weight.detach(), (0, 0, 0, room - n)).unflatten(1, (-1, BLOCK)).mT)
        at_bias = -1 if bias is None else self.add(F.pad(bias.detach(), (0, room - n)))
        where = [(at + layer * room * k, at_bias if bias is None else at_bias + layer * room) for layer in range(layers)]
        return [{"n": n, "k": k, "weight": weight, "bias": bias} for weight, bias in where]

    def together(self) -> Tensor:
        return torch.cat(self.parts)


class Arena:
    """Lays out what a tile keeps: `take(n)` vectors, of one column or of several.

    `packed` vectors more are room for a product of packed columns.
    """

    def __init__(self, packed: int):
        self.size, self.packed = 0, packed

    def take(self, n: int, columns: int = 1) -> Place:
        at = Place(self.size, n if columns > 1 else 0)
        self.size += n * columns
        return at


class Batch(NamedTuple):
    """What b images are drawn with, and where what is recorded of them goes: tensors (b c h w), and a condition."""

    values: Tensor  # (b c h w) int64, out
    levels: int
    choice: Choice = Choice()  # of tensors (b c h w), conditionals (b c h w v)
    condition: Tensor | None = None  # (b h w d), or (b 1 1 d) where it is the same everywhere

    def in_memory(self, tiles: Tiles) -> tuple[Tensor, list[Tensor]]:
        """The integers of `BATCH`, and the tensors that they stand for, which must be kept as long."""
        choice, (_, colours, height, width), like = self.choice, self.values.shape, tiles.parameters
        numbers, kinds = like.dtype, {"given": torch.int64, "known": torch.bool, "values": torch.int64}
        temperature = like.new_tensor([choice.temperature or 1.0])
        fields = {**choice._asdict(), "temperature": temperature, "values": self.values, "condition": self.condition}
        written = ("values", "log_prob", "conditionals")
        kept, out = [], []
        for name in ADDRESSES:
            x = fields[name]
            if x is not None:
                kind = kinds.get(name, numbers)
                assert name not in written or (x.is_contiguous() and x.dtype == kind), f"{name} of another layout"
                x = x.to(kind).contiguous()
                kept.append(x)
            out.append(0 if x is None else x.data_ptr())
        if choice.uniforms is None:
            out.append(GIVEN)
        else:
            out.append({0.0: LIKELIEST, 1.0: DRAWN}.get(choice.temperature, TEMPERED))
        out += [height, width, colours, self.levels, tiles.room]
        if self.condition is not None:
            _, h, w, d = self.condition.shape
            out += [d, h * w * d, w * d if h > 1 else 0]
        return torch.tensor(out + [0] * (len(BATCH) - len(out))), kept


class Tiles:
    """Runs stages for images that are drawn side by side, cut in tiles.

    Args:
        b: how many images.
        arena: what a tile keeps.
        parameters: of the network.
    """

    def __init__(self, b: int, arena: Arena, parameters: Parameters):
        self.b, self.parameters = b, parameters.together()
        double = self.parameters.dtype == torch.float64
        assert (double or self.parameters.dtype == torch.float32) and self.parameters.device.type == "cpu"
        self.lanes = native.lanes(b, double)
        self.count, self.room = cdiv(b, self.lanes), arena.size
        self.size = arena.size + arena.packed + BLOCK  # a block may read beyond the end
        self.arena = self.parameters.new_zeros(self.count, self.size, self.lanes)
        self.function, self.kept = native.library(write, {"run": 8}, self.lanes, double)["run"], []

    def program(self, stages: Sequence[Stage]) -> Tensor:
        """Lay stages out in memory, as integers."""
        stages = [stage for stage in stages if stage.operations and stage.count]
        out = []
        for stage in stages:
            operations = torch.from_numpy(np.array([encode(o) for o in stage.operations], dtype=np.int64))
            self.kept.append(operations)
            times = (1, 1, stage.count) if stage.together else (stage.count, stage.step, 1)
            out.append([operations.data_ptr(), len(operations), stage.first, *times])
        return torch.tensor(out, dtype=torch.int64).reshape(-1, STAGE)

    def run(self, program: Tensor, batch: Tensor, k: int, i: int) -> None:
        """Run a program for tile k at row i."""
        first, arena = k * self.lanes, self.arena.data_ptr() + k * self.size * self.lanes * self.arena.element_size()
        live, of_batch = min(self.lanes, self.b - first), (self.parameters.data_ptr(), batch.data_ptr())
        self.function(program.data_ptr(), len(program), arena, *of_batch, first, live, i)

    def images_of(self, place: Place, n: int) -> Tensor:
        """Vectors `place`, …, `place + n − 1` as numbers of images: (b n)."""
        return self.arena[:, place.at : place.at + n].mT.flatten(0, 1)[: self.b]
