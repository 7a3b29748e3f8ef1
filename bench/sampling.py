"""How fast images are drawn: `python -m bench.sampling`.

Five tables. The first is of batches that follow each other, the others of one batch drawn by `models.sampling.sample`,
preparation of its buffers included:

    throughput  images/s by batch size, and on a GPU by backend and precision (there for two models of the papers'
                size), beside the floor: arithmetic and weights over what this machine was just measured to reach.
                Noise is made before; the time for that has its own row
    methods     28×28 binary images: the cached sampler, and the naive one that re-runs the network a sub-pixel
    growth      the cached sampler at 16², 32² and 64²: the time a pixel should not depend on the size, and what it
                keeps should grow only with the width
    colour      32×32×3 images of 256 levels: both methods, for small models and for a PixelCNN of 15 blocks, h = 128
    products    the time of the cached sampler's matrix products by themselves: those of a row, recorded with the memory
                that they read and write, done again without anything in between; and the time of its calls, of Python
                and torch, where there is next to nothing to compute: one image, one feature a colour

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
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import Clock, Results, build, ceilings, describe, interleave, parse, parser, spread, table, whole
from bench.plain import live_multiply_adds
from kernels.jit import has_triton
from models.sampling import PixelLoop, noise, sample
from models.sampling.cached import Cached
from models.sampling.loop import threads_for
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


def compare_methods(part: str, name: str, model, args: argparse.Namespace) -> list[dict]:
    """Two rows: cached and naive, the second with the ratio of its time to the first's."""
    model, b, sub_pixels = model.eval(), args.batch, math.prod(model.shape)
    timed = sub_pixels if args.full_naive else min(TIMED, sub_pixels)
    things = {m: whole(lambda m=m: sample(model, b, method=m, batch_size=b)) for m in ("cached", "naive")}
    if timed < sub_pixels:
        things["naive"] = whole(naive_start(model, b, timed))
    times = interleave(things, args.device, args.repeats, warmup=1)
    rows = []
    for method in things:
        extrapolated = method == "naive" and timed < sub_pixels
        ms = spread(times[method]["total"], sub_pixels / timed if extrapolated else 1.0)
        row = {"part": part, **describe(name, model, b), "method": method, "ms": ms}
        row |= {"seconds": ms["median"] / 1e3, "images_per_second": b / ms["median"] * 1e3}
        row |= {"extrapolated": extrapolated, "timed_sub_pixels": timed if extrapolated else sub_pixels}
        rows.append(row | {"ratio": ms["median"] / (rows or [row])[0]["ms"]["median"], "ratio_to": "cached"})
    return rows


def growth(name: str, args: argparse.Namespace) -> list[dict]:
    """A row a size: the cached sampler's time a pixel (of the whole batch), its ratio to the first size's."""
    b, things, built = args.batch, {}, {}
    for side in args.sides:
        built[side] = build(name, side, 1, 2, args.hidden, args.layers, args.device).eval()
        things[side] = whole(lambda model=built[side]: sample(model, b, method="cached", batch_size=b))
    times = interleave(things, args.device, args.repeats, warmup=1)
    rows = []
    for side, model in built.items():
        ms = spread(times[side]["total"])
        row = {"part": "growth", **describe(name, model, b), "method": "cached", "ms": ms}
        row |= {"seconds": ms["median"] / 1e3, "images_per_second": b / ms["median"] * 1e3}
        row |= {"ms_per_pixel": ms["median"] / side**2, "kept_mb": kept_bytes(Cached(model, b)) / 1e6}
        first = (rows or [row])[0]
        ratio = row["ms_per_pixel"] / first["ms_per_pixel"]
        rows.append(row | {"ratio": ratio, "ratio_to": f"ms_per_pixel at {args.sides[0]}×{args.sides[0]}"})
    return rows


def kept_bytes(evaluator: Cached) -> int:
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


PRODUCTS = ("addmm", "addmm_", "baddbmm", "baddbmm_", "mm")


class Products(TorchDispatchMode):
    """Records matrix products: a call that repeats each, their multiplications and additions, their weights' bytes."""

    def __init__(self):
        super().__init__()
        self.again, self.operations, self.weight_bytes = [], 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        out = operation(*arguments, **keywords)
        name = operation.overloadpacket.__name__
        if name in PRODUCTS:
            weight = arguments[2 if "add" in name else 1]
            self.again.append(partial(operation, *arguments, **keywords))
            self.operations += 2 * out.numel() * weight.shape[-2]
            self.weight_bytes += weight.numel() * weight.element_size()
        return out


def draw_rule(model, b: int, seed: int = 0) -> Draw:
    return Draw(noise(seed, range(b), model.shape).to(model.device))


def products_of_a_row(model, b: int) -> Products:
    """Those of any row but the first: they read and write the memory of a sampler that stays."""
    products, loop = Products(), PixelLoop(model, "cached", draw_rule(model, b), b, backend="torch", graph=False)
    with loop.drawing():
        for i in (0, 1):
            loop.evaluator.load(i)
            loop.rule.load(i)
            if i == 0:
                loop.row(first=True)
            else:
                with products:
                    loop.row(first=False)
    return products


def products_alone(name: str, model, args: argparse.Namespace) -> dict:
    """One row: the time of a whole draw, of its products alone, of the same calls with next to no arithmetic."""
    model, b = model.eval(), args.batch
    products, body = products_of_a_row(model, b), model.body
    arguments = {"hidden": model.channels, "layers": body.layers, "head_features": model.channels}
    shape = dict(zip(("channels", "height", "width"), model.shape, strict=True))
    switches = {"residual": body.residual, "skip": body.skip}
    tiny = type(model)(**shape, levels=model.levels, **arguments, **switches).to(args.device).eval()

    def again() -> None:
        with torch.inference_mode(), threads_for(model, "cached", b):
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


def throughput(name: str, make, backend: str, bf16: bool, b: int, noises: Noise, most: dict, args) -> list[dict]:
    """A row: the time of a batch where one follows another. Noise is there already; images are fetched.

    `floor_seconds` is what the arithmetic of live weights takes at the rate of a large product, `share` its part of the
    time; `weights_seconds` is what reading all weights at each pixel takes at the rate of a copy, were there no caches.
    """
    cuda, model = args.device.type == "cuda", make(name, args).eval()
    if name not in args.weight_bytes:
        args.weight_bytes[name] = products_of_a_row(model, 1).weight_bytes * model.height
    if bf16:
        model = model.bfloat16()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    uniforms, times = noises.of(model.shape, b), []
    loop = PixelLoop(model, "cached", Draw(uniforms[0]), b, backend=backend)
    warm(loop)
    for x in uniforms:
        draw = whole(lambda x=x: loop.again(Draw(x), None).to("cpu", torch.uint8))
        times += interleave({"": draw}, args.device, 1, warmup=0)[""]["total"]
        if times[0] > LONG * 1e3 or (cuda and backend == "triton" and not bf16):
            break  # once is enough
    ms, c = spread(times), most[bf16]
    gflop = 2 * live_multiply_adds(model) * b / 1e9
    read = args.weight_bytes[name] / (2 if bf16 else 1) / 1e9
    floor = gflop / c["gflops"]
    row = {"part": "throughput", **describe(name, model, b), "method": "cached"}
    row |= {"backend": backend, "bf16": bf16, "ms": ms}
    row |= {"images_per_second": b / ms["median"] * 1e3, "gflop": gflop, "weight_gigabytes": read}
    row |= {"floor_seconds": floor, "share": floor / ms["median"] * 1e3}
    row |= {"weights_seconds": read / c["gigabytes_per_second"]}
    memory = torch.cuda.max_memory_allocated() if cuda else kept_bytes(loop.evaluator)
    return [row | {"memory_mb": memory / 1e6}]


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
        table(title, [row for row in results.rows if row["part"] in of_part], columns)
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
    variants = {("torch", False): args.batches}
    if cuda:
        names, make = [name for name in args.names if name in ("pixel_cnn", "diag_bilstm")], large
        least, most = args.batches[0], args.batches[-1]
        variants = {("triton", True): args.batches, ("torch", True): (least, most)}
        variants |= {("triton", False): (least, most), ("torch", False): (least, most)}
    for bf16, dtype in dtypes.items():
        about = {"part": "ceilings", "bf16": bf16, "product": size}
        yield (
            about,
            lambda about=about, dtype=dtype: [about | ceilings(args.device, dtype, size, megabytes, args.repeats)],
        )
    reached = {row["bf16"]: row for row in results.rows if row["part"] == "ceilings"}
    noises = Noise(args)
    if names:
        shape = make(names[0], args).shape
        yield {"part": "noise"}, lambda: noises.rows(shape)
    for ((backend, bf16), batches), name in product(variants.items(), names):
        for b in batches:
            about = {"model": name, "backend": backend, "bf16": bf16, "batch": b}
            yield about, partial(throughput, name, make, backend, bf16, b, noises, reached, args)


OF_METHODS = "model", "shape", "hidden", "method", "seconds", "images_per_second", "ratio", "extrapolated", "ms"
OF_GROWTH = "model", "shape", "seconds", "images_per_second", "ms_per_pixel", "ratio", "kept_mb", "ms"
OF_PRODUCTS = "model", "shape", "hidden", "ms", "products_ms", "share", "calls_ms", "share_of_calls", "gflop", "gflops"
OF_THROUGHPUT = (
    *("model", "shape", "backend", "bf16", "ms", "images_per_second", "floor_seconds", "share", "memory_mb"),
    *("weights_seconds", "gflop", "weight_gigabytes", "gflops", "gigabytes_per_second"),
)
PARTS = {
    "throughput": ("One batch after another; share: of the time, what the floor is", OF_THROUGHPUT, throughput_part),
    "methods": ("Binary images; ratio: time over the cached sampler's", OF_METHODS, methods_part),
    "growth": ("Growth with the size of the image; ratio: of the time a pixel", OF_GROWTH, growth_part),
    "colour": ("Colour images; ratio: time over the cached sampler's", OF_METHODS, colour_part),
    "products": ("The matrix products of a draw, and its calls, alone; share: of its time", OF_PRODUCTS, products_part),
}


if __name__ == "__main__":
    sys.exit(main())
