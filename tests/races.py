"""Races and accesses out of bounds, found while kernels run in Triton's interpreter.

    with watched() as watch:
        kernel[grid](…)
    assert not watch.hazards, watch.report()

The interpreter runs a program as one thread and programs one after another; a GPU promises neither. What is ordered on
a GPU is what a barrier of the program stands between, nothing else. So all that a program loads and stores between two
of its barriers is taken as unordered, and so is all that two programs of a launch do:

    load after store     a program loads bytes that it stored since its last barrier
    store after store    it stores to them again
    store after load     it stores to bytes that it loaded, unless through the same tensor of pointers, element by
                         element: then each thread loads and stores its own
    twice in a store     two elements of one store are the same bytes
    two programs         two programs touch the same bytes, and one of them stores, and nothing orders the two
    out of bounds        bytes outside of the storage of the tensor whose pointer it was

Atomic operations are ordered among themselves. One that releases orders what its program did before its last barrier,
and all that this program knows to be ordered, before what a program does that acquires the same number later. Programs
may take turns (`tests.interleaved`). Bytes are compared, not addresses of elements. Every storage gets
addresses of its own, far from all others', so that a pointer never leads from one tensor into another; what is out of
bounds is not carried out.

`watched(late=True)` makes stores visible as late as a GPU may: at the program's next barrier, or at its end.
`watched(without=(file, line))` takes the barrier at that line away.

Memory has a shadow: for each of its grains, a number that says when and where it was last stored, and one for loads.
"When" is an interval: it begins with a program and at each of its barriers. Intervals are counted through a launch, and
each is some program's.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np

from tests import interleaved as turns

ROOT = Path(__file__).parents[1]
ROOM = 40  # bits of an address within a storage
HALF = 1 << (ROOM - 1)  # a pointer may leave its storage by so much, to either side
SITES = 16  # bits of a mark that say where: a site and whether it is an atomic operation

Line = tuple[str, int]  # file, line
Site = tuple[Line, ...]  # of a load or store, and of the calls that lead to it from the kernel, the innermost first


def short(site: Site) -> str:
    def path(file: str) -> str:
        return os.path.relpath(file, ROOT) if Path(file).is_relative_to(ROOT) else file

    called = "".join(f", called at {path(file)}:{line}" for file, line in site[1:])
    return f"{path(site[0][0])}:{site[0][1]}{called}"


class Hazard(NamedTuple):
    kind: str
    kernel: str
    tensor: str  # the arguments that share the storage
    second: Site  # the access that shows it,
    first: Site | None  # and the one before; None: out of bounds

    def __str__(self) -> str:
        of = f"{self.kind}: {self.kernel}, {self.tensor}: {short(self.second)}"
        return of if self.first is None else f"{of}; before it: {short(self.first)}"


class Memory:
    """A storage of a launch and its shadow, which has a number for each `grain` bytes."""

    def __init__(self, number: int, storage):
        self.base, self.start, self.size = number << ROOM, storage.data_ptr(), storage.nbytes()
        self.delta = np.uint64((self.start - self.base) % 2**64)  # from the address that a kernel sees to the true one
        self.grain = 0
        self.stored = self.loaded = self.loaded_before = None  # marks; `loaded_before`: by an earlier program
        self.is_stored = False
        self.loads = []  # of the interval `loads_of`: (site, pointers, grains)
        self.loads_of = 0

    def grains(self, offset: np.ndarray, size: int) -> np.ndarray:
        """Which grains elements of `size` bytes at `offset` (elements,) cover."""
        if not self.grain:
            self.grain = size
            number = -(-self.size // size)
            self.stored, self.loaded, self.loaded_before = (np.zeros(number, np.int64) for _ in range(3))
        together = int(np.bitwise_or.reduce(offset)) | size | self.grain
        divisor = together & -together
        if divisor < self.grain:
            factor, self.grain = self.grain // divisor, divisor
            self.stored, self.loaded, self.loaded_before = (
                np.repeat(marks, factor) for marks in (self.stored, self.loaded, self.loaded_before)
            )
            self.loads = [
                (site, pointers, (grains[:, None] * factor + np.arange(factor)).ravel())
                for site, pointers, grains in self.loads
            ]
        first = offset // self.grain if self.grain > 1 else offset
        if size == self.grain:
            return first
        return (first[:, None] + np.arange(size // self.grain)).ravel()


class Program:
    """A program of a launch, while it runs."""

    def __init__(self, number: int):
        self.number = number  # from 0
        self.interval = 0  # marks are at least so much since the last barrier
        self.known = np.zeros(number + 1, np.int64)  # of each program, up to which interval all is before what comes
        self.waiting = []  # stores that are not visible yet

    def learn(self, known: np.ndarray) -> None:
        self.known = joined(self.known, known)


def joined(known: np.ndarray, other: np.ndarray) -> np.ndarray:
    size = max(len(known), len(other))
    return np.maximum(np.pad(known, (0, size - len(known))), np.pad(other, (0, size - len(other))))


class Launch:
    """What is known while a kernel runs."""

    def __init__(self, kernel: str, tensors: dict):
        self.kernel, self.tensors = kernel, tensors
        self.memories: dict[int, Memory] = {}  # by number
        self.numbers: dict[int, int] = {}  # by the true address of a storage
        self.programs: dict[tuple, Program] = {}  # by their places in the grid
        self.owners = np.zeros(1, np.int64)  # of each interval: the program's number
        self.intervals = 0
        self.released: dict[int, np.ndarray] = {}  # by address of an atomic operation: what who acquires it then knows

    def begin(self, program: Program) -> None:
        """Begin an interval."""
        self.intervals += 1
        if self.intervals == len(self.owners):
            self.owners = np.pad(self.owners, (0, len(self.owners)))
        self.owners[self.intervals] = program.number
        program.interval = self.intervals << SITES

    def of_others(self, program: Program, marks: np.ndarray) -> np.ndarray:
        """Which marks are of other programs, and not known to be before this one's."""
        intervals = marks >> SITES
        owners = self.owners[intervals]
        known = np.pad(program.known, (0, max(0, len(self.programs) - len(program.known))))
        return (marks > 0) & (owners != program.number) & (intervals > known[owners])

    def memory(self, tensor) -> Memory:
        storage = tensor.untyped_storage()
        number = self.numbers.setdefault(storage.data_ptr(), len(self.numbers) + 1)
        if number not in self.memories:
            self.memories[number] = Memory(number, storage)
        return self.memories[number]

    def name(self, memory: Memory | None) -> str:
        if memory is None:
            return "no tensor"
        return " = ".join(name for name, x in self.tensors.items() if x.untyped_storage().data_ptr() == memory.start)


class Watch:
    """What was found: `hazards`, how often each; `barriers`, how often a program came to each line with one."""

    def __init__(self, without: tuple[str | Path, int] | None, late: bool, strict: bool):
        self.hazards: Counter[Hazard] = Counter()
        self.barriers: Counter[Line] = Counter()
        self.without = without and (str(without[0]), without[1])
        self.late, self.strict = late, strict
        self.launch: Launch | None = None
        self.sites: list[Site] = []
        self.number_of: dict[Site, int] = {}

    def report(self) -> str:
        return "\n".join(f"{hazard} ({times} times)" for hazard, times in self.hazards.most_common())

    # ----------------------------------------------------------------------------------- the course of a program

    def begin_program(self, place: tuple) -> None:
        launch = self.launch
        for before in launch.programs.values():  # they have ended, or not begun
            self.show(before)
        program = launch.programs[place] = Program(len(launch.programs))
        launch.begin(program)

    def barrier(self, program: Program, site: Site) -> None:
        self.barriers[site[0]] += 1
        if site[0] != self.without:
            self.show(program)
            self.launch.begin(program)

    def show(self, program: Program) -> None:
        """Carry out the stores that wait."""
        waiting, program.waiting = program.waiting, []
        for store in waiting:
            store()

    def order(self, program: Program, address: int, order: str) -> None:
        """An atomic operation orders programs: "acquire", "release", "acq_rel" or "relaxed"."""
        nothing = np.zeros(0, np.int64)
        if order in ("release", "acq_rel"):
            done = program.known.copy()
            done[program.number] = (program.interval >> SITES) - 1  # other threads may not have done more
            self.launch.released[address] = joined(self.launch.released.get(address, nothing), done)
        if order in ("acquire", "acq_rel"):
            program.learn(self.launch.released.get(address, nothing))

    # --------------------------------------------------------------------------------------------- what it touches

    def site_number(self, site: Site) -> int:
        number = self.number_of.get(site)
        if number is None:
            number = self.number_of[site] = len(self.sites)
            self.sites.append(site)
            assert 2 * number < 1 << SITES
        return number

    def note(self, kind: str, memory: Memory | None, second: Site, first: Site | None, times: int) -> None:
        if times:
            self.hazards[Hazard(kind, self.launch.kernel, self.launch.name(memory), second, first)] += times

    def note_marks(self, kind: str, memory: Memory, second: Site, marks: np.ndarray) -> None:
        """Note a hazard with each of the accesses that left these marks."""
        sites = (marks & ((1 << SITES) - 1)) >> 1
        for number, times in zip(*np.unique(sites, return_counts=True), strict=True):
            self.note(kind, memory, second, self.sites[number], int(times))

    def resolve(self, pointers: np.ndarray, mask: np.ndarray, size: int, site: Site):
        """Where an access goes.

        Returns:
            What is in bounds of each storage, (memory, offsets (elements,)), the true pointers, and the mask of those
            in bounds.
        """
        at = pointers[mask]
        if not at.size:
            return [], pointers, mask
        memory = self.launch.memories.get((int(at[0]) + HALF) >> ROOM)
        if memory is not None:
            offset = (at - np.uint64(memory.base)).view(np.int64)
            if offset.min() >= 0 and offset.max() <= memory.size - size:
                return [(memory, offset)], pointers + memory.delta, mask
        parts, true, within = [], pointers.copy(), np.zeros(at.shape, bool)
        numbers, moved = (at + np.uint64(HALF)) >> np.uint64(ROOM), at.copy()
        for number in np.unique(numbers).tolist():
            memory, these = self.launch.memories.get(number), numbers == number
            good = np.zeros(0, np.int64)
            if memory is not None:
                offset = (at[these] - np.uint64(memory.base)).view(np.int64)
                inside = (offset >= 0) & (offset <= memory.size - size)
                within[these], moved[these], good = inside, at[these] + memory.delta, offset[inside]
            self.note("out of bounds", memory, site, None, int(these.sum()) - good.size)
            if good.size:
                parts.append((memory, good))
        true[mask] = moved
        mask = mask.copy()
        mask[mask] = within
        return parts, true, mask

    def load(
        self, program: Program, memory: Memory, offset: np.ndarray, pointers: np.ndarray, size: int, site: Site
    ) -> None:
        grains = memory.grains(offset, size)
        if memory.is_stored:
            self.find(program, "load after store", memory, site, memory.stored[grains])
        if len(self.launch.programs) > 1:
            before = memory.loaded[grains]
            others = self.launch.of_others(program, before)
            if others.any():
                memory.loaded_before[grains[others]] = before[others]
        memory.loaded[grains] = program.interval | self.site_number(site) << 1
        if memory.loads_of != program.interval:
            memory.loads, memory.loads_of = [], program.interval
        memory.loads.append((site, pointers, grains))

    def store(
        self,
        program: Program,
        memory: Memory,
        offset: np.ndarray,
        pointers: np.ndarray,
        size: int,
        site: Site,
        atomic: bool = False,
    ) -> None:
        grains = memory.grains(offset, size)
        number = self.site_number(site)
        if memory.is_stored:
            before = memory.stored[grains]
            self.find(program, "store after store", memory, site, before[before & 1 == 0] if atomic else before)
        before = memory.loaded[grains]
        if memory.loads_of == program.interval and (before >= program.interval).any():
            for first, read, of_read in memory.loads:
                if read.shape != pointers.shape or not np.array_equal(read, pointers):
                    self.note("store after load", memory, site, first, int(np.isin(grains, of_read).sum()))
        self.find_of_others(program, memory, site, before)
        self.find_of_others(program, memory, site, memory.loaded_before[grains])
        if not atomic and (grains[1:] <= grains[:-1]).any():  # in order, nothing can be there twice
            self.note("twice in a store", memory, site, site, len(grains) - len(np.unique(grains)))
        memory.stored[grains] = program.interval | number << 1 | atomic
        memory.is_stored = True

    def find(self, program: Program, kind: str, memory: Memory, site: Site, marks: np.ndarray) -> None:
        """Note what an access finds of its own program's interval, and of others."""
        mine = marks >= program.interval
        if mine.any():
            mine &= self.launch.owners[marks >> SITES] == program.number
            self.note_marks(kind, memory, site, marks[mine])
        self.find_of_others(program, memory, site, marks)

    def find_of_others(self, program: Program, memory: Memory, site: Site, marks: np.ndarray) -> None:
        if len(self.launch.programs) > 1:
            marks = marks[self.launch.of_others(program, marks)]
            if marks.size:
                self.note_marks("two programs", memory, site, marks)


active: Watch | None = None


@contextmanager
def watched(without: tuple[str | Path, int] | None = None, late: bool = False, strict: bool = False) -> Iterator[Watch]:
    """Watch all kernels that run in Triton's interpreter.

    Args:
        without: the file and line of a barrier that is to have no effect.
        late: whether stores are visible only from the program's next barrier, or its end, on.
        strict: whether a launch with a hazard raises AssertionError when it is done.
    """
    from triton.runtime import interpreter

    global active
    assert active is None, "kernels are watched already"
    watch = active = Watch(without, late, strict)
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic_rmw, atomic_cas = builder.create_atomic_rmw, builder.create_atomic_cas
    set_grid_idx, run, convert = builder.set_grid_idx, executor.__call__, interpreter._implicit_cvt
    outermost = run.__code__, turns.Program.run.__code__
    handle = interpreter.TensorHandle
    others = os.path.join(os.path.dirname(interpreter.triton.__file__), ""), turns.__file__  # files of no kernel

    def where() -> Site:
        """The line that runs, of the kernel or a function that it calls, and the lines of these calls."""
        frame, lines = sys._getframe(2), []
        while frame.f_code not in outermost:
            if not frame.f_code.co_filename.startswith(others):
                lines.append((frame.f_code.co_filename, frame.f_lineno))
            frame = frame.f_back
        return tuple(lines)

    def resolve(pointers, mask, site):
        """Of a handle of pointers: the size of an element, and what `Watch.resolve` returns."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        mask = np.broadcast_to(np.asarray(mask.data, bool), pointers.data.shape)
        parts, true, mask = watch.resolve(pointers.data, mask, size, site)
        return size, parts, handle(true, pointers.dtype), handle(mask, interpreter.tl.int1)

    def masked_load(self, pointers, mask, *rest, **options):
        site = where()
        size, parts, true, mask = resolve(pointers, mask, site)
        for memory, offset in parts:
            watch.load(program(self), memory, offset, pointers.data, size, site)
        return load(self, true, mask, *rest, **options)

    def masked_store(self, pointers, value, mask, *rest, **options):
        site = where()
        size, parts, true, mask = resolve(pointers, mask, site)
        for memory, offset in parts:
            watch.store(program(self), memory, offset, pointers.data, size, site)
        if not watch.late:
            return store(self, true, value, mask, *rest, **options)
        program(self).waiting.append(lambda: store(self, true, value, mask, *rest, **options))

    def masked_atomic_rmw(self, operation, pointers, value, mask, order, *rest):
        site = where()
        size, parts, true, mask = resolve(pointers, mask, site)
        old = atomic_rmw(self, operation, true, value, mask, order, *rest)  # here other programs may have their turn
        for memory, offset in parts:
            watch.store(program(self), memory, offset, pointers.data, size, site, atomic=True)
            for address in np.unique(memory.base + offset).tolist():
                watch.order(program(self), address, order.name.lower())
        return old

    def whole_atomic_cas(self, pointers, *rest):
        site = where()
        size, parts, true, mask = resolve(pointers, handle(np.ones(1, bool), interpreter.tl.int1), site)
        if not mask.data.all():
            raise IndexError(watch.report())  # it has no mask that could leave out what is out of bounds
        for memory, offset in parts:
            watch.store(program(self), memory, offset, pointers.data, size, site, atomic=True)
        return atomic_cas(self, true, *rest)

    def barrier(self):
        watch.barrier(program(self), where())

    def begin_program(self, *place):
        set_grid_idx(self, *place)
        watch.begin_program(place)

    def program(builder) -> Program:
        return watch.launch.programs[builder.grid_idx]

    def to_pointer(x):
        """The pointers of tensors are where the kernel is to think that they are."""
        out = convert(x)
        if hasattr(x, "data_ptr"):
            memory = watch.launch.memory(interpreter._unwrap_tensor(x))
            out.handle.data = out.handle.data - memory.delta
        return out

    def launched(self, *arguments, **options):
        named = {**dict(zip(self.arg_names, arguments, strict=False)), **options}
        tensors = {name: interpreter._unwrap_tensor(x) for name, x in named.items() if hasattr(x, "data_ptr")}
        watch.launch = Launch(self.fn.__name__, tensors)
        try:
            run(self, *arguments, **options)
            for program in watch.launch.programs.values():
                watch.show(program)
        finally:
            watch.launch = None
        assert not (watch.strict and watch.hazards), watch.report()

    patches = [
        mock.patch.multiple(
            builder,
            create_masked_load=masked_load,
            create_masked_store=masked_store,
            create_atomic_rmw=masked_atomic_rmw,
            create_atomic_cas=whole_atomic_cas,
            create_barrier=barrier,
            set_grid_idx=begin_program,
        ),
        mock.patch.object(executor, "__call__", launched),
        mock.patch.object(interpreter, "_implicit_cvt", to_pointer),
    ]
    try:
        with patches[0], patches[1], patches[2]:
            yield watch
    finally:
        active = None
