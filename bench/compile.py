"""Compile every kernel as it is launched, without a GPU, and say what came of it.

    python -m bench.compile [--target sm_80|sm_90|…|gfx942] [--only TEXT] [--set num_warps=8 …] [--json FILE]

The operations and models here are launched on a stand-in for a GPU (`bench.stand_in`), so that what is compiled is what
runs: Triton's own specialisation of the arguments that the project's code passes. For each kernel: registers a thread,
stack (spilled registers), shared memory, matrix instructions. Exit status 1 if one of these rules is broken:

    no stack          a spilled register is a trip to memory at each use
    shared memory     a kernel above the GPU's limit compiles, and fails when it is loaded
    matrix            products of bfloat16 numbers run on matrix instructions, and those of float32 in a drawn row
    replication       no product is computed by several warps alike, but in float64, which only tests use
    async copies      of memory that the same kernel writes, only by a loop that stores nothing there, after a barrier
    barrier           where a program reads back what it stored at an earlier step, one stands after its last store
    addresses         offsets into what grows with the batch are 64-bit numbers, from before anything is multiplied

`--set` compiles with other constants or options than the usual: that is how their values were found.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import kernels
import models
from bench.compiled_text import hasty_copies, narrow_addresses, replicated, unguarded
from bench.measure import build
from bench.stand_in import TARGETS, Compiled, StandIn, Variant, compile_all, write_rows
from bench.training import ON_A_GPU
from bench.widths import launch_every_level, launch_every_width, launch_row_kernels, short
from kernels.jit import triton
from kernels.lstm_scan import lstm_scan
from kernels.philox import uniforms
from models.sampling.rules import Draw, Given, Keep, Record
from models.sampling.triton_row import TritonRow

NVIDIA = [name for name, (backend, *_) in TARGETS.items() if backend == "cuda"]
DTYPES = (torch.bfloat16, torch.float32)
SMALL = ("weight", "bias", "counts")  # how arguments end that stay small however large the batch is
PRODUCTS = ("lstm_scan_fwd_kernel", "lstm_scan_bwd_kernel", "masked_conv_kernel", "masked_conv_weight_kernel")
DRAW_ROW = "draw_row_kernel"
PRODUCTS += (DRAW_ROW,)

# ----------------------------------------------------------------------------------------------------------- launching


Launches = Iterator[tuple[str, Callable[[], None]]]  # names, and what launches


def both_ways(out: Tensor, *wanted: Tensor) -> None:
    torch.autograd.grad(out, wanted, torch.empty_like(out))


def scans() -> Launches:
    """The LSTM scans: the papers' sizes, and both sides of where one form gives way to the next."""

    def run(diagonal: bool, extent: int, f: int, dtype: torch.dtype, form: str = "auto", fast: bool = False) -> None:
        (h, w), directions, taps = ((extent, 1), 2, 2) if diagonal else ((1, extent), 1, 3)
        pre = torch.empty(1, h, w, directions, 4 * f, dtype=dtype, requires_grad=True)
        weight = torch.empty(directions, 4 * f, taps * f, requires_grad=True)
        both_ways(lstm_scan(pre, weight, diagonal, form, fast), pre, weight)

    widths = {torch.bfloat16: (7, 16, 32, 64, 128, 512), torch.float32: (7, 128, 512)}
    for diagonal, extent in ((True, 28), (True, 64), (False, 32), (False, 64)):
        for dtype, f in ((dtype, f) for dtype, widths_ in widths.items() for f in widths_):
            name = f"{'diagonal' if diagonal else 'row'} {extent} positions, f = {f}, {short(dtype)}"
            yield name, partial(run, diagonal, extent, f, dtype, "streamed" if f == 128 else "auto")
        for f in (64, 128):
            name = f"{'diagonal' if diagonal else 'row'} {extent} positions, f = {f}, bfloat16, shared"
            yield name, partial(run, diagonal, extent, f, torch.bfloat16, "shared")
    for extent, f, form in ((28, 16, "carried"), (64, 128, "streamed"), (64, 128, "shared")):
        name = f"diagonal {extent} positions, f = {f}, bfloat16, {form}, fast"
        yield name, partial(run, True, extent, f, torch.bfloat16, form, True)


def convolutions() -> Launches:
    """Masked convolutions: the stem's, the blocks', the gated model's; each of the three products."""

    def run(rows: int, columns: int, live: int, k: int, f: int, dtype: torch.dtype) -> None:
        u = torch.empty(1, 2, 2, k, dtype=dtype, requires_grad=k >= 16)
        weight, bias = torch.empty(f, k, rows, columns, requires_grad=True), torch.empty(f)
        out = kernels.masked_conv(u, weight, bias, True, live=live, backend="triton")
        both_ways(out, *([u] if k >= 16 else []), weight)

    shapes = [("7×7 A", 4, 7, 25, 3, 256), ("3×3 B", 2, 3, 5, 128, 128), ("3×3 B", 2, 3, 5, 16, 16)]
    shapes += [("2×3", 2, 3, 6, 128, 256), ("1×1", 1, 1, 1, 256, 128), ("1×3", 1, 3, 2, 128, 256)]
    for dtype, (name, *sizes) in product(DTYPES, shapes):
        yield f"convolution {name}, {sizes[-2]} → {sizes[-1]}, {short(dtype)}", partial(run, *sizes, dtype)


def elementwise() -> Launches:
    def cross_entropy(v: int, dtype: torch.dtype) -> None:
        logits = torch.empty(3, v, dtype=dtype, requires_grad=True)
        target = torch.zeros(3, dtype=torch.uint8 if v <= 256 else torch.long)
        both_ways(kernels.cross_entropy(logits, target, backend="triton"), logits)

    def gate(dtype: torch.dtype) -> None:
        u = torch.empty(3, 32, dtype=dtype, requires_grad=True)
        both_ways(kernels.gate(u, backend="triton"), u)

    for dtype in DTYPES:
        for v in (2, 256, 1024, 8192):
            yield f"cross-entropy, {v} levels, {short(dtype)}", partial(cross_entropy, v, dtype)
        yield f"gate, {short(dtype)}", partial(gate, dtype)
    yield "noise", partial(uniforms, torch.zeros(3, 2, dtype=torch.long), 3072, 1, backend="triton")


def rows() -> Launches:
    """Sampling: each kind of layer at the papers' sizes for CIFAR-10, one with a mixture, and a small one.

    All of them draw as `sample` does; two of them also have skips and other rules. The models are real, on the meta
    device, with batches as large as in use: their own code lays out the memory.
    """

    def run(target: str, arguments: dict, skip: bool, dtype: torch.dtype, b: int, rule: str) -> None:
        sizes = {"_target_": f"models.{target}", "height": 2, "layers": 2, "skip": skip, **arguments}
        with torch.device("meta"):
            model = models.build(sizes).to(dtype).eval().requires_grad_(False)
        x = torch.zeros(b, *model.shape, dtype=torch.long, device="meta")
        draw = Draw(x.float())
        rules = {"draw": draw, "keep": Keep(x, x, draw), "score": Record(model, Given(x), b, conditionals=True)}
        TritonRow(model, b, None, rules[rule], x[:, :, 0].contiguous()).row(None, None, False)

    colour = {"channels": 3, "levels": 256, "width": 32, "hidden": 128, "head_features": 1024}
    binary = {"channels": 1, "levels": 2, "width": 28, "hidden": 16, "head_features": 32}
    sizes = {
        "PixelCNN": ("PixelCNN", colour),
        "Gated PixelCNN": ("GatedPixelCNN", colour),
        "Row LSTM": ("RowLSTM", colour),
        "Diagonal BiLSTM": ("DiagBiLSTM", colour),
        "PixelCNN, mixture": ("PixelCNN", {**colour, "head": "logistic_mixture"}),
        "Diagonal BiLSTM, binary": ("DiagBiLSTM", binary),
        "PixelCNN, codes": ("PixelCNN", {**colour, "channels": 1, "levels": 512, "input": "embedding"}),
    }
    work = [(name, False, dtype, ("draw",)) for name in sizes for dtype in DTYPES]
    rules_of = {torch.bfloat16: ("draw", "keep", "score"), torch.float32: ("score",)}
    work += [(name, True, *of) for name in ("PixelCNN", "Diagonal BiLSTM") for of in rules_of.items()]
    for name, skip, dtype, rules in work:
        for b, rule in product((16, 16384), rules):
            title = f"sampling {name}{', skip' * skip}, {b} images, {rule}, {short(dtype)}"
            yield title, partial(run, *sizes[name], skip, dtype, b, rule)


def training_steps() -> Launches:
    """The models that `bench.training` times on a GPU, one layer of each: forward and backward."""

    def run(name: str, side: int, channels: int, levels: int, hidden: int, head: int) -> None:
        model = build(name, side, channels, levels, hidden, 1, "cpu", head)
        with kernels.use("triton"), torch.autocast("cpu", torch.bfloat16):
            nats = model(torch.zeros(1, *model.shape, dtype=torch.long))
        nats.sum().backward()

    for name, side, channels, levels, hidden, _, head, _ in ON_A_GPU:
        title = f"training {name}, h = {hidden}, {side}×{side}×{channels}"
        yield title, partial(run, name, side, channels, levels, hidden, head)


def float64() -> Launches:
    """Small models in float64: a training step, and a row of what they draw."""

    def run(target: str, head: str) -> None:
        sizes = {"channels": 3, "levels": 8, "height": 9, "width": 7, "hidden": 18, "layers": 1, "head": head}
        model = models.build({"_target_": f"models.{target}", **sizes}).double()
        x = torch.zeros(2, *model.shape, dtype=torch.long)
        with kernels.use("triton"):
            model(x).sum().backward()
        model, values = model.eval().requires_grad_(False), x[:, :, 0].contiguous()
        TritonRow(model, 2, None, Draw(x.double()), values).row(None, None, False)

    for target, head in product(
        ("PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"), ("softmax", "logistic_mixture")
    ):
        yield f"{target}, {head}, float64", partial(run, target, head)


def variants(only: str = "", widths: range | None = None) -> list[Variant]:
    """List every kernel in every configuration in use, or those whose `title` holds a text.

    Args:
        widths: with models of all these hidden widths, too.
    """
    everything = [*scans(), *convolutions(), *elementwise(), *training_steps(), *rows(), *float64()]
    named = [(name, run) for name, run in everything if only.split(": ")[0] in name]
    if not named and only.isidentifier():  # part of a kernel's name: it may be any launch's
        named = everything
    with StandIn() as gpu:
        for gpu.name, run in named:
            before = gpu.launches
            run()
            assert gpu.launches > before, f"{gpu.name}: no kernel was launched"
        if widths:
            launch_every_width(gpu, widths)
            launch_every_level(gpu, range(2, 1025))
            launch_row_kernels(gpu, [f for f in widths if f in (16, 48, 128, 384, 512)])
    return [variant for variant in gpu.variants if only in title(variant)]


def title(variant: Variant) -> str:
    return f"{variant.name}: {variant.kernel}"


# ----------------------------------------------------------------------------------------------------------- compiling


def changed(variant: Variant, other: dict[str, int]) -> Variant:
    """With other constants or options, where it has such; `maxnreg` fits every kernel."""
    names = list(variant.signature)
    constants = {(names.index(n),): x for n, x in other.items() if variant.signature.get(n) == "constexpr"}
    options = {n: x for n, x in other.items() if n in variant.options or n == "maxnreg"}
    return replace(variant, constants=variant.constants | constants, options=variant.options | options)


def judged(variant: Variant, target: str, out: Compiled) -> dict:
    """A row of the report: what a kernel takes, and which rules it breaks."""
    row = {"kernel": title(variant), "target": target, "warps": variant.options["num_warps"]}
    if out.error:
        return {**row, "broken": [f"does not compile: {out.error}"]}
    limit, texts = TARGETS[target][3], out.texts
    matrix = sorted(set(re.findall(r"(wgmma\.mma_async|mma\.sync|tcgen05\.mma|v_mfma)", texts["assembly"])))
    types = variant.signature.values()
    half = variant.kernel in PRODUCTS and "*bf16" in types
    wants_matrix = half or (variant.kernel == DRAW_ROW and "*fp64" not in types)
    same = {f"%{name}": f"%{other}" for name, other in variant.same.items()}
    copies, narrow = hasty_copies(texts["ttgir"], same), narrow_addresses(texts["ttir"], SMALL)
    bare = unguarded(texts["ttir"])
    twice = [] if "*fp64" in types else replicated(texts["ttgir"])
    rules = {
        f"{out.stack} bytes of stack": out.stack > 0,
        f"{out.shared} bytes of shared memory, {limit} at most": out.shared > limit,
        "no matrix instruction": wants_matrix and not matrix,
        f"products that several warps compute alike ({', '.join(twice)})": bool(twice),
        f"asynchronous copies of what it writes ({', '.join(copies)})": bool(copies),
        f"no barrier after its stores to what it reads ({', '.join(bare)})": bool(bare),
        f"32-bit addresses ({', '.join(narrow)})": bool(narrow),
    }
    taken = {"registers": out.registers, "stack": out.stack, "shared": out.shared, "matrix": matrix}
    taken["seconds"] = round(out.seconds, 2)
    return {**row, **taken, "broken": [rule for rule, broken in rules.items() if broken]}


def judge(variants: list[Variant], targets: list[str]) -> list[dict]:
    """Compile each variant for each target: rows of the report."""
    return [judged(*of) for of in compile_all(variants, targets)]


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.compile", description=__doc__.split("\n")[0])
    options.add_argument("--target", choices=TARGETS, action="append", help=f"({', '.join(NVIDIA)})")
    options.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds this text")
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=N", help="another constant or option")
    options.add_argument("--widths", type=int, metavar="N", help="models of every hidden width up to N too: an hour")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = options.parse_args(argv)
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        options.error("Triton must be installed, and TRITON_INTERPRET not be 1: nothing is compiled there")
    for text in args.set:
        if not re.fullmatch(r"\w+=\d+", text):
            options.error(f"--set={text}: expected NAME=N, N an integer")
    other = {name: int(value) for name, value in (text.split("=") for text in args.set)}
    chosen = [changed(variant, other) for variant in variants(args.only, args.widths and range(1, args.widths + 1))]
    if not chosen:
        options.error(f"--only: no kernel's name holds {args.only!r}")
    rows = judge(chosen, args.target or NVIDIA)
    widest = max(len(row["kernel"]) for row in rows)
    print(f"{'kernel':{widest}}  target  warps  registers  stack  shared  matrix instructions")
    for row in rows:
        numbers = (str(row.get(name, "")).rjust(len(name)) for name in ("warps", "registers", "stack", "shared"))
        print(f"{row['kernel']:{widest}}  {row['target']}   {'  '.join(numbers)}  {' '.join(row.get('matrix', []))}")
        for rule in row["broken"]:
            print(f"    broken: {rule}")
    broken = sum(bool(row["broken"]) for row in rows)
    print(f"Triton {triton.__version__}: {len(rows)} kernels compiled, {broken} break a rule")
    if args.json:
        command = shlex.join(["python", "-m", "bench.compile", *(f"--set={text}" for text in args.set)])
        write_rows(args.json, command, rows)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
