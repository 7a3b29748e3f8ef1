"""The runs below runs/: find one, continue it, and write what it measures; and the data that a checkpoint is of."""

import json
import sys
from pathlib import Path

import data
from checks import one_of, unexpected
from models.base import ImageModel
from models.checkpoint import read, write_atomically


def key_of(override: str) -> str:
    """Return the key of a command line argument KEY=VALUE, +KEY=VALUE or ~KEY."""
    return override.split("=")[0].lstrip("+~")


def own_overrides(overrides: list[str]) -> list[str]:
    """Return the arguments that say what a run computes, without those that give its folder or say how it began."""
    return [o for o in overrides if key_of(o) != "resume" and not key_of(o).startswith("hydra.")]


def newest_unfinished(overrides: list[str]) -> Path | None:
    """Return last.pt of the newest run below runs/ that had these arguments and has not ended, or None."""
    paths = [path for path in Path("runs").rglob("last.pt") if not (path.parent / "summary.json").exists()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            if sorted(read(path)["overrides"]) == sorted(own_overrides(overrides)):
                return path
        except ValueError as error:
            print(f"resume=auto passes over a run: {error}", file=sys.stderr)
    return None


def resumed(argv: list[str]) -> list[str]:
    """Turn resume=FOLDER, or resume=auto, into the arguments that continue that run: its own, then these.

    auto is the newest unfinished run below runs/ that was started with these same arguments. If there is none, in a
    sweep, and with hydra.run.dir, the arguments stay as they are.
    """
    by_key = {key_of(argument): argument for argument in argv}
    value = by_key.get("resume", "").partition("=")[2].strip("'\"")
    if value in ("", "null") or {"-m", "--multirun", "hydra.run.dir", "hydra.sweep.dir"} & by_key.keys():
        return argv
    path = newest_unfinished(argv) if value == "auto" else Path(value) / "last.pt"
    if path is None:
        return argv
    kept = [override for override in read(path)["overrides"] if key_of(override) not in by_key]
    quoted = str(path.parent).replace("\\", "\\\\").replace("'", "\\'")
    return [*kept, *argv, f"hydra.run.dir='{quoted}'"]


def check_folder(folder: Path, resume: str | None) -> None:
    """Raise ValueError if `folder` holds a run that is not to be continued, or `resume` names another folder."""
    if (folder / "last.pt").exists() and resume is None:
        raise ValueError(f"{folder}: expected no run there, found one; resume={folder} continues it")
    if resume not in (None, "auto") and Path(resume).resolve() != folder.resolve():
        raise unexpected("resume", resume, f"{folder}, the folder of this run")


def check_classes(model: ImageModel, dataset: data.Dataset) -> None:
    """Raise ValueError if a model is conditioned on classes that the data set does not have."""
    if model.classes and model.classes != dataset.classes:
        has = f"{dataset.classes} classes" if dataset.classes else "no labels"
        allowed = one_of(["0", str(dataset.classes)] if dataset.classes else ["0"])
        raise unexpected("model.classes", model.classes, f"{allowed}, as {dataset.name} has {has}")


def dataset_of(checkpoint: dict, root: str | None) -> data.Dataset:
    """Load the data set that a checkpoint was trained on, from below another folder if `root` names one."""
    config = dict(checkpoint["config"]["dataset"])
    return data.build(config if root is None else {**config, "root": root})


class Metrics:
    """Write metrics.jsonl in a run's folder, and TensorBoard's files beside it if that is installed.

    Args:
        folder: the run's.
        step: where the run continues; lines of later steps are dropped.
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
        """Add a line of values of a step."""
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
    """Tell whether a line of metrics is whole and of this step or an earlier one."""
    try:
        return json.loads(line)["step"] <= step
    except ValueError:  # a line that a killed run left unfinished
        return False
