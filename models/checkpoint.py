"""Checkpoints: one file that rebuilds its model and continues its run.

A checkpoint is a dict of plain values and tensors, so that it loads with `weights_only=True`:

    format       "pixelrnn-1"
    model        the config that `models.build` takes
    weights      the model's state
    ema          the state of the averaged weights, or None
    config       the run's whole config, resolved
    …            what train.py adds to continue: optimizer, step, best, random states

An exported model (`models.exported`) is one without what continues its run.
"""

import os
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from checks import reason_of, shortened
from files import write_atomically
from models import exported
from models.exported import FORMAT
from models.untrusted import check_archive, check_claims, check_values


def is_state(value: object) -> bool:
    """Tell whether a value is the state of a module: tensors by name, at least one."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def is_config_of_run(value: object) -> bool:
    """Tell whether a value may be the config of a run: it says at least of which data."""
    return isinstance(value, dict) and isinstance(value.get("dataset"), dict)


EXPORTED = (  # of an exported model: key, whether a value is right, what is expected
    ("model", lambda value: isinstance(value, dict), "a config"),
    ("weights", is_state, "tensors by name"),
    ("config", lambda value: value is None or is_config_of_run(value), "a run's config, or none"),
)
CONTENTS = (  # of a checkpoint; train.py checks what it adds
    *EXPORTED[:2],
    ("ema", lambda value: value is None or is_state(value), "tensors by name, or None"),
    ("config", is_config_of_run, "a run's config"),
)


def save(path: str | os.PathLike, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint atomically; `checkpoint` has the keys above but `format`."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **checkpoint}, file))


def read(path: str | os.PathLike, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint or an exported model, whole or not at all. It may come from anybody: nothing in it is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no checkpoint of this project; one line that names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint, found none")
    if path.suffix == ".safetensors":
        checkpoint = exported.read(path, device)
        check_contents(checkpoint, EXPORTED, path)
        return checkpoint
    check_archive(path)
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        check_values(checkpoint, path.stat().st_size)
    except Exception as error:  # torch.load raises whatever its unpickler meets
        raise ValueError(f"{path}: expected a checkpoint, found {reason_of(error)}") from None
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a checkpoint of the format {FORMAT}, found another")
    check_contents(checkpoint, CONTENTS, path)
    return checkpoint


def check_contents(checkpoint: dict[str, Any], contents: tuple, path: Path) -> None:
    """Raise ValueError, naming the file, unless each value is right; `contents` as in `CONTENTS`."""
    for name, right, expected in contents:
        if not right(checkpoint.get(name)):
            found = " ".join(reprlib.repr(checkpoint.get(name)).split())
            raise ValueError(f"{path}: expected {name} to be {expected}, found {found}")


def rebuild(checkpoint: dict[str, Any], path: str | os.PathLike) -> "models.base.ImageModel":
    """The model of a checkpoint that was read from `path`, with its averaged weights where it has them, in eval mode.

    Raises:
        ValueError: its config is none of a model, or its weights are not those of that model, or not finite.
    """
    weights = checkpoint["weights"] if checkpoint["ema"] is None else checkpoint["ema"]
    try:
        check_claims(checkpoint["model"], weights)
        model = models.build(checkpoint["model"])
    except Exception as error:  # a value of any kind, anywhere
        raise ValueError(f"{path}: expected the config of a model, found {in_one_line(error)}") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path}: expected the weights of its model, found others: {in_one_line(error)}") from None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"{path}: expected finite weights, found some that are infinite or no number")
    return model.to(next(iter(weights.values())).device).eval()


def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "models.base.ImageModel":
    """Rebuild the model of a checkpoint from what that says, and nothing else; errors as in `read` and `rebuild`."""
    return rebuild(read(path, device), path)


def in_one_line(error: Exception) -> str:
    """Return an error's text in one line, shortened; its type, where it has none."""
    return shortened(" ".join(str(error).split()) or type(error).__name__)


def find(path: str | os.PathLike | None, runs: str | os.PathLike = "runs") -> Path:
    """Find the file that `path` means: a file, the best in a folder, or with None that of the newest run.

    The best is best.pt, else last.pt, else an exported model.

    Raises:
        FileNotFoundError: there is none.
    """
    if path is not None and not Path(path).is_dir():
        return Path(path)  # `read` says what is wrong with it
    folders = [Path(path)] if path is not None else {file.parent for file in Path(runs).rglob("last.pt")}
    found = [file for folder in folders if (file := best_or_last(folder))]
    if not found:
        where = (
            f"{path}: expected best.pt, last.pt or {exported.NAME}"
            if path is not None
            else f"{runs}/: expected a trained model"
        )
        raise FileNotFoundError(f"{where}, found none: run `python train.py` first, or name a checkpoint")
    return max(found, key=lambda file: file.stat().st_mtime_ns)


def best_or_last(folder: Path) -> Path | None:
    return next((folder / name for name in ("best.pt", "last.pt", exported.NAME) if (folder / name).is_file()), None)
