"""Checkpoints: one file that rebuilds its model and continues its run.

A checkpoint is a dict of plain values and tensors, so that it loads with `weights_only=True`:

    format       "pixelrnn-1"
    model        the config that `models.build` takes
    weights      the model's state
    ema          the state of the averaged weights, or None
    config       the run's whole config, resolved
    …            what train.py adds to continue: optimizer, step, best, random states
"""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

import models

FORMAT = "pixelrnn-1"


def write_atomically(path: str | os.PathLike, write) -> None:
    """Call write(file) on a new file beside `path`, and rename it to `path` once it is safely on the disk.

    Whatever happens midway, `path` holds the old contents or the new, whole.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with open(unfinished, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def save(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `checkpoint` has the keys above but `format`."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **checkpoint}, file))


def read(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, whole or not at all.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no checkpoint of this project; one line that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint, found none")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # compares every record with its checksum, which torch.load does not
        if damaged:
            raise ValueError(f"{path}: expected a whole checkpoint, found its record {damaged} damaged")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except zipfile.BadZipFile:
        raise ValueError(f"{path}: expected a checkpoint, found a file of another kind, or one cut short") from None
    except ValueError:
        raise
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise ValueError(f"{path}: expected a checkpoint, found {str(error).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of the format {FORMAT}, found another")
    return checkpoint


def rebuild(checkpoint: dict[str, Any]) -> "models.base.ImageModel":
    """The model of a checkpoint that was read, with its averaged weights where it has them, in eval mode."""
    model = models.build(checkpoint["model"])
    weights = checkpoint["weights"] if checkpoint["ema"] is None else checkpoint["ema"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ValueError(f"the checkpoint's weights: expected those of its model, found others: {lines}") from None
    return model.to(next(iter(weights.values())).device).eval()


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "models.base.ImageModel":
    """Rebuild the model of a checkpoint from what that says, and nothing else; errors as in `read`."""
    return rebuild(read(path, device))


def find(path: str | os.PathLike | None, runs: str | os.PathLike = "runs") -> Path:
    """Find the checkpoint that is meant: a file, a run's folder (its best, else its last), or None for the newest run.

    Raises:
        FileNotFoundError: there is none.
    """
    if path is not None and not Path(path).is_dir():
        return Path(path)  # `read` says what is wrong with it
    folders = [Path(path)] if path is not None else {file.parent for file in Path(runs).rglob("last.pt")}
    found = [file for folder in folders if (file := best_or_last(folder))]
    if not found:
        where = f"{path}: expected best.pt or last.pt" if path is not None else f"{runs}/: expected a trained model"
        raise FileNotFoundError(f"{where}, found none: run `python train.py` first, or name a checkpoint")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def best_or_last(folder: Path) -> Path | None:
    return next((folder / name for name in ("best.pt", "last.pt") if (folder / name).is_file()), None)
