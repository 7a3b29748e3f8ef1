"""How surprising single images are to a model: the bits of each pixel, and how many of them any image so complex takes.

Legend: n images · b batch · c channel (colour) · h w rows, columns.

A likelihood by itself is no measure of what is unusual: a model finds plain images of a kind that it has never seen
likelier than those that it learnt from. Less the bits that a PNG takes, it is much nearer to one (Serrà et al. 2020,
1909.11480).
"""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.base import ImageModel, bits_per_dim
from models.likelihood import EVALUATION_BATCH
from models.video import film

PNG = {"format": "PNG", "optimize": True}


class Scores(NamedTuple):
    """Of n images, what `scores` finds."""

    nats: Tensor  # (n,) float64: −log p(x)
    bits: Tensor  # (n h w) float32: of each pixel, its colours together, given all before it; of clips (n t h w)
    png_bits: Tensor | None  # (n,) float64: of the image as a PNG; None where a PNG cannot hold it
    shape: tuple[int, ...]  # c h w, of clips t c h w

    @property
    def bits_per_dim(self) -> Tensor:
        """Bits a sub-pixel: (n,) float64."""
        return bits_per_dim(self.nats, self.shape)

    @property
    def corrected(self) -> Tensor | None:
        """Bits a sub-pixel less those of the PNG: (n,) float64, the larger the more unusual; None without a PNG."""
        return None if self.png_bits is None else self.bits_per_dim - self.png_bits / np.prod(self.shape)


def scores(
    model: ImageModel,
    x: Tensor,
    label: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    batch_size: int = EVALUATION_BATCH,
    tell: Callable[[int], None] = lambda images: None,
) -> Scores:
    """Score images x (n c h w), or clips (n t c h w), of integers in [0, levels), each by itself, in eval mode.

    Args:
        label, cond: of the images, as in `model.log_prob`.
        batch_size: images at a time; it changes nothing but the last digits.
        tell: called after each batch with the number of images in it.
    """
    model.check_condition(len(model.check(x)), label, cond)
    training, bits = model.training, []
    model.eval()
    with torch.no_grad():
        for some in torch.arange(len(x)).split(batch_size):
            given = (value if value is None else value[some].to(model.device) for value in (x.long(), label, cond))
            bits.append(model.nats_at(*given).cpu().double() / np.log(2))
            tell(len(some))
    model.train(training)
    bits = torch.cat(bits)
    of_png = png_bits(x, model.levels)
    return Scores(bits.flatten(1).sum(1) * np.log(2), bits.float(), of_png, model.shape)


def png_bits(x: Tensor, levels: int) -> Tensor | None:
    """Bits of images x (n c h w), or clips, as PNGs: (n,) float64; None where no PNG can hold them."""
    x = film(x)
    if levels > 256 or x.shape[1] not in (1, 3):
        return None
    pixels = x.cpu().numpy().astype(np.uint8)
    return torch.tensor([8.0 * picture_bytes(image, levels, PNG) for image in pixels], dtype=torch.float64)


def picture_bytes(image: np.ndarray, levels: int, options: dict) -> int:
    """Bytes of an image (c h w) uint8 in a format of Pillow's; a PNG of two levels has one bit a pixel."""
    picture = Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2))
    if levels == 2:
        picture = picture.point(lambda value: 255 * value)
        picture = picture.convert("1") if options["format"] == "PNG" and len(image) == 1 else picture
    file = io.BytesIO()
    picture.save(file, **options)
    return len(file.getvalue())


def auroc(normal: Tensor, unusual: Tensor) -> float:
    """The probability that one of the scores `unusual` (m,) is larger than one of `normal` (n,); ties count half."""
    values, ranks = np.unique(torch.cat([normal, unusual]).numpy(), return_inverse=True)
    counts = np.bincount(ranks, minlength=len(values))
    below = np.cumsum(counts) - (counts - 1) / 2 - 1  # its place in the order; equal ones share a place
    of_unusual = below[ranks[len(normal) :]].sum() - len(unusual) * (len(unusual) - 1) / 2
    return float(of_unusual / (len(normal) * len(unusual)))
