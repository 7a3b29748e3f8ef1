"""How fast images are drawn: `python -m bench.sampling`.

Four tables, all of one batch drawn by `models.sampling.sample`, preparation of its buffers included:

    methods   28×28 binary images: the cached sampler, and the naive one that re-runs the network a sub-pixel
    growth    the cached sampler at 16², 32² and 64²: the time a pixel should not depend on the size, and what it keeps
              should grow with the width alone
    colour    32×32×3 images of 256 levels: both methods, for small models and for a PixelCNN of 15 blocks, h = 128
    products  what the cached sampler's matrix products alone take: those of a row, recorded with the memory that they
              read and write, done again without anything in between, and their rate

The naive sampler does the same work at every sub-pixel. So it is timed for the first few alone and the time
is multiplied; such a row says `extrapolated: true` and how many were timed. --full-naive draws whole images.
"""

import argparse
import math
from functools import partial

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.measure import build, describe, interleave, parse, parser, spread, table, whole, write
from models.sampling import Draw, FullForward, PixelLoop, RowScan, noise, sample, threads_for

BATCH, TIMED = 16, 4  # images drawn side by side; sub-pixels that the naive sampler is timed for


def naive_start(model, b: int, count: int):
    """What visits the first `count` sub-pixels as the naive sampler does."""
    evaluator = FullForward(model, b)
    rule = Draw(noise(0, range(b), model.shape).to(model.device))
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
        row |= {"ms_per_pixel": ms["median"] / side**2, "kept_mb": kept_bytes(RowScan(model, b)) / 1e6}
        first = (rows or [row])[0]
        ratio = row["ms_per_pixel"] / first["ms_per_pixel"]
        rows.append(row | {"ratio": ratio, "ratio_to": f"ms_per_pixel at {args.sides[0]}×{args.sides[0]}"})
    return rows


def kept_bytes(scan: RowScan) -> int:
    """The bytes of all tensors that a row scan keeps, its copies of weights among them; views count once."""
    storages, seen, todo = {}, set(), [scan]
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


PRODUCTS = ("addmm", "addmm_", "baddbmm", "baddbmm_", "bmm", "mm", "convolution")


class Products(TorchDispatchMode):
    """Records the matrix products of each row: `rows` are lists of what does one again, and its operations."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        out = operation(*arguments, **keywords)
        name = operation.overloadpacket.__name__
        if self.rows and name in PRODUCTS:
            self.rows[-1].append((partial(operation, *arguments, **keywords), operations(name, arguments, out)))
        return out


class Marked(Draw):
    """`Draw`, which tells `Products` where rows begin."""

    def __init__(self, uniforms: torch.Tensor, products: Products):
        super().__init__(uniforms)
        self.products = products

    def load(self, i: int) -> None:
        super().load(i)
        self.products.rows.append([])


def operations(name: str, arguments: tuple, out: torch.Tensor) -> int:
    """Multiplications and additions of one product."""
    if name == "convolution":
        return 2 * out.numel() * arguments[1][0].numel()
    left = arguments[1] if "add" in name else arguments[0]
    return 2 * out.numel() * left.shape[-1]


def products_alone(name: str, model, args: argparse.Namespace) -> dict:
    """One row: the time of a whole draw, and of its products alone."""
    model, b = model.eval(), args.batch
    products = Products()
    with products:
        PixelLoop(model, "cached-eager", Marked(noise(0, range(b), model.shape).to(model.device), products), b).run()
    products.rows = products.rows[-1:]  # the last row's: those before it do the same
    row = products.rows[0]

    def again() -> None:
        with torch.inference_mode(), threads_for(model, "cached-eager", b):
            for product, _ in row:
                product()

    things = {
        "draw": whole(lambda: sample(model, b, method="cached-eager", batch_size=b)),
        "products": whole(again),
    }
    times = interleave(things, args.device, args.repeats, warmup=1)
    ms, alone = spread(times["draw"]["total"]), spread(times["products"]["total"], model.height)
    gflop = sum(count for _, count in row) * model.height / 1e9
    out = {"part": "products", **describe(name, model, b), "method": "cached-eager", "ms": ms, "products_ms": alone}
    out |= {"products_of_a_row": len(row), "gflop": gflop, "gflops": gflop / alone["median"] * 1e3}
    return out | {"share": alone["median"] / ms["median"]}


def main(argv: list[str] | None = None) -> None:
    description = "Time the samplers: cached against naive, growth with the size of the image, colour images."
    options = parser("sampling", description, repeats=5)
    options.add_argument(
        "--full-naive", action="store_true", help="draw whole images naively too: takes minutes to hours"
    )
    args = parse(options, argv)
    args.batch, args.hidden, args.layers, args.sides = BATCH, None, None, (16, 32, 64)
    side, (colour_side, colour_levels, colour_hidden, colour_layers) = 28, (32, 256, 32, 5)
    if args.quick:
        args.batch, args.hidden, args.layers, args.sides = 2, 4, 2, (3, 4)
        side, (colour_side, colour_levels, colour_hidden, colour_layers) = 4, (3, 8, 6, 2)

    columns = ("model", "shape", "method", "seconds", "images_per_second", "ratio", "extrapolated", "ms")
    rows = []
    for name in args.names:
        model = build(name, side, 1, 2, args.hidden, args.layers, args.device)
        rows += compare_methods("methods", name, model, args)
    table("Binary images; ratio: time over the cached sampler's", rows, columns)

    grown = [row for name in args.names for row in growth(name, args)]
    columns_of_growth = ("model", "shape", "seconds", "images_per_second", "ms_per_pixel", "ratio", "kept_mb", "ms")
    table("Growth with the size of the image; ratio: of the time a pixel", grown, columns_of_growth)

    coloured = []
    for name in args.names:
        model = build(name, colour_side, 3, colour_levels, colour_hidden, colour_layers, args.device)
        coloured += compare_methods("colour", name, model, args)
    if "pixel_cnn" in args.names:
        hidden, layers, head = (6, 2, 32) if args.quick else (128, 15, 1024)
        model = build("pixel_cnn", colour_side, 3, colour_levels, hidden, layers, args.device, head)
        coloured += compare_methods("colour", "pixel_cnn", model, args)
    table("Colour images; ratio: time over the cached sampler's", coloured, columns)

    alone = [
        products_alone(name, build(name, side, 1, 2, args.hidden, args.layers, args.device), args)
        for name in args.names
    ]
    if "pixel_cnn" in args.names:
        alone.append(products_alone("pixel_cnn", model, args))
    columns_of_products = (
        "model",
        "shape",
        "hidden",
        "products_of_a_row",
        "ms",
        "products_ms",
        "share",
        "gflop",
        "gflops",
    )
    table("The matrix products of a draw alone; share: of its time", alone, columns_of_products)
    write(args, rows + grown + coloured + alone)


if __name__ == "__main__":
    main()
