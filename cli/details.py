"""What `python evaluate.py` draws of a model: bits by colour and row, calibration, and what its samples are near to.

Legend: n images, or clips · c channel (colour) · h w rows, columns.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from cli.output import save_grid, write_json
from cli.plot import curves
from files import write_text
from models.details import Details

COLOURS = ("red", "green", "blue")
NEIGHBOURS = 5  # training images beside each sample


def check_folder(path: Path) -> None:
    """Raise ValueError or OSError unless it is, or can become, a folder."""
    if path.suffix or path.is_file():
        raise ValueError(f"{path}: expected a folder's name, found a file's")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: expected a folder for {path.name}, found none")


def colours_of(c: int) -> list[str]:
    """Name the c colours of an image."""
    return [*COLOURS] if c == 3 else ["grey"] if c == 1 else [f"colour {k}" for k in range(c)]


def write_details(folder: Path, found: Details) -> dict:
    """Write by_row.svg, of clips by_frame.svg, calibration.svg, and the numbers in details.json.

    Returns:
        the bits by colour and the error of calibration.
    """
    folder.mkdir(exist_ok=True)
    bits, place = found.nats.movedim(-3, 0) / math.log(2), "frame" if found.nats.dim() == 4 else "row"
    names = colours_of(len(bits))
    places = {name: of_colour.flatten(1).mean(1).tolist() for name, of_colour in zip(names, bits, strict=True)}
    by_colour = dict(zip(names, bits.flatten(1).mean(1).tolist(), strict=True))
    used = found.count > 0
    points = list(zip(found.expected[used].tolist(), found.observed[used].tolist(), strict=True))
    pictures = {
        f"by_{place}": curves(
            {name: [*enumerate(values)] for name, values in places.items()}, place, "bits a sub-pixel"
        ),
        "calibration": curves(
            {"a calibrated model": [(0.0, 0.0), (1.0, 1.0)], "this one": points},
            "probability by the model",
            "how often it happened",
        ),
    }
    for name, text in pictures.items():
        write_text(folder / f"{name}.svg", text)
    said = {"bits_by_colour": by_colour, "calibration_error": found.calibration_error}
    calibration = {name: getattr(found, name)[used].tolist() for name in ("expected", "observed", "count")}
    write_json(folder / "details.json", {**said, f"bits_by_{place}": places, "calibration": calibration})
    return said


def save_nearest(path: Path, x: Tensor, others: Tensor, places: Tensor, levels: int) -> None:
    """Write a picture with a row for each sample x (n c h w): itself, then those of `others` at `places` (n k)."""
    rows = torch.cat([x[:, None].long(), others[places].long()], dim=1)
    save_grid(path, rows.flatten(0, 1), levels, columns=rows.shape[1])
