"""The LSTM scans on a CPU: the functions that `kernels.lstm_scan_cpu` compiles and calls.

Legend: b batch · h w rows, columns · d direction · f hidden features · n taps · i j a row, a column · v a vector of f.

A vector is features side by side. Pixels are computed in raster order, the same one of some images together, as many as
a CPU has registers for: each number of the weights is loaded once for all of them. A state is stored where the pixels
that read it have their taps, so what a pixel reads is side by side. An image's arithmetic is the same whatever images
are beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kernels.vector import I64, Code, Value, Variable
from kernels.vector_math import gates_of_lstm, tanh_by_expm1

# The integers of a scan in memory: addresses, sizes, and for each direction and tap how many rows below and columns to
# the right the pixel is that reads a state there. The pixel that `carry` leads to continues the cell.
FORWARD = ("gates", "weight", "taps", "hidden", "cell_before", "tanh_cell", "cell")
BACKWARD = ("gates", "weight", "d_gates", "d_hidden", "cell_before", "tanh_cell", "d_cell")
OUTPUTS = 2  # vectors that the backward product sums side by side
SIZES = ("h", "w", "d", "n", "vectors", "carry")


class Scan:
    """A scan in memory, for `count` images of one direction."""

    def __init__(self, code: Code, names: tuple[str, ...], scan: Value, first: Value, direction: Value, count: int):
        self.code, self.scan, self.direction = code, scan, direction
        self.images = [first + k for k in range(count)]
        self.at = {name: code.pointer(code.load_integer(scan, k)) for k, name in enumerate(names)}
        sizes = (code.load_integer(scan, len(names) + k) for k in range(len(SIZES)))
        self.h, self.w, self.d, self.n, self.vectors, self.carry = sizes
        self.steps = code.address(scan, len(names) + len(SIZES), I64)

    def neighbour(self, i: Value, j: Value, tap: Value, sign: int) -> tuple[Value, Value, Value]:
        """The pixel whose tap reads the state of (i, j), or for sign −1 whose state the tap of (i, j) reads.

        Returns:
            Its row, its column, and whether it is in the image.
        """
        at = (self.direction * self.n + tap) * 2
        row, column = (x + self.code.load_integer(self.steps, at + k) * sign for k, x in enumerate((i, j)))
        return row, column, (row >= 0) & (row < self.h) & (column >= 0) & (column < self.w)

    def places(self, name: str, i: Value, j: Value, vectors: Value) -> list[Value]:
        """Where a pixel's numbers stand, so many vectors of each image."""
        pixels = (((image * self.h + i) * self.w + j) * self.d + self.direction for image in self.images)
        return [self.code.address(self.at[name], pixel * vectors) for pixel in pixels]

    def carried(self, name: str, j: Value) -> list[Value]:
        """Where a column's cell, or its gradient, stands while it waits for the next pixel."""
        columns = ((image * self.d + self.direction) * self.w + j for image in self.images)
        return [self.code.address(self.at[name], column * self.vectors) for column in columns]

    @contextmanager
    def pixels(self, backward: bool = False) -> Iterator[tuple[Value, Value]]:
        """Do what is written inside for each pixel (i, j), in the direction's raster order or its opposite."""
        turned = 1 - self.direction if backward else self.direction
        with self.code.loop(self.h) as i, self.code.loop(self.w) as j:
            yield (self.h - 1 - i if backward else i), j + turned * (self.w - 1 - j * 2)


def forward(code: Code, s: Scan) -> None:
    """gates: sums of bias and inputs → activated. Stores too what the taps read, and what `backward` needs."""
    inputs = s.n * s.vectors * code.lanes
    with s.pixels() as (i, j):
        taps, gates = s.places("taps", i, j, s.n * s.vectors), s.places("gates", i, j, s.vectors * 4)
        narrow = [s.places(name, i, j, s.vectors) for name in ("hidden", "tanh_cell", "cell_before")]
        cells, (_, next_j, goes_on) = s.carried("cell", j), s.neighbour(i, j, s.carry, 1)
        with code.loop(s.n) as tap:
            is_outside = s.neighbour(i, j, tap, -1)[2].equals(0)
            with code.when(is_outside), code.loop(s.vectors) as v:
                for at in taps:
                    code.store(code.number(0), at, tap * s.vectors + v)
        with code.loop(s.vectors) as v:
            sums = [[code.variable(code.load(at, s.vectors * gate + v)) for gate in range(4)] for at in gates]
            with code.loop(inputs) as k:
                row = code.address(s.at["weight"], ((s.direction * s.vectors + v) * inputs + k) * 4)
                weights = [code.load(row, gate) for gate in range(4)]
                for at, totals in zip(taps, sums, strict=True):
                    x = code.load_one(at, k)
                    for weight, total in zip(weights, totals, strict=True):
                        total.set(code.fma(weight, x, total.get()))
            states = []
            for totals, of_gates, cell, *places in zip(sums, gates, cells, *narrow, strict=True):
                o, forget, into, g = activated = gates_of_lstm(code, *(total.get() for total in totals))
                before = code.load(cell, v)
                after = code.fma(forget, before, into * g)
                of_cell = tanh_by_expm1(code, after)
                states.append((o * of_cell, after))
                for gate, x in enumerate(activated):
                    code.store(x, of_gates, s.vectors * gate + v)
                for x, at in zip((o * of_cell, of_cell, before), places, strict=True):
                    code.store(x, at, v)
            with code.when(goes_on):
                for (_, after), at in zip(states, s.carried("cell", next_j), strict=True):
                    code.store(after, at, v)
            with code.loop(s.n) as tap:
                row, column, is_inside = s.neighbour(i, j, tap, 1)
                with code.when(is_inside):
                    for (hidden, _), at in zip(states, s.places("taps", row, column, s.n * s.vectors), strict=True):
                        code.store(hidden, at, tap * s.vectors + v)


def backward(code: Code, s: Scan) -> None:
    """d_gates: of the sums. d_hidden: of the output → with what the taps that read it add."""
    with s.pixels(backward=True) as (i, j):
        gates, d_gates = (s.places(name, i, j, s.vectors * 4) for name in ("gates", "d_gates"))
        narrow = [s.places(name, i, j, s.vectors) for name in ("d_hidden", "tanh_cell", "cell_before")]
        _, next_j, goes_on = s.neighbour(i, j, s.carry, -1)
        d_cells, next_cells = s.carried("d_cell", j), s.carried("d_cell", next_j)
        with code.loop(s.vectors) as v:
            for of_gates, of_d_gates, of_d_cell, next_cell, *places in zip(
                gates, d_gates, d_cells, next_cells, *narrow, strict=True
            ):
                o, forget, into, g = (code.load(of_gates, s.vectors * gate + v) for gate in range(4))
                d_hidden, of_cell, before = (code.load(at, v) for at in places)
                d_cell = code.fma(d_hidden * o, 1 - of_cell * of_cell, code.load(of_d_cell, v))
                d_sums = (
                    d_hidden * of_cell * (o * (1 - o)),
                    d_cell * before * (forget * (1 - forget)),
                    d_cell * g * (into * (1 - into)),
                    d_cell * into * (1 - g * g),
                )
                for gate, x in enumerate(d_sums):
                    code.store(x, of_d_gates, s.vectors * gate + v)
                with code.when(goes_on):
                    code.store(d_cell * forget, next_cell, v)
        add_products(code, s, i, j, d_gates)


def add_products(code: Code, s: Scan, i: Value, j: Value, d_gates: list[Value]) -> None:
    """Add what a pixel's d_gates say of the states that its taps read to the gradients of these."""
    inputs, blocks = s.vectors * code.lanes * 4, (s.n * s.vectors + (OUTPUTS - 1)) / OUTPUTS
    tap, v = (code.variable(code.integer(0)) for _ in range(2))
    with code.loop(blocks) as block:
        sums = products(code, s, d_gates, (s.direction * blocks + block) * inputs)
        for r in range(OUTPUTS):
            with code.when(tap.get() < s.n):  # the last block may have more outputs than there are
                row, column, is_inside = s.neighbour(i, j, tap.get(), -1)
                with code.when(is_inside):
                    for totals, at in zip(sums, s.places("d_hidden", row, column, s.vectors), strict=True):
                        code.store(code.load(at, v.get()) + totals[r].get(), at, v.get())
            v.set(v.get() + 1)
            with code.when(v.get().equals(s.vectors)):
                v.set(code.integer(0))
                tap.set(tap.get() + 1)


def products(code: Code, s: Scan, d_gates: list[Value], first: Value) -> list[list[Variable]]:
    """The sums of a block of outputs, for each image, by the weights from input `first` on."""
    sums = [[code.variable(code.number(0)) for _ in range(OUTPUTS)] for _ in d_gates]
    with code.loop(s.vectors * code.lanes * 4) as k:
        row = code.address(s.at["weight"], (first + k) * OUTPUTS)
        weights = [code.load(row, r) for r in range(OUTPUTS)]
        for at, totals in zip(d_gates, sums, strict=True):
            x = code.load_one(at, k)
            for weight, total in zip(weights, totals, strict=True):
                total.set(code.fma(weight, x, total.get()))
    return sums


def write(code: Code) -> None:
    """Write `forward` and `backward`, functions of a scan in memory, the first image, how many, and the direction."""
    together = 4 if code.many else 2
    for body, names in ((forward, FORWARD), (backward, BACKWARD)):

        def of_images(count: int, body=body, names=names) -> Callable:
            return code.function(lambda code, *given: body(code, Scan(code, names, *given, count)), "pii")

        several, single = of_images(together), of_images(1)

        def run(code: Code, scan, first, count, direction, several=several, single=single) -> None:
            whole = count / together * together
            with code.loop(count / together) as k:
                several(scan, first + k * together, direction)
            with code.loop(count, whole) as k:
                single(scan, first + k, direction)

        code.job(run, "piii", body.__name__)
