"""What `kernels.native` promises: machine code that is what was written, whatever the disk has; threads that end."""

import errno
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import native
from kernels.vector import Code
from models.sampling import PixelLoop, noise, sample
from models.sampling.rules import Draw, Rule
from tests.cases import CASES, build


def write(code: Code) -> None:
    """y[k] = 2 · x[k] + 1."""

    def scaled(code, x, y, count):
        with code.loop(count) as k:
            code.store(code.fma(code.load(x, k), code.number(2), code.number(1)), y, k)

    code.function(scaled, "ppi", name="scaled")


def works() -> bool:
    """Whether the function computes what it should."""
    x, y = np.arange(16, dtype=np.float32), np.zeros(16, np.float32)
    native.library(write, {"scaled": 3}, 8)["scaled"](x.ctypes.data, y.ctypes.data, 2)
    return bool((y == 2 * x + 1).all())


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty one for compiled code, and nothing compiled yet."""
    monkeypatch.setattr(native, "FOLDER", str(tmp_path / "kept" / "here"))
    native.loaded.cache_clear()
    yield tmp_path / "kept" / "here"
    native.loaded.cache_clear()


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def compiled_again(monkeypatch) -> list[str]:
    """What is compiled from now on, with nothing loaded yet."""
    of, made = native.compiled, []
    monkeypatch.setattr(native, "compiled", lambda text, target: made.append(text) or of(text, target))
    native.loaded.cache_clear()
    return made


# --------------------------------------------------------------------------------------------- what is kept on disk


def test_what_is_compiled_is_kept_and_read(folder, monkeypatch):
    assert works()
    before = only_file(folder).read_bytes()
    made = compiled_again(monkeypatch)
    assert works() and not made and only_file(folder).read_bytes() == before
    assert folder.stat().st_mode & 0o077 == 0  # others may not put code there


@pytest.mark.parametrize("where", [0, 31, 32, -1, "middle", "half", "empty", "digest only"])
def test_a_damaged_file_is_compiled_again_and_not_run(where, folder, monkeypatch):
    assert works()
    path = only_file(folder)
    good = path.read_bytes()
    if isinstance(where, str):
        cut = {"half": len(good) // 2, "empty": 0, "digest only": native.DIGEST, "middle": len(good)}[where]
        damaged, at = bytearray(good[:cut]), len(good) // 2
    else:
        damaged, at = bytearray(good), where
    if where not in ("half", "empty", "digest only"):
        damaged[at] ^= 0x10
    path.write_bytes(damaged)
    made = compiled_again(monkeypatch)
    assert works() and len(made) == 1 and only_file(folder).read_bytes() == good


def test_other_sources_another_cpu_and_other_lanes_have_files_of_their_own(folder, monkeypatch, compiled_for):
    assert works()
    native.library(write, {"scaled": 3}, 4)
    assert len(list(folder.iterdir())) == 2
    compiled_for("generic")
    assert works() and len(list(folder.iterdir())) == 3
    monkeypatch.setattr(native, "sources", lambda: b"changed")
    native.loaded.cache_clear()
    assert works() and len(list(folder.iterdir())) == 4


def full(path, write):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


@pytest.mark.parametrize("disk", ["a file is in the way", "full", "a folder has the file's name"])
def test_a_disk_that_cannot_be_written_to(disk, folder, monkeypatch):
    """Then it is compiled in each process."""
    if disk == "a file is in the way":
        folder.parent.write_text("")
    elif disk == "full":
        monkeypatch.setattr(native, "write_atomically", full)
    else:
        assert works()
        path = only_file(folder)
        path.unlink()
        (path / "inside").mkdir(parents=True)
    made = compiled_again(monkeypatch)
    assert works() and len(made) == 1
    assert works() and len(made) == 1
    native.loaded.cache_clear()
    assert works() and len(made) == 2


@pytest.mark.parametrize("name", ["fast", "i386", "help", "nehalem,+avx512f"])
def test_a_cpu_that_is_none_ends_in_one_line(name, monkeypatch):
    monkeypatch.setenv("PIXELRNN_CPU", name)
    with pytest.raises(ValueError, match=f"PIXELRNN_CPU={name!r}: expected generic".replace("+", r"\+")) as error:
        sample(build(CASES["pixel_cnn"]), 1, backend="cpu")
    assert "\n" not in str(error.value)


def test_a_cpu_that_this_machine_is_not_is_refused(monkeypatch):
    """Its instructions would end the process."""
    found = native.llvm.FeatureMap({"sse4.2": True, "avx2": False})
    monkeypatch.setattr(native.llvm, "get_host_cpu_features", lambda: found)
    native.found.cache_clear()
    monkeypatch.setenv("PIXELRNN_CPU", "nehalem")
    assert native.cpu() == ("nehalem", "")
    monkeypatch.setenv("PIXELRNN_CPU", "haswell")
    with pytest.raises(ValueError, match="PIXELRNN_CPU='haswell': expected generic or nehalem"):
        native.cpu()
    native.found.cache_clear()


# ------------------------------------------------------------------------------------------------------- processes


def in_a_child(do) -> int:
    """Start do() in a forked process, whose exit status says whether it was true."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        signal.alarm(60)  # hangs
        status = 0 if do() else 1
    finally:
        os._exit(status)


def ends_well(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def forks(test):
    test = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")(test)
    return pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")(test)


@forks
def test_several_processes_compile_at_once(folder):
    """And each reads what another wrote, or compiles."""

    def rounds() -> bool:
        for k in range(8):
            native.sources = lambda k=k: bytes([k])
            native.loaded.cache_clear()
            if not works():
                return False
        return True

    children = [in_a_child(rounds) for _ in range(3)]
    assert [ends_well(child) for child in children] == [True] * 3
    assert len(list(folder.iterdir())) == 8  # no unfinished ones


@forks
def test_a_forked_process_draws_after_its_parent_has(threads):
    """It has none of its parent's threads. By one of its own: after a fork, torch's operations hang with several."""
    threads(2)
    model = build(CASES["pixel_cnn"])
    expected = sample(model, 70, backend="cpu")

    def draws() -> bool:
        done = []
        native.share(lambda k: [done.append(k)], 20)
        torch.set_num_threads(1)
        return sorted(done) == [*range(20)] and torch.equal(sample(model, 70, backend="cpu"), expected)

    assert ends_well(in_a_child(draws))
    assert torch.equal(sample(model, 70, backend="cpu"), expected)


# --------------------------------------------------------------------------------------------------------- threads


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def write_doubled(code: Code) -> None:
    """x[k] ← 2 · x[k], for vectors k < count."""

    def doubled(code, x, count):
        with code.loop(count) as k:
            code.store(code.load(x, k) * 2, x, k)

    code.job(doubled, "pi", "doubled")


every_number = pytest.mark.parametrize("count", [1, 2, 3])


@every_number
def test_each_call_is_gone_through_once(count, threads):
    threads(count)
    done = [0] * 20

    def call(k):
        for _ in range(k):
            done[k] += 1
            yield

    native.share(call, 20)
    assert done == list(range(20))


@every_number
@pytest.mark.parametrize("by", ["torch's threads", "others"])
@pytest.mark.parametrize("jobs", [0, 1, 2, 7, 300])
def test_each_job_is_done_once(count, by, jobs, threads, monkeypatch):
    threads(count)
    if by == "others":
        monkeypatch.setattr(native, "openmp", lambda: None)
    job = native.library(write_doubled, {"doubled": 1}, 4)["doubled"]
    x = torch.arange(jobs * 40.0).view(jobs, 40)
    expected = x * 2
    native.in_parallel(job, [(row.data_ptr(), 10) for row in x])
    assert torch.equal(x, expected)


@every_number
def test_jobs_within_a_call_that_is_one_of_several(count, threads):
    """Each call does its own jobs, on its own thread."""
    threads(count)
    job = native.library(write_doubled, {"doubled": 1}, 4)["doubled"]
    x = torch.arange(80.0).view(4, 5, 4)
    expected = x * 2
    native.share(lambda k: [native.in_parallel(job, [(row.data_ptr(), 1) for row in x[k]])], 4)
    assert torch.equal(x, expected)


@pytest.mark.skipif(native.openmp() is None, reason="torch's threads are none of OpenMP's here")
def test_jobs_are_done_by_torch_s_threads(threads, monkeypatch):
    threads(2)
    monkeypatch.setattr(native, "share", None)
    test_each_job_is_done_once(2, "torch's threads", 7, threads, monkeypatch)


@every_number
def test_an_error_in_one_ends_all_at_their_next_step(count, threads):
    threads(count)
    steps = [0] * 20

    def call(k):
        for step in range(1000):
            steps[k] += 1
            if (k, step) == (count - 1, 3):
                raise RuntimeError("of one tile")
            yield time.sleep(0.001)

    with pytest.raises(RuntimeError, match="of one tile"):
        native.share(call, 20)
    assert max(steps) < 1000 and max(steps[count:]) <= 1
    native.share(lambda k: iter([]), 20)


@every_number
def test_ctrl_c_ends_all(count, threads):
    threads(count)
    steps = [0] * 20

    def call(k):
        for step in range(1000):
            steps[k] += 1
            if (k, step) == (0, 3):
                os.kill(os.getpid(), signal.SIGINT)
            yield time.sleep(0.001)

    with pytest.raises(KeyboardInterrupt):
        native.share(call, 20)
    assert max(steps) < 1000 and max(steps[count:]) <= 1


@every_number
def test_an_error_of_who_is_told_of_rows_ends_the_draw_and_the_next_one_works(count, threads):
    threads(count)
    model = build(CASES["diag_bilstm"], height=20)
    rule = Draw(noise(0, range(100), model.shape))
    loop, told, runs = PixelLoop(model, "cached", rule, 100, backend="cpu"), [], []
    expected, run = loop.run(), loop.evaluator.tiles.run
    loop.evaluator.tiles.run = lambda *arguments: runs.append(arguments) or run(*arguments)

    def tell():
        told.append(1)
        if len(told) == 3:
            raise RuntimeError("nobody listens")

    with pytest.raises(RuntimeError, match="nobody listens"):
        loop.run(tell)
    tiles = loop.evaluator.tiles.count
    assert len(told) == 3 and tiles > 3 and len(runs) <= 3 * tiles + count + tiles
    assert torch.equal(loop.run(), expected)
    told.clear()
    assert torch.equal(loop.run(lambda: told.append(1) if len(told) < 20 else tell()), expected) and len(told) == 20


def test_an_error_of_a_rule_that_is_called_ends_the_draw():
    model = build(CASES["row_lstm"])

    class Fail(Rule):
        def __call__(self, j, g, logits):
            if j == 2:
                raise RuntimeError("no value")
            return logits.argmax(1)

    with pytest.raises(RuntimeError, match="no value"):
        PixelLoop(model, "cached", Fail(), 40, backend="cpu").run()
    assert sample(model, 40, backend="cpu").shape == (40, *model.shape)
