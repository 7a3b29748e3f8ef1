"""How the kernels are cut, compared: `python -m bench.sweep`.

    rows    the row kernel of a PixelCNN of 15 blocks, h = 128, on 32×32×3, by images of a program, outputs and features
            of a block, at several batch sizes
    above   what the rows above give to a row of the same model, by features of a block and blocks on their way; and by
            torch, which copies it side by side first
    scan    the Diagonal BiLSTM's scan at the paper's CIFAR-10 size, forward and backward, by features computed and read
            at a time, and by warps; at the MNIST size, in the form that keeps all weights; both with the GPU's own tanh
            too; and on 64×64 images
    shared  the form of the scan whose programs wait for each other, beside the usual one; only if asked for

A row says how long one launch takes, and what the compiler made: registers, spills, shared memory. What does not fit in
a GPU is a row that says `no_room`, which is no failure. Numbers are bfloat16.

Legend: b batch · h w rows, columns · f features.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch

import kernels.row_product
from bench.cost import (
    QUICK_SCAN,
    ROUNDS,
    SCAN,
    Launches,
    on_a_gpu,
    pixel_cnn,
    scan_launches,
    timed_row_kernel,
    times_of,
)
from bench.measure import Results, parser, spread, table, text_of
from models.sampling.memory import Buffers, ConditionRow, RowProduct, windows

SMALL_SCAN, TALL_SCAN = (16, 28, 29, 16), (16, 64, 65, 64)
BLOCKS = [(128, 32, 8), (128, 64, 8), (64, 64, 8), (32, 64, 8)]  # features computed and read at a time, warps
WARPS = (4, 8)
FORMS = [  # images of a program, outputs and features of a block, blocks of weights on their way, warps
    {"images": images, "block_n": 64, "block_k": 64, "stages": stages, "warps": warps}
    for images, stages, warps in ((16, 4, 4), (16, 3, 4), (32, 4, 4), (32, 3, 4), (64, 3, 8))
]
BATCHES = (8448, 4224, 2048, 16)


def no_room(error: Exception) -> bool:
    """Whether a kernel takes more shared memory, registers or threads than there are, or can be given."""
    return type(error).__name__ in ("OutOfResources", "PTXASError")


def where_it_fits(about: dict, measure: Callable[[], list[dict]]) -> list[dict]:
    """What `measure` finds, or the row that says that there is no room."""
    try:
        return measure()
    except Exception as error:
        if no_room(error):
            return [{**about, "no_room": text_of(error)}]
        raise


def scan(size: tuple, form: str, backward: bool, changes: dict, about: dict, args: argparse.Namespace) -> list[dict]:
    launches, steps = scan_launches(size, backward, form, **changes)
    ms = times_of(launches.again, args, ROUNDS)
    return [{**about, "ms": spread(ms), "step_us": spread(ms, 1e3 / steps)["median"], **launches.compiled()}]


def rows(b: int, changes: dict, about: dict, args: argparse.Namespace) -> list[dict]:
    model = pixel_cnn(args)
    out = timed_row_kernel(model, b, args, changes)
    ms = {key: value * model.width if key != "repeats" else value for key, value in out.pop("measured").items()}
    seconds = ms["median"] * model.height / 1e3
    return [{**about, "ms": ms, "pixel_ms": ms["median"] / model.width, "images_per_second": b / seconds, **out}]


def above(b: int, backend: str, changes: dict, about: dict, args: argparse.Namespace) -> list[dict]:
    new = partial(torch.randn, device=args.device, dtype=torch.bfloat16)
    weight, bias = new(15, 128, 384), new(15, 128)
    product = RowProduct(Buffers(b, weight, backend=backend), 32, weight, bias, ConditionRow(None, None, 32))
    product.read(windows(new(15, b, 34, 128), 3))
    with Launches(kernels.row_product, **changes) as launches:
        product()
        ms = times_of(product, args)
    return [{**about, "ms": spread(ms), **(launches.compiled() if launches.calls else {})}]


Cases = Iterator[tuple[dict, partial]]  # what a case is about, and what measures it


def scan_cases(size: tuple, form: str, cuts: list[dict], args: argparse.Namespace) -> Cases:
    size = QUICK_SCAN if args.quick else size
    for changes in cuts[:2] if args.quick else cuts:
        for backward in (False, True):
            kernel = f"lstm_scan_{'bwd' if backward else 'fwd'}"
            about = {"kernel": kernel, "shape": list(size), "form": {"form": form, **changes}}
            yield about, partial(scan, size, form, backward, changes, about, args)


def scan_sweep(args: argparse.Namespace) -> Cases:
    cuts = [{"block_n": n, "block_k": k, "warps": warps} for n, k, warps in BLOCKS]
    yield from scan_cases(SCAN, "streamed", cuts, args)
    yield from scan_cases(SMALL_SCAN, "carried", [{"warps": warps} for warps in WARPS], args)
    if not args.quick:  # nothing but a GPU has this instruction
        yield from scan_cases(SCAN, "streamed", [{"fast": True}], args)
        yield from scan_cases(SMALL_SCAN, "carried", [{}, {"fast": True}], args)
    yield from scan_cases(TALL_SCAN, "streamed", [cut for cut in cuts if cut["block_n"] <= 64], args)


def row_cases(args: argparse.Namespace) -> Cases:
    """The large batches first: which form is best there is open."""
    for b in (2, 1) if args.quick else BATCHES:
        for changes in FORMS[:2] if args.quick else FORMS:
            if changes["images"] > max(16, b):
                continue
            about = {"kernel": "draw_row", "shape": [b], "form": changes}
            yield about, partial(rows, b, changes, about, args)


def above_cases(args: argparse.Namespace) -> Cases:
    for b in (2,) if args.quick else BATCHES:
        for changes in ({}, {"num_stages": 2}, {"num_stages": 4}, {"BLOCK_K": 128}):
            about = {"kernel": "row_product", "shape": [b], "form": changes}
            yield about, partial(above, b, "triton", changes, about, args)
        about = {"kernel": "copy and baddbmm", "shape": [b]}
        yield about, partial(above, b, "torch", {}, about, args)


def shared_sweep(args: argparse.Namespace) -> Cases:
    """Beside the form that it is an alternative to."""
    yield from scan_cases(SCAN, "streamed", [{}], args)
    yield from scan_cases(SCAN, "shared", [{"block_k": k, "stages": n} for k, n in ((64, 3), (128, 3), (64, 2))], args)


SWEEPS = {"rows": row_cases, "above": above_cases, "scan": scan_sweep, "shared": shared_sweep}
USUAL = "rows,above,scan"  # the last one could wait in vain


def main(argv: list[str] | None = None) -> int:
    description = "Compare how the kernels are cut: features of a block, images of a program, warps."
    options = parser("sweep", description, repeats=5, names=SWEEPS)
    options.set_defaults(names=USUAL)
    args = on_a_gpu(options, argv)
    columns = ("kernel", "shape", "form", "ms", "step_us", "pixel_ms", "images_per_second")
    columns += ("registers", "spills", "shared_bytes", "no_room")
    results = Results(args, columns)
    for name in args.names:
        for about, measure in SWEEPS[name](args):
            results.case(about, partial(where_it_fits, about, measure))
    table("One launch of a kernel, by how it is cut", results.rows, columns)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
