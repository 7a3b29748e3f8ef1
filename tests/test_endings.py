"""However a command ends, nothing is lost: killed at any moment, on a full disk, in a folder that cannot be written,
several at once.

ENDINGS=50 tries fifty random moments and twenty pairs, where the suite tries a few.
"""

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from models.checkpoint import read
from tests import killed
from tests.commands import REPOSITORY, TINY, Started, process

pytestmark = pytest.mark.slow
MANY = int(os.environ.get("ENDINGS", 1))


def some(*few: int) -> Iterator[int]:
    """The writes at which something happens: all until there are no more, where ENDINGS is large."""
    return iter(few) if MANY < 10 else itertools.count(1)


RUN = [*TINY, "model=pixel_cnn", "steps=24", "warmup=2", "log_every=4", "evaluate_every=6", "save_every=5"]
RUN += ["sample_every=12", "samples=4", "evaluate_images=64"]
DRAW = ["n=12", "batch_size=3", "npy=drawn.npy", "out=drawn.png"]


def at_its_write(cwd: Path, event: str, k: int, *line: str) -> subprocess.CompletedProcess:
    """Run a command that dies, or finds the disk full, at its k-th write."""
    run = Started([str(REPOSITORY / "tests/killed.py"), event, str(k), *line], cwd)
    out, err = run.communicate(timeout=120)
    return subprocess.CompletedProcess(line, run.returncode, out, err)


def plain(value):
    """A checkpoint as values that can be compared."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def result(folder: Path) -> dict:
    """All that a run leaves which is the same each time: not its seconds."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("images_per_second", None)
    checkpoints = {name: plain(read(folder / name)) for name in ("last.pt", "best.pt")}
    for checkpoint in checkpoints.values():
        checkpoint.pop("seconds")
        checkpoint.pop("overrides")
    pictures = {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}
    summary = json.loads((folder / "summary.json").read_text())
    numbers = {name: value for name, value in summary.items() if name.startswith(("test_", "val_", "best_"))}
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    return {"metrics": rows, **checkpoints, **pictures, **numbers}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, float]:
    """The folder of a run that nothing stopped, and its seconds."""
    folder, before = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    process("train.py", *RUN, f"hydra.run.dir={folder}", check=True)
    return folder, time.monotonic() - before


def finished(cwd: Path) -> dict:
    """Let the run in cwd/run go on to its end."""
    go_on = ["resume=run"] if (cwd / "run/last.pt").exists() else [*RUN, "hydra.run.dir=run"]
    process("train.py", *go_on, cwd=cwd, check=True)
    return result(cwd / "run")


def whole_checkpoints(folder: Path) -> None:
    for path in folder.rglob("*.pt"):
        read(path)


def one_line_of_a_full_disk(done: subprocess.CompletedProcess, below: Path) -> None:
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: ") and "No space left on device" in line, done
    assert below.name in line or line.split(": ")[1].startswith(("run/", "drawn")), line


@pytest.mark.parametrize("seed", range(MANY))
def test_a_run_killed_at_random_ends_bit_equal(tmp_path, whole, seed):
    """Up to three times, anywhere from its start to its evaluation."""
    random, line = Random(seed), [str(REPOSITORY / "train.py"), *RUN, "hydra.run.dir=run"]
    for _ in range(random.choice((1, 1, 2, 3))):
        run = Started(line, tmp_path)
        try:
            run.communicate(timeout=random.uniform(0.2, 1.05) * whole[1])
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.communicate()
        whole_checkpoints(tmp_path)
        if (tmp_path / "run/summary.json").exists():
            break
        line = [line[0], "resume=run"] if (tmp_path / "run/last.pt").exists() else line
    assert finished(tmp_path) == result(whole[0])


@pytest.mark.parametrize(("event", "few"), [("half", (9,)), ("written", (4,)), ("named", (5,)), ("line", (6,))])
def test_a_run_killed_at_any_write_ends_bit_equal(tmp_path, whole, event, few):
    for k in some(*few):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = at_its_write(tmp_path, event, k, "train.py", *RUN, "hydra.run.dir=run")
        whole_checkpoints(tmp_path)
        if run.returncode == 0:  # after its last write
            assert MANY >= 10 and k > 5
            break
        assert run.returncode == -signal.SIGKILL, run
        assert finished(tmp_path) == result(whole[0]), k


def test_a_run_on_a_full_disk_ends_in_a_line_and_goes_on(tmp_path, whole):
    """At any of its writes of a whole file."""
    for k in some(10):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        run = at_its_write(tmp_path, "full", k, "train.py", *RUN, "hydra.run.dir=run")
        if run.returncode == 0:  # after its last write
            assert MANY >= 10 and k > 5
            break
        one_line_of_a_full_disk(run, tmp_path)
        whole_checkpoints(tmp_path)
        assert finished(tmp_path) == result(whole[0]), k


def test_metrics_on_a_full_disk(tmp_path, whole):
    done = at_its_write(tmp_path, "full-line", 3, "train.py", *RUN, "hydra.run.dir=run")
    one_line_of_a_full_disk(done, tmp_path)
    assert "run/metrics.jsonl" in done.stderr
    assert finished(tmp_path) == result(whole[0])


PLACES = {"memory": [], "npy": ["npy=drawn.npy"], "pngs": ["pngs=drawn"]}
CUTS = [("npy", "half", 4), ("npy", "named", 4), ("pngs", "full", 3)]
if MANY >= 10:
    CUTS = [(place, event, 1) for place in PLACES for event in ("half", "named", "full")]


@pytest.mark.parametrize(("place", "event", "few"), CUTS)
def test_a_draw_that_is_cut_short_goes_on(tmp_path, whole, place, event, few):
    line = ["sample.py", f"checkpoint={whole[0]}", "n=6", "batch_size=2", "out=drawn.png", *PLACES[place]]
    kept = ("drawn.npy", "drawn.png", "drawn/000005.png")

    def images() -> dict:
        return {name: (tmp_path / name).read_bytes() for name in kept if (tmp_path / name).is_file()}

    process(*line, cwd=tmp_path, check=True)
    expected = images()
    for k in some(few):
        for path in tmp_path.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        done = at_its_write(tmp_path, event, k, *line)
        if done.returncode == 0:  # after its last write
            assert MANY >= 10 and k > 1
            break
        if event == "full":
            one_line_of_a_full_disk(done, tmp_path)
        process(*line, cwd=tmp_path, check=True)
        assert images() == expected


@pytest.fixture
def small_disk(tmp_path):
    """disk(size) → a folder on a file system of that size."""
    mounted = tmp_path / "disk"
    mounted.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mounted)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def resize(disk: Path, *options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{','.join(options)}", str(disk)], check=True)


def test_a_disk_that_is_really_too_small(small_disk, whole):
    """From one that holds nothing to one that holds all, and once it is read-only."""
    line = ["train.py", *RUN, "hydra.run.dir=run"]
    ends = set()
    for size in (60, 400) if MANY < 10 else range(4, 400, 8):
        shutil.rmtree(small_disk / "run", ignore_errors=True)
        resize(small_disk, f"size={size}k")
        done = process(*line, cwd=small_disk)
        ends.add(done.returncode)
        if done.returncode:
            one_line_of_a_full_disk(done, small_disk)
            whole_checkpoints(small_disk)
        if (small_disk / "run/last.pt").exists() and done.returncode:
            resize(small_disk, "size=4m")
            assert finished(small_disk) == result(whole[0]), size
    assert ends == {0, 2}
    resize(small_disk, "ro")
    try:
        for again in (["train.py", "resume=run"], ["train.py", *RUN], ["sample.py", *DRAW]):
            done = process(*again, cwd=small_disk)
            assert done.returncode == 2 and ("Read-only file" in done.stderr or "no permission" in done.stderr), done
            assert len(done.stderr.splitlines()) == 1
    finally:
        resize(small_disk, "rw")


def test_an_array_that_does_not_fit_on_the_disk_is_refused_at_once(small_disk, whole):
    resize(small_disk, "size=1m")
    done = process("sample.py", f"checkpoint={whole[0]}", "n=1000000", "npy=drawn.npy", "out=a.png", cwd=small_disk)
    one_line_of_a_full_disk(done, small_disk)
    assert "drawn.npy.part" in done.stderr and not [*small_disk.iterdir()]


def test_the_array_s_space_is_taken_before_it_is_drawn(tmp_path):
    from cli.output import write_zeros

    with open(tmp_path / "a.npy", "wb") as file:
        write_zeros(file, np.dtype(np.uint8), (64, 3, 32, 32))
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.zeros((64, 3, 32, 32), np.uint8))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 64 * 3 * 32 * 32


@pytest.mark.parametrize("pair", range(max(1, MANY * 2 // 5)))
def test_two_runs_that_start_at_once(tmp_path, pair):
    """In one folder one of them trains; without a folder's name each has its own."""
    line = [str(REPOSITORY / "train.py"), *RUN]
    runs = [Started([*line, "hydra.run.dir=run", f"seed={k}"], tmp_path) for k in (0, 1)]
    ends = [(*run.communicate(timeout=120), run.returncode) for run in runs]
    assert sorted(end[2] for end in ends) == [0, 2], ends
    (refused,) = (err for _, err, status in ends if status)
    assert len(refused.splitlines()) == 1 and "run: expected" in refused
    winner = next(k for k, end in enumerate(ends) if end[2] == 0)
    assert read(tmp_path / "run/last.pt")["config"]["seed"] == winner
    assert f"seed: {winner}" in (tmp_path / "run/.hydra/config.yaml").read_text()
    rows = [json.loads(row)["step"] for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(rows)
    runs = [Started([*line, f"seed={k}"], tmp_path) for k in (0, 1)]
    for run in runs:
        out, err = run.communicate(timeout=120)
        assert run.returncode == 0, (out, err)
    assert len([*(tmp_path / "runs").rglob("summary.json")]) == 2


def test_the_events_are_what_they_are_called(tmp_path, monkeypatch):
    """An event before which nothing is counted, and one that never comes."""
    monkeypatch.setattr(os, "fsync", os.fsync)
    killed.arrange("full", 2)
    with open(tmp_path / "a", "wb") as file:
        os.fsync(file.fileno())
        with pytest.raises(OSError) as error:
            os.fsync(file.fileno())
        assert error.value.errno == errno.ENOSPC
        os.fsync(file.fileno())
