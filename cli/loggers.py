"""What a run records as it goes: lines of metrics and pictures in its folder, and beside them the loggers it chose.

metrics.jsonl and the pictures are the record; a logger shows it. One that cannot begin stops the run before it starts;
one that fails later is left out, in a line on stderr, and the run goes on.

A run that goes on from a checkpoint may have recorded steps after it, which come again. Each logger therefore says from
which step on it lacks the record, and is given that part of metrics.jsonl and of the pictures once more:

    TensorBoard keeps its files, and passes over what they have from the checkpoint's step on.
    W&B keeps all that its server has, and a step that is there is not sent again. Offline, a run that goes on is a
        further folder wandb/offline-run-* with the same id and the whole record; wandb/latest-run is the one to sync.
    trackio's run is deleted and written again. That reaches only the database on this machine: with TRACKIO_SPACE_ID or
        TRACKIO_SERVER_URL, a run that goes on is a second one of the same name.
"""

import importlib
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path

import numpy as np
from omegaconf import ListConfig, OmegaConf
from PIL import Image

from checks import check_one_of, reason_of, unexpected
from cli.output import write_json
from cli.report import PICTURES, pictures_of, read_json, row_of
from files import naming, write_atomically

PROJECT = "pixelrnn"
IDS = "loggers.json"  # in the folder of a run: the ids by which W&B and trackio know it


def place_of(folder: Path) -> dict[str, str | None]:
    """Return the project, name and group of a run; a sweep is a group."""
    group = folder.parent.name if folder.parent.parent.name == "sweeps" else None
    return {"project": PROJECT, "name": f"{folder.parent.name}/{folder.name}", "group": group}


def ids_of(folder: Path) -> dict[str, str]:
    """Return the ids of a run in its loggers."""
    found = read_json(folder / IDS) or {}
    return {logger: name for logger, name in found.items() if isinstance(name, str)}


def keep_id(folder: Path, logger: str, name: str) -> None:
    """Write down the id of a run in one of its loggers."""
    write_json(folder / IDS, {**ids_of(folder), logger: name})


class TensorBoard:
    """Files that TensorBoard reads, in the run's folder."""

    module = "torch.utils.tensorboard"

    def __init__(self, folder: Path, config: dict, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.first = step if list(folder.glob("events.out.tfevents.*")) else 0
        self.writer = SummaryWriter(folder, purge_step=self.first)
        self.writer.add_text("config", f"```yaml\n{OmegaConf.to_yaml(config)}```", step)
        print(f"to see this run: tensorboard --logdir {folder}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # what a killed run wrote is there when it goes on

    final = scalars

    def picture(self, step: int, name: str, path: Path) -> None:
        pixels = np.asarray(Image.open(path))
        self.writer.add_image(name, pixels, step, dataformats="HWC"[: pixels.ndim])

    def close(self, failed: bool) -> None:
        self.writer.close()


class WandB:
    """A run of Weights & Biases; without a network or a login, with WANDB_MODE=offline, below wandb/ in the folder."""

    module = "wandb"

    def __init__(self, folder: Path, config: dict, step: int):
        import wandb

        where = {**place_of(folder), "dir": folder, "id": ids_of(folder).get("wandb"), "resume": "allow"}
        self.run, self.image = wandb.init(config=config, **where), wandb.Image
        keep_id(folder, "wandb", self.run.id)
        self.first = self.run.step

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def final(self, step: int, values: dict[str, float]) -> None:
        self.run.summary.update(values)

    def picture(self, step: int, name: str, path: Path) -> None:
        self.run.log({name: self.image(path)}, step=step)

    def close(self, failed: bool) -> None:
        self.run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's database, in TRACKIO_DIR, or else below ~/.cache/huggingface."""

    module = "trackio"
    first = 0

    def __init__(self, folder: Path, config: dict, step: int):
        import trackio

        self.trackio, before = trackio, ids_of(folder).get("trackio")
        with suppress(ValueError):  # the database has no such project yet
            for run in trackio.Api().runs(PROJECT):
                if run.id == before:
                    run.delete()
        with redirect_stdout(io.StringIO()):  # six lines
            run = trackio.init(config=config, **place_of(folder))
        keep_id(folder, "trackio", run.id)
        print(f"to see this run: trackio show --project {PROJECT}")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.trackio.log(values, step)

    final = scalars

    def picture(self, step: int, name: str, path: Path) -> None:
        self.trackio.log({name: self.trackio.Image(path)}, step)

    def close(self, failed: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self.trackio.finish()


LOGGERS = {"wandb": WandB, "trackio": Trackio, "tensorboard": TensorBoard}  # first the one that can fail to begin


def chosen(value: object) -> list[str]:
    """Return the loggers that logger=NAME or logger=[NAME,…] names.

    Raises:
        ValueError: there is no such logger, or it is not installed.
    """
    given = value if isinstance(value, ListConfig) else [value]
    for name in given:
        check_one_of("logger", name, ("none", *LOGGERS))
    names = [name for name in LOGGERS if name in given]
    for name in names:
        try:
            importlib.import_module(LOGGERS[name].module)
        except ImportError as error:
            expected = f"{name} to be installed, as by pip install -e '.[log]' ({reason_of(error)})"
            raise unexpected("logger", name, expected) from None
    return names


def tagged(values: dict[str, float]) -> dict[str, float]:
    """Return numbers under the names by which loggers group them: nats/train and nats/val, test/nats."""

    def tag(name: str) -> str:
        split, _, unit = name.partition("_")
        names = {"train": f"{unit}/train", "val": f"{unit}/val", "test": f"test/{unit}", "lr": "learning_rate"}
        return names.get(split, name)

    return {tag(name): value for name, value in values.items()}


class Records:
    """The records of a run, which the first of several processes writes.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.file, self.loggers = None, {}

    def open(self, loggers: list[str], config: dict, step: int) -> None:
        """Begin in this process, or go on after `step`: lines of later steps are dropped.

        Raises:
            ValueError: a logger cannot begin; nothing has been written then, but what that logger wrote.
        """
        for name in loggers:
            try:
                self.loggers[name] = LOGGERS[name](self.folder, config, step)
            except Exception as error:  # each logger has other ones
                self.close(failed=True)
                raise unexpected("logger", name, f"a logger that can begin, found {reason_of(error)}") from error
        if self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
            kept = [(line, row) for line in lines if (row := row_of(line, step))]
            write_atomically(self.path, lambda file: file.write("".join(f"{line}\n" for line, _ in kept).encode()))
            self.again([row for _, row in kept], step)
        self.file = self.path.open("a")

    def again(self, rows: list[dict], step: int) -> None:
        """Give the loggers what they lack of the record up to `step`."""
        todo = [(row["step"], {name: x for name, x in row.items() if name != "step"}) for row in rows]
        for name in PICTURES if self.loggers else ():
            todo += [(at, path) for at, path in pictures_of(self.folder / name) if at <= step]
        for at, what in sorted(todo, key=lambda item: item[0]):
            if isinstance(what, dict):
                self.tell(at, what)
            else:
                self.show(at, what)

    def write(self, step: int, **values: float) -> None:
        """Add a line of values of a step."""
        if not self.file:
            return
        with naming(self.path):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        self.tell(step, values)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Write a picture of a step, whole or not at all, into the folder of its name."""
        path = self.folder / name / f"step_{step:06d}.png"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, lambda file: image.save(file, format="PNG"))
        self.show(step, path)

    def tell(self, step: int, values: dict[str, float]) -> None:
        """Give the loggers values of a step."""
        self.each(lambda logger: step < logger.first or logger.scalars(step, tagged(values)))

    def final(self, step: int, values: dict[str, float]) -> None:
        """Give the loggers the numbers of a run that ends with this step."""
        self.each(lambda logger: logger.final(step, tagged(values)))

    def show(self, step: int, path: Path) -> None:
        """Give the loggers a picture of a step."""
        self.each(lambda logger: step < logger.first or logger.picture(step, path.parent.name, path))

    def each(self, do: Callable[[object], object]) -> None:
        """Call do(logger) with each logger, and leave out one that fails."""
        for name, logger in [*self.loggers.items()]:
            try:
                do(logger)
            except Exception as error:  # whatever it is, the run goes on
                del self.loggers[name]
                print(f"logger={name} failed ({reason_of(error)}); the run goes on without it", file=sys.stderr)

    def close(self, failed: bool) -> None:
        """End the records of a run that has ended, or failed or was stopped."""
        if self.file:
            with naming(self.path):
                self.file.close()
        self.each(lambda logger: logger.close(failed))

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, error: type | None, *_) -> None:
        self.close(failed=error is not None)
