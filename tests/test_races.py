"""What `tests.races` promises, and what its detector says of the kernels: no race, and no barrier that is not needed.

Legend: b batch · h w rows, columns · d direction · k f features in, out · n taps.
"""

import ast
import functools
import inspect
import re
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import pytest
import torch

import kernels
import kernels.draw_row
from kernels.lstm_scan import FORMS, lstm_scan
from kernels.philox import uniforms
from models.sampling import PixelLoop
from models.sampling.memory import Buffers, ConditionRow, RowProduct, windows
from models.sampling.rules import Draw, Given, Keep, Record
from tests.cases import ARCHITECTURES, CASES, EMBEDDING, MIXTURE, build, images
from tests.interleaved import interleaved
from tests.races import Hazard, watched

triton = pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="it is about Triton's interpreter"),
]
tl = triton.language

# ------------------------------------------------------------------------------------------------- small kernels
# Each is racy or not by its arguments. A case says which source lines the detector is to name.


@triton.jit
def stores_then_loads(x, out, SHIFT: tl.constexpr, BARRIER: tl.constexpr):
    n = tl.arange(0, 8)
    tl.store(x + n, n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + n, tl.load(x + n + SHIFT))


@triton.jit
def loads_then_stores(x, SHIFT: tl.constexpr, BARRIER: tl.constexpr):
    n = tl.arange(0, 8)
    part = tl.load(x + n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + n + SHIFT, part + 1)


@triton.jit
def loads_twice_then_stores(x, out, BARRIER: tl.constexpr):
    n = tl.arange(0, 8)
    tl.store(out + n, tl.load(x + 7 - n))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + n, tl.load(x + n) + 1)


@triton.jit
def stores_twice(x, SHIFT: tl.constexpr, BARRIER: tl.constexpr):
    n = tl.arange(0, 8)
    tl.store(x + n, n)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + n + SHIFT, n)


@triton.jit
def scatters(x, COPIES: tl.constexpr, MASK: tl.constexpr):
    n = tl.arange(0, 8)
    tl.store(x + n // COPIES, n, mask=n % COPIES == 0 if MASK else n >= 0)


@triton.jit
def programs_store(x, STEP: tl.constexpr):
    n = tl.program_id(0) * STEP + tl.arange(0, 8)
    tl.store(x + n, n)


@triton.jit
def programs_load_and_store(x, out, FROM: tl.constexpr, BACKWARDS: tl.constexpr):
    """Each program loads 8 numbers from program · 8 + FROM on and stores its own 8."""
    program = tl.num_programs(0) - 1 - tl.program_id(0) if BACKWARDS else tl.program_id(0)
    n = program * 8 + tl.arange(0, 8)
    part = tl.load(x + n + FROM)
    tl.debug_barrier()  # orders the threads of one program alone
    tl.store(x + n, part)
    tl.store(out + n, part)


@triton.jit
def last_program_stores(x, out, BOTH: tl.constexpr):
    """All programs load the same, and the last one stores to it."""
    n = tl.arange(0, 8)
    if BOTH or tl.program_id(0) == 0:
        tl.store(out + tl.program_id(0) * 8 + n, tl.load(x + n))
    tl.debug_barrier()
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x + n, n)


@triton.jit
def halves(x, out, WHOLE: tl.constexpr, HALF: tl.constexpr):
    """Stores a number of 64 bits, loads one of 32."""
    tl.store(x + WHOLE, 7)
    tl.store(out, tl.load(x.to(tl.pointer_type(tl.int32)) + HALF))


@triton.jit
def wholes(x, out, WHOLE: tl.constexpr, HALF: tl.constexpr):
    """Stores a number of 32 bits, loads one of 64."""
    tl.store(x.to(tl.pointer_type(tl.int32)) + HALF, 7)
    tl.store(out, tl.load(x + WHOLE))


@triton.jit
def unaligned(x, out, BYTE: tl.constexpr):
    """Loads eight numbers of 32 bits, stores one that begins at any byte."""
    n = tl.arange(0, 8)
    tl.store(out + n, tl.load(x + n))
    at = (x.to(tl.pointer_type(tl.int8)) + BYTE).to(tl.pointer_type(tl.int32))
    tl.store(at, 7)


@triton.jit
def loads_at(x, out, SHIFT, LIVE: tl.constexpr):
    n = tl.arange(0, 8)
    tl.store(out + n, tl.load(x + n + SHIFT, mask=n < LIVE, other=-1))


@triton.jit
def stores_at(x, SHIFT, LIVE: tl.constexpr):
    n = tl.arange(0, 8)
    tl.store(x + n + SHIFT, n, mask=n < LIVE)


@triton.jit
def adds(x, out, PLAIN: tl.constexpr):
    n = tl.arange(0, 8)
    tl.atomic_add(x + n // 2, n)
    tl.atomic_add(x + n, n)
    if PLAIN:
        tl.store(out + n, tl.load(x + n))


@triton.jit
def swaps(x, out, PLAIN: tl.constexpr):
    if PLAIN:
        tl.store(x + 3, 1)
    tl.store(out + tl.program_id(0), tl.atomic_cas(x + 3, 0, 5))


@triton.jit
def descriptors(x, out, BARRIER: tl.constexpr):
    """Six numbers, in a block of eight."""
    block = tl.make_tensor_descriptor(x, (6,), (1,), (8,))
    block.store((0,), tl.arange(0, 8))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out + tl.arange(0, 8), block.load((0,)))


@triton.jit
def put(x, n, value):
    tl.store(x + n, value)


@triton.jit
def calls(x, BARRIER: tl.constexpr):
    n = tl.arange(0, 8)
    put(x, n, 1)
    if BARRIER:
        tl.debug_barrier()
    put(x, n, 2)


RAW, WAW, WAR = "load after store", "store after store", "store after load"
TWICE, PROGRAMS, OUTSIDE = "twice in a store", "two programs", "out of bounds"
RACES = [  # kernel, programs, arguments, what is found: kind, what the two lines hold (first, second), how many places
    (stores_then_loads, 1, (0, False), (RAW, "tl.store(x + n, n)", "tl.load(x", 8)),
    (stores_then_loads, 1, (5, False), (RAW, "tl.store(x + n, n)", "tl.load(x", 3)),
    (stores_then_loads, 1, (8, False), None),
    (stores_then_loads, 1, (0, True), None),
    (loads_then_stores, 1, (3, False), (WAR, "tl.load(x + n)", "tl.store(x", 5)),
    (loads_then_stores, 1, (0, False), None),  # each thread its own
    (loads_then_stores, 1, (3, True), None),
    (loads_twice_then_stores, 1, (False,), (WAR, "tl.load(x + 7 - n)", "tl.store(x + n", 8)),
    (loads_twice_then_stores, 1, (True,), None),
    (stores_twice, 1, (6, False), (WAW, "tl.store(x + n, n)", "tl.store(x + n + SHIFT", 2)),
    (stores_twice, 1, (8, False), None),
    (stores_twice, 1, (6, True), None),
    (scatters, 1, (2, False), (TWICE, "tl.store", "tl.store", 4)),
    (scatters, 1, (2, True), None),
    (scatters, 1, (1, False), None),
    (programs_store, 3, (7,), (PROGRAMS, "tl.store", "tl.store", 2)),
    (programs_store, 3, (8,), None),
    (programs_load_and_store, 2, (0, False), None),
    (programs_load_and_store, 2, (4, False), (PROGRAMS, "tl.load", "tl.store(x", 4)),
    (programs_load_and_store, 2, (4, True), (PROGRAMS, "tl.store(x", "tl.load", 4)),
    (programs_load_and_store, 2, (8, True), (PROGRAMS, "tl.store(x", "tl.load", 8)),
    (programs_load_and_store, 2, (16, False), None),
    (last_program_stores, 2, (True,), (PROGRAMS, "tl.load", "tl.store(x", 8)),  # though it loaded them too
    (last_program_stores, 2, (False,), (PROGRAMS, "tl.load", "tl.store(x", 8)),
    (last_program_stores, 1, (True,), None),
    (halves, 1, (1, 3), (RAW, "tl.store(x", "tl.load", 1)),
    (halves, 1, (1, 2), (RAW, "tl.store(x", "tl.load", 1)),
    (halves, 1, (1, 1), None),
    (halves, 1, (1, 4), None),
    (wholes, 1, (1, 3), (RAW, "tl.store(x", "tl.load", 1)),
    (wholes, 1, (1, 4), None),
    (unaligned, 1, (27,), (WAR, "tl.load(x + n)", "tl.store(at", 4)),
    (unaligned, 1, (29,), (WAR, "tl.load(x + n)", "tl.store(at", 3)),
    (unaligned, 1, (33,), None),
    (loads_at, 1, (57, 8), (OUTSIDE, None, "tl.load", 1)),
    (loads_at, 1, (57, 7), None),
    (loads_at, 1, (-1, 8), (OUTSIDE, None, "tl.load", 1)),
    (loads_at, 1, (10**9, 8), (OUTSIDE, None, "tl.load", 8)),
    (loads_at, 1, (10**9, 0), None),
    (stores_at, 1, (57, 8), (OUTSIDE, None, "tl.store", 1)),
    (stores_at, 1, (57, 7), None),
    (stores_at, 1, (-3, 8), (OUTSIDE, None, "tl.store", 3)),
    (adds, 2, (False,), None),
    (adds, 1, (True,), (RAW, "tl.atomic_add(x + n, n)", "tl.load", 8)),
    (swaps, 2, (False,), None),
    (swaps, 1, (True,), (WAW, "tl.store(x + 3", "tl.atomic_cas", 1)),
    (descriptors, 1, (False,), (RAW, "block.store", "block.load", 6)),
    (descriptors, 1, (True,), None),
]
WIDE = (halves, wholes, swaps)


def launch(kernel, programs, arguments):
    """Run a small kernel on 64 numbers x, and where it takes it, on `out`."""
    x = torch.arange(64, dtype=torch.int64 if kernel in WIDE else torch.int32)
    tensors = [x, torch.zeros(64, dtype=torch.int64)] if "out" in kernel.arg_names else [x]
    kernel[(programs,)](*tensors, *arguments)
    return tensors


def line_of(kernel, text: str, last: bool = False) -> tuple[str, int]:
    """File and number of a line of the kernel's source that holds a text: the first one, or the last."""
    lines, first = inspect.getsourcelines(kernel.fn)
    numbers = [first + i for i, line in enumerate(lines) if text in line]
    return __file__, numbers[-1 if last else 0]


@pytest.mark.parametrize(
    ("kernel", "programs", "arguments", "expected"),
    [pytest.param(*race, id="-".join([race[0].__name__, *map(str, (race[1], *race[2]))])) for race in RACES],
)
def test_a_hazard_is_found_where_there_is_one(kernel, programs, arguments, expected):
    with watched() as watch:
        launch(kernel, programs, arguments)
    if expected is None:
        assert not watch.hazards, watch.report()
        return
    kind, first, second, places = expected
    first = first and (line_of(kernel, first),)
    hazard = Hazard(kind, kernel.__name__, "x", (line_of(kernel, second),), first)
    assert watch.hazards == {hazard: places}, watch.report()


def test_the_report_names_both_lines_and_what_called_them():
    with watched() as watch:
        calls[(1,)](torch.zeros(8, dtype=torch.int32), False)
    (_, inside), (_, one), (_, two) = line_of(put, "tl.store"), line_of(calls, ", 1)"), line_of(calls, ", 2)")
    assert watch.report() == (
        f"store after store: calls, x: tests/test_races.py:{inside}, called at tests/test_races.py:{two}; "
        f"before it: tests/test_races.py:{inside}, called at tests/test_races.py:{one} (8 times)"
    )
    with watched() as watch:
        calls[(1,)](torch.zeros(8, dtype=torch.int32), True)
    assert not watch.hazards and watch.barriers == {line_of(calls, "debug_barrier"): 1}


def test_a_pointer_does_not_lead_into_another_tensor():
    """What is out of bounds is not done, though there is memory of the launch."""
    x, y = torch.zeros(64, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
    shift = (y.data_ptr() - x.data_ptr()) // 4
    with watched() as watch:
        stores_at[(1,)](x, shift, 8)
        loads_at[(1,)](x, y, shift, 8)
    assert [(hazard.kind, hazard.tensor) for hazard in watch.hazards] == [(OUTSIDE, "x")] * 2
    assert list(watch.hazards.values()) == [8, 8] and not x.any() and y.tolist() == [-1] * 8 + [0] * 56


@pytest.mark.parametrize("shift", [10**12, -(2**38), -(2**38) - 4])  # the last ones from 0 on, and around it
def test_a_pointer_far_from_all_tensors_is_found(shift):
    with watched() as watch:
        stores_at[(1,)](torch.zeros(8, dtype=torch.int32), shift, 8)
    [(hazard, times)] = watch.hazards.items()
    assert (hazard.kind, hazard.tensor, times) == (OUTSIDE, "no tensor", 8)


def test_views_of_a_storage_are_one_tensor():
    """Their names are joined, and what one does to the other's bytes is seen."""
    whole = torch.arange(24, dtype=torch.int32)
    with watched() as watch:
        loads_at[(1,)](whole[8:16], whole[12:20], -8, 8)
    assert not watch.hazards and whole[12:20].tolist() == list(range(8))
    with watched() as watch:
        stores_then_loads[(1,)](whole[8:16], whole[6:14], 0, True)
    assert [hazard.tensor for hazard in watch.hazards] == ["x = out"]


def test_kernels_compute_what_they_compute_unwatched():
    """But for what is out of bounds."""
    for kernel, programs, arguments, expected in RACES:
        if expected is None or expected[0] != OUTSIDE:
            unwatched = launch(kernel, programs, arguments)
            with watched():
                seen = launch(kernel, programs, arguments)
            assert all(map(torch.equal, seen, unwatched)), (kernel, arguments)


def test_late_stores_are_seen_after_the_barrier_alone():
    for arguments, late, without, expected in [
        ((0, False), False, None, range(8)),
        ((0, False), True, None, [5] * 8),
        ((0, True), True, None, range(8)),
        ((0, True), True, line_of(stores_then_loads, "debug_barrier"), [5] * 8),
        ((0, True), True, line_of(stores_then_loads, "tl.store"), range(8)),  # there is no barrier
    ]:
        x, out = torch.full((8,), 5, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
        with watched(late=late, without=without):
            stores_then_loads[(1,)](x, out, *arguments)
        assert x.tolist() == list(range(8)) and out.tolist() == list(expected)
    x = torch.arange(24, dtype=torch.int32)
    with watched(late=True):  # at its end a program's stores are done: the next one loads them
        programs_load_and_store[(2,)](x, torch.zeros_like(x), 8, True)
    assert x[:8].tolist() == list(range(16, 24))


def test_a_taken_barrier_makes_a_race():
    without = line_of(stores_then_loads, "debug_barrier")
    with watched(without=without) as watch:
        launch(stores_then_loads, 1, (0, True))
    assert [hazard.kind for hazard in watch.hazards] == [RAW] and watch.barriers == {without: 1}


def test_tests_fail_at_a_hazard(no_hazards):
    launch(stores_then_loads, 1, (0, True))
    with pytest.raises(AssertionError, match="load after store: stores_then_loads, x: tests/test_races"):
        launch(stores_then_loads, 1, (0, False))


def test_the_interpreter_is_left_as_it_was():
    from triton.runtime import interpreter

    of = (interpreter.InterpreterBuilder, interpreter.GridExecutor, interpreter)
    before = [dict(vars(x)) for x in of]
    with pytest.raises(KeyError), watched():
        assert [dict(vars(x)) for x in of] != before
        with pytest.raises(AssertionError, match="watched already"), watched():
            pass
        raise KeyError
    assert [dict(vars(x)) for x in of] == before
    with watched() as watch:
        launch(stores_at, 1, (57, 8))
    assert watch.hazards


# ------------------------------------------------------------------------------------------------------ the kernels
# Small scenarios that together run every load and store of the kernels: name of the file → scenarios, functions that
# return what the kernels computed.


def numbers(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def both_ways(operation, *inputs):
    """What an operation gives, and every gradient."""
    out = operation(*inputs)
    (d_out,) = numbers(out.shape)
    return [out, *torch.autograd.grad(out, inputs, d_out.detach())]


def scan(diagonal: bool, form: str):
    """Several programs, two blocks of features."""
    b, h, w, d, n, f = (2, 2, 2, 2, 2, 17) if diagonal else (9 if form == "carried" else 2, 2, 2, 1, 3, 17)
    inputs = numbers((b, h, w, d, 4 * f), (d, 4 * f, n * f))
    with interleaved(0) if form == "shared" else nullcontext():
        return both_ways(lambda pre, weight: lstm_scan(pre, weight / 8, diagonal, form), *inputs)


def convolution(k: int, *rest):
    """Several programs, in each direction; k input features, then whether there is a ReLU, extra columns, live taps."""
    inputs = numbers((2, 5, 7, k), (34, k, 2, 3), (34,))
    return both_ways(lambda *x: kernels.masked_conv(*x, *rest, backend="triton"), *inputs)


def cross_entropy():
    target = torch.arange(10) * 30
    return both_ways(lambda x: kernels.cross_entropy(x, target, backend="triton"), *numbers((10, 300)))


def noise():
    return [uniforms(torch.arange(4).view(2, 2), 20, 1, "triton")]


def what_rows_above_give():
    """Several programs, two blocks of features, two sources."""
    x, y, weight, bias = (t.detach() for t in numbers((2, 9, 10, 40), (2, 9, 8, 5), (2, 70, 125), (2, 70)))
    product = RowProduct(Buffers(9, weight, backend="triton"), 8, weight, bias, ConditionRow(None, None, 8))
    product.read(windows(x, 3), y[:, :, :, None])
    product()
    return [product.out]


def row(architecture: str, rule: str, b: int = 2, width: int = 2, form=(16, 64, 64), **arguments):
    """Draw a row of images: their values, and what a rule recorded."""
    sizes = {"channels": 2, "levels": 5, "height": 1, "width": width, "hidden": 7, "layers": 2}
    model = build(CASES[architecture], **{**sizes, **arguments})
    uniforms = torch.rand(b, *model.shape, generator=torch.Generator().manual_seed(0))
    x, known = images(model, b), uniforms < 0.5
    chosen = {
        "draw": lambda: Draw(uniforms),
        "greedy": lambda: Draw(uniforms, 0),
        "given": lambda: Record(model, Given(x), b, conditionals=True),
        "known": lambda: Record(model, Keep(x, known, Draw(uniforms)), b),
    }[rule]()
    form = kernels.draw_row.Form(*form, 1, 4)
    with mock.patch.object(kernels.draw_row, "form_for", lambda *_, **__: form):
        values = PixelLoop(model, "cached", chosen, b, backend="triton").run()
    kept = [getattr(chosen, name, None) for name in ("log_prob", "conditionals")]
    return [values, *(x for x in kept if x is not None)]


RULES = ("draw", "given", "known", "greedy")
SCENARIOS = {
    "lstm_scan_kernel": {
        f"{'diagonal' if diagonal else 'row'}-{form}": functools.partial(scan, diagonal, form)
        for form in FORMS
        for diagonal in (True, False)
    },
    "philox": {"noise": noise},
    "row_product": {"two-sources": what_rows_above_give},
    "masked_conv": {
        "few-features": functools.partial(convolution, 3, False, 1, 4),
        "many-features-relu": functools.partial(convolution, 17, True, 0, 5),
    },
    "cross_entropy": {"both-ways": cross_entropy},
    "gate": {"both-ways": lambda: both_ways(lambda x: kernels.gate(x, backend="triton"), *numbers((70, 32)))},
    "draw_row_kernel": {
        f"{name}-{RULES[(i + k) % 4]}{'-mixture' * bool(k & 1)}{'-skip' * (k >> 1)}": functools.partial(
            row, name, RULES[(i + k) % 4], skip=bool(k >> 1), **(MIXTURE if k & 1 else {})
        )
        for k in range(4)  # softmax, mixture, softmax with skips, mixture with skips
        for i, name in enumerate(ARCHITECTURES)
    }
    | {
        "two-programs": functools.partial(row, "pixel_cnn", "draw", b=18, channels=1),
        "embedding": functools.partial(row, "gated_pixel_cnn", "known", **EMBEDDING),
        "many-blocks": functools.partial(row, "row_lstm", "known", width=1, form=(16, 16, 16), hidden=35, channels=2),
    },
}
every_scenario = pytest.mark.parametrize(
    ("file", "name"),
    [pytest.param(file, name, id=f"{file}:{name}") for file, names in SCENARIOS.items() for name in names],
)


def run(file: str, name: str, **how):
    """A scenario under watch: what the watch found, and the bytes of what it computed."""
    torch.use_deterministic_algorithms(True)  # memory that is not written holds NaN
    try:
        with watched(**how) as watch, np.errstate(all="ignore"):
            out = SCENARIOS[file][name]()
    finally:
        torch.use_deterministic_algorithms(False)
    return watch, [x.detach().numpy().tobytes() for x in out]


usual = functools.cache(run)


class Place(NamedTuple):
    file: Path
    function: str
    line: int


def places(names: str) -> list[Place]:
    """Where functions of the Triton language whose names match are called, in all kernels."""
    found = []
    for file in Path(kernels.__file__).parent.glob("*.py"):
        for function in ast.parse(file.read_text()).body:
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and re.fullmatch(rf"tl\.({names})", ast.unparse(node.func)):
                    found.append(Place(file, getattr(function, "name", ""), node.lineno))
    return sorted(found)


def counted(found: list[Place]):
    """Parameters of a test with one case a place: file:function:n-th of the function."""
    assert found
    ids = []
    for place in found:
        before = sum(x.function == place.function and x.file == place.file and x.line < place.line for x in found)
        ids.append(f"{place.file.name}:{place.function}:{before + 1}")
    return pytest.mark.parametrize("place", found, ids=ids)


@every_scenario
def test_kernels_have_no_hazard_and_do_not_need_their_stores_early(file, name):
    """Bit for bit the same, however late a store becomes visible."""
    watch, expected = usual(file, name)
    assert not watch.hazards, watch.report()
    watch, got = run(file, name, late=True)
    assert not watch.hazards, watch.report()
    assert got == expected


@counted(places("debug_barrier"))
def test_every_barrier_is_needed(place):
    """Without it a scenario has a race, and with stores as late as they may be then computes something else."""
    scenarios = SCENARIOS.get(place.file.stem, {})
    reached = [name for name in scenarios if usual(place.file.stem, name)[0].barriers[str(place.file), place.line]]
    assert reached, "no scenario comes to this barrier"
    raced = []
    for name in reached:
        watch, got = run(place.file.stem, name, without=(place.file, place.line), late=True)
        if watch.hazards and got != usual(place.file.stem, name)[1]:
            return
        raced += [name] * bool(watch.hazards)
    pytest.fail(f"of {reached}, these have a race without it: {raced}; none computes anything else")


def test_scenarios_come_to_every_load_and_store_of_the_kernels():
    done = set()
    for file, names in SCENARIOS.items():
        for name in names:
            done |= {site[0] for site in usual(file, name)[0].sites}
    missed = [x for x in places(r"load|store|atomic_\w+") if (str(x.file), x.line) not in done]
    assert not missed and done
