"""How a row on a CPU chooses a value: a mixture's logits, and the rule. Operations of `kernels.draw_row_cpu_kernel`.

Legend: v levels · m component · c colour.
"""

from __future__ import annotations

import math

from llvmlite import ir

from kernels.draw_row_cpu_kernel import Fields
from kernels.vector import I64, Code, Value
from kernels.vector_math import decay, exp, expm1, log, log1p, tanh

GIVEN, LIKELIEST, DRAWN, TEMPERED = range(4)  # how values are drawn
# As in `models.logistic_mixture`
SHARPNESS = (-14.0, 3.5)
SOFTPLUS_IS_LINEAR = 40.0


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
        self.m, colours, self.colour = o["n"], o.batch("colours"), o["more"]
        self.highest = code.of_integer(o.batch("levels") - 1) * 0.5
        self.given, x = o.place("x"), o.place("x")
        self.colours, self.weights = colours, o.place("start")
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
    x, out, chosen = Mixture(code, o), o.place("out"), code.address(o.tile.arena, o["k"])
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
    x, chosen = Mixture(code, o), code.address(o.tile.arena, o["k"])
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


def choose(code: Code, o: Fields) -> None:
    """Choose the value of colour `more` from the logits x (levels), as the rule says, and record it.

    `start` has room for (levels). The value goes to the rule's `values`, and where `put` puts it.
    """
    x, sums, n, how = o.place("x"), o.place("start"), o.batch("levels"), o.batch("how")
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
    """Put what the stem reads of a value, its row of the table (levels n), to `out`, and it to `k` for a mixture.

    Of a given value that is no level, it reads the nearest level's row.
    """
    code.store(value, code.address(o.tile.arena, o["k"] + o["more"]))
    out, n, highest = o.place("out"), o["n"], code.of_integer(o.batch("levels") - 1)
    level = code.larger(code.smaller(value, highest), code.number(0))
    with code.each(o.tile.live, level) as (lane, one):
        row = code.address(o.tile.parameters, o["weight"] + code.as_integer(one) * n, code.float)
        with code.loop(n) as i:
            code.store_number(code.load_as_number(row, i, code.float), code.address(out, i), lane)
