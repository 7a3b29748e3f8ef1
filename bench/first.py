"""What the first images of a process cost: a table of `bench.sampling`.

Each time is that of a new process, which draws what `python sample.py` draws by default from the model that `python
train.py` trains by default. One begins with an empty folder of compiled code, one with what that one left, one draws by
torch, where only the noise is compiled, and it finds that on the disk. They take turns.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench.measure import Clock, build, describe, interleave, spread
from kernels import native
from models.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
IMAGES = 64
STARTS = {"compiled": "cpu", "from the disk": "cpu", "none": "torch"}  # where the row's machine code is from; backend

CHILD = """
import json, sys, time
import torch
start = time.perf_counter()
import llvmlite.binding, llvmlite.ir
imported = time.perf_counter() - start
from bench.first import draw
print(json.dumps({"import_ms": 1e3 * imported, **draw(*map(json.loads, sys.argv[1:]))}))
"""


def digits(quick: bool):
    """The default model, of the size that the digits have; its weights, which nothing here depends on, are random."""
    return build("diag_bilstm", 8, 1, 17, *((4, 1) if quick else (32, 4)), None, head_features=128)


def draw(folder: str, backend: str, threads: int, quick: bool) -> dict[str, float]:
    """Draw in a process that has not drawn yet: its milliseconds, and those to get machine code.

    Args:
        folder: where compiled code is kept.
    """
    torch.set_num_threads(threads)
    native.FOLDER, library, found = folder, native.library, {}

    def timed(*arguments):
        start = time.perf_counter()
        out = library(*arguments)
        found["code_ms"] = found.get("code_ms", 0.0) + 1e3 * (time.perf_counter() - start)
        return out

    native.library = timed
    model, start = digits(quick), time.perf_counter()
    sample(model, IMAGES, backend=backend)
    return {**found, "draw_ms": 1e3 * (time.perf_counter() - start)}


def first(args: argparse.Namespace) -> list[dict]:
    """A row for each of `STARTS`, with the time of the whole process, and its ratio to that of the one by torch."""
    said: dict[str, list[dict]] = {code: [] for code in STARTS}

    with tempfile.TemporaryDirectory() as above:

        def start(code: str, clock: Clock) -> None:
            folder = Path(above) / "compiled"
            if code == "compiled":
                shutil.rmtree(folder, ignore_errors=True)
            given = map(json.dumps, (str(folder), STARTS[code], torch.get_num_threads(), args.quick))
            command = [sys.executable, "-c", CHILD, *given]
            said[code].append(json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout))
            clock.lap("process")

        things = {code: lambda clock, code=code: start(code, clock) for code in STARTS}
        times = interleave(things, args.device, 1 if args.quick else args.repeats, warmup=0)
    model, whole = digits(args.quick), {code: spread(times[code]["total"]) for code in STARTS}
    rows = []
    for code, backend in STARTS.items():
        row = {"part": "first", **describe("diag_bilstm", model, IMAGES), "method": "cached", "backend": backend}
        row |= {"code": code, "ms": whole[code]}
        row |= {name: spread([times[name] for times in said[code]]) for name in said[code][0]}
        rows.append(row | {"ratio": whole[code]["median"] / whole["none"]["median"], "ratio_to": "torch"})
    return rows
