"""Everything that is launched on a GPU, launched without one, through Triton's own path: see `tests/fake_gpu`.

All of the GPU's tests, the Triton tests, the benchmarks and `sample.py` run to their end on a fake GPU, numbers apart,
and what they launched is compiled.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def compiled(out: Path) -> list[dict]:
    """What was launched, each variant once, compiled for three chips and held against the rules of `bench.compile`."""
    from bench.compile import judge

    found = [variant for file in out.glob("*.pickle") for variant in pickle.loads(file.read_bytes())]
    return judge(list({variant.key: variant for variant in found}.values()), ["sm_80", "sm_90", "sm_100"])


def assert_unbroken(rows: list[dict]) -> None:
    """No register on the stack, no more shared memory than there is, …"""
    broken = [f"{row['kernel']}: {', '.join(row['broken'])}" for row in rows if row["broken"]]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("file", "kernels"),
    [
        ("test_gpu", "lstm_scan_fwd lstm_scan_bwd masked_conv masked_conv_weight cross_entropy_fwd gate_bwd draw_row"),
        ("test_triton", "lstm_scan_fwd lstm_scan_bwd masked_conv masked_conv_weight cross_entropy_bwd gate_fwd"),
        ("test_row_kernel", "draw_row gate_fwd masked_conv lstm_scan_fwd"),
    ],
)
def test_tests_run_to_their_end(tmp_path, file, kernels):
    """And what they launch, which is at least these kernels, compiles and keeps the rules."""
    process = pytest_on_the_fake_gpu(tmp_path, f"tests/{file}.py")
    text = process.communicate()[0]
    assert process.returncode == 0, text[-5000:]
    if file == "test_gpu":  # else: some are about the interpreter alone
        assert "skipped" not in text
    rows = compiled(tmp_path)
    assert {f"{kernel}_kernel" for kernel in kernels.split()} <= {row["kernel"].split(": ")[-1] for row in rows}
    assert_unbroken(rows)


@pytest.mark.parametrize("name", ["kernels", "training", "sampling"])
def test_benchmarks_run_to_their_end(tmp_path, name):
    command = ["-m", f"bench.{name}", "--quick", "--device", "cuda", "--out", str(tmp_path / "results")]
    process = on_the_fake_gpu(tmp_path, *command, everywhere=True)
    text = process.communicate()[0]
    assert process.returncode == 0, text[-5000:]
    rows = compiled(tmp_path)
    assert rows
    assert_unbroken(rows)


@pytest.mark.parametrize("index", [0, 1])
def test_launches_and_captures_are_where_the_tensors_are(tmp_path, index):
    """Also where another device is the current one, as for a process of torchrun that has not been told its own."""
    process = pytest_on_the_fake_gpu(tmp_path, "tests/fake_gpu/gpu_checks.py", index=index)
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
