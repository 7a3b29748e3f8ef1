"""A model of the kernels' time on an H100, where there is none: `python -m bench.model`.

Each kernel is launched on a stand-in for the GPU and compiled. A model of the chip then steps through its machine code
(`bench.machine_code`). How often a loop is walked, `bench.model_cases` knows. Nothing of it is a measurement: believe
ratios within 20 %, times within 35 %.

    clk a step    of a step of a scan, of a sub-pixel of a row, of a whole convolution, where the L2 cache answers after
                  300 clk, and after 600
    programs      of the launch, and how many share one of 132 multiprocessors; more than that wait for one
    ms            of the launch, at both
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import NamedTuple

from bench.cost import Launches
from bench.machine_code import Instruction, Loop, clocks, disassembled, walked
from bench.measure import table
from bench.model_cases import CASES
from bench.stand_in import TARGETS, StandIn, gpu_target, in_processes, source_of, usage, write_rows
from kernels.jit import cdiv, triton

CLOCK = 1.755e6  # clk a millisecond
PROCESSORS = 132
L2 = (300, 600)  # clk until the L2 cache answers: at once, or when many ask


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
