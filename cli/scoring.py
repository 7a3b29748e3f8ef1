"""What `python evaluate.py` writes of single images: a table of their scores, heat maps, and two sets side by side.

Legend: n images · c channel (colour) · h w rows, columns.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from cli.details import check_folder
from cli.output import bytes_of, check_writable, picture
from cli.plot import curves
from files import write_atomically, write_text
from models.scores import Scores, auroc
from models.video import film

if TYPE_CHECKING:
    from cli.images import Images

COLUMNS = ("image", "rank", "nats", "bits_per_dim", "png_bits", "corrected_bits_per_dim")
HEAT = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # from no bits to the most
BINS = 40
SIDE = 224  # pixels of a heat map's longer side, about


def check_places(scores: str | None, maps: str | None, images: list[str | None]) -> None:
    """Raise ValueError or OSError unless the table and the heat maps can be written there, and not over the images."""
    if scores is not None:
        check_writable(Path(scores), ".csv")
    if maps is not None:
        check_folder(Path(maps))
        if Path(maps).resolve() in [Path(given).resolve() for given in images if given is not None]:
            raise ValueError(f"maps={maps}: expected another folder than that of the images, which would be lost")


def ranks(found: Scores) -> list[int]:
    """Rank the images by nats, 1 the most surprising: (n,)."""
    out = torch.empty(len(found.nats), dtype=torch.long)
    out[found.nats.argsort(descending=True, stable=True)] = torch.arange(1, len(out) + 1)
    return out.tolist()


def write_table(path: Path, given: Images, found: Scores) -> None:
    """Write a line an image, in the images' order."""
    n, text = len(given), io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    png, corrected = (n * [""] if x is None else x.tolist() for x in (found.png_bits, found.corrected))
    lines.writerows(
        zip(given.names, ranks(found), found.nats.tolist(), found.bits_per_dim.tolist(), png, corrected, strict=True)
    )
    write_text(path, text.getvalue())


def heat(bits: Tensor, most: float) -> Tensor:
    """Colour bits (n h w), black for none to pale yellow for `most`: (n 3 h w) uint8."""
    at = (bits.double() / most).clamp(0, 1).numpy() * (len(HEAT) - 1)
    colours = [np.interp(at, range(len(HEAT)), of_colour) for of_colour in zip(*HEAT, strict=True)]
    return torch.from_numpy(np.stack(colours, 1).round().astype(np.uint8))


def write_maps(folder: Path, given: Images, found: Scores, levels: int) -> float:
    """Write for each image a picture of it beside its heat map, all on one scale; return the bits of its end."""
    folder.mkdir(exist_ok=True)
    most = max(torch.quantile(found.bits.flatten()[: 1 << 24], 0.999).item(), 1e-9)
    stems = [Path(name).stem for name in given.names]
    names = stems if len(set(stems)) == len(stems) else given.names  # a.png and a.jpg are two
    shown, bits = bytes_of(film(given.x), levels).expand(-1, 3, -1, -1), film(found.bits[..., None, :, :])[:, 0]
    scale = max(1, SIDE // max(found.shape[-2:]))
    for name, image, of_image in zip(names, shown, heat(bits, most), strict=True):
        both = torch.stack([image, of_image]).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        pixels = rearrange(both, "two c h w -> h (two w) c").numpy()
        path = folder / f"{name}.png"
        write_atomically(path, lambda file, pixels=pixels: picture(pixels).save(file, format="PNG"))
    return most


def histogram(values: dict[str, Tensor], label: str) -> str:
    """Draw how each set's values (n,) are distributed, as SVG."""
    together = torch.cat([*values.values()]).numpy()
    edges = np.linspace(together.min(), together.max() + 1e-12, BINS + 1)
    series = {}
    for name, x in values.items():
        share = 100 * np.histogram(x.numpy(), edges)[0] / len(x)
        series[name] = [(e, s) for k, s in enumerate(share) for e in edges[k : k + 2].tolist()]
    return curves(series, label, "% of the images")


def compare(names: tuple[str, str], found: Scores, others: Scores, scores: Path | None) -> dict[str, float]:
    """Say how well both scores tell images from others, and draw the distributions beside the table of scores.

    Returns:
        auroc: the probability that one of the images has a higher score than one of the others.
    """
    out = {}
    of = {"bits_per_dim": (found.bits_per_dim, others.bits_per_dim)}
    if found.corrected is not None:
        of["corrected_bits_per_dim"] = (found.corrected, others.corrected)
    for name, (of_images, of_others) in of.items():
        out[f"auroc_{name}"] = auroc(of_others, of_images)
        if scores is not None:
            text = histogram(dict(zip(names, (of_images, of_others), strict=True)), name.replace("_", " "))
            path = scores.with_name(f"{scores.stem}-{name}.svg")
            write_text(path, text)
    return out
