"""`python -m bench.gpu` loses nothing: it ends, on a fake GPU; it is killed at any moment; its steps fail and hang.

The fake GPU (tests/fake_gpu) runs no kernel, so numbers mean nothing there.
"""

import argparse
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import gpu, kernels, measure, sweep
from bench.measure import LOST, Results

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 120  # seconds that something may take on a busy machine before a test fails
PASSING = {"PYTEST_ADDOPTS": "-p tests.fake_gpu.plugin --assert=plain"}  # tests of numbers that mean nothing
ENVIRONMENT = {"date", "device", "cpu", "cores", "threads", "python", "torch", "triton", "commit"}

pytestmark = pytest.mark.slow  # processes that are started, and killed
linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux, and so is /proc")


def wait_for(condition, what: str):
    """What the condition gives, once it is true."""
    until = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < until, what
        time.sleep(0.02)
    return found


def surroundings(**more: str) -> dict[str, str]:
    """The environment of a process that has the fake GPU, and nothing of this run of pytest."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
    return {**own, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests/fake_gpu"), str(ROOT)]), **more}


def start(*arguments: str, **more: str) -> subprocess.Popen:
    """A Python process with the fake GPU, in a group of its own; what it prints can be read."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=surroundings(OMP_NUM_THREADS="1", **more),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def rows_of(path: Path) -> list[dict]:
    return read(path)["rows"] if path.exists() else []


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


# ------------------------------------------------------------------------------------------------ on a fake GPU


@linux
@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_runs_to_its_end(part, tmp_path, tmp_path_factory):
    launched = tmp_path_factory.mktemp("launched")
    more = {**PASSING, "FAKE_GPU_OUT": str(launched)}
    process = start("-m", "bench.gpu", "--part", part, "--quick", "--out", str(tmp_path), **more)
    out, _ = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 0, out
    options = [variant.options for path in launched.iterdir() for variant in pickle.loads(path.read_bytes())]
    assert len(options) > 5
    assert all(32 * x["num_warps"] * x.get("maxnreg", 1) <= 65536 for x in options)  # the registers there are
    files = {path.name for path in tmp_path.iterdir()}
    benchmarks = [step for step in gpu.PARTS[part] if step in gpu.CASES]
    assert files == {f"gpu-{part}.json", f"gpu-{part}.log", *(f"{step}-cuda-quick.json" for step in benchmarks)}
    assert len(files) <= 8
    steps = read(tmp_path / f"gpu-{part}.json")
    assert steps.keys() == ENVIRONMENT | {"command", "gpu", "rows"}
    assert steps["command"] == f"python -m bench.gpu --part {part} --quick --out DIR"
    assert [row["step"] for row in steps["rows"]] == list(gpu.PARTS[part])
    for row in steps["rows"]:
        assert row["status"] in (0, *["not installed"] * (row["step"] == "sanitizer")) and row["seconds"] >= 0
        assert str(tmp_path) not in row["command"]
    for step in benchmarks:
        result = read(tmp_path / f"{step}-cuda-quick.json")
        assert result.keys() == ENVIRONMENT | {"command", "rows"} and result["rows"]
        assert not any("error" in row for row in result["rows"])
        assert result["device"] == "no GPU: a fake"
    assert out == (tmp_path / f"gpu-{part}.log").read_text()
    if part == "1":
        figures = rows_of(tmp_path / "cost-cuda-quick.json")
        assert [row["figure"] for row in figures] == ["scan_forward", "scan_backward", "row_kernel", "graph_node"]
        for row in figures:
            assert row["ratio"] == pytest.approx(2 * row["measured"]["median"] / sum(row["model"].values()))
        assert out.count("cost:  graph_node") == 2  # when it was measured, and at the end, which is what is read
    if part == "2":
        rows = rows_of(tmp_path / "sampling-cuda-quick.json")
        order = [(r["backend"], r["bf16"]) for r in rows if r["part"] == "throughput"]
        assert order[0] == ("triton", True) and order[-1] == ("torch", False)
        assert sorted(order, key=lambda x: not x[1]) == order  # bfloat16 first
        assert [r["part"] for r in rows].index("noise") < [r["part"] for r in rows].index("throughput")


@linux
def test_why_a_test_failed_is_in_the_log(tmp_path):
    """Without the plugin that lets them pass, tests of numbers fail."""
    process = start("-m", "bench.gpu", "--only", "tests", "--quick", "--out", str(tmp_path))
    out, _ = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 1
    (row,) = rows_of(tmp_path / "gpu.json")
    assert row["status"] == 1
    log = (tmp_path / "gpu.log").read_text()
    assert "test_float32_is_exact_and_two_runs_are_equal" in log and "E   assert" in log and out == log


def status_of(folder: Path) -> str | int | None:
    rows = rows_of(folder / "gpu.json")
    return rows[0]["status"] if rows else None


@linux
@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_ended_in_the_middle_it_leaves_what_was_measured(number, rows, tmp_path):
    """Of the command's group alone: a step has one of its own."""
    process = start("-m", "bench.gpu", "--only", "sampling,cost", "--quick", "--out", str(tmp_path))
    path = tmp_path / "sampling-cuda-quick.json"
    wait_for(lambda: status_of(tmp_path) == "runs" and len(rows_of(path)) >= rows, "no rows")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    (child,) = wait_for(lambda: children.read_text().split(), "no step")
    os.killpg(process.pid, number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    wait_for(partial(is_gone, int(child)), "the step goes on alone")
    assert status_of(tmp_path) == ("runs" if number == signal.SIGKILL else "interrupted")
    assert rows_of(tmp_path / "gpu.json")[1]["status"] == "waits"
    measured = rows_of(path)
    assert len(measured) >= rows and not any("error" in row for row in measured)
    said = (tmp_path / "gpu.log").read_text().count("\nsampling:  ")
    assert said in (len(measured), len(measured) - 1)


BENCHMARKS = {  # some of each
    "cost": ["--cost", "scan_forward,scan_backward,row_kernel"],
    "sweep": ["--sweep", "scan"],
    "kernels": ["--kernels", "gate,cross_entropy", "--device", "cpu"],
    "training": ["--models", "pixel_cnn", "--device", "cpu"],
    "sampling": ["--models", "pixel_cnn", "--parts", "growth,methods", "--device", "cpu"],
}
KILLED = """
import os, runpy, signal, sys
from bench.measure import Results

add = Results.add

def add_and_die(results, row):
    add(results, row)
    if len(results.rows) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

Results.add = add_and_die
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


@linux
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_killed_after_a_row_leaves_the_rows(name, tmp_path):
    options = [*BENCHMARKS[name], "--quick", "--out", str(tmp_path), "--name", "it"]
    process = start("-c", KILLED, f"bench.{name}", *options)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, out
    (path,) = tmp_path.iterdir()
    left = read(path)
    assert left.keys() == ENVIRONMENT | {"command", "unfinished", "rows"}
    assert len(left["rows"]) == 2 and not any("error" in row for row in left["rows"])


# ----------------------------------------------------------------------------------------------------- its steps


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def run(tmp_path, *steps: gpu.Step) -> tuple[int, dict[str, str | int], str]:
    """Exit status, what became of each step, the log."""
    status = gpu.Run(list(steps), tmp_path, "gpu", {"command": ""}, time.monotonic()).all()
    rows = rows_of(tmp_path / "gpu.json")
    assert all(row["seconds"] is not None for row in rows)
    return status, {row["step"]: row["status"] for row in rows}, (tmp_path / "gpu.log").read_text()


@linux
def test_a_step_that_hangs_is_ended_with_all_that_it_started(tmp_path, capfdbinary):
    hangs = "import subprocess, sys, time; code = 'import time; time.sleep(1000)'\n"
    hangs += "print('started', subprocess.Popen([sys.executable, '-c', code]).pid, flush=True); time.sleep(1000)"
    begin = time.monotonic()
    status, became, log = run(
        tmp_path,
        gpu.Step("hangs", python(hangs), 3),
        gpu.Step("next", python("print('here')"), PATIENCE),
    )
    assert 3 <= time.monotonic() - begin < PATIENCE
    assert (status, became) == (1, {"hangs": "too long", "next": 0})
    pid = int(log.partition("started ")[2].split()[0])
    wait_for(partial(is_gone, pid), "what the step started goes on")
    assert "\nhere\n" in log


def test_a_step_that_fails_leaves_the_others(tmp_path):
    status, became, log = run(
        tmp_path,
        gpu.Step("fails", python("import sys; print('why'); sys.exit(7)"), PATIENCE),
        gpu.Step("dies", python("import os; print('so far', flush=True); os.abort()"), PATIENCE),
        gpu.Step("absent", ["env", "A=1", "no-such-program"], PATIENCE),
        gpu.Step("good", python("print('good')"), PATIENCE),
    )
    assert (status, became) == (1, {"fails": 7, "dies": -6, "absent": "not installed", "good": 0})
    assert all(f"\n{text}\n" in log for text in ("why", "so far", "good"))


def test_all_good_is_status_zero(tmp_path):
    assert run(tmp_path, gpu.Step("good", python(""), PATIENCE), gpu.Step("absent", ["no-such-program"], 1))[0] == 0


def test_time_that_a_step_leaves_is_the_next_one_s(tmp_path):
    """And no step begins a limit of its own: all end when the sum of their limits is over."""
    waits = python("import time; time.sleep(3)")
    late = gpu.Run([gpu.Step("a", python(""), 60), gpu.Step("b", waits, 0.1)], tmp_path, "gpu", {}, time.monotonic())
    assert late.all() == 0
    over = gpu.Run([gpu.Step("a", waits, 1), gpu.Step("b", waits, 1)], tmp_path, "gpu", {}, time.monotonic() - 60)
    assert over.all() == 1 and [row["status"] for row in over.rows] == ["too long"] * 2


def test_a_step_that_prints_without_end_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG", 10_000)
    _, became, log = run(tmp_path, gpu.Step("loud", python("while True: print('again and again')"), PATIENCE))
    assert became == {"loud": "printed too much"} and 10_000 < len(log) < 11_000


def test_a_step_that_loses_the_gpu_goes_on_in_another_process(tmp_path):
    code = f"import sys; print(sys.argv[1:]); sys.exit({LOST} * (sys.argv[1:] == []))"
    _, became, log = run(
        tmp_path,
        gpu.Step("resumes", python(code), PATIENCE, resumes=True),
        gpu.Step("does not", python(code), PATIENCE),
    )
    assert became == {"resumes": 0, "does not": LOST} and "['--resume']" in log


def test_a_part_takes_less_than_five_minutes():
    assert {name for part in gpu.PARTS.values() for name in part} == gpu.LIMITS.keys()
    for part in gpu.PARTS.values():
        assert sum(step.limit for step in gpu.steps(list(part), Path("DIR"))) <= 285
    assert all(seconds < gpu.LIMITS[name] for name, seconds in gpu.CASES.items())


@pytest.mark.parametrize(
    "arguments, said",
    [(["--only", "speed"], "--only=speed: expected cost, "), (["--part", "1", "--only", "tests"], "one of them")],
)
def test_a_wrong_option_ends_in_one_line(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu.main(arguments)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- rows that fail


def results(tmp_path, **more) -> Results:
    arguments = {"command": "some", "command_line": "python -m bench.some", "device": torch.device("cpu")}
    arguments |= {"out": tmp_path, "name": "some", "resume": False, "case_limit": None}
    return Results(argparse.Namespace(**arguments | more), ("ms",))


def failing() -> list[dict]:
    raise torch.OutOfMemoryError("tried to\nallocate too much")


def test_a_case_that_fails_is_a_row_and_the_next_one_comes(tmp_path, capsys):
    def halfway():
        yield {"ms": 1}
        failing()

    rows = results(tmp_path)
    rows.case({"shape": [1]}, halfway)
    rows.case({"shape": [2]}, lambda: [{"ms": 2}])
    assert rows.finish() == 1
    error = {"shape": [1], "error": "OutOfMemoryError: tried to allocate too much"}
    assert read(tmp_path / "some.json")["rows"] == [{"ms": 1}, error, {"ms": 2}]
    assert "error OutOfMemoryError" in capsys.readouterr().out


def test_every_row_is_on_the_disk_before_the_next_one_is_measured(tmp_path):
    rows = results(tmp_path)

    def measured():
        for k in range(3):
            assert rows_of(tmp_path / "some.json") == [{"ms": n} for n in range(k)]
            yield {"ms": k}

    rows.case({}, measured)
    assert read(tmp_path / "some.json")["unfinished"] == 1
    assert rows.finish() == 0 and "unfinished" not in read(tmp_path / "some.json")


def test_a_run_goes_on_where_another_ended(tmp_path, monkeypatch):
    def ended(status):
        raise SystemExit(status)

    monkeypatch.setattr(measure, "answers", lambda device: False)
    monkeypatch.setattr(measure.os, "_exit", ended)
    first = results(tmp_path)
    first.case({}, lambda: [{"ms": 1}])
    with pytest.raises(SystemExit) as stopped:
        first.case({"shape": [2]}, failing)
    assert stopped.value.code == LOST
    second = results(tmp_path, resume=True)
    for ms in (1, 2, 3):
        second.case({}, lambda ms=ms: [{"ms": ms}])
    assert second.finish() == 1
    assert [row.get("ms") for row in rows_of(tmp_path / "some.json")] == [1, None, 3]
    third = results(tmp_path, resume=True)  # nothing is left to do
    third.case({}, failing)
    assert len(third.rows) == 3


def test_a_case_that_does_not_end_is_a_row(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(measure.os, "_exit", lambda status: ended.set())
    rows = results(tmp_path, case_limit=0.1)
    rows.case({"shape": [1]}, lambda: [] if ended.wait(PATIENCE) else [{"ms": 1}])
    assert rows_of(tmp_path / "some.json") == [{"shape": [1], "error": "no end after 0.1 s"}]


@pytest.mark.parametrize("measured", ["scan", "rows"])
def test_a_kernel_that_does_not_fit_is_no_failure(measured, monkeypatch):
    class OutOfResources(Exception):  # as Triton's
        pass

    def too_large(*_, **__):
        raise OutOfResources("shared memory, Required: 300000")

    monkeypatch.setattr(sweep, "pixel_cnn", lambda args: None)
    for name in ("scan_launches", "timed_row_kernel"):
        monkeypatch.setattr(sweep, name, too_large)
    about, arguments = {"kernel": "a"}, {"scan": ((1, 3, 4, 2), "streamed", True), "rows": (1,)}[measured]
    measure = partial(getattr(sweep, measured), *arguments, {}, about, None)
    said = [{"kernel": "a", "no_room": "OutOfResources: shared memory, Required: 300000"}]
    assert sweep.where_it_fits(about, measure) == said
    monkeypatch.setattr(sweep, "no_room", lambda error: False)
    with pytest.raises(OutOfResources):
        sweep.where_it_fits(about, measure)


def test_what_fails_beside_something_else_leaves_the_other_s_times():
    errors, times = {}, iter(range(100))

    def second_time(clock) -> None:
        if next(times) == 1:
            raise RuntimeError("no more")
        clock.lap("all")

    things = {"good": measure.whole(lambda: None), "bad": second_time}
    measured = measure.interleave(things, torch.device("cpu"), 3, 0, errors)
    assert measured.keys() == {"good"} and len(measured["good"]["total"]) == 3
    assert errors == {"bad": "RuntimeError: no more"}
    with pytest.raises(RuntimeError):
        measure.interleave({"bad": lambda clock: failing()}, torch.device("cpu"), 1, 0, {})


def test_a_baseline_that_fails_is_a_row_of_its_own(tmp_path, monkeypatch):
    make, *sizes = kernels.OPERATIONS["gate"]

    def without_baseline(*arguments):
        work = make(*arguments)
        return work._replace(things=work.things | {"plain": (failing, [])})

    monkeypatch.setitem(kernels.OPERATIONS, "gate", (without_baseline, *sizes))
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--kernels", "gate,stem"]
    assert kernels.main(options) == 1
    rows = rows_of(tmp_path / "kernels-cpu-quick.json")[1:]
    said = [(row["operation"], row["implementation"], "error" in row) for row in rows]
    assert said == [("gate", "plain", True), ("gate", "ours", False), ("stem", "ours", False), ("stem", "dense", False)]


# ------------------------------------------------------------------------------------ failures, when they happen

WAITS = """
import os, time

def test_fails():
    left = [1, 2]
    assert left == [1, 3]

def test_waits():
    until = time.monotonic() + {patience}
    while not os.path.exists({go!r}):
        assert time.monotonic() < until
        time.sleep(0.02)
"""
LOSES = """
import sys
from types import SimpleNamespace

def synchronize():
    if "lost" in sys.modules:
        raise RuntimeError("an illegal memory access")

sys.modules["torch"] = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: True, synchronize=synchronize))
"""
LOST_BY = """
import sys

def test_before(): pass

def test_loses():
    sys.modules["lost"] = sys
    assert False, "here"

def test_after(): assert "lost" not in sys.modules

def test_last(): assert "lost" not in sys.modules
"""


def pytest_process(folder: Path, *arguments: str) -> subprocess.Popen:
    """pytest in a folder of its own, which has no GPU, and not even torch."""
    own = surroundings(PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    line = [sys.executable, "-m", "pytest", "-p", "tests.at_once", "-p", "no:cacheprovider", "-v", "--tb=short"]
    return subprocess.Popen(
        [*line, *arguments], cwd=folder, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def side_by_side(n: int) -> list[str]:
    if n:
        pytest.importorskip("xdist")
    return ["-p", "xdist", "-n", str(n)] if n else []


@pytest.mark.parametrize("n", [0, 2])
def test_why_a_test_failed_is_said_while_others_run(n, tmp_path):
    go = tmp_path / "go"
    (tmp_path / "test_it.py").write_text(WAITS.format(go=str(go), patience=PATIENCE))
    seen = ""
    with pytest_process(tmp_path, *side_by_side(n)) as process:
        for line in process.stdout:
            seen += line
            if line.startswith("E ") and "assert [1, 2] == [1, 3]" in line:  # some versions name the error before it
                go.touch()
    assert process.returncode == 1 and go.exists(), seen
    assert "1 failed, 1 passed" in seen
    assert seen.count("left == [1, 3]") == 1  # not once more at the end


def test_tests_go_on_in_another_process_where_one_lost_the_gpu(tmp_path):
    arguments = side_by_side(1)
    (tmp_path / "conftest.py").write_text(LOSES)
    (tmp_path / "test_it.py").write_text(LOST_BY)
    out, _ = pytest_process(tmp_path, *arguments).communicate(timeout=PATIENCE)
    assert "3 passed" in out and "AssertionError: here" in out, out


def test_tests_end_where_their_process_lost_the_gpu(tmp_path):
    (tmp_path / "conftest.py").write_text(LOSES)
    (tmp_path / "test_it.py").write_text(LOST_BY)
    process = pytest_process(tmp_path)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 3 and "the GPU no longer answers" in out and "AssertionError: here" in out, out
