"""What tests of the commands share."""

import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from hydra import compose, initialize_config_dir

import compress
import demo
import evaluate
import sample
import train
from conf import schema

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train": (train.main, train.prepare),
    "sample": (sample.main,),
    "evaluate": (evaluate.main,),
    "compress": (compress.main, compress.prepare),
    "demo": (demo.main,),
}
TINY = ["model.hidden=4", "model.layers=1", "model.head_features=8", "batch_size=256"]


def composed(*overrides: str):
    """What `python train.py OVERRIDES` runs with."""
    schema.register()
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base="1.3"):
        return compose("train", list(overrides))


SHORT = [
    *TINY,
    "steps=12",
    "warmup=2",
    "log_every=4",
    "evaluate_every=6",
    "save_every=5",
    "sample_every=12",
    "samples=4",
]


class Started:
    """A script that runs in a process of its own, as subprocess.Popen runs one.

    It is forked from a process that has imported torch and the commands, which takes a fresh Python four seconds.
    """

    context = multiprocessing.get_context("forkserver")

    def __init__(self, line: list[str], cwd: Path | None = None, **environment: str):
        self.context.set_forkserver_preload(["tests.commands"])
        with mock.patch.dict(os.environ, PYTHONPATH=str(REPOSITORY), OMP_NUM_THREADS="1"):
            multiprocessing.forkserver.ensure_running()
        self.line, self.folder = line, tempfile.mkdtemp()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        arguments = line, str(cwd or Path.cwd()), environment, self.folder
        self.process = self.context.Process(target=run_script, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the number of the signal that ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait until it has ended, and return what it printed on stdout and stderr."""
        self.process.join(timeout)
        if self.process.is_alive():
            raise subprocess.TimeoutExpired(self.line, timeout)
        out, err = (Path(self.folder, name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self.folder)
        return out, err


def run_script(line: list[str], cwd: str, environment: dict[str, str], folder: str) -> None:
    """Be what runs a line: a script and its arguments."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = line
    try:
        runpy.run_path(line[0], run_name="__main__")
    finally:
        sys.stdout.flush()


def process(script: str, *arguments: str, check: bool = False, cwd: Path | None = None) -> subprocess.CompletedProcess:
    line = [str(REPOSITORY / script), *arguments]
    run = Started(line, cwd)
    out, err = run.communicate()
    assert not check or run.returncode == 0, (line, out, err)
    return subprocess.CompletedProcess(line, run.returncode, out, err)


def refused(result: tuple[int, str, str], words: list[str]) -> None:
    """A mistake ended in exit status 2 and one line with these words in it."""
    status, _, err = result
    assert status == 2, result
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err
