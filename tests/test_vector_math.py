"""What `kernels.vector_math` promises: at most 2 ulp, and the same bits on every CPU.

Legend: ulp, the distance between neighbouring numbers at a result.
"""

import math

import numpy as np
import pytest

from kernels import native, vector_math
from kernels.vector import Code

NAMES = ("exp", "decay", "expm1", "log", "log1p", "sigmoid", "tanh")
LANES = {np.float32: 16, np.float64: 8}
EXACT = {
    "exp": np.exp,
    "decay": lambda x: np.exp(-np.abs(x)),
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sigmoid": lambda x: np.where(x < 0, np.exp(-np.abs(x)), 1) / (1 + np.exp(-np.abs(x))),
    "tanh": np.tanh,
}
every_function = pytest.mark.parametrize("name", NAMES)
every_kind = pytest.mark.parametrize("kind", LANES, ids=["float32", "float64"])


def write(code: Code) -> None:
    """Each function of `NAMES`: y[k] = f(x[k]), for vectors k < count."""
    for name in NAMES:
        function = getattr(vector_math, name)

        def body(code, x, y, count, f=function):
            with code.loop(count) as k:
                code.store(f(code, code.load(x, k)), y, k)

        code.function(body, "ppi", name=name)


def computed(name: str, x: np.ndarray) -> np.ndarray:
    """A function of all numbers of x, of float32 or float64."""
    lanes = LANES[x.dtype.type]
    x = np.ascontiguousarray(np.pad(x, (0, -len(x) % lanes), mode="edge"))
    y = np.empty_like(x)
    library = native.library(write, dict.fromkeys(NAMES, 3), lanes, x.dtype == np.float64)
    library[name](x.ctypes.data, y.ctypes.data, len(x) // lanes)
    return y


def neighbours(at: list[float], kind: type, count: int = 200) -> np.ndarray:
    """The numbers next to some, so many on each side."""
    bits = np.dtype(f"i{np.dtype(kind).itemsize}")
    out = np.array(at, dtype=kind).view(bits)[:, None] + np.arange(-count, count + 1, dtype=bits)
    return out.view(kind).flatten()


def numbers(name: str, kind: type, count: int = 1 << 16) -> np.ndarray:
    """Numbers from everywhere where a function promises 2 ulp: dense where results vary, and at its seams."""
    random, of = np.random.default_rng(0), vector_math.FLOAT64 if kind is np.float64 else vector_math.FLOAT32
    halves = [(k + 0.5) * math.log(2) for k in (-100, -3, -2, -1, 0, 1, 2, 100)]  # where n changes
    tiny = -np.exp(random.uniform(math.log(np.finfo(kind).tiny), 0, count))
    ranges = {
        "exp": [random.uniform(of.least, of.most, count), random.uniform(-1, 1, count), tiny, -tiny],
        "decay": [random.uniform(of.least, -of.least, count), tiny],
        "expm1": [random.uniform(of.least, 0, count), random.uniform(-1, 0, count), tiny],
        "log": [np.exp(random.uniform(of.least, of.most, count)), random.uniform(0.4, 2.1, count)],
        "log1p": [random.uniform(0, 1, count), -tiny],
        "sigmoid": [random.uniform(of.least, -of.least, count), random.uniform(-2, 2, count), tiny, -tiny],
        "tanh": [random.uniform(-1, 1, count), random.uniform(-25, 25, count), tiny, -tiny],
    }
    seams = {
        "exp": [*halves[1:-1], of.least, of.most],
        "decay": [*halves, of.least, -of.least],
        "expm1": [*(x for x in halves if x < 0), of.least],
        "log": [0.25, math.sqrt(0.125), 0.5, math.sqrt(0.5), 1, math.sqrt(2), 2, float(np.finfo(kind).max)],
        "log1p": [0.25, 0.5, 1],
        "sigmoid": [*halves, of.least, -of.least],
        "tanh": [-0.55, 0.55, 10, 20, *halves[1:-1]],
    }
    x = np.concatenate([*(part.astype(kind) for part in ranges[name]), neighbours(seams[name], kind)])
    low, high = {
        "exp": (of.least, of.most),
        "decay": (of.least, -of.least),
        "expm1": (-math.inf, 0),
        "log": (np.finfo(kind).tiny, np.finfo(kind).max),
        "log1p": (0, 1),
        "sigmoid": (of.least, -of.least),
        "tanh": (-math.inf, math.inf),
    }[name]
    return x[(x >= kind(low)) & (x <= kind(high))]


@every_kind
@every_function
def test_results_are_off_by_at_most_2_ulp(name, kind):
    wider = np.float64 if kind is np.float32 else np.longdouble
    if np.finfo(wider).nmant <= np.finfo(kind).nmant:
        pytest.skip("numpy has no wider numbers here")
    x = numbers(name, kind)
    assert len(x) > 1 << 16
    y, exact = computed(name, x)[: len(x)].astype(wider), EXACT[name](x.astype(wider))
    off = np.abs(y - exact) / np.spacing(np.maximum(np.abs(exact).astype(kind), np.finfo(kind).tiny))
    assert off.max() <= 2, f"{off.max()} ulp at {x[off.argmax()]!r}"


def one(name: str, x: float, kind: type) -> float:
    return float(computed(name, np.array([x], dtype=kind))[0])


@every_kind
def test_at_the_ends(kind):
    """Of exp: 0 below the least, ∞ above the most. σ stays about the least normal number, and tanh reaches ±1."""
    of, tiny = vector_math.FLOAT64 if kind is np.float64 else vector_math.FLOAT32, float(np.finfo(kind).tiny)
    below, above = (float(np.nextafter(kind(x), kind(to))) for x, to in ((of.least, -math.inf), (of.most, math.inf)))
    for x in (below, 2 * of.least, -float(np.finfo(kind).max), -math.inf):
        assert one("exp", x, kind) == 0 and one("expm1", x, kind) == -1
        assert one("tanh", x, kind) == -1
        for name in ("sigmoid", "decay"):
            assert tiny / 2 < one(name, x, kind) < 2 * tiny
    for x in (above, 2 * of.most, float(np.finfo(kind).max), math.inf):
        assert one("exp", x, kind) == math.inf
        assert one("sigmoid", x, kind) == one("tanh", x, kind) == 1 and tiny / 2 < one("decay", x, kind) < 2 * tiny
    assert [of.least, of.most] == pytest.approx([math.log(tiny), math.log(np.finfo(kind).max)], rel=1e-6)
    least = float(np.nextafter(kind(0), kind(1)))  # subnormal
    for x in (0.0, -0.0, least, -least):
        assert [one(name, x, kind) for name in ("exp", "decay", "sigmoid")] == [1, 1, 0.5]
        assert one("tanh", x, kind) == x
    assert one("expm1", 0, kind) == one("log1p", 0, kind) == one("log", 1, kind) == 0
    assert one("log1p", least, kind) == least and one("expm1", -least, kind) == -least


CPUS = [name for name in native.CPUS if name != native.cpu()[0]]


@pytest.mark.parametrize("cpu", CPUS)
@every_kind
def test_the_same_bits_on_every_cpu(cpu, kind, compiled_for):
    xs = {name: numbers(name, kind, 1 << 9) for name in NAMES}
    here = {name: computed(name, x).tobytes() for name, x in xs.items()}
    compiled_for(cpu)
    assert {name: computed(name, x).tobytes() for name, x in xs.items()} == here
