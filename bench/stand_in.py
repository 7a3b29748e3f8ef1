"""A stand-in for a GPU: Triton's own path of a launch, up to where a kernel would be compiled and run.

    with StandIn("sm_90") as gpu:
        kernels.gate(u, backend="triton")      # u may be on the CPU, or on the meta device
    rows = compile_all(gpu.variants, ["sm_80", "sm_90"])

Within, Triton binds arguments, checks names and options, and specialises as it does where there is such a GPU; no
kernel runs, so what they would have written holds anything. Each variant, a kernel specialised for its arguments, is
recorded once; `compile_all` compiles them for several GPUs side by side. Nothing of it works in Triton's interpreter.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch

from kernels.jit import OPTIONS, triton

TARGETS = {  # name → backend, architecture, threads of a warp, bytes of shared memory that one program may have
    "sm_80": ("cuda", 80, 32, 163 << 10),
    "sm_90": ("cuda", 90, 32, 227 << 10),
    "sm_100": ("cuda", 100, 32, 227 << 10),
    "sm_120": ("cuda", 120, 32, 99 << 10),
    "gfx942": ("hip", "gfx942", 64, 64 << 10),
}


def gpu_target(name: str):
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*TARGETS[name][:3])


@dataclass
class Variant:
    """A kernel as Triton specialised it for a launch: all that compiling it takes."""

    module: str
    kernel: str
    signature: dict[str, str]  # argument → type, or "constexpr"
    constants: dict  # path of a constexpr → value
    attributes: dict  # path of an argument → what is known of its value
    options: dict[str, int]
    same: dict[str, str]  # arguments whose memory is another argument's: see `same_memory`
    name: str = ""  # what it was launched for
    launches: int = field(default=0, compare=False)

    @property
    def key(self) -> str:
        return repr((self.module, self.kernel, self.signature, self.constants, self.attributes, self.options))


def same_memory(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Which tensors have features in common with one before: name → that one's name.

    Two views of one memory have, where one begins within the other's last dimension: at the same image and column they
    are then the same numbers. A view that begins a column later is another memory there.
    """

    def begins_within(x: torch.Tensor, other: torch.Tensor) -> bool:
        if x.untyped_storage()._cdata != other.untyped_storage()._cdata:
            return False
        start, other_start = (t.storage_offset() * t.element_size() for t in (x, other))
        extent, other_extent = (t.shape[-1] * t.element_size() if t.dim() else 1 for t in (x, other))
        return start < other_start + other_extent and other_start < start + extent

    out: dict[str, str] = {}
    for name, x in tensors.items():
        others = (other for other in tensors if other not in out and begins_within(x, tensors[other]))
        if (first := next(others)) != name:
            out[name] = first
    return out


class Driver:
    """What Triton asks of a GPU's driver, answered without one."""

    launcher_cls = utils = None  # nothing is loaded

    def __init__(self, target: str):
        self.target = gpu_target(target)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class StandIn:
    """Within, launches are recorded: see above.

    Attributes:
        variants: the kernels that were launched, each once for all launches that Triton would compile alike.
        name: what the launches to come are for.
    """

    def __init__(self, target: str = "sm_90"):
        assert not triton.knobs.runtime.interpret, "TRITON_INTERPRET=1: nothing would be compiled"
        self.driver, self.found, self.name = Driver(target), {}, ""
        self.kernels, self.launched_before = {}, {}

    @property
    def variants(self) -> list[Variant]:
        return list(self.found.values())

    @property
    def launches(self) -> int:
        """How many there were."""
        return sum(variant.launches for variant in self.variants)

    def __enter__(self) -> StandIn:
        from triton.runtime.jit import JITFunction

        self.run, stand_in = JITFunction.run, self
        self.driver_before, triton.runtime.driver._active = triton.runtime.driver._active, self.driver

        def run(kernel, *arguments, **named):
            named_before = dict(zip(kernel.arg_names, arguments, strict=False)) | named
            stand_in.launched = {name: x for name, x in named_before.items() if isinstance(x, torch.Tensor)}
            if id(kernel) not in stand_in.kernels:
                kernel.device_caches.pop(0, None)  # made for another target, or by a real driver
                stand_in.kernels[id(kernel)] = kernel
            return stand_in.run(kernel, *arguments, **named)

        JITFunction.run = run
        self.hook, triton.knobs.runtime.jit_cache_hook = triton.knobs.runtime.jit_cache_hook, self.record
        return self

    def __exit__(self, *_) -> None:
        from triton.runtime.jit import JITFunction

        JITFunction.run, triton.runtime.driver._active = self.run, self.driver_before
        triton.knobs.runtime.jit_cache_hook = self.hook
        for kernel in self.kernels.values():
            kernel.device_caches.pop(0, None)

    def record(self, *, fn, key: str, compile: dict, **_) -> bool:
        """Triton is about to compile a kernel. It does not where this is true, nor does it run it.

        Args:
            key: Triton's own, which is the same for all launches of a kernel that it would compile alike.
        """
        if variant := self.launched_before.get((fn.module, fn.name, key)):
            variant.launches += 1
            return True
        options = json.loads(compile["specialization_data"])["options"]
        variant = Variant(
            fn.module,
            fn.name,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            {name: options[name] for name in sorted(OPTIONS) if options.get(name) is not None},
            same_memory(self.launched),
            self.name,
        )
        variant = self.launched_before[fn.module, fn.name, key] = self.found.setdefault(variant.key, variant)
        variant.launches += 1
        return True


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack) as the assembler says."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{name}:(\d+)", text) for name in ("REG", "STACK"))
    return int(registers[1]), int(stack[1])


@dataclass
class Compiled:
    """What came of a variant for a target: the texts on the way, and what the kernel takes; or why there is none."""

    seconds: float
    texts: dict[str, str] = field(default_factory=dict)  # ttir, ttgir, assembly
    registers: int = 0
    stack: int = 0
    shared: int = 0
    error: str | None = None


made: dict[str, str] = {}  # the last variant's key → what Triton's front end made of it


def source_of(variant: Variant):
    """The source that Triton compiles. Its front end runs once for all GPUs, as it asks nothing of them.

    The front end takes a third of the time of a large kernel. `tests/test_launches.py` compares its outputs.
    """
    from triton._C.libtriton import ir
    from triton.compiler import ASTSource

    class Source(ASTSource):
        def make_ir(self, target, options, codegen_fns, module_map, context):
            if variant.key in made:
                with tempfile.NamedTemporaryFile("w", suffix=".ttir") as file:
                    file.write(made[variant.key])
                    file.flush()
                    module = ir.parse_mlir_module(file.name, context)
                module.context = context
                return module
            module = super().make_ir(target, options, codegen_fns, module_map, context)
            made.clear()
            made[variant.key] = str(module)
            return module

    kernel = getattr(importlib.import_module(variant.module), variant.kernel)
    return Source(kernel, variant.signature, variant.constants, variant.attributes)


def compile_variant(variant: Variant, target: str) -> Compiled:
    source, start = source_of(variant), time.perf_counter()
    try:
        compiled = triton.compile(source, target=gpu_target(target), options=dict(variant.options))
    except Exception as error:  # whatever the compiler meets is something to report
        first = next(iter(str(error).strip().splitlines()[-1:]), "")
        return Compiled(time.perf_counter() - start, error=f"{type(error).__name__}: {first}")
    texts = {kind: compiled.asm[kind] for kind in ("ttir", "ttgir")}
    if TARGETS[target][0] == "cuda":
        texts["assembly"], (registers, stack) = compiled.asm["ptx"], usage(compiled.asm["cubin"])
    else:
        texts["assembly"] = compiled.asm["amdgcn"]
        counts = (
            re.search(rf"\.{name}:\s*(\d+)", texts["assembly"]) for name in ("vgpr_count", "private_segment_fixed_size")
        )
        registers, stack = (int(count[1]) for count in counts)
    return Compiled(time.perf_counter() - start, texts, registers, stack, compiled.metadata.shared)


def in_processes(function, *arguments: Iterable, together: int = 1) -> list:
    """Map in as many processes as there are cores; each imports Triton itself, without the interpreter.

    Args:
        together: how many calls in a row one process does.
    """
    work = list(zip(*arguments, strict=True))
    workers = max(1, min(len(work), len(os.sched_getaffinity(0))))
    # A fresh process has no threads of torch that a fork would copy; it has the environment of now.
    with mock.patch.dict(os.environ), ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        os.environ.pop("TRITON_INTERPRET", None)
        return list(pool.map(partial(_call, function), work, chunksize=together))


def _call(function, arguments: tuple):
    return function(*arguments)


def compile_all(variants: list[Variant], targets: list[str]) -> list[tuple[Variant, str, Compiled]]:
    """Every variant for every target."""
    work = list(product(variants, targets))
    found = in_processes(compile_variant, *zip(*work, strict=True), together=len(targets))
    return [(*of, out) for of, out in zip(work, found, strict=True)]


def write_rows(path: Path, command: str, rows: list[dict]) -> None:
    """Write a report as JSON, a line a row, after the versions that it is of."""
    head = {"command": command, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    head |= {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(json.dumps(head, indent=1)[:-2] + f',\n "rows": [\n{lines}\n]}}\n')
