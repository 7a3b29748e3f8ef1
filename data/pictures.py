"""Pictures of any size, decoded, cropped and resized to one shape.

k pictures of a block · c channels · h w rows, columns
"""

import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from checks import check, unexpected

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # Pillow would hand other kinds to other programs
BLOCK = 1 << 26  # bytes in memory at a time


def read_picture(file: Path | BinaryIO, height: int, width: int, channels: int) -> np.ndarray:
    """Read a picture, turned as its EXIF data says; crop its centre to the shape's proportions and resize it.

    Returns:
        (c h w) uint8: RGB for 3 channels, grey for 1. Transparency is dropped.

    Raises:
        any error of Pillow's for a file that it cannot read, or that is larger than it takes for harmless (some 90
        million pixels); ValueError for another kind of file, and for pixels that are not bytes.
    """
    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        try:
            picture = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"none of {', '.join(FORMATS)}") from None
        with picture:
            picture = ImageOps.exif_transpose(picture)
            if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip 16 bits, not scale them
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.mode in ("I", "F"):
                raise ValueError(f"expected pixels of a fixed range, found the mode {picture.mode}")
            if "transparency" in picture.info:
                picture = picture.convert("RGBA")
            picture = picture.convert("RGB" if channels == 3 else "L")
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture).reshape(height, width, channels).transpose(2, 0, 1)


def in_blocks(pictures: Iterator[np.ndarray], shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Gather pictures of a shape (c h w), as they come, into blocks (k c h w) of about BLOCK bytes."""
    size = max(1, BLOCK // math.prod(shape))
    while block := list(itertools.islice(pictures, size)):
        yield np.stack(block)


def shape_of(size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
    """Check the options of a data set of pictures; return the shape (c, h, w) that they ask for."""
    if channels not in (1, 3) or isinstance(channels, bool):
        raise unexpected("dataset.channels", channels, "3 (RGB) or 1 (grey)")
    pair = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(pair) != 2 or isinstance(size, str):
        raise unexpected("dataset.size", size, "an integer or [height, width]")
    for side in pair:
        check("dataset.size", side, int, 1)
    return channels, *pair
