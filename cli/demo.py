"""What the demo page computes: completions of a sketch, scores of a picture, its compression. `demo.py` is the page.

Legend: n images · c channel (colour) · h w rows, columns.
"""

import math
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageOps
from torch import Tensor

from checks import unexpected
from cli.other_codecs import sizes
from cli.output import bytes_of, grid, picture, upper_rows
from cli.scoring import heat
from data.given import read_images
from models.base import NO_LABEL, ImageModel
from models.checkpoint import load
from models.compression import compress, decompress, read_head
from models.sampling import sample
from models.scores import scores

COMPLETIONS, COLUMNS = 16, 4
LARGEST = 2 << 20  # bytes of a picture that is read
SHOWN = 280  # pixels of a single image's longer side, about


class Answer(NamedTuple):
    """A picture, one of the bits of its pixels, and what there is to say."""

    shown: Image.Image
    bits: Image.Image
    text: str


@lru_cache(maxsize=8)
def model_of(path: Path) -> ImageModel:
    return load(path).eval()


def of_sketch(rgba: np.ndarray | None, model: ImageModel) -> Tensor:
    """A drawing (h w 4) uint8, of any size, as an image of the model's: (1 c h w). Dark ink is bright, paper is dark.

    Paper is white or transparent; None is all of it.
    """
    _, h, w = model.shape
    if rgba is None:
        return torch.zeros(1, *model.shape, dtype=torch.long)
    paper = Image.new("RGBA", rgba.shape[1::-1], "white")
    drawn = Image.alpha_composite(paper, Image.fromarray(rgba).convert("RGBA")).convert("L")
    ink = ImageOps.invert(drawn).resize((w, h), Image.Resampling.BOX)
    levels = np.rint(np.asarray(ink) * ((model.levels - 1) / 255)).astype(np.int64)
    return torch.from_numpy(levels).expand(1, *model.shape)


def labels(model: ImageModel, label: int | None, n: int) -> Tensor | None:
    """The label of n images; None: none, or where the model needs one, each class in turn."""
    if not model.classes:
        return None
    if label is None:
        return torch.full((n,), NO_LABEL) if model.label_dropout else torch.arange(n) % model.classes
    return torch.full((n,), label)


def complete(
    model: ImageModel,
    rgba: np.ndarray | None,
    keep: float = 0.5,
    temperature: float = 1.0,
    guidance: float = 1.0,
    label: int | None = None,
    seed: int = 0,
) -> Answer:
    """Sixteen completions of a drawing (see `of_sketch`) whose upper part `keep`, of its rows, is known.

    Args:
        temperature, guidance, seed: as of `models.sampling.batches`.
        label: the class to draw, see `labels`.
    """
    x = of_sketch(rgba, model).expand(COMPLETIONS, -1, -1, -1)
    known, label = upper_rows(x, keep), labels(model, label, COMPLETIONS)
    guidance = guidance if model.label_dropout else 1.0
    with torch.inference_mode():
        drawn = sample(
            model, COMPLETIONS, seed=seed, temperature=temperature, guidance=guidance, label=label, known=(x, known)
        ).long()
        found = scores(model, drawn, label)
    low, high = found.bits.sum((1, 2)).aminmax()
    most = max(found.bits.quantile(0.999).item(), 1e-9)
    text = f"{COMPLETIONS} completions of {low:.0f} to {high:.0f} bits. Bits a pixel: black 0, pale yellow {most:.1f}."
    return Answer(grid(drawn, model.levels, COLUMNS), grid(heat(found.bits, most).long(), 256, COLUMNS), text)


def read(path: str | os.PathLike | None, model: ImageModel) -> Tensor:
    """A picture as an image of the model's (1 c h w): cropped, resized, with the nearest levels.

    Raises:
        ValueError: there is no file, it is too large, or no picture.
    """
    if path is None:
        raise ValueError("expected a picture, found none")
    size = os.path.getsize(path)
    if size > LARGEST:
        raise unexpected("file", f"{size:,} bytes", f"a picture of at most {LARGEST:,}")
    return read_images(Path(path), model.shape, model.levels, 1, rounded=True)


def enlarged(x: Tensor) -> Image.Image:
    """One image (c h w) uint8, with large pixels."""
    scale = max(1, SHOWN // max(x.shape[1:]))
    return picture(rearrange(x, "c h w -> h w c").numpy().repeat(scale, 0).repeat(scale, 1))


def score(model: ImageModel, path: str | os.PathLike, label: int | None = None) -> Answer:
    """How surprising a picture is, and where."""
    x = read(path, model)
    with torch.inference_mode():
        found = scores(model, x, labels(model, label, 1))
    bits, most = found.bits.sum().item(), max(found.bits.max().item(), 1e-9)
    text = f"{bits:.0f} bits, {found.nats.item():.1f} nats, {found.bits_per_dim.item():.3f} bits/dim. "
    if found.png_bits is not None:
        text += f"A PNG of it has {found.png_bits.item():.0f} bits. "
    text += f"Bits a pixel: black 0, pale yellow {most:.1f}."
    return Answer(enlarged(bytes_of(x, model.levels)[0]), enlarged(heat(found.bits, most)[0]), text)


def compressed(model: ImageModel, path: str | os.PathLike, label: int | None = None) -> tuple[bytes, Image.Image, str]:
    """A picture as a compressed file, which was decoded again and compared; the picture; and how large files are."""
    x = read(path, model)
    content = compress(model, x, labels(model, label, 1))
    back = decompress(model, content).long()
    assert torch.equal(back, x), "the image that came back is another one"
    bits = -model.log_prob(x, labels(model, label, 1)).item() / math.log(2)
    head = read_head(content)[1]
    lines = [
        f"**{len(content)} bytes**, {head} of them the file's head; the likelihood says {bits / 8:.1f} for the image."
    ]
    lines += [f"{name.removesuffix(', each image')}: {size} bytes." for name, size in others(x, model.levels)]
    return content, enlarged(bytes_of(back, model.levels)[0]), "\n\n".join([*lines, "Decoded, it is the same image."])


def others(x: Tensor, levels: int) -> list[tuple[str, int]]:
    """What other codecs take for an image (1 c h w)."""
    return [(name, size) for name, size in sizes(x, levels).items() if not name.endswith("side by side")]


def said(compute: Callable[..., tuple], error: type[Exception]) -> Callable[..., tuple]:
    """The function, whose mistakes are errors of another type, in one line."""

    def computed(*arguments, **named):
        try:
            return compute(*arguments, **named)
        except (ValueError, OSError, ImportError) as mistake:
            raise error(str(mistake)) from None

    return computed


def fitting(models: Mapping[str, Path]) -> dict[str, Path]:
    """Those of the models whose images can be drawn and shown: grey ones, and not too large for a page that waits."""
    found = {}
    for name, path in models.items():
        model = model_of(path)
        small_and_grey = len(model.shape) == 3 and model.channels == 1 and math.prod(model.shape) <= 1 << 12
        if small_and_grey and not model.map_features:
            found[name] = path
    return found
