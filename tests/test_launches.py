"""Everything that is launched on a GPU, launched without one, through Triton's own path: see `tests/fake_gpu`.

The tests of operations, of the row kernel and of a GPU, and `sample.py`, run to their end on a fake GPU, numbers apart,
and what the tests launched is compiled. `tests/test_bench_gpu.py` runs the benchmarks there.
"""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bench.compile import judged
from bench.stand_in import Variant, compile_variant, gpu_target, in_processes, source_of
from kernels.jit import jit, launch
from tests.commands import REPOSITORY, SHORT

pytest.importorskip("triton", reason="Triton is for Linux")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the fake is for machines without a GPU"),
]
FAKE = REPOSITORY / "tests/fake_gpu"


def on_the_fake_gpu(out: Path, *command: str, index: int = 0, everywhere: bool = False, **others) -> subprocess.Popen:
    """A Python process, in which everything that is launched goes to the folder `out`.

    Args:
        everywhere: have the fake GPU from the start; else pytest's plugin is to bring it.
        index: of the device that tensors are on.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAKE_GPU_INDEX": str(index), "FAKE_GPU_OUT": str(out)}
    environment |= {name: str(value) for name, value in others.items()}
    environment.pop("TRITON_INTERPRET", None)
    environment["PYTHONPATH"] = os.pathsep.join([str(FAKE)] * everywhere + [str(REPOSITORY)])
    out.mkdir(exist_ok=True)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=REPOSITORY, env=environment, **pipes)


def pytest_on_the_fake_gpu(out: Path, *arguments: str, **others) -> subprocess.Popen:
    plugin = [
        "-m",
        "pytest",
        "-p",
        "tests.fake_gpu.plugin",
        "--assert=plain",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=-q",
    ]
    return on_the_fake_gpu(out, *plugin, *arguments, **others)


def judge_variant(variant: Variant) -> dict:
    """For the chip with the least shared memory; `python -m bench.compile` is for all."""
    return judged(variant, "sm_80", compile_variant(variant, "sm_80"))


def launched(out: Path) -> dict[str, Variant]:
    """What was launched, each variant once, by its key."""
    found = [variant for file in out.glob("*.pickle") for variant in pickle.loads(file.read_bytes())]
    return {variant.key: variant for variant in found}


def front_end(variant: Variant) -> list[str]:
    """What Triton makes of a kernel for each chip, before its compiler's first pass."""
    from triton.compiler.compiler import ASTSource, ir, make_backend

    texts = []
    for target in map(gpu_target, ("sm_80", "sm_90", "sm_100")):
        source, backend, context = source_of(variant), make_backend(target), ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options({**variant.options, **source.parse_options()})
        given = target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context
        texts.append(str(ASTSource.make_ir(source, *given)))
    return texts


TESTS = {  # files, and kernels that they launch at least
    "tests/test_gpu.py": "lstm_scan_fwd lstm_scan_bwd masked_conv masked_conv_weight cross_entropy_fwd gate_bwd "
    "draw_row",
    "tests/test_gpu_shared.py": "lstm_scan_fwd lstm_scan_bwd",
    "tests/test_operations.py": "lstm_scan_fwd lstm_scan_bwd masked_conv masked_conv_weight cross_entropy_fwd "
    "cross_entropy_bwd gate_fwd gate_bwd",
    "tests/test_row_kernel.py": "draw_row gate_fwd masked_conv lstm_scan_fwd",
}


def run_tests(name: str, out: Path) -> tuple[str, int, str]:
    """The file's name, exit status and text."""
    process = pytest_on_the_fake_gpu(out, name)
    text = process.communicate()[0]
    return name, process.returncode, text


def test_tests_run_to_their_end_and_what_they_launch_compiles(tmp_path):
    """It keeps the rules of `bench.compile` but one, on one chip: no register on the stack, no more shared memory, …

    Each variant is compiled once, whichever tests launch it. `bench.compile` compiles the sizes in use; so here, of the
    row kernel's variants, every eighth, and of each other kernel's every third, or all where THOROUGH is set.
    """
    folders = {name: tmp_path / name.replace("/", "-") for name in TESTS}
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for name, status, text in pool.map(run_tests, folders.keys(), folders.values()):
            assert status == 0, f"{name}\n{text[-5000:]}"
            if name == "tests/test_gpu.py":  # else: some are about the interpreter alone
                assert "skipped" not in text
    variants = {}
    for name, expected in TESTS.items():
        found = launched(folders[name])
        kernels = {variant.kernel for variant in found.values()}
        assert kernels and {f"{kernel}_kernel" for kernel in expected.split()} <= kernels, name
        variants |= found
    by_kernel = {}
    for variant in variants.values():
        by_kernel.setdefault(variant.kernel, []).append(variant)
    drawn = by_kernel.pop("draw_row_kernel")
    assert len(drawn) > 30 and sum(map(len, by_kernel.values())) > 30
    of_drawn, of_others = (1, 1) if os.environ.get("THOROUGH") else (8, 3)
    others = [variant for of_one in by_kernel.values() for variant in of_one[::of_others]]
    rows = in_processes(judge_variant, [*drawn[::of_drawn], *others])  # the largest first
    small = "compute alike"  # at such sizes there are more warps than products
    broken = [(row["kernel"], rule) for row in rows for rule in row["broken"] if small not in rule]
    assert not broken, "\n".join(map(": ".join, broken))
    one_of_each = {variant.kernel: variant for variant in variants.values()}
    for texts in in_processes(front_end, one_of_each.values()):
        assert len(set(texts)) == 1, "bench.stand_in takes Triton's front end to ask nothing of a GPU"


@pytest.mark.parametrize("index", [0, 1])
def test_launches_and_captures_are_where_the_tensors_are(tmp_path, index):
    """Also where another device is the current one, as for a process of torchrun that has not been told its own."""
    process = pytest_on_the_fake_gpu(tmp_path, "tests/fake_gpu/launching.py", index=index)
    text = process.communicate()[0]
    assert process.returncode == 0, text[-5000:]


def test_a_process_of_torchrun_draws_on_its_own_gpu(tmp_path, call):
    status, _, err = call("train", *SHORT)
    assert status == 0, err
    checkpoint = next(Path.cwd().glob("runs/**/last.pt"))
    arguments = [f"checkpoint={checkpoint}", "n=4", f"pngs={tmp_path / 'drawn'}", f"out={tmp_path / 'grid.png'}"]
    for rank in (0, 1):  # the first also writes what the images are
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2}
        process = on_the_fake_gpu(tmp_path / "out", "sample.py", *arguments, index=rank, everywhere=True, **ranks)
        text = process.communicate(timeout=120)[0]
        assert process.returncode == 0, text
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4
    process = on_the_fake_gpu(tmp_path / "out", "sample.py", *arguments, everywhere=True, **ranks)
    text = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "LOCAL_RANK=1: expected less than 1, the number of GPUs here" in text


# --------------------------------------------------------------- what the interpreter's tests check of each launch


def test_a_launch_passes_the_kernel_s_arguments_and_known_options():
    @jit
    def kernel(u, n):
        pass

    u = torch.zeros(1)
    launch(kernel, (1,), u, n=1, num_warps=4, maxnreg=255)
    for arguments, named, said in (
        ((u,), {}, r"missing: \['n'\], unknown: \[\]"),
        ((u, 1), {"main_bias": u}, r"missing: \[\], unknown: \['main_bias'\]"),
        ((u, 1), {"n": 1}, r"missing: \[\], unknown: \[\], of 3 given"),
        ((u, 1, 2), {}, "too many"),
    ):
        with pytest.raises(TypeError, match=said):
            launch(kernel, (1,), *arguments, **named)


def test_a_kernel_s_argument_has_no_name_that_triton_keeps():
    def kernel(stream, n):
        pass

    with pytest.raises(AssertionError, match=r"kernel: Triton takes \['stream'\] for itself"):
        jit(kernel)
    with pytest.raises(AssertionError, match=r"other has no \['m'\]"):

        @jit(varying=("m",))
        def other(n):
            pass
