"""What a run says: a progress bar (plain lines where there is no terminal), metrics.jsonl, and TensorBoard."""

import json
import time
from pathlib import Path

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
