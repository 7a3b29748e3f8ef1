"""What `python -m bench.compile` promises: all kernels keep its rules, and one that does not makes it exit with 1."""

import json
import os
import re
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

from bench.compile import main
from bench.compiled_text import hasty_copies, narrow_addresses, replicated, unguarded
from tests.commands import REPOSITORY

pytestmark = pytest.mark.slow


def report(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.compile", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_every_kernel_keeps_the_rules(tmp_path):
    """For one chip; `python -m bench.compile` compiles for all three."""
    path = tmp_path / "report.json"
    done = report("--target", "sm_90", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert rows and not any(row["broken"] for row in rows)
    names = (
        "diagonal 28",
        "row 32",
        "convolution 7×7",
        "convolution 3×3",
        "cross-entropy",
        "gate",
        "sampling PixelCNN",
        "training",
    )
    for name in names:
        assert any(row["kernel"].startswith(name) for row in rows), name


def test_other_chips_are_compiled_for_on_demand(tmp_path):
    path = tmp_path / "report.json"
    only = "convolution 1×1, 256 → 128, bfloat16: masked_conv_kernel"
    done = report("--target", "sm_120", "--target", "gfx942", "--only", only, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert {row["target"] for row in rows} == {"sm_120", "gfx942"}
    assert all(row["registers"] > 30 and len(row["matrix"]) == 1 for row in rows)


BREAKING = [  # a kernel, what is set, and which rule it then breaks
    ("diagonal 64 positions, f = 128, bfloat16: lstm_scan_fwd", "maxnreg=64", "bytes of stack"),
    ("diagonal 28 positions, f = 16, bfloat16: lstm_scan_bwd", "num_warps=4", "compute alike (32×16 2 times"),
    ("convolution 3×3 B, 128 → 128, bfloat16: masked_conv_kernel", "num_stages=9", "bytes of shared memory"),
    ("convolution 3×3 B, 16 → 16, bfloat16: masked_conv_weight", "BLOCK_N=24", "does not compile"),
]
BAD = [
    (["--only", "no such kernel"], "no kernel's name holds 'no such kernel'"),
    (["--set", "num_warps"], "--set=num_warps: expected NAME=N"),
    (["--target", "sm_70"], "invalid choice"),
]
IN_TURN = """
import json, sys
from bench.compile import main

def run(arguments):
    try:
        return main(arguments)
    except SystemExit as end:
        return end.code

if __name__ == "__main__":
    for arguments in json.loads(sys.argv[1]):
        status = run(arguments)
        print("status", status, flush=True)
        print("status", status, file=sys.stderr, flush=True)
"""


def in_turn(tmp_path, *commands: list[str]) -> list[tuple[int, str, str]]:
    """(exit status, stdout, stderr) of each command, all in one process."""
    script = tmp_path / "in_turn.py"
    script.write_text(IN_TURN)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(script), json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    parts = [re.split(r"status (\d)\n", text) for text in (done.stdout, done.stderr)]
    assert len(parts[0]) == len(parts[1]) == 2 * len(commands) + 1
    return [(int(code), out, err) for out, code, err in zip(parts[0][::2], parts[0][1::2], parts[1][::2], strict=False)]


def test_a_broken_rule_ends_with_status_1(tmp_path):
    done = in_turn(tmp_path, *(["--target", "sm_90", "--only", only, "--set", other] for only, other, _ in BREAKING))
    for (status, out, err), (_, _, broken) in zip(done, BREAKING, strict=True):
        assert status == 1 and broken in out, out + err


def test_bad_arguments_are_named(tmp_path):
    done = in_turn(tmp_path, *(arguments for arguments, _ in BAD))
    for (status, _, err), (_, said) in zip(done, BAD, strict=True):
        assert status == 2 and said in err and "Traceback" not in err


def test_nothing_is_compiled_in_the_interpreter(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2 and "TRITON_INTERPRET" in capsys.readouterr().err


def test_addresses_of_32_bits_are_found():
    """By the text of a kernel that multiplies before it widens, and of one that never widens."""
    head = "tt.func public @k(%u: !tt.ptr<f32>, %f: i32) {\n%p = tt.get_program_id x : i32\n"
    load = "%v = tt.load %at : !tt.ptr<f32>\n}"
    good = head + "%w = arith.extsi %p : i32 to i64\n%o = arith.muli %w, %w : i64\n"
    good += "%at = tt.addptr %u, %o : !tt.ptr<f32>, i64\n" + load
    assert narrow_addresses(good, ()) == []
    late = head + "%o = arith.muli %p, %f : i32\n%w = arith.extsi %o : i32 to i64\n"
    late += "%at = tt.addptr %u, %w : !tt.ptr<f32>, i64\n" + load
    assert narrow_addresses(late, ()) == ["the product %o"]
    never = head + "%o = arith.addi %p, %f : i32\n%at = tt.addptr %u, %o : !tt.ptr<f32>, i32\n" + load
    assert narrow_addresses(never, ()) == ["the offset into %u"]
    assert narrow_addresses(never, ("u",)) == []


def test_copies_of_written_memory_are_found():
    """A loop over stages: store, barrier, an inner loop whose copies begin before it and go on in it."""
    head = "tt.func @k(%u: !tt.ptr<f32>, %w: !tt.ptr<f32>) {\n%a = tt.splat %u : x\n%b = tt.splat %w : x\n"
    copy = "%c = ttg.async_copy_global_to_local {}, %l : x\n"
    outer, store, wall = "scf.for %i = %0 to %n {\n", "tt.store %a, %v : x\n", "ttg.barrier local\n"

    def inner(value, then=""):
        return copy.format(value) + "scf.for %k = %0 to %m {\n" + copy.format(value) + then + "}\n"

    def found(*lines):
        return hasty_copies(head + "".join(lines) + "}\n")

    assert found(outer, inner("%a"), store, wall, "}\n") == []
    assert found(outer, store, wall, inner("%a"), "}\n") == []
    assert found(store, inner("%b")) == []  # of other memory
    assert found(outer, store, inner("%a"), wall, "}\n") == ["%u"] * 2  # the barrier is late
    assert found(outer, inner("%a"), store, "}\n") == ["%u"] * 2  # there is none
    assert found(outer, inner("%a", store), wall, "}\n") == ["%u"] * 2  # the loop itself stores
    assert found(outer, copy.format("%a"), store, wall, "}\n") == ["%u"]  # for the outer loop's next turn
    assert found(outer, inner("%unknown"), store, wall, "}\n") == ["%unknown"] * 2
    views = head + outer + store + inner("%b") + wall + "}\n}\n"
    assert hasty_copies(views) == [] and hasty_copies(views, {"%w": "%u"}) == ["%u"] * 2


@pytest.mark.parametrize("barrier", ["ttg.barrier local", "gpu.barrier"])  # of Triton 3.7 and 3.6
def test_a_missing_barrier_is_found(barrier):
    text = "tt.func @k(%u: !tt.ptr<f32>, %w: !tt.ptr<f32>) {\n%v = tt.load %u : x\ntt.store %u, %v : x\n"
    assert unguarded(text) == ["%u"]
    assert unguarded(text + f"{barrier}\n") == []
    assert unguarded(f"{barrier}\n" + text) == ["%u"]
    assert unguarded(text.replace("store %u", "store %w")) == []


@pytest.mark.parametrize(
    ("layout", "times"),
    [
        ("ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [8, 1], instrShape = [16, 8]}>", 4),
        ("ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [2, 4], instrShape = [16, 8]}>", 1),
        ("ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 32, 16]}>", 2),
        ("ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [8, 4], warpsPerCTA = [4, 2], order = [1, 0]}>", 1),
        ("ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [8, 4], warpsPerCTA = [4, 2], order = [1, 0]}>", 2),
    ],
)
def test_products_that_warps_compute_alike_are_found(layout, times):
    """All warps' tile of a layout, against a result of 32×32."""
    product = "%total = tt.dot %a, %b, %c : tensor<32x16xbf16, #x> * tensor<16x32xbf16, #y> -> tensor<32x32xf32, #out>"
    assert replicated(f"#out = #{layout}\n{product} loc(#loc1)\n") == ([f"32×32 {times} times"] if times > 1 else [])
