"""A model of the kernels' time on an H100, where there is none: `python -m bench.model`.

Each kernel is launched on a stand-in for the GPU and compiled. A model of the chip then steps through its machine code
(`bench.machine_code`). How often a loop is walked is known here, by its line in the source (`loops` of a case). Nothing
of it is a measurement: believe ratios within 20 %, times within 35 %.

    clk a step    of a step of a scan, of a sub-pixel of a row, of a whole convolution, where the L2 cache answers after
                  300 clk, and after 600
    programs      of the launch, and how many share one of 132 multiprocessors; more than that wait for one
    ms            of the launch, at both

Legend: b batch · h w rows, columns · f features.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import kernels
import kernels.draw_row
import kernels.lstm_scan
import kernels.row_product
from bench.cost import Launches
from bench.machine_code import Instruction, Loop, clocks, disassembled, walked
from bench.measure import build, table
from bench.stand_in import TARGETS, StandIn, gpu_target, in_processes, source_of, usage, write_rows
from kernels.jit import cdiv, triton
from kernels.lstm_scan import lstm_scan
from models.sampling.memory import windows
from models.sampling.rules import Draw
from models.sampling.triton_row import TritonRow

CLOCK = 1.755e6  # clk a millisecond
PROCESSORS = 132
L2 = (300, 600)  # clk until the L2 cache answers: at once, or when many ask

# ------------------------------------------------------------------------------------------------------------- cases


class Case(NamedTuple):
    """A launch to model.

    `loops` counts how often a loop is walked, by what its line in the source holds, in order of appearance; the loop
    that is `None` there is the one whose turns are the steps. It gets a launch's arguments.
    """

    run: Callable[[], None]
    module: object
    kernel: str
    loops: Callable[[dict], list[dict[str, list]]]  # one for each kind of step, which are equally many
    steps: int  # 0: the kernel as a whole
    aim: str = ""


def scan(
    b: int, extent: int, f: int, diagonal: bool, backward: bool, form: str = "auto", aim: str = "", fast: bool = False
) -> Case:
    h, w = (extent, extent + 1) if diagonal else (extent, extent)
    directions, taps = (2, 2) if diagonal else (1, 3)

    def run() -> None:
        pre = torch.empty(b, h, w, directions, 4 * f, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(directions, 4 * f, taps * f, requires_grad=True)
        hidden = lstm_scan(pre, weight, diagonal, form, fast)
        torch.autograd.grad(hidden, [pre, weight], torch.empty_like(hidden))

    def loops(x: dict) -> list[dict]:
        blocks = 1 if x["ONE"] else cdiv(f, x["BLOCK_N"])
        read = taps * cdiv(4 * f if backward else f, x["BLOCK_K"])
        steps = {"for step in": [None], "for back in": [None]}
        return [steps | {"for block in": [blocks], "for block_k in": [read], "while": [1]}]  # it waits for nobody

    kernel = f"lstm_scan_{'bwd' if backward else 'fwd'}_kernel"
    return Case(run, kernels.lstm_scan, kernel, loops, h + w - 1 if diagonal else h, aim)


def convolution(b: int, side: int, f: int, backward: bool, aim: str = "") -> Case:
    """A 3×3 below mask B, forward or the gradient of its weights."""

    def run() -> None:
        u = torch.empty(b, side, side, f, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(f, f, 2, 3, requires_grad=True)
        out = kernels.masked_conv(u, weight, torch.empty(f), True, live=5, backend="triton")
        torch.autograd.grad(out, [u, weight], torch.empty_like(out))

    def loops(x: dict) -> list[dict]:
        blocks = x["pixels_of_part"] // x["BLOCK_P"] if backward else x["TAPS"] * cdiv(f, x["BLOCK_K"])
        return [{"for block in": [blocks]}]

    return Case(run, sys.modules["kernels.masked_conv"], f"masked_conv{'_weight' * backward}_kernel", loops, 0, aim)


def row(b: int, name: str, aim: str = "", type: torch.dtype = torch.bfloat16) -> Case:
    """A row of 32×32 colour images, 15 layers of 128 features, a head of 1024; without what the rows above give."""

    def run() -> None:
        model = build(name, 32, 3, 256, 128, 15, "meta", 1024).to(type).eval()
        x = torch.zeros(b, *model.shape, dtype=torch.long, device="meta")
        TritonRow(model, b, None, Draw(x.float()), x[:, :, 0].contiguous()).program.run()

    def loops(x: dict) -> list[dict]:
        def blocks(name: str, size: int) -> list[int]:
            return [n] if (n := cdiv(size, x[name])) > 1 or name == "BLOCK_K" else []  # a single one is no loop

        f, wide, between = (x[name] // x["groups"] for name in ("f", "stream_features", "between_features"))
        down, out = x["down_weight"] is not None, []
        for g in range(1, x["groups"] + 1):
            main = x["num_inputs"] - (x["f"] - g * f if down else x["stream_features"] - g * wide)
            read = [*[g * wide] * down, main, g * f, g * wide, g * between]
            made = [wide, *[f] * down, x["GATES"] * f, wide, between, x["num_outputs"]]
            counts = {"for block_k": [n for size in read for n in blocks("BLOCK_K", size)]}
            counts["for block in"] = [n for size in made for n in blocks("BLOCK_N", size)]
            chunks = {"for chunk in": [x["IMAGES"] // x["CHOSEN"]]}
            out.append({"for j in": [1], "for g in": [None], "for layer in": [x["layers"]], **counts, **chunks})
        return out

    return Case(run, kernels.draw_row, "draw_row_kernel", loops, 96, aim)


def rows_above(b: int, type: torch.dtype = torch.bfloat16) -> Case:
    """What the rows above give to a row of the same PixelCNN."""

    def run() -> None:
        here = torch.empty(15, b, 34, 128, dtype=type, device="meta")
        weight, bias, out = here.new_empty(15, 384, 128), here.new_empty(15, 128), here.new_empty(15, b, 32, 128)
        kernels.row_product.row_product((windows(here, 3),), weight, bias, out)

    def loops(x: dict) -> list[dict]:
        return [{"for block in": [x["X_TAPS"] * cdiv(x["x_k"], x["BLOCK_K"])]}]

    return Case(run, kernels.row_product, "row_product_kernel", loops, 0)


CASES = {
    "diagonal scan 32×33, f = 128, b = 16": scan(16, 32, 128, True, False, aim="9k clk"),
    "diagonal scan 32×33, f = 128, b = 16, backward": scan(16, 32, 128, True, True, aim="10k clk"),
    "shared diagonal scan 32×33, f = 128, b = 16": scan(16, 32, 128, True, False, "shared", "9k clk"),
    "shared diagonal scan 32×33, f = 128, b = 16, backward": scan(16, 32, 128, True, True, "shared", "10k clk"),
    "diagonal scan 32×33, f = 128, b = 16, fast tanh": scan(16, 32, 128, True, False, fast=True),
    "shared diagonal scan 32×33, f = 128, b = 16, fast tanh": scan(16, 32, 128, True, False, "shared", fast=True),
    "diagonal scan 28×29, f = 32, b = 16": scan(16, 28, 32, True, False),
    "diagonal scan 28×29, f = 32, b = 16, backward": scan(16, 28, 32, True, True),
    "diagonal scan 28×29, f = 16, b = 16": scan(16, 28, 16, True, False, aim="2.6k clk"),
    "diagonal scan 28×29, f = 16, b = 16, backward": scan(16, 28, 16, True, True),
    "diagonal scan 28×29, f = 16, b = 16, fast tanh": scan(16, 28, 16, True, False, fast=True),
    "row scan 32×32, f = 128, b = 16": scan(16, 32, 128, False, False),
    "row scan 32×32, f = 128, b = 16, backward": scan(16, 32, 128, False, True),
    "row scan 28×28, f = 16, b = 16": scan(16, 28, 16, False, False),
    "row scan 28×28, f = 16, b = 16, backward": scan(16, 28, 16, False, True),
    "convolution 3×3, 32×32, 128 → 128, b = 16": convolution(16, 32, 128, False),
    "convolution 3×3, 32×32, 128 → 128, b = 16, weights' gradient": convolution(16, 32, 128, True),
    "row of a PixelCNN, 16 images": row(16, "pixel_cnn", aim="9.4 ms"),
    "row of a PixelCNN, 4,224 images": row(4224, "pixel_cnn"),
    "row of a PixelCNN, 8,448 images": row(8448, "pixel_cnn", aim="18.8 ms"),
    "rows above of a PixelCNN, 16 images": rows_above(16),
    "rows above of a PixelCNN, 4,224 images": rows_above(4224),
    "rows above of a PixelCNN, 8,448 images": rows_above(8448),
    "row of a Diagonal BiLSTM, 16 images": row(16, "diag_bilstm"),
    "row of a PixelCNN, 16 images, float32": row(16, "pixel_cnn", type=torch.float32),
    "row of a PixelCNN, 8,448 images, float32": row(8448, "pixel_cnn", type=torch.float32),
    "rows above of a PixelCNN, 8,448 images, float32": rows_above(8448, torch.float32),
}


def counted(loops: list[Loop], counts: dict[str, list]) -> tuple[dict[Loop, int], Loop | None]:
    """How often each loop is walked, and the loop whose turns are the steps."""
    left, times = {text: iter(numbers) for text, numbers in counts.items()}, {}
    for loop in loops:
        times[loop] = next(next(numbers for text, numbers in left.items() if text in loop.line))
    return times, next((loop for loop in loops if times[loop] is None), None)


class Traced(NamedTuple):
    """What a multiprocessor issues: each kind of step, or the kernel as a whole, and what the launch takes."""

    steps: list[list[Instruction]]
    warps: int  # of a program
    programs: int
    together: int  # programs that share a multiprocessor
    registers: int
    stack: int


def traced(name: str) -> Traced:
    case = CASES[name]
    with StandIn() as gpu, Launches(case.module) as launches:
        case.run()
    kernel, grid, arguments, named = next(call for call in launches.calls if call[0].__name__ == case.kernel)
    variant = next(v for v in gpu.variants if v.kernel == case.kernel)
    out = triton.compile(source_of(variant), target=gpu_target("sm_90"), options=dict(variant.options))
    code, loops = disassembled(out.asm["cubin"])
    steps = []
    for counts in case.loops(dict(zip(kernel.arg_names, arguments, strict=False)) | named):
        times, main = counted(loops, counts)
        inner = [loop for loop in loops if main is None or main.holds(loop)]
        steps.append(walked(code, inner, *((main.first, main.last) if main else (0, len(code) - 1)), times))
    (registers, stack), warps, programs = usage(out.asm["cubin"]), named["num_warps"], math.prod(grid)
    room = min(65536 // (cdiv(registers, 8) * 256 * warps), TARGETS["sm_90"][3] // (out.metadata.shared + 1024))
    return Traced(steps, warps, programs, min(room, cdiv(programs, PROCESSORS)), registers, stack)


def modelled(name: str) -> dict:
    """A row of the table."""
    case, out = CASES[name], traced(name)

    def clk(code: list[Instruction], l2: float) -> float:
        once, *thrice = (
            clocks(turns * code, out.warps, out.together, l2) for turns in ((1, 3) if case.steps else (1,))
        )
        return (thrice[0] - once) / 2 if thrice else once

    per_step = [sum(clk(code, l2) for code in out.steps) / len(out.steps) for l2 in L2]
    steps = (case.steps or 1) * cdiv(out.programs, PROCESSORS * out.together)
    row = {"kernel": name, "clk a step": [round(x) for x in per_step], "aim": case.aim}
    row |= {"programs": out.programs, "together": out.together, "warps": out.warps, "registers": out.registers}
    return row | {"stack": out.stack, "ms": [round(x * steps / CLOCK, 3) for x in per_step]}


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.model", description=__doc__.split("\n")[0])
    options.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds this text")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = options.parse_args(argv)
    names = [name for name in CASES if args.only in name]
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        options.error("Triton must be installed, and TRITON_INTERPRET not be 1: nothing is compiled there")
    if not names:
        options.error(f"--only: no kernel's name holds {args.only!r}")
    rows = in_processes(modelled, names)
    table("A model of an H100, not a measurement", rows, tuple(rows[0]))
    if args.json:
        write_rows(args.json, "python -m bench.model", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
