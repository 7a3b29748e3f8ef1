"""The LSTM scans on a CPU, forward and backward, for some images and one direction: `kernels.lstm_scan_cpu` calls them.

Legend: b batch · h w rows, columns · d direction · f hidden features · n taps · i j a row, a column · V vectors of f.

A vector is features side by side. Pixels are computed in raster order, for images side by side, as many as a CPU has
registers for: each number of the weights is loaded once for all of them. A state is written to where the pixels that
read it have their taps. Each image's arithmetic is the same whatever is beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kernels.vector import I64, Code, Value
from kernels.vector_math import sigmoid, tanh

# The integers of a scan in memory: addresses, sizes, and behind them for each direction and tap how far below and to
# the right the pixel is that reads a state there; the one of tap `carry` continues its cell.
FORWARD = ("pre", "weight", "gates", "taps", "hidden", "before", "tanh_cell", "cell")
BACKWARD = ("d_hidden", "weight", "gates", "before", "tanh_cell", "d_pre", "d_cell", "unused")
SIZES = ("h", "w", "d", "n", "vectors", "carry")


class Scan:
    """A scan in memory, for images `first`, first + 1, … of one direction."""

    def __init__(self, code: Code, scan: Value, first: Value, direction: Value, addresses: tuple[str, ...]):
        self.code, self.scan, self.direction, self.images = code, scan, direction, [first]
        read = lambda k: code.load_integer(scan, k)  # noqa: E731
        self.at = {name: code.pointer(read(k)) for k, name in enumerate(addresses)}
        self.h, self.w, self.d, self.n, self.vectors, self.carry = (
            read(len(addresses) + k) for k in range(len(SIZES))
        )
        self.offsets = len(addresses) + len(SIZES)

    def side_by_side(self, count: int) -> Scan:
        self.images = [self.images[0] + k for k in range(count)]
        return self

    def neighbour(self, i: Value, j: Value, tap: Value, back: bool) -> tuple[Value, Value, Value]:
        """Row and column of the pixel whose tap reads the state of (i, j), and whether it is in the image.

        Or `back`: of the pixel whose state the tap reads.
        """
        at = (self.direction * self.n + tap) * 2 + self.offsets
        steps = (self.code.load_integer(self.scan, at + k) for k in range(2))
        row, column = (x - step if back else x + step for x, step in zip((i, j), steps, strict=True))
        return row, column, (row >= 0) & (row < self.h) & (column >= 0) & (column < self.w)

    def pixel(self, image: Value, i: Value, j: Value) -> Value:
        return ((image * self.h + i) * self.w + j) * self.d + self.direction

    def place(self, name: str, pixel: Value, vectors: Value) -> Value:
        """Where a pixel's numbers stand, of so many vectors."""
        return self.code.address(self.at[name], pixel * vectors)

    def carried(self, name: str, image: Value, j: Value) -> Value:
        return self.code.address(self.at[name], ((image * self.d + self.direction) * self.w + j) * self.vectors)


@contextmanager
def pixels(code: Code, s: Scan, backward: bool) -> Iterator[tuple[Value, Value]]:
    """Do what is written inside for each pixel (i, j), in raster order, or in the opposite one."""
    turned = code.like(1, s.direction) - s.direction if backward else s.direction
    with code.loop(s.h) as i, code.loop(s.w) as j:
        row = s.h - 1 - i if backward else i
        yield row, j + turned * (s.w - 1 - j * 2)


def forward(code: Code, s: Scan) -> None:
    V, n = s.vectors, s.n
    f = V * code.lanes
    with pixels(code, s, False) as (i, j):
        at = [s.pixel(image, i, j) for image in s.images]
        taps = [s.place("taps", p, n * V) for p in at]
        pre, gates = ([s.place(name, p, V * 4) for p in at] for name in ("pre", "gates"))
        narrow = {name: [s.place(name, p, V) for p in at] for name in ("hidden", "before", "tanh_cell")}
        cell = [s.carried("cell", image, j) for image in s.images]
        _, next_j, goes_on = s.neighbour(i, j, s.carry, False)
        with code.loop(V) as v:
            sums = [[code.variable(code.load(x, V * gate + v)) for gate in range(4)] for x in pre]
            with code.loop(n * f) as k:
                row = code.address(s.at["weight"], (((s.direction * V + v) * n * f) + k) * 4)
                weights = [code.load(row, gate) for gate in range(4)]
                for x, totals in zip(taps, sums, strict=True):
                    one = code.load_one(x, k)
                    for weight, total in zip(weights, totals, strict=True):
                        total.set(code.fma(weight, one, total.get()))
            hidden = []
            for c, totals in enumerate(sums):
                o, forget, into, g = (act(code, x.get()) for act, x in zip((sigmoid, sigmoid, sigmoid, tanh), totals))
                before = code.load(cell[c], v)
                after = code.fma(forget, before, into * g)
                of_cell = tanh(code, after)
                hidden.append(o * of_cell)
                for gate, x in enumerate((o, forget, into, g)):
                    code.store(x, gates[c], V * gate + v)
                for name, x in (("hidden", hidden[-1]), ("before", before), ("tanh_cell", of_cell)):
                    code.store(x, narrow[name][c], v)
                with code.when(goes_on):
                    code.store(after, s.carried("cell", s.images[c], next_j), v)
            with code.loop(n) as tap:
                row, column, inside = s.neighbour(i, j, tap, False)
                with code.when(inside):
                    for image, x in zip(s.images, hidden, strict=True):
                        code.store(x, s.place("taps", s.pixel(image, row, column), n * V), tap * V + v)


def backward(code: Code, s: Scan) -> None:
    V, n = s.vectors, s.n
    f = V * code.lanes
    with pixels(code, s, True) as (i, j):
        at = [s.pixel(image, i, j) for image in s.images]
        gates, d_pre = ([s.place(name, p, V * 4) for p in at] for name in ("gates", "d_pre"))
        narrow = {name: [s.place(name, p, V) for p in at] for name in ("d_hidden", "before", "tanh_cell")}
        _, carry_j, goes_on = s.neighbour(i, j, s.carry, True)
        with code.loop(V) as v:
            for c, image in enumerate(s.images):
                o, forget, into, g = (code.load(gates[c], V * gate + v) for gate in range(4))
                d_hidden, before, of_cell = (code.load(narrow[x][c], v) for x in ("d_hidden", "before", "tanh_cell"))
                d_cell = code.load(s.carried("d_cell", image, j), v)
                d_cell = code.fma(d_hidden * o, 1 - of_cell * of_cell, d_cell)
                d_gates = (
                    d_hidden * of_cell * (o - o * o),
                    d_cell * before * (forget - forget * forget),
                    d_cell * g * (into - into * into),
                    d_cell * into * (1 - g * g),
                )
                for gate, x in enumerate(d_gates):
                    code.store(x, d_pre[c], V * gate + v)
                with code.when(goes_on):
                    code.store(d_cell * forget, s.carried("d_cell", image, carry_j), v)
        with code.loop(n) as tap:
            row, column, inside = s.neighbour(i, j, tap, True)
            with code.when(inside):
                to = [s.place("d_hidden", s.pixel(image, row, column), V) for image in s.images]
                with code.loop(V) as v:
                    sums = [[code.variable(code.load(x, v)), code.variable(code.number(0))] for x in to]
                    first = (((s.direction * n + tap) * V + v) * f) * 4
                    with code.loop(f * 2) as k:
                        weights = [code.load(s.at["weight"], first + k * 2 + odd) for odd in range(2)]
                        for x, totals in zip(d_pre, sums, strict=True):
                            for odd, (weight, total) in enumerate(zip(weights, totals, strict=True)):
                                total.set(code.fma(weight, code.load_one(x, k * 2 + odd), total.get()))
                    for x, (even, odd) in zip(to, sums, strict=True):
                        code.store(even.get() + odd.get(), x, v)


def write(code: Code) -> None:
    """Write the functions `forward` and `backward`: scans in memory, the first image, how many, the direction."""
    together = 4 if code.wide else 2
    for body, addresses in ((forward, FORWARD), (backward, BACKWARD)):

        def several(code: Code, scan, first, direction, body=body, addresses=addresses) -> None:
            body(code, Scan(code, scan, first, direction, addresses).side_by_side(together))

        def single(code: Code, scan, first, direction, body=body, addresses=addresses) -> None:
            body(code, Scan(code, scan, first, direction, addresses))

        many, one = code.function(several, "pii"), code.function(single, "pii")

        def run(code: Code, scan, first, count, direction, many=many, one=one) -> None:
            blocks = count / together
            with code.loop(blocks) as k:
                many(scan, first + k * together, direction)
            with code.loop(count, blocks * together) as k:
                one(scan, first + k, direction)

        code.function(run, "piii", name=body.__name__)
