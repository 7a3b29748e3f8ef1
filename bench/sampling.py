"""How fast images are drawn: `python -m bench.sampling`.

Six tables. The first is of batches that follow each other, those after it of one batch drawn by
`models.sampling.sample`, preparation of its buffers included, and the last of whole processes. On a CPU the cached
sampler's rows are compiled ones, and torch's beside them, in turn:

    throughput  images/s by batch size and backend, and on a GPU by precision (there for two models of the papers'
                size), beside the floor: arithmetic and weights over what this machine was just measured to reach.
                Noise is made before; the time for that has its own row
    methods     28×28 binary images: the cached sampler, and the naive one that re-runs the network a sub-pixel
    growth      the cached sampler at 16², 32² and 64²: the time a pixel should not depend on the size, and what it
                keeps should grow only with the width
    colour      32×32×3 images of 256 levels: both methods, for small models and for a PixelCNN of 15 blocks, h = 128
    products    the time of the matrix products by themselves, where torch computes the rows: those of a row, recorded
                with the memory that they read and write, done again without anything in between; and the time of its
                calls, of Python and torch, where there is next to nothing to compute: one image, one feature a colour
    first       on a CPU: 64 digits by the default model, each time by a new process (`bench.first`); to compile the row
                or to load it from the disk; to import the compiler

The naive sampler does the same work at every sub-pixel. So it is timed for the first few only, and the time
is multiplied; such a row says `extrapolated: true` and how many were timed. --full-naive draws whole images.
"""

import argparse
import math
import sys
from collections.abc import Iterator
from functools import partial
from itertools import product

import torch

from bench.first import first
from bench.measure import Clock, Results, build, ceilings, describe, interleave, parse, parser, spread, table, whole
from bench.peak import multiply_adds
from bench.plain import live_multiply_adds
from bench.row_products import draw_rule, products_of_a_row
from kernels.jit import has_triton
from models.sampling import PixelLoop, noise, sample
from models.sampling.loop import backend_of_rows, threads_for
from models.sampling.naive import Naive
from models.sampling.rules import Draw

BATCH, TIMED = 16, 4  # images drawn side by side; sub-pixels that the naive sampler is timed for


def naive_start(model, b: int, count: int):
    """Make a function that visits the first `count` sub-pixels as the naive sampler does."""
    evaluator = Naive(model, b)
    rule = draw_rule(model, b)
    c, _, w = model.shape

    def run() -> None:
        with torch.inference_mode():
            for k in range(count):
                i, j, g = k // c // w, k // c % w, k % c
                evaluator.load(i)
                rule.load(i)
                evaluator.put(j, g, rule(j, g, evaluator.logits(j, g)))

    return run


def backends_of(model) -> tuple[str, ...]:
    """Who computes the cached sampler's rows: as by default, and on a CPU torch beside that."""
    default = backend_of_rows(model, draw_rule(model, 1))
    return (default, "torch") if model.device.type == "cpu" else (default,)


def compare_methods(part: str, name: str, model, args: argparse.Namespace) -> list[dict]:
    """A row for each backend of the cached sampler, one for the naive: `ratio` of its time to the first row's.

    `naive_ratio` is the naive sampler's time over the row's.
    """
    model, b, sub_pixels = model.eval(), args.batch, math.prod(model.shape)
    timed = sub_pixels if args.full_naive else min(TIMED, sub_pixels)
    ways = [*(("cached", backend) for backend in backends_of(model)), ("naive", None)]
    things = {way: whole(partial(sample, model, b, method=way[0], backend=way[1], batch_size=b)) for way in ways}
    if timed < sub_pixels:
        things["naive", None] = whole(naive_start(model, b, timed))
    times, rows = interleave(things, args.device, args.repeats, warmup=1), []
    for method, backend in ways:
        extrapolated = method == "naive" and timed < sub_pixels
        ms = spread(times[method, backend]["total"], sub_pixels / timed if extrapolated else 1.0)
        row = {"part": part, **describe(name, model, b), "method": method, "backend": backend, "ms": ms}
        row |= {"seconds": ms["median"] / 1e3, "images_per_second": b / ms["median"] * 1e3}
        row |= {"extrapolated": extrapolated, "timed_sub_pixels": timed if extrapolated else sub_pixels}
        rows.append(row | {"ratio": ms["median"] / (rows or [row])[0]["ms"]["median"], "ratio_to": "cached"})
    return [row | {"naive_ratio": rows[-1]["ms"]["median"] / row["ms"]["median"]} for row in rows]


def growth(name: str, args: argparse.Namespace) -> list[dict]:
    """A row a backend and size: the cached sampler's time a pixel (of the whole batch), its ratio to the first size's.

    `kept_mb` is what it keeps of a batch.
    """
    b = args.batch
    built = {side: build(name, side, 1, 2, args.hidden, args.layers, args.device).eval() for side in args.sides}
    cases = list(product(backends_of(built[args.sides[0]]), args.sides))
    things = {case: whole(partial(sample, built[case[1]], b, backend=case[0], batch_size=b)) for case in cases}
    times, rows = interleave(things, args.device, args.repeats, warmup=1), []
    for backend, side in cases:
        model, ms = built[side], spread(times[backend, side]["total"])
        row = {"part": "growth", **describe(name, model, b), "method": "cached", "backend": backend, "ms": ms}
        row |= {"seconds": ms["median"] / 1e3, "images_per_second": b / ms["median"] * 1e3}
        kept = kept_bytes(PixelLoop(model, "cached", draw_rule(model, b), b, backend=backend).evaluator)
        row |= {"ms_per_pixel": ms["median"] / side**2, "kept_mb": kept / 1e6}
        first_size = next((r for r in rows if r["backend"] == backend), row)
        ratio = row["ms_per_pixel"] / first_size["ms_per_pixel"]
        rows.append(row | {"ratio": ratio, "ratio_to": f"ms_per_pixel at {args.sides[0]}×{args.sides[0]}"})
    return rows


def kept_bytes(evaluator) -> int:
    """The bytes of all tensors that the cached sampler keeps, its copies of weights among them; views count once."""
    storages, seen, todo = {}, set(), [evaluator]
    while todo:
        thing = todo.pop()
        if id(thing) in seen or isinstance(thing, torch.nn.Module):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        elif isinstance(thing, list | tuple):
            todo.extend(thing)
        elif hasattr(thing, "__dict__"):
            todo.extend(vars(thing).values())
    return sum(storages.values())


def products_alone(name: str, model, args: argparse.Namespace) -> dict:
    """One row: the time of a whole draw, of its products alone, of the same calls with next to no arithmetic."""
    model, b = model.eval(), args.batch
    products, body = products_of_a_row(model, b), model.body
    arguments = {"hidden": model.channels, "layers": body.layers, "head_features": model.channels}
    shape = dict(zip(("channels", "height", "width"), model.shape, strict=True))
    switches = {"residual": body.residual, "skip": body.skip}
    tiny = type(model)(**shape, levels=model.levels, **arguments, **switches).to(args.device).eval()

    def again() -> None:
        with torch.inference_mode(), threads_for(model, "torch", b):
            for product in products.again:
                product()

    things = {
        "draw": whole(lambda: sample(model, b, batch_size=b, backend="torch")),
        "products": whole(again),
        "calls": whole(lambda: sample(tiny, 1, batch_size=1, backend="torch")),
    }
    times = interleave(things, args.device, args.repeats, warmup=1)
    h, gflop = model.height, products.operations * model.height / 1e9
    ms, alone, calls = (spread(times[thing]["total"], h if thing == "products" else 1) for thing in things)
    out = {"part": "products", **describe(name, model, b), "method": "cached", "backend": "torch"}
    out |= {"ms": ms, "products_ms": alone}
    out |= {"products_of_a_row": len(products.again), "gflop": gflop, "gflops": gflop / alone["median"] * 1e3}
    out |= {"weight_gigabytes": products.weight_bytes * h / 1e9, "calls_ms": calls}
    return out | {"share": alone["median"] / ms["median"], "share_of_calls": calls["median"] / ms["median"]}


LONG = 4.0  # seconds: what takes longer is timed once


def warm(loop: PixelLoop) -> None:
    """Each kind of row twice: as it is and, on a GPU, captured."""
    with loop.drawing():
        for i in (0, 0, 1, 1):
            loop.evaluator.load(i)
            loop.rule.load(i)
            loop.row(first=i == 0)


class Noise:
    """Uniform numbers made before they are needed, as many sets as there are repeats, on the device.

    A set's numbers are those of its first images, too: a batch takes as many as it has.
    """

    def __init__(self, args: argparse.Namespace):
        self.args, self.sets, self.making = args, [], {}

    def of(self, shape: tuple[int, int, int], b: int) -> list[torch.Tensor]:
        """For b images of `shape` (c h w), b at most the largest batch: a set a repeat, (b c h w) each."""
        if not self.sets or self.sets[0].shape[1:] != shape:
            self.sets, self.making = [], {}
            makers = ("torch", "triton")[: 1 + has_triton(self.args.device)]
            for seed in range(self.args.repeats):
                made = {backend: partial(self.make, seed, shape, backend) for backend in makers}
                for backend, laps in interleave(made, self.args.device, 1, warmup=0).items():
                    self.making.setdefault(backend, []).extend(laps["made"])
        return [x[:b] for x in self.sets]

    def make(self, seed: int, shape: tuple[int, int, int], backend: str, clock: Clock) -> None:
        x = noise(seed, range(max(self.args.batches)), shape, device=self.args.device, backend=backend)
        clock.lap("made")
        self.sets[seed:] = [x]

    def rows(self, shape: tuple[int, int, int]) -> list[dict]:
        """How long one set takes, on the device."""
        b = len(self.of(shape, max(self.args.batches))[0])
        out = []
        for backend, times in self.making.items():
            row = {"part": "noise", "shape": [b, *shape], "backend": backend, "ms": spread(times)}
            out.append(row | {"images_per_second": b / row["ms"]["median"] * 1e3})
        return out


def throughput(
    name: str, make, backends: tuple[str, ...], bf16: bool, b: int, noises: Noise, most: dict, args
) -> list[dict]:
    """A row for each of the backends, which take turns: the time of a batch where one follows another.

    Noise is there already; images are fetched. `floor_seconds` is what the arithmetic of live weights takes at the rate
    of a large product by torch, `share` its part of the time, on a CPU `share_of_peak` that of its multiply-add units
    at their best; `weights_seconds` is what reading all weights at each
    pixel takes at the rate of a copy, were there no caches. `ratio`, where torch is among the backends, is of the time
    to torch's.
    """
    cuda, model = args.device.type == "cuda", make(name, args).eval()
    if name not in args.weight_bytes:
        args.weight_bytes[name] = products_of_a_row(model, 1).weight_bytes * model.height
    if bf16:
        model = model.bfloat16()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    uniforms, times = noises.of(model.shape, b), {backend: [] for backend in backends}
    loops = {backend: PixelLoop(model, "cached", Draw(uniforms[0]), b, backend=backend) for backend in backends}
    kept = {backend: 0 if cuda else kept_bytes(loop.evaluator) for backend, loop in loops.items()}
    for loop in loops.values():
        warm(loop)
    for x in uniforms:
        draws = {k: whole(lambda x=x, of=of: of.again(Draw(x), None).to("cpu", torch.uint8)) for k, of in loops.items()}
        for backend, laps in interleave(draws, args.device, 1, warmup=0).items():
            times[backend] += laps["total"]
        longest = max(max(ms) for ms in times.values())
        if longest > LONG * 1e3 or (cuda and backends == ("triton",) and not bf16):
            break  # once is enough
    c, read = most[bf16], args.weight_bytes[name] / (2 if bf16 else 1) / 1e9
    gflop, medians = 2 * live_multiply_adds(model) * b / 1e9, {k: spread(ms)["median"] for k, ms in times.items()}
    rows, floor = [], gflop / c["gflops"]
    for backend, ms in medians.items():
        row = {"part": "throughput", **describe(name, model, b), "method": "cached"}
        row |= {"backend": backend, "bf16": bf16, "ms": spread(times[backend])}
        row |= {"images_per_second": b / ms * 1e3, "gflop": gflop, "weight_gigabytes": read}
        row |= {"floor_seconds": floor, "share": floor / ms * 1e3, "weights_seconds": read / c["gigabytes_per_second"]}
        if "multiply_add_gflops" in c:
            row["share_of_peak"] = gflop / ms * 1e3 / c["multiply_add_gflops"]
        row |= {"memory_mb": (torch.cuda.max_memory_allocated() if cuda else kept[backend]) / 1e6}
        of_torch = medians.get("torch") if len(backends) > 1 else None
        rows.append(row | ({"ratio": ms / of_torch, "ratio_to": "torch"} if of_torch else {}))
    return rows


def large(name: str, args: argparse.Namespace):
    """A model of the papers' size for 32×32 colour images."""
    layers = {"pixel_cnn": 15}.get(name, 12)
    hidden, layers, head = (6, 2, 32) if args.quick else (128, layers, 1024)
    side, levels = (3, 8) if args.quick else (32, 256)
    return build(name, side, 3, levels, hidden, layers, args.device, head)


def main(argv: list[str] | None = None) -> int:
    description = "Time the samplers: cached against naive, growth with the size of the image, colour images, batches."
    options = parser("sampling", description, repeats=5)
    options.add_argument(
        "--full-naive", action="store_true", help="draw whole images naively too: takes minutes to hours"
    )
    options.add_argument(
        "--parts", default=",".join(PARTS), help="which tables, with commas between, in this order (%(default)s)"
    )
    args = parse(options, argv)
    parts = args.parts.split(",")
    for part in parts:
        if part not in PARTS:
            options.error(f"--parts={part}: expected {', '.join(PARTS)}")
    args.batch, args.hidden, args.layers, args.sides, args.batches = BATCH, None, None, (16, 32, 64), (1, 16, 64, 256)
    args.side, args.colour, args.weight_bytes = 28, (32, 256, 32, 5), {}
    if args.device.type == "cuda":
        args.batches = 16, 2048, 4224, 8448  # on 132 multiprocessors: 1, 128 and 264 programs of 16; 264 of 32
    if args.quick:
        args.batch, args.hidden, args.layers, args.sides, args.batches = 2, 4, 2, (3, 4), (1, 2)
        args.side, args.colour = 4, (3, 8, 6, 2)
    results = Results(
        args, ("part", "model", "shape", "method", "backend", "bf16", "batch", "ms", "images_per_second", "ratio")
    )
    for part in parts:
        title, columns, cases = PARTS[part]
        for about, measure in cases(args, results):
            results.case({"part": part} | about, measure)
        of_part = (part, "ceilings", "noise") if part == "throughput" else (part,)
        rows = [row for row in results.rows if row["part"] in of_part]
        if rows:
            table(title, rows, columns)
    return results.finish()


Cases = Iterator[tuple[dict, partial]]  # what a case is about, and what measures it: () → rows


def binary(name: str, args: argparse.Namespace):
    return build(name, args.side, 1, 2, args.hidden, args.layers, args.device)


def colour(name: str, args: argparse.Namespace):
    side, levels, hidden, layers = args.colour
    return build(name, side, 3, levels, hidden, layers, args.device)


def made(measure, name: str, make, args: argparse.Namespace):
    """`measure` of a model that is made when it is its turn."""
    return partial(lambda: measure(name, make(name, args), args))


def and_a_large_one(make, args: argparse.Namespace) -> list[tuple]:
    """(name, what makes it) of each model, and of a PixelCNN of the papers' size."""
    return [(name, make) for name in args.names] + [(name, large) for name in args.names if name == "pixel_cnn"]


def methods_part(args: argparse.Namespace, _) -> Cases:
    for name in args.names:
        yield {"model": name}, made(partial(compare_methods, "methods"), name, binary, args)


def growth_part(args: argparse.Namespace, _) -> Cases:
    for name in args.names:
        yield {"model": name}, partial(growth, name, args)


def colour_part(args: argparse.Namespace, _) -> Cases:
    for name, make in and_a_large_one(colour, args):
        yield {"model": name}, made(partial(compare_methods, "colour"), name, make, args)


def products_part(args: argparse.Namespace, _) -> Cases:
    for name, make in and_a_large_one(binary, args):
        yield {"model": name}, made(lambda *of: [products_alone(*of)], name, make, args)


def throughput_part(args: argparse.Namespace, results: Results) -> Cases:
    """On a CPU of the small models; on a GPU of two of the papers' size, those with least and most to do.

    There what matters most comes first: the row kernel before graphs, bfloat16 before float32.
    """
    cuda = args.device.type == "cuda"
    size, megabytes = (64, 1) if args.quick else (4096, 1024) if cuda else (1024, 64)
    dtypes = ({True: torch.bfloat16} if cuda else {}) | {False: torch.float32}
    names, make = args.names, binary
    variants = {(("cpu", "torch"), False): args.batches}
    if cuda:
        names, make = [name for name in args.names if name in ("pixel_cnn", "diag_bilstm")], large
        least, most = args.batches[0], args.batches[-1]
        variants = {(("triton",), True): args.batches, (("torch",), True): (least, most)}
        variants |= {(("triton",), False): (least, most), (("torch",), False): (least, most)}
    for bf16, dtype in dtypes.items():
        about = {"part": "ceilings", "bf16": bf16, "product": size}

        def measured(about=about, dtype=dtype) -> list[dict]:
            peak = {} if cuda else {"multiply_add_gflops": multiply_adds(args.repeats)}
            return [about | ceilings(args.device, dtype, size, megabytes, args.repeats) | peak]

        yield about, measured
    reached = {row["bf16"]: row for row in results.rows if row["part"] == "ceilings"}
    noises = Noise(args)
    if names:
        shape = make(names[0], args).shape
        yield {"part": "noise"}, lambda: noises.rows(shape)
    for ((backends, bf16), batches), name in product(variants.items(), names):
        for b in batches:
            about = {"model": name, "backend": " ".join(backends), "bf16": bf16, "batch": b}
            yield about, partial(throughput, name, make, backends, bf16, b, noises, reached, args)


def first_part(args: argparse.Namespace, _) -> Cases:
    if args.device.type == "cpu":
        yield {}, partial(first, args)


OF_METHODS = (
    *("model", "shape", "hidden", "method", "backend", "seconds", "images_per_second", "ratio", "naive_ratio"),
    *("extrapolated", "ms"),
)
OF_GROWTH = "model", "shape", "backend", "seconds", "images_per_second", "ms_per_pixel", "ratio", "kept_mb", "ms"
OF_PRODUCTS = "model", "shape", "hidden", "ms", "products_ms", "share", "calls_ms", "share_of_calls", "gflop", "gflops"
OF_THROUGHPUT = (
    *("model", "shape", "backend", "bf16", "ms", "images_per_second", "ratio", "floor_seconds", "share", "memory_mb"),
    *("share_of_peak", "weights_seconds", "gflop", "weight_gigabytes"),
    *("gflops", "gigabytes_per_second", "multiply_add_gflops"),
)
OF_FIRST = "model", "shape", "backend", "code", "ms", "draw_ms", "code_ms", "import_ms", "ratio"
BATCHES = "One batch after another; share: of the time, what the floor is; ratio: time over that of torch's rows"
METHODS = "ratio: time over the cached sampler's; naive_ratio: the naive sampler's time over it"
PARTS = {
    "throughput": (BATCHES, OF_THROUGHPUT, throughput_part),
    "methods": (f"Binary images; {METHODS}", OF_METHODS, methods_part),
    "growth": ("Growth with the size of the image; ratio: of the time a pixel", OF_GROWTH, growth_part),
    "colour": (f"Colour images; {METHODS}", OF_METHODS, colour_part),
    "products": ("The matrix products of a draw, and its calls, alone; share: of its time", OF_PRODUCTS, products_part),
    "first": (
        "64 digits by a new process; code: of the row; ratio: time over torch's",
        OF_FIRST,
        first_part,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
