"""Rules about the compiler's text of a kernel, Triton's ttir and ttgir: mistakes that show only on a GPU.

`bench.compile` holds every kernel against them.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Line(NamedTuple):
    """An operation in the compiler's text, with the loops around it, outermost first."""

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
    loop stores nothing there, and there is a barrier between the last store and the loop.
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


def tile_of(layout: str) -> list[int]:
    """The rows and columns of a result that all warps of a program hold once, by the text of the result's layout."""
    fields = {
        name: [int(x) for x in numbers.split(",")] for name, numbers in re.findall(r"(\w+) = \[([\d, ]+)\]", layout)
    }
    if "instrShape" not in fields:  # products without matrix instructions
        parts = (fields[name][-2:] for name in ("sizePerThread", "threadsPerWarp", "warpsPerCTA"))
        return [size * threads * warps for size, threads, warps in zip(*parts, strict=True)]
    rows_and_columns = fields["instrShape"][:2] if "versionMajor = 3" in layout else fields["instrShape"][-2:]
    return [size * warps for size, warps in zip(rows_and_columns, fields["warpsPerCTA"][-2:], strict=True)]


def replicated(text: str) -> list[str]:
    """Products (in ttgir) that several warps compute alike, as all warps together have more room than the result."""
    layouts = dict(re.findall(r"^#(\w+) = #(.*)", text, re.M))
    found = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot) .*-> tensor<(\d+)x(\d+)x\w+, #(\w+)>", text)
    out = {}
    for rows, columns, layout in found:
        tile = tile_of(layouts[layout])
        times = max(1, tile[0] // int(rows)) * max(1, tile[1] // int(columns))
        if times > 1:
            out[f"{rows}×{columns} {times} times"] = None
    return list(out)
