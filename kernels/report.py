"""Compile every kernel in every configuration that is used, without a GPU, and say what came of it.

    python -m kernels.report [--target sm_80|sm_90] [--only TEXT] [--set num_warps=8 …] [--json FILE]

For each: registers a thread, stack (spilled registers), shared memory, matrix instructions. Exit status 1 if one of
these rules is broken:

    no stack          a spilled register is a trip to memory at each use
    shared memory     a kernel above the GPU's limit compiles, and fails when it is loaded
    matrix            products of bfloat16 numbers run on matrix instructions
    async copies      of memory that the same kernel writes, only by a loop that stores nothing there, after a barrier
    barrier           where a program reads back what it stored at an earlier step, one stands after its last store
    addresses         offsets into what grows with the batch are 64-bit numbers, from before anything is multiplied

`--set` compiles with other constants or options than the usual: that is how their values were found.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from kernels.cross_entropy import constants as cross_entropy_constants
from kernels.gate import constants as gate_constants
from kernels.jit import tl, triton
from kernels.lstm_scan import constants as scan_constants
from kernels.lstm_scan import form_of
from kernels.masked_conv import product_constants, weight_constants
from kernels.row_scan import Choice, Head, Layers, Product, RowScanProgram, Stem, pack, row_scan_kernel

TARGETS = {"sm_80": (80, 163 << 10), "sm_90": (90, 227 << 10)}  # shared memory that one program may have
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TYPES = {**POINTERS, torch.int64: "*i64", torch.uint8: "*u8"}
SMALL = ("weight", "bias")  # how arguments end that do not grow with the batch


class Case(NamedTuple):
    """A kernel with the constants that it is launched with."""

    name: str
    module: str
    kernel: str
    types: dict[str, str]  # of arguments that are not 32-bit integers
    constants: dict
    sixteens: tuple[str, ...]  # integers that sixteen divides, which lets loads be wide
    matrix: bool  # whether it is to have matrix instructions
    same: dict[str, str] | None = None  # arguments that are views of others' memory


def scans() -> list[Case]:
    """The LSTM scans: the papers' sizes, and both sides of where one form gives way to the next."""
    out = []
    widths = {torch.bfloat16: (7, 16, 32, 64, 128, 512), torch.float32: (7, 128, 512)}
    for diagonal, directions, taps, extent in (
        (True, 2, 2, 28),
        (True, 2, 2, 64),
        (False, 1, 3, 32),
        (False, 1, 3, 64),
    ):
        for dtype, f in ((dtype, f) for dtype, widths_ in widths.items() for f in widths_):
            for kernel, others in (
                ("lstm_scan_fwd_kernel", ("pre", "weight", "gates", "hidden")),
                ("lstm_scan_bwd_kernel", ("d_hidden", "weight", "gates", "d_pre")),
            ):
                way = "forward" if "fwd" in kernel else "backward"
                form = form_of(f, taps, extent, dtype.itemsize, way == "backward")
                kind = "resident" if form.resident else "launches" if form.launches else "streamed"
                constants = scan_constants(form, f, taps, directions, diagonal, torch.float32)
                title = (
                    f"{'diagonal' if diagonal else 'row'} {extent} positions, f = {f}, {kind}, {short(dtype)}, {way}"
                )
                types = {**dict.fromkeys(others, POINTERS[dtype]), **dict.fromkeys(("cells", "d_cells"), "*fp32")}
                sixteens = ("f",) if f % 16 == 0 else ()
                out.append(Case(title, "lstm_scan", kernel, types, constants, sixteens, dtype == torch.bfloat16))
    return out


def convolutions() -> list[Case]:
    """Masked convolutions: the stem's, the blocks', the gated model's; each of the three products."""
    out = []
    shapes = [("7×7 A", 4, 7, 25, 3, 256), ("3×3 B", 2, 3, 5, 128, 128), ("3×3 B", 2, 3, 5, 16, 16)]
    shapes += [("2×3", 2, 3, 6, 128, 256), ("1×1", 1, 1, 1, 256, 128), ("1×3", 1, 3, 2, 128, 256)]
    for dtype in POINTERS:
        pointers = dict.fromkeys(("u", "weight", "bias", "seen", "out", "d_out"), POINTERS[dtype])
        for name, rows, columns, live, k, f in shapes:
            shape = {"TAPS": live, "ROWS": rows, "COLUMNS": columns, "SUM": tl.float32}
            title = f"convolution {name}, {k} → {f}, {short(dtype)}"
            flags = {"TURNED": False, "RELU": True, "BIAS": True, "SEEN": False}
            constants = {**shape, **flags, **product_constants(k, f, dtype.itemsize)}
            rest = ("f", "k") if k % 16 == 0 else ("f",), dtype == torch.bfloat16
            out.append(Case(f"{title}, forward", "masked_conv", "masked_conv_kernel", pointers, constants, *rest))
            if k >= 16:
                flags = {"TURNED": True, "RELU": False, "BIAS": False, "SEEN": True}
                constants = {**shape, **flags, **product_constants(f, k, dtype.itemsize)}
                case = f"{title}, input gradient", "masked_conv", "masked_conv_kernel", pointers, constants, *rest
                out.append(Case(*case))
            constants = {**shape, "RELU": True, **weight_constants(live, k, f, dtype.itemsize)}
            types = {**pointers, "parts": "*fp32"}
            case = f"{title}, weight gradient", "masked_conv", "masked_conv_weight_kernel", types, constants, *rest
            out.append(Case(*case))
    return out


def elementwise() -> list[Case]:
    out = []
    for dtype, pointer in POINTERS.items():
        for v in (2, 256, 1024):
            types = {"logits": pointer, "target": "*u8" if v <= 256 else "*i64"}
            types |= {"nats": "*fp32", "most": "*fp32", "log_sum": "*fp32"}
            types |= {"d_nats": "*fp32", "d_logits": pointer}
            constants = cross_entropy_constants(v, False)
            for kernel in ("cross_entropy_fwd_kernel", "cross_entropy_bwd_kernel"):
                way = "forward" if "fwd" in kernel else "backward"
                title = f"cross-entropy, {v} levels, {short(dtype)}, {way}"
                out.append(Case(title, "cross_entropy", kernel, types, constants, ("v",) if v % 16 == 0 else (), False))
        for kernel in ("gate_fwd_kernel", "gate_bwd_kernel"):
            types = dict.fromkeys(("u", "out", "d_out", "d_u"), pointer)
            title = f"gate, {short(dtype)}, {'forward' if 'fwd' in kernel else 'backward'}"
            out.append(Case(title, "gate", kernel, types, gate_constants(False), ("f",), False))
    return out


def row_program(gates: int, mirrored: bool, c: int, v: int, mixtures: int, f: int, b: int, dtype) -> RowScanProgram:
    """The row kernel's arguments for b images, 32 wide, as the models give them, in memory that is not there."""
    layers, w, groups = 12, 32 + mirrored, 1 if mixtures else c
    empty = partial(torch.empty, dtype=dtype, device="meta")

    def product(inputs: int, outputs: int, parts: int = 1, n: int = layers) -> Product:
        size = outputs // parts // groups
        first = [[(part * groups + g) * size for part in range(parts)] for g in range(groups)]
        slices = [[slice(n, n + size) for n in stretches] for stretches in first]
        return pack(empty(n, outputs, inputs), empty(n, outputs), slices)

    def features(size: int, columns: int = w) -> torch.Tensor:
        return empty(layers, b, columns, size)

    stream = f if gates == 2 else 2 * f
    known = {1: 2 * f, 2: 2 * f, 4: 3 * f if mirrored else 4 * f}[gates]
    slot = 3 * f if mirrored else f if gates == 1 else stream
    taps = features(slot, w + 2)[:, :, :w]
    body = Layers(
        gates,
        product(2 * f, f) if gates == 1 else None,
        product(known, gates * f, gates),
        product(f, stream),
        product(f, stream),
        taps,
        known,
        features(stream) if gates == 1 else taps[..., f:] if mirrored else taps,
        features(gates * f),
        middle=taps if gates == 1 else None,
        cell=features(f).float() if gates == 4 else None,
        hidden=taps[..., :f] if mirrored else features(f) if gates == 4 else None,
        mirrored=features(f) if mirrored else None,
    )
    outputs = mixtures * (1 + 2 * c + c * (c - 1) // 2) if mixtures else v
    between = 32 * groups if v == 2 else 1024 // (16 * groups) * 16 * groups
    head = Head(product(stream, between, n=1), product(between, groups * outputs, n=1), between, outputs, mixtures)
    stem = Stem(product(4 * c, stream, n=1), empty(b, (w + 6) * c), empty(b, w, stream), 3)
    integers = torch.empty(b, c, 32, dtype=torch.long, device="meta")
    choice = Choice(integers.float(), 1.0, integers, integers > 0, empty(b).float(), empty(b, c, 32, v).float())
    return RowScanProgram(stem, body, head, True, True, choice, integers, v)


def row_scans() -> list[Case]:
    """The row kernel: each kind of layer at the papers' sizes for CIFAR-10, one with a mixture, and a small one."""
    out, kernel = [], row_scan_kernel
    kinds = {
        "PixelCNN": (1, False, 3, 256, 0, 128),
        "Gated PixelCNN": (2, False, 3, 256, 0, 128),
        "Row LSTM": (4, False, 3, 256, 0, 128),
        "Diagonal BiLSTM": (4, True, 3, 256, 0, 128),
        "PixelCNN, mixture": (1, False, 3, 256, 10, 128),
        "Diagonal BiLSTM, binary": (4, True, 1, 2, 0, 16),
    }
    for dtype in POINTERS:
        for b in (16, 16384):
            for name, (gates, mirrored, c, v, mixtures, f) in kinds.items():
                f = -(-f // (16 * c)) * 16 * c if not mixtures else f  # `models.aligned`
                program = row_program(gates, mirrored, c, v, mixtures, f, b, dtype)
                constexpr = {kernel.arg_names[k] for k in kernel.constexprs}
                types, constants, sixteens = {}, {}, []
                for argument, x in program.arguments.items():
                    if isinstance(x, torch.Tensor):
                        types[argument] = TYPES[x.dtype]
                    elif argument in constexpr or argument not in kernel.arg_names:
                        constants[argument] = x
                    elif isinstance(x, float):
                        types[argument] = "fp32"
                    elif x % 16 == 0:
                        sixteens.append(argument)
                title = f"row scan {name}, f = {f}, {program.form.images} images, {short(dtype)}"
                case = title, "row_scan", "row_scan_kernel", types, constants, tuple(sixteens)
                same = {"%middle": "%taps"} if gates == 1 else {"%stream": "%taps"}
                out.append(Case(*case, dtype == torch.bfloat16, same))
    return out


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> list[Case]:
    """Every kernel in every configuration that is used."""
    return scans() + convolutions() + elementwise() + row_scans()


# --------------------------------------------------------------------------------------------------------- compiling


class Line(NamedTuple):
    """An operation in the compiler's text, with the loops that it stands in, outermost first."""

    at: int
    name: str  # what it defines
    operation: str
    rest: str
    loops: tuple[int, ...]

    @property
    def operand(self) -> str:
        """The first one."""
        found = re.match(r"(?:\{\}, )?(%[\w#]+)", self.rest)
        return found[1] if found else ""


def lines_of(text: str) -> list[Line]:
    """The operations of a kernel in the compiler's text (ttir or ttgir)."""
    out, opened = [], []
    for at, line in enumerate(text.splitlines()):
        line = line.strip()
        if line.startswith("}") and opened:
            opened.pop()
        found = re.match(r"(?:(%[\w]+)(?::\d+)? = )?([a-z_]+\.[\w.]+) ?(.*)", line)
        loops = tuple(loop for loop in opened if loop is not None)
        out.append(Line(at, *(x or "" for x in found.groups()), loops) if found else Line(at, "", "", line, loops))
        if line.split(" loc(")[0].endswith("{"):
            opened.append(at if "scf.for" in line or "scf.while" in line else None)
    return out


def definition_of(lines: list[Line], value: str, before: int) -> Line | None:
    """Where a value that is used in a line is defined: names come again in regions that do not see each other."""
    return next((line for line in reversed(lines[:before]) if line.name == value), None)


def source_of(lines: list[Line], value: str, before: int) -> str | None:
    """The function's argument that a pointer comes from, as seen from a line; None if it cannot be told."""
    definition = definition_of(lines, value, before)
    if definition is None:
        argument = any(f"{value}: !tt.ptr" in line.rest for line in lines if line.operation == "tt.func")
        return value if argument else None
    if definition.operation not in ("tt.addptr", "tt.splat", "tt.broadcast", "ttg.convert_layout", "tt.expand_dims"):
        return None
    return source_of(lines, definition.operand, definition.at)


def accesses(lines: list[Line], operation: str) -> list[tuple[Line, str | None]]:
    """The lines of an operation, each with the argument whose memory it is about."""
    found = [line for line in lines if line.operation == operation]
    return [(line, source_of(lines, line.operand, line.at)) for line in found]


def barriers(lines: list[Line]) -> list[int]:
    return [line.at for line in lines if line.operation in ("ttg.barrier", "gpu.barrier")]


def hasty_copies(text: str, same: dict[str, str] | None = None) -> list[str]:
    """Arguments (in ttgir) of which a copy begins before the kernel has stored what it is to find.

    Args:
        same: arguments that are views of others' memory.

    A pipelined loop copies ahead what its next turns load, its first turns' before it begins. That is right where the
    loop stores nothing there, and a barrier stands between the last store and the loop.
    """
    lines, same = lines_of(text), same or {}
    walls, out = barriers(lines), []
    stores, copies = (
        [(line, same.get(name, name)) for line, name in accesses(lines, operation)]
        for operation in ("tt.store", "ttg.async_copy_global_to_local")
    )
    ends = {loop: max(line.at for line in lines if loop in line.loops) for line in lines for loop in line.loops}
    for copy, source in copies:
        stored = [line for line, name in stores if name == source or name is None]
        if source is None:
            out.append(copy.operand)
        if source is None or not stored:
            continue
        # the loops around the copy that store, and the one that loads what is copied
        storing = [loop for loop in copy.loops if any(loop in line.loops for line in stored)]
        own = copy.loops[len(storing) :] or [loop for loop in sorted(ends) if loop > copy.at][:1]
        outer = storing[-1] if storing else -1
        last_before = max((line.at for line in stored if line.at < copy.at), default=-1)
        guarded = last_before < 0 or any(last_before < wall < copy.at for wall in walls)
        if storing and last_before < outer:  # the last store is that of the loop's turn before
            last = max(line.at for line in stored if outer in line.loops)
            guarded = any(last < wall <= ends[outer] or outer < wall < copy.at for wall in walls)
        meanwhile = not own or any(copy.at < line.at <= ends[own[0]] for line in stored)
        if not guarded or meanwhile:
            out.append(source)
    if "async_tma_copy" in text:
        out.append("tma")
    return out


def unguarded(text: str) -> list[str]:
    """Arguments (in ttir) that a kernel both stores to and loads from, if no barrier follows its last store to them."""
    lines = lines_of(text)
    stores = {source: line.at for line, source in accesses(lines, "tt.store")}
    loaded = {source for _, source in accesses(lines, "tt.load")}
    after = max(barriers(lines), default=-1)
    return [str(name) for name, at in stores.items() if name in loaded and after < at]


def narrow_addresses(text: str, small: tuple[str, ...]) -> list[str]:
    """What (in ttir) overflows at 2³¹ elements: 32-bit offsets of loads and stores, 32-bit products of program ids.

    Args:
        small: how arguments end that do not grow with the batch.
    """
    lines, out, from_program = lines_of(text), [], set()
    for line in lines:
        operands, _, type = line.rest.rpartition(" : ")
        if line.operation == "tt.get_program_id" and operands.strip() == "x":
            from_program.add(line.name)
        elif from_program.intersection(re.findall(r"%\w+", operands)) and re.search(r"i32>?\S*\s*(loc.*)?$", type):
            if line.operation == "arith.muli":
                out.append(f"the product {line.name}")
            if line.operation != "arith.remsi":  # a remainder stays small
                from_program.add(line.name)
    for access, source in accesses(lines, "tt.load") + accesses(lines, "tt.store"):
        value, before, wide = access.operand, access.at, False
        while not wide and (definition := definition_of(lines, value, before)):
            wide = definition.operation == "tt.addptr" and "i64" in definition.rest
            value, before = definition.operand, definition.at
        if not wide and not (source or "").endswith(small):
            out.append(f"the offset into {source}")
    return out


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) as the assembler says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    return int(registers[1]), int(stack[1])


def compile_case(case: Case, target: str, other: dict | None = None) -> dict:
    """Compile one case and hold it against the rules: a row of the report."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"kernels.{case.module}"), case.kernel)
    other = {name: value for name, value in (other or {}).items() if name in case.constants or name == "maxnreg"}
    constants = {**case.constants, **other}
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    signature = {name: case.types.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    wide = [k for k, (name, type) in enumerate(signature.items()) if type[0] == "*" or name in case.sixteens]
    attributes = {(k,): [["tt.divisibility", 16]] for k in wide}
    capability, limit = TARGETS[target]
    row = {"kernel": case.name, "target": target, "warps": options["num_warps"]}
    source = ASTSource(kernel, signature, constants, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # whatever the compiler meets is a row of the report
        first = next(iter(str(error).strip().splitlines()[-1:]), "")
        return {**row, "broken": [f"does not compile: {type(error).__name__}: {first}"]}
    registers, stack = usage(compiled.asm["cubin"])
    matrix = sorted(set(re.findall(r"(wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"])))
    copies = hasty_copies(compiled.asm["ttgir"], case.same)
    narrow = narrow_addresses(compiled.asm["ttir"], SMALL)
    bare = unguarded(compiled.asm["ttir"])
    rules = {
        f"{stack} bytes of stack": stack > 0,
        f"{compiled.metadata.shared} bytes of shared memory, {limit} at most": compiled.metadata.shared > limit,
        "no matrix instruction": case.matrix and not matrix,
        f"asynchronous copies of what it writes ({', '.join(copies)})": bool(copies),
        f"no barrier after its stores to what it reads ({', '.join(bare)})": bool(bare),
        f"32-bit addresses ({', '.join(narrow)})": bool(narrow),
    }
    return {
        **row,
        "registers": registers,
        "stack": stack,
        "shared": compiled.metadata.shared,
        "matrix": matrix,
        "broken": [rule for rule, broken in rules.items() if broken],
    }


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m kernels.report", description=__doc__.split("\n")[0])
    options.add_argument("--target", choices=TARGETS, action="append", help="(all)")
    options.add_argument("--only", default="", metavar="TEXT", help="kernels whose name holds this text")
    options.add_argument("--set", nargs="+", default=[], metavar="NAME=N", help="another constant or option")
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = options.parse_args(argv)
    if triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        options.error("Triton must be installed, and TRITON_INTERPRET not be 1: nothing is compiled there")
    for text in args.set:
        if not re.fullmatch(r"\w+=\d+", text):
            options.error(f"--set: {text!r} is not allowed: NAME=N is, N an integer")
    other = {name: int(value) for name, value in (text.split("=") for text in args.set)}
    chosen = [case for case in cases() if args.only in case.name]
    if not chosen:
        options.error(f"--only: no kernel's name holds {args.only!r}")
    work = [(case, target) for target in args.target or TARGETS for case in chosen]
    workers = min(len(work), os.cpu_count() or 1)
    # Each worker compiles; a fresh one has no threads of torch that a fork would copy.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(partial(compile_case, other=other), *zip(*work, strict=True)))
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
        command = shlex.join(["python", "-m", "kernels.report", *(f"--set={text}" for text in args.set)])
        head = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
        head |= {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        args.json.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
