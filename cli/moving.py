"""Moving pictures: how images are drawn, as their pixels appear in the order of drawing; clips; both as a GIF.

Legend: n images · c channel (colour) · h w rows, columns · k stride of a smaller image's pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from cli.output import UNKNOWN
from files import write_atomically
from models.base import ImageModel

FRAMES, MILLISECONDS, AT_THE_END = 60, 60, 2000  # at most; how long one is shown; and the last one
MILLISECONDS_OF_CLIPS = 120  # how long a frame of a clip is shown


def order_of(model: ImageModel) -> tuple[Tensor, list[int]]:
    """When each pixel is drawn: its number in the order (h w), and the strides of the images, from the smallest.

    With Multi-Scale, smaller images come first; in the paper's form, without `copy_known`, they are no part of the
    image, and only the largest is shown.
    """
    _, h, w = model.shape
    strides = [h // net.height for net in model.nets] if getattr(model, "copy_known", False) else [1]
    number, drawn = torch.full((h, w), h * w), 0
    for k in strides:
        of_size = number[::k, ::k]
        new = of_size == h * w
        of_size[new] = torch.arange(drawn, drawn + int(new.sum()))
        drawn += int(new.sum())
    return number, strides


def halfway(x: Tensor, number: Tensor, strides: list[int], drawn: int) -> Tensor:
    """Images x (n c h w) after `drawn` pixels: the others have the smaller image's colour there, or are UNKNOWN."""
    out = torch.full_like(x, UNKNOWN)
    for k in strides:
        rows, columns = (torch.arange(side) // k * k for side in x.shape[2:])
        there = number[rows][:, columns] < drawn
        out = torch.where(there, x[:, :, rows][..., columns], out)
    return out


def halfway_through(x: Tensor, model: ImageModel) -> Iterator[Tensor]:
    """Images x (n c h w) as they were drawn, from none of their pixels to all: some (n c h w) in turn."""
    number, strides = order_of(model)
    pixels, x = number.numel(), x.long()
    times = torch.linspace(0, pixels, min(pixels, FRAMES) + 1).round().long().tolist()
    return (halfway(x, number, strides, drawn) for drawn in times)


def write_gif(path: Path, pictures: list[Image.Image], milliseconds: int = MILLISECONDS) -> None:
    """Write pictures as a looping GIF, whole or not at all.

    Args:
        milliseconds: how long each but the last is shown.
    """
    first, *others = pictures
    shown = [milliseconds] * len(others) + [AT_THE_END]
    options = {"format": "GIF", "save_all": True, "append_images": others, "duration": shown, "loop": 0}
    write_atomically(path, lambda file: first.save(file, **options))
