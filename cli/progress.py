"""Progress while a person waits: a bar on a terminal, else a line now and then; and how fast training goes."""

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor


class Bar:
    """Show progress and the time left: a bar on a terminal, else a line now and then.

    Args:
        name: shown before the bar.
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

    def text(self, text: str, at_end: bool = True) -> None:
        """Show `text` beside the bar. Without a terminal, print it if the last line was `every` seconds ago.

        Args:
            at_end: print it at the end, too, however long ago that was.
        """
        now = time.perf_counter()
        if self.progress:
            self.progress.update(self.task, text=text)
        elif now - self.said >= self.every or (at_end and self.done >= self.total):
            self.said = now
            left = (now - self.start) / max(self.done - self.first, 1) * (self.total - self.done)
            print(f"{self.name} {self.done}/{self.total} · {text} · {left:.0f} s left", flush=True)

    def count(self, images: int) -> None:
        """Count images as done, and show how many a second that is."""
        self.advance(images)
        self.text(f"{(self.done - self.first) / (time.perf_counter() - self.start):.0f} images/s")

    def part(self, name: str, total: int) -> Callable[[int], None]:
        """Return what counts the units of work beside the bar's own, and shows them as its text."""
        done = 0

        def count(units: int) -> None:
            nonlocal done
            done += units
            self.text(f"{name} {done}/{total}", at_end=False)

        return count

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


class Throughput:
    """Measure the mean loss and the images a second since the last line of metrics; only time in steps counts."""

    def __init__(self, device: torch.device):
        self.nats, self.steps, self.images = torch.zeros((), device=device), 0, 0
        self.start = time.perf_counter()

    def add(self, nats: Tensor, images: int) -> None:
        """Count a step: how many images it had, and their mean nats, a scalar."""
        self.nats += nats.detach()
        self.steps += 1
        self.images += images

    def take(self) -> tuple[float, float, float]:
        """Return nats an image, images a second, and seconds; then count from zero."""
        nats, seconds = self.nats.item() / self.steps, time.perf_counter() - self.start
        rate = self.images / seconds
        self.nats.zero_()
        self.steps = self.images = 0
        self.restart()
        return nats, rate, seconds

    def restart(self) -> None:
        """Count seconds from now."""
        self.start = time.perf_counter()
