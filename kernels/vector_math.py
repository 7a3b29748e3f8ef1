"""exp, log and what follows from them, as instructions of `kernels.vector`: the same bits on every machine.

Legend: ulp, the distance between neighbouring numbers at a result.

A mathematical library's functions differ from machine to machine in their last bits. These are IEEE products, sums and
divisions in a fixed order, so they do not. Each is off by at most 2 ulp (`tests/test_vector_math.py`). Where an exact
result is below the smallest normal number, exp is 0 and σ about that number. Nothing is promised of NaN.

    exp(x)  = 2ⁿ · (1 + r + r² Σ aᵢ rⁱ)              n = round(x / log 2), r = x − n · log 2, |r| ≤ log(2) / 2
    log(x)  = n · log 2 + log(1 + y)                 x = 2ⁿ · (1 + y), √½ ≤ 1 + y < √2
    log(1 + y) = 2 z + z³ Σ bᵢ z²ⁱ                   z = y / (2 + y)
    tanh(x) = x + x³ Σ cᵢ x²ⁱ                        near 0

Of float64 the coefficients are those of Taylor's series. Of float32 they are fitted at Chebyshev's nodes, which takes
fewer terms.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

from kernels.vector import Code, Value


def tanh_series(count: int) -> list[float]:
    """The first coefficients of tanh(x) = x + c₀ x³ + c₁ x⁵ + …, from tanh′ = 1 − tanh²."""
    odd = [Fraction(1)]
    for k in range(1, count + 1):
        odd.append(-sum(odd[i] * odd[k - 1 - i] for i in range(k)) / (2 * k + 1))
    return [float(c) for c in odd[1:]]


def log_series(count: int) -> list[float]:
    return [2 / (2 * i + 1) for i in range(1, count + 1)]


class Kind(NamedTuple):
    """What the functions need to know of a type of numbers."""

    mantissa: int  # bits of it that are stored
    bias: int  # of the exponent
    least: float  # exp of anything lower is 0
    most: float  # exp of anything higher is ∞
    log2: tuple[float, float]  # log 2: so few digits that a product with n is exact, and what is left
    root: int  # the bits of √½
    exp: list[float]  # coefficients
    log: list[float]
    log1p: list[float]  # of the same series, for 0 ≤ y ≤ 1
    tanh: list[float]


FLOAT32 = Kind(
    23,
    127,
    -87.33654,
    88.72283,
    (22713 / 2**15, 1.4286068203094173e-06),
    0x3F3504F3,
    [0.5, 0.16666576266288757, 0.04166646674275398, 0.008363179862499237, 0.0013933650916442275],
    [0.6666668653488159, 0.39988699555397034, 0.2958321273326874],
    [0.6666666865348816, 0.3999970257282257, 0.28592583537101746, 0.21703314781188965, 0.23239050805568695],
    [-0.3333333134651184, 0.13333117961883545, -0.053910065442323685, 0.021312745288014412, -0.006615754682570696],
)
FLOAT64 = Kind(
    52,
    1023,
    -708.3964185322641,
    709.782712893384,
    (0x2C5C85FDF47 / 2**42, 5.497923018708371e-14),
    0x3FE6A09E667F3BCD,
    [1 / math.factorial(i) for i in range(2, 14)],
    log_series(11),
    log_series(17),
    tanh_series(18),
)


def kind(code: Code) -> Kind:
    return FLOAT64 if code.double else FLOAT32


def polynomial(code: Code, x: Value, coefficients: list[float]) -> Value:
    """Σ coefficients[i] · xⁱ."""
    total = code.number(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        total = code.fma(total, x, code.number(coefficient))
    return total


def reduced(code: Code, x: Value) -> tuple[Value, Value]:
    """n as integers and exp(r) − 1, where x = n · log 2 + r."""
    of = kind(code)
    round_up = code.number(1.5 * 2**of.mantissa)  # so large that a sum with it has no digits after the point
    rounded = code.fma(x, code.number(1 / math.log(2)), round_up)
    n = rounded - round_up
    high, low = of.log2
    r = code.fma(n, code.number(-low), code.fma(n, code.number(-high), x))
    series = polynomial(code, r, of.exp)
    return code.as_bits(rounded) - code.as_bits(round_up), code.fma(r * r, series, r)


def exp(code: Code, x: Value) -> Value:
    of = kind(code)
    result = code.where(x > code.number(of.most), code.number(math.inf), unbounded_exp(code, x))
    return code.where(x < code.number(of.least), code.number(0), result)


def unbounded_exp(code: Code, x: Value) -> Value:
    """Of numbers from `least` to `most`."""
    n, less_one = reduced(code, x)
    return code.from_bits(code.as_bits(less_one + 1) + code.shifted(n, kind(code).mantissa))


def decay(code: Code, x: Value) -> Value:
    """exp(−|x|), or where that is below any normal number, about the least of them."""
    return unbounded_exp(code, code.larger(code.with_sign(x, code.number(-1)), code.number(kind(code).least)))


def expm1(code: Code, x: Value) -> Value:
    """exp(x) − 1 of x ≤ 0."""
    n, less_one = reduced(code, code.larger(x, code.number(kind(code).least)))
    scale = power_of_2(code, n)
    return code.fma(scale, less_one, scale - 1)


def power_of_2(code: Code, n: Value) -> Value:
    return code.from_bits(code.shifted(n + kind(code).bias, kind(code).mantissa))


def log_by(code: Code, y: Value, coefficients: list[float]) -> Value:
    """log(1 + y): 2z is y − z · y, and the rest of the series joins it there."""
    z = y / (y + 2)
    square = z * z
    return code.fma(z, square * polynomial(code, square, coefficients) - y, y)


def log(code: Code, x: Value) -> Value:
    """Of normal numbers above 0."""
    of = kind(code)
    bits = code.as_bits(x) + ((of.bias << of.mantissa) - of.root)  # so that m ≥ √½ has the exponent of 1
    n = code.to_number(code.shifted(bits, -of.mantissa) - of.bias)
    m = code.from_bits((bits & code.like((1 << of.mantissa) - 1, bits)) + of.root)
    high, low = of.log2
    of_m = log_by(code, m - 1, of.log)
    return code.fma(n, code.number(high), code.fma(n, code.number(low), of_m))


def log1p(code: Code, x: Value) -> Value:
    """log(1 + x) of 0 ≤ x ≤ 1."""
    return log_by(code, x, kind(code).log1p)


def sigmoid(code: Code, x: Value) -> Value:
    """1 / (1 + e) = 1 − e / (1 + e), or of x < 0 e / (1 + e) = e − e · e / (1 + e), with e = exp(−|x|)."""
    e = decay(code, x)
    ratio = e / (e + 1)
    return code.where(x < code.number(0), code.fma(0 - e, ratio, e), 1 - ratio)


def tanh(code: Code, x: Value) -> Value:
    """1 − 2e / (1 + e) with e = exp(−2|x|), or near 0 the series."""
    square, e = x * x, decay(code, x + x)
    series = code.fma(square * x, polynomial(code, square, kind(code).tanh), x)
    return code.where(code.absolute(x) < code.number(0.55), series, code.with_sign(1 - (e + e) / (e + 1), x))


def as_fraction(code: Code, x: Value, is_tanh: bool) -> tuple[Value, Value]:
    """σ(x) as 1 / (1 + e) or e / (1 + e), with e = exp(−|x|), or tanh(x) as ±m / (2 − m), with m = 1 − exp(−2|x|).

    The denominator is between 1 and 2. NaN stays NaN.
    """
    least = code.number(kind(code).least)
    x_or_twice = x + x if is_tanh else x
    down = code.larger(least, code.with_sign(x_or_twice, code.number(-1)))
    if not is_tanh:
        e = unbounded_exp(code, down)
        return code.where(x < code.number(0), e, code.number(1)), e + 1
    n, less_one = reduced(code, down)
    scale = power_of_2(code, n)
    m = code.fma(scale, less_one, scale - 1)
    return code.with_sign(m, x), m + 2


def tanh_by_expm1(code: Code, x: Value) -> Value:
    above, below = as_fraction(code, x, True)
    return above / below


def tanh_and_sigmoid(code: Code, a: Value, b: Value) -> tuple[Value, Value]:
    """tanh(a) and σ(b), by one division: it takes a CPU longer than ten products. They are off by some ulp more."""
    (above, of_a), (over, of_b) = as_fraction(code, a, True), as_fraction(code, b, False)
    inverse = 1 / (of_a * of_b)
    return above * (inverse * of_b), over * (inverse * of_a)


def gates_of_lstm(code: Code, o: Value, forget: Value, into: Value, g: Value) -> list[Value]:
    """σ(o), σ(forget), σ(into), tanh(g), by one division, as above: a training does not mind some ulp more."""
    parts = [as_fraction(code, x, is_tanh) for x, is_tanh in ((o, False), (forget, False), (into, False), (g, True))]
    (a, of_a), (b, of_b), (c, of_c), (d, of_d) = parts
    of_ab, of_cd = of_a * of_b, of_c * of_d
    inverse = 1 / (of_ab * of_cd)
    inverse_ab, inverse_cd = inverse * of_cd, inverse * of_ab
    return [a * (inverse_ab * of_b), b * (inverse_ab * of_a), c * (inverse_cd * of_d), d * (inverse_cd * of_c)]
