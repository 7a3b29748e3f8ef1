"""Compile every kernel in every configuration that is used, without a GPU, and say what came of it.

    python -m kernels.report [--target sm_80|sm_90] [--only TEXT] [--set num_warps=8 …] [--json FILE]

For each: registers a thread, stack (spilled registers), shared memory, matrix instructions. Exit status 1 if one of
these rules is broken:

    no stack          a spilled register is a trip to memory at each use
    shared memory     a kernel above the GPU's limit compiles, and fails when it is loaded
    matrix            products of bfloat16 numbers run on matrix instructions
    async copies      none of memory that the same kernel writes: a copy ahead of time would read what is not there yet
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

TARGETS = {"sm_80": (80, 163 << 10), "sm_90": (90, 227 << 10)}  # shared memory that one program may have
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
SMALL = ("weight", "bias")  # arguments of all kernels that do not grow with the batch


class Case(NamedTuple):
    """A kernel with the constants that it is launched with."""

    name: str
    module: str
    kernel: str
    types: dict[str, str]  # of arguments that are not 32-bit integers
    constants: dict
    sixteens: tuple[str, ...]  # integers that sixteen divides, which lets loads be wide
    matrix: bool  # whether it is to have matrix instructions


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


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases() -> list[Case]:
    """Every kernel in every configuration that is used."""
    return scans() + convolutions() + elementwise()


# --------------------------------------------------------------------------------------------------------- compiling


def source_of(text: str, value: str, seen: frozenset = frozenset()) -> str | None:
    """The function argument that a pointer in Triton's text comes from; None if it cannot be told."""
    if re.fullmatch(r"%\w+", value) and re.search(rf"{re.escape(value)}: !tt\.ptr", text):
        return value
    definition = re.search(rf"^\s*{re.escape(value)} = (\S+) (%[\w#]+)", text, re.MULTILINE)
    if not definition or value in seen:
        return None
    if definition[1] not in ("tt.addptr", "tt.splat", "tt.broadcast", "ttg.convert_layout", "tt.expand_dims"):
        return None
    return source_of(text, definition[2], seen | {value})


def hasty_copies(text: str) -> list[str]:
    """Asynchronous copies (in ttgir) of memory that the kernel stores to, or that cannot be traced."""
    stored = {source_of(text, value) for value in re.findall(r"tt\.store (%[\w#]+)", text)}
    out = []
    for value in re.findall(r"async_copy_global_to_local (%[\w#]+)", text):
        source = source_of(text, value)
        if source is None or source in stored or None in stored:
            out.append(source or value)
    if "async_tma_copy" in text:
        out.append("tma")
    return out


def unguarded(text: str) -> list[str]:
    """Arguments (in ttir) that a kernel both stores to and loads from, if no barrier follows its last store to them."""
    stores = {}
    for found in re.finditer(r"tt\.store (%\w+)", text):
        stores[source_of(text, found[1])] = found.end()
    loaded = {source_of(text, value) for value in re.findall(r"tt\.load (%\w+)", text)}
    barriers = [found.start() for found in re.finditer(r"\b(ttg|gpu)\.barrier", text)]
    after = max(barriers, default=-1)
    return [str(name) for name, at in stores.items() if name in loaded and after < at]


def narrow_addresses(text: str, small: tuple[str, ...]) -> list[str]:
    """What (in ttir) overflows at 2³¹ elements: 32-bit offsets of loads and stores, 32-bit products of program ids.

    Args:
        small: arguments that do not grow with the batch.
    """
    out, from_program = [], set()
    for line in text.splitlines():
        definition = re.match(r"\s*(%\w+) = (\S+) (.*)", line)
        if not definition:
            continue
        name, operation, rest = definition.groups()
        operands, _, type = rest.rpartition(" : ")
        if operation == "tt.get_program_id" and operands.strip() == "x":
            from_program.add(name)
        elif from_program.intersection(re.findall(r"%\w+", operands)) and re.search(r"i32>?\S*\s*(loc.*)?$", type):
            if operation == "arith.muli":
                out.append(f"the product {name}")
            if operation != "arith.remsi":  # a remainder stays small
                from_program.add(name)
    for value in re.findall(r"tt\.(?:load|store) (%\w+)", text):
        source, wide = source_of(text, value), False
        while value != source and not wide:
            definition = re.search(rf"^\s*{re.escape(value)} = (\S+) (%\w+)(.*)", text, re.MULTILINE)
            wide = definition is not None and definition[1] == "tt.addptr" and "i64" in definition[3]
            value = definition[2] if definition else source
        if not wide and (source or "").lstrip("%") not in small:
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
    copies = hasty_copies(compiled.asm["ttgir"])
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
