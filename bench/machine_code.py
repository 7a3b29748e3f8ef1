"""The machine code of a kernel, and a model of how an H100 issues it.

The code comes from `nvdisasm`, which Triton brings along. The assembler has written into each instruction how long the
next one of its warp waits at least, and for which loads and results: bits 105–125 of 128 (found by 1804.06826). The
model issues the warps of a multiprocessor by that, in order, each unit of the chip being busy as long as `RATES` says.
"""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from collections import defaultdict
from heapq import heappop, heappush
from pathlib import Path
from typing import NamedTuple

from kernels.jit import triton

ROOT = Path(__file__).parent.parent
RATES = {  # a warp's instruction: its unit, clk that it keeps the unit busy, clk from then until its result is there
    "LDG": ("memory", "bytes / 56", "L2"),
    "LDGSTS": ("memory", "bytes / 56", "L2"),
    "ATOM": ("memory", 2, "L2"),
    "ATOMG": ("memory", 2, "L2"),
    "MEMBAR": ("memory", 2, "L2"),
    "STG": ("shared", "bytes / 128", 20),
    "LDS": ("shared", "bytes / 128", 30),
    "STS": ("shared", "bytes / 128", 24),
    "LDSM": ("shared", "matrices", 33),
    "STSM": ("shared", 4, 24),
    "SHFL": ("shared", 2, 24),
    "MUFU": ("special", 8, 16),
    "HMMA": ("matrix", 8, 26),
    "HGMMA": ("matrix", "columns / 2", 20),
    "LDC": ("other", 1, 40),
    "S2R": ("other", 1, 30),
    "S2UR": ("other", 1, 30),
}
OTHERS = ("other", 1, 12)
OF_A_PART = ("special", "matrix", "other")  # units that each of the four parts of a multiprocessor has
BARRIER = 22  # clk from the last warp's arrival

# ------------------------------------------------------------------------------------------------------------- code


class Instruction(NamedTuple):
    name: str
    rest: str
    stall: int  # clk until the next one of its warp
    writes: int  # the counter that goes down with its result; 7: none
    reads: int  # the same, when its operands are read
    waits: int  # bits of the counters that it waits for

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def bytes(self) -> int:
        """Of a warp's load or store."""
        found = re.search(r"\.(128|64|U16|S16|U8|S8)\b", self.name)
        return 32 * {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}[found[1]] if found else 128


class Loop(NamedTuple):
    first: int
    last: int
    line: str  # of the source

    def holds(self, other: Loop) -> bool:
        return self != other and self.first <= other.first and other.last <= self.last


def disassembled(cubin: bytes) -> tuple[list[Instruction], list[Loop]]:
    """The instructions of a kernel, and the loops: branches back."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        text = subprocess.run([tool, "-g", "-hex", "-c", file.name], capture_output=True, text=True, check=True).stdout
    out, labels, jumps, line = [], {}, [], ""
    first = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Za-z0-9_.]+)(.*?);\s*/\* 0x[0-9a-f]+ \*/"
    for text_line, next_line in zip(text.splitlines(), [*text.splitlines()[1:], ""], strict=True):
        if found := re.match(r"\s*(\.L_x_\d+):", text_line):
            labels[found[1]] = len(out)
        elif found := re.search(r'//## File ".*/(kernels/.*)", line (\d+)', text_line):
            line = linecache.getline(str(ROOT / found[1]), int(found[2])).strip()
        elif found := re.search(first, text_line):
            upper = int(re.search(r"/\* (0x[0-9a-f]+) \*/", next_line)[1], 16) >> 41
            bits = upper & 15, upper >> 5 & 7, upper >> 8 & 7, upper >> 11 & 63
            if found[1].startswith("BRA") and (label := re.search(r"\.L_x_\d+", found[2])):
                jumps.append((len(out), label[0], line))
            out.append(Instruction(found[1], found[2], *bits))
    loops = [Loop(labels[label], at, line) for at, label, line in jumps if labels.get(label, at) < at]
    return out, sorted(loops, key=lambda loop: (loop.first, -loop.last))


def walked(code: list[Instruction], loops: list[Loop], first: int, last: int, times: dict[Loop, int]) -> list:
    """The instructions from `first` to `last` in the order in which a warp issues them."""
    out, at = [], first
    while at <= last:
        loop = next((x for x in loops if x.first == at and x.last <= last), None)
        if loop is None:
            out.append(code[at])
            at += 1
        else:
            inner = [x for x in loops if loop.holds(x)]
            out += times[loop] * walked(code, inner, loop.first, loop.last, times)
            at = loop.last + 1
    return out


# ------------------------------------------------------------------------------------------------------------- clock


class Step(NamedTuple):
    """What the clock needs of an instruction."""

    kind: str
    unit: str
    own: bool  # whether each part of a multiprocessor has such a unit
    busy: float
    late: float
    stall: int
    writes: int
    reads: int
    waits: tuple[int, ...]
    keeps: int  # of the groups of copies under way, how many it does not wait for


def steps_of(x: Instruction, l2: float) -> Step:
    unit, busy, late = RATES.get(x.kind, OTHERS)
    busy = {"bytes / 56": x.bytes / 56, "bytes / 128": max(1, x.bytes / 128), "matrices": 4}.get(busy, busy)
    if busy == "columns / 2":  # for 16 inputs in bfloat16, and for 8 in tf32
        busy = int(re.search(r"64x(\d+)x", x.name)[1]) / 2
    waits = tuple(n for n in range(6) if x.waits >> n & 1)
    keeps = int(found[1], 16) if (found := re.search(r"SB0, (0x[0-9a-f]+)", x.rest)) else 0
    kind = "PRODUCTS" if x.name.startswith("WARPGROUP.DEPBAR") else x.kind
    late = l2 if late == "L2" else late
    return Step(kind, unit, unit in OF_A_PART, busy, late, max(1, x.stall), x.writes, x.reads, waits, keeps)


class Warp:
    """A warp: how far it has come, and the results it may have to wait for."""

    def __init__(self, code: list[Step], program: int, part: int):
        self.code, self.program, self.part, self.at = code, program, part, 0
        self.counters, self.copies, self.groups, self.products = [0.0] * 6, 0.0, [], 0.0

    def next(self, free: float) -> float:
        """Find when its next instruction may be issued, which the one before lets go at `free`."""
        x = self.code[self.at]
        for n in x.waits:
            free = max(free, self.counters[n])
        if x.kind == "DEPBAR" and len(self.groups) > x.keeps:  # for all groups of copies but the last few
            free = max(free, *self.groups[: len(self.groups) - x.keeps])
        return max(free, self.products) if x.kind == "PRODUCTS" else free


def clocks(code: list[Instruction], warps: int, programs: int, l2: float) -> float:
    """How many clk `programs` programs of `warps` warps take that share a multiprocessor."""
    made: dict[Instruction, Step] = {}
    steps = [made.get(x) or made.setdefault(x, steps_of(x, l2)) for x in code]
    every = [Warp(steps, n // warps, n % 4) for n in range(warps * programs)]
    ready = [(700.0 * warp.program, 0.0, n) for n, warp in enumerate(every)]  # when; when it was last; which warp
    arrived: list[list[int]] = [[] for _ in range(programs)]  # at a barrier
    free: dict[tuple[str, int], float] = defaultdict(float)  # from when on a unit is
    now = 0.0
    while ready:
        now, last, n = heappop(ready)
        warp = every[n]
        if (later := free["issue", warp.part]) > now:
            heappush(ready, (later, last, n))
            continue
        x = steps[warp.at]
        free["issue", warp.part] = now + 1
        place = x.unit, warp.part if x.own else 0
        done = free[place] = max(free[place], now) + x.busy
        begins = now + x.stall
        if x.kind == "HMMA":
            begins = max(begins, done - 3 * x.busy)  # four may wait for the unit
        elif x.kind in ("BRA", "WARPSYNC"):
            begins = max(begins, now + 10)
        done += x.late
        if x.kind == "LDGSTS":
            warp.copies, done = max(warp.copies, done), now + 30
        elif x.kind == "LDGDEPBAR":
            warp.groups.append(warp.copies)
        elif x.kind == "HGMMA":
            warp.products = done
        if x.writes < 6:
            warp.counters[x.writes] = max(warp.counters[x.writes], done)
        if x.reads < 6:
            warp.counters[x.reads] = max(warp.counters[x.reads], now + 18)
        warp.at += 1
        going = [n] if x.kind != "BAR" else arrived[warp.program]
        if x.kind == "BAR":
            going.append(n)
            if len(going) < warps:
                continue
            arrived[warp.program], begins = [], now + BARRIER
        for n in going:
            if every[n].at < len(steps):
                heappush(ready, (every[n].next(begins), now, n))
    return now
