"""What a run says: progress (a bar on a terminal, else lines), metrics.jsonl, TensorBoard, and what it ran on.

And the one thing that it asks of the machine: `keep_freed_memory`.
"""

import ctypes
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.checkpoint import write_atomically


class Bar:
    """Progress and time left: a bar on a terminal, else a line now and then.

    Args:
        total: units of work; `done` of them were done before.
        every: seconds between plain lines.
    """

    def __init__(self, name: str, total: int, done: int = 0, every: float = 5.0):
        self.name, self.total, self.every = name, total, every
        self.done = self.first = done
        self.start = self.said = time.perf_counter()
        self.console = Console()
        self.progress = None
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self.progress = Progress(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self.task = self.progress.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> "Bar":
        if self.progress:
            self.progress.start()
        return self

    def __exit__(self, *_) -> None:
        if self.progress:
            self.progress.stop()

    def advance(self, units: int = 1) -> None:
        """Count `units` as done."""
        self.done += units
        if self.progress:
            self.progress.update(self.task, completed=self.done)

    def text(self, text: str) -> None:
        """What to show beside the bar. Without a terminal it is printed, if the last line is some time ago."""
        now = time.perf_counter()
        if self.progress:
            self.progress.update(self.task, text=text)
        elif now - self.said >= self.every or self.done >= self.total:
            self.said = now
            left = (now - self.start) / max(self.done - self.first, 1) * (self.total - self.done)
            print(f"{self.name} {self.done}/{self.total} · {text} · {left:.0f} s left", flush=True)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Metrics:
    """metrics.jsonl in a run's folder, and TensorBoard's files beside it where that is installed.

    Args:
        folder: the run's.
        step: where the run continues; what was written of later steps is dropped.
    """

    def __init__(self, folder: Path, step: int):
        path = folder / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if is_before(line, step)]
            write_atomically(path, lambda file: file.write("".join(f"{line}\n" for line in lines).encode()))
        self.file = path.open("a")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.board = None
        else:
            self.board = SummaryWriter(folder, purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, step)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def is_before(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # a line that a killed run left unfinished
        return False


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout, with -dirty where tracked files but results differ; None without one."""

    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    if not (root / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, str | int | None]:
    """When, on what, and with which versions: what stands beside every number."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory that a training step frees for the next step; elsewhere do nothing.

    It would give tensors of some megabytes back to the system and get them anew, zeroed page by page: some ten thousand
    page faults in a step of a Diagonal BiLSTM on a CPU.
    """
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2  # names in malloc.h: M_TRIM_THRESHOLD, …
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
