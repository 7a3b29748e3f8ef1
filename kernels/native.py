"""Machine code for this computer's CPU, compiled once and kept on the disk.

`library(write, lanes, double)` calls `write(code)`, which writes functions down (`kernels.vector`), and returns them
ready to be called with integers and addresses. Calls let other threads run. `in_parallel` and `share` are for several.

What is compiled is kept below ~/.cache/pixelrnn/compiled, named by everything that it depends on: these files, the
compiler's version, and the CPU. It is machine code that will be run, so its digest is checked first; a file that does
not have it is compiled again.

PIXELRNN_CPU=generic compiles for the least of this architecture's CPUs, or for another of `CPUS`; results are the same
bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import os
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import torch

from checks import check_one_of
from files import write_atomically
from kernels.vector import I64, Code, Value

FOLDER = "~/.cache/pixelrnn/compiled"
DIGEST = 32  # bytes
# What may be asked for, by LLVM's names, and what this machine must have for it: LLVM ends the process at another name.
CPUS = {"generic": None, "nehalem": "sse4.2", "haswell": "avx2", "x86-64-v4": "avx512vl"}
lock = threading.Lock()
engines = []  # that the compiled functions live in
within = threading.local()  # `shared`: whether this thread is one of `share`


def cpu() -> tuple[str, str]:
    """LLVM's name of the CPU to compile for, and what it has beside that.

    Raises:
        ValueError: PIXELRNN_CPU is none that code could run on here.
    """
    return found(os.environ.get("PIXELRNN_CPU"))


@lru_cache
def found(named: str | None) -> tuple[str, str]:
    features = llvm.get_host_cpu_features()
    if named:
        check_one_of("PIXELRNN_CPU", named, [name for name, needed in CPUS.items() if features.get(needed, not needed)])
        return named, ""
    return llvm.get_host_cpu_name(), features.flatten()


def vector_bytes() -> int:
    """Bytes of the CPU's widest vectors: 64, 32 or 16."""
    (name, features), needed = cpu(), {64: ("avx512f", "x86-64-v4"), 32: ("avx2", "haswell")}
    return next((size for size, (has, of) in needed.items() if f"+{has}" in features.split(",") or name == of), 16)


def lanes(b: int, double: bool) -> int:
    """How many numbers a vector has, of b that are computed side by side."""
    whole = max(vector_bytes(), 32) // (8 if double else 4)
    return whole // 2 if b <= whole // 2 and vector_bytes() == 64 else whole


def lanes_of_tile(b: int, double: bool) -> int:
    """How many images a tile has, of b.

    Where a CPU has few registers, a tile of many images is two of them wide: each weight is loaded less often.
    """
    whole = lanes(b, double)
    return 2 * whole if vector_bytes() == 32 and b > 2 * whole else whole


def registers(lanes: int, double: bool) -> tuple[int, bool]:
    """How many registers a vector takes, and whether the CPU has many of them."""
    return max(1, lanes * (8 if double else 4) // vector_bytes()), vector_bytes() == 64


def machine():
    """LLVM's compiler for the CPU."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    name, features = cpu()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(cpu=name, features=features, opt=2, jit=True, codemodel="jitdefault")


def compiled(text: str, target) -> bytes:
    """An object file of a module of LLVM's instructions."""
    module = llvm.parse_assembly(text)
    module.triple, module.data_layout = target.triple, str(target.target_data)
    module.verify()
    passes = llvm.create_new_module_pass_manager()
    passes.add_sroa_pass()  # variables become registers
    passes.add_instruction_combine_pass()
    passes.add_simplify_cfg_pass()
    passes.run(module, llvm.create_pass_builder(target, llvm.create_pipeline_tuning_options()))
    return target.emit_object(module)


def kept(path: Path, make: Callable[[], bytes]) -> bytes:
    """The contents of a file behind their digest; where there is none or it is damaged, they are made and written."""
    try:
        whole = path.read_bytes()
        if hashlib.sha256(whole[DIGEST:]).digest() == whole[:DIGEST]:
            return whole[DIGEST:]
    except OSError:
        pass
    made = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, lambda file: file.write(hashlib.sha256(made).digest() + made))
    except OSError:  # a disk that cannot be written to: compile each time
        pass
    return made


@lru_cache
def sources() -> bytes:
    """A digest of the files that machine code depends on."""
    of_all = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        of_all.update(path.read_bytes())
    return of_all.digest()


def library(write: Callable[[Code], object], functions: dict[str, int], lanes: int, double: bool = False) -> dict:
    """The functions that `write(code)` writes under these names, compiled: name → a function of so many integers.

    Args:
        functions: how many arguments each has; an address is an integer too.
        lanes, double: see `Code`.
    """
    with lock:
        return loaded(write, tuple(functions.items()), lanes, double, cpu())


@lru_cache
def loaded(
    write: Callable[[Code], object], functions: tuple[tuple[str, int], ...], lanes: int, double: bool, of: tuple
) -> dict:
    name = f"{write.__module__.rpartition('.')[2]}-{write.__name__}"
    key = repr((name, lanes, double, of, llvmlite.__version__, llvm.llvm_version_info, platform.machine())).encode()
    path = Path(FOLDER).expanduser() / f"{name}-{hashlib.sha256(sources() + key).hexdigest()[:32]}.o"
    target = machine()

    def make() -> bytes:
        code = Code(lanes, double, *registers(lanes, double))
        write(code)
        return compiled(str(code.module), target)

    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target)
    engine.add_object_file(llvm.ObjectFileRef.from_data(kept(path, make)))
    engine.finalize_object()
    engines.append(engine)
    kinds = {name: ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * count) for name, count in functions}
    return {name: kind(engine.get_function_address(name)) for name, kind in kinds.items()}


# ------------------------------------------------------------------------------------------------------- threads


def write_turns(code: Code) -> None:
    """Write what each of torch's threads does: as long as there are jobs that none has done, the next one.

    In memory: how many were begun, how many there are, the job's function, how many arguments one has, all arguments.
    """

    def turns(code: Code, at: Value) -> None:
        count, function, arguments = (code.load_integer(at, k) for k in (1, 2, 3))
        with code.loop(count):
            number = code.taken(at)
            with code.when(number < count):
                code.call_at(function, code.address(at, number * arguments + 4, I64))

    code.function(turns, "p", name="turns")


@lru_cache
def openmp() -> Callable | None:
    """What has torch's own threads run a function: of the function, its argument, how many, 0. None: there is none."""
    start = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if os.name == "posix" else None
    if start is not None:
        start.argtypes, start.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return start


def in_parallel(job: Callable[[int], None], arguments: Sequence[tuple[int, ...]]) -> None:
    """Call a compiled `Code.job` with each of these arguments, by as many threads as torch uses: by its own threads.

    For a millisecond and more after each operation of torch, its threads wait awake for the next one. A thread of
    Python's, as `share` has them, would have to wait until they sleep, longer than such a job takes.
    """
    if not arguments:
        return
    start, flat = openmp(), [*itertools.chain.from_iterable(arguments)]
    memory = (ctypes.c_int64 * (4 + len(flat)))(0, len(arguments), address_of(job), len(arguments[0]), *flat)
    turns, at = library(write_turns, {"turns": 1}, 4)["turns"], ctypes.addressof(memory)
    threads = min(len(arguments), torch.get_num_threads())
    if threads == 1 or getattr(within, "shared", False):
        turns(at)
    elif start is not None:
        start(address_of(turns), at, threads, 0)
    else:
        share(lambda k: [turns(at)], threads)


def address_of(function: Callable) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


@lru_cache
def pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="tile")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a child has none of its parent's threads


def share(call: Callable[[int], Iterable[object]], count: int) -> None:
    """Go through call(0), …, call(count − 1), by as many threads as torch uses.

    What a call yields is not used; but where there was an error, or Ctrl-C, it is not asked for more. Within a call,
    another `share` is done by its thread alone.
    """
    stopped, threads = threading.Event(), min(count, torch.get_num_threads())
    if getattr(within, "shared", False):
        threads = 1

    def through(k: int) -> None:
        within.shared = True
        try:
            for _ in call(k):
                if stopped.is_set():
                    return
        except BaseException:
            stopped.set()
            raise

    if threads == 1:
        for k in range(count):
            for _ in call(k):
                pass
        return
    calls = []
    try:
        calls += (pool(threads).submit(through, k) for k in range(count))
        for made in calls:
            made.result()
    except BaseException:
        stopped.set()
        raise
    finally:
        wait(calls)
