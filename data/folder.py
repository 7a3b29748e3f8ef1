"""Images from any folder of pictures, cropped and resized to one size."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from checks import check, reason_of, unexpected
from data import cache
from data.splits import Dataset, shuffled, sizes, three_way

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
BLOCK = 1 << 26  # bytes in memory at a time


def read_picture(path: Path, height: int, width: int, channels: int) -> np.ndarray:
    """Read a picture, turned as its EXIF data says; crop its centre to the shape's proportions and resize it.

    Returns:
        (c h w) uint8: RGB for 3 channels, grey for 1. Transparency is dropped.

    Raises:
        any error of Pillow's for a file that it cannot read, or that is larger than it takes for harmless (some 90
        million pixels); ValueError for pixels that are not bytes.
    """
    too_large = Image.DecompressionBombWarning
    with warnings.catch_warnings(action="error", category=too_large), Image.open(path) as picture:
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


def _blocks(folder: Path, names: Sequence[str], shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Read pictures as blocks (k c h w); those that cannot be read are named on stderr and left out."""
    channels, height, width = shape
    size, block, empty = max(1, BLOCK // (channels * height * width)), [], True
    for name in names:
        try:
            block.append(read_picture(folder / name, height, width, channels))
        except Exception as error:  # decoders meet damage with errors of nearly every type
            print(f"{folder / name}: skipped, cannot be read ({reason_of(error)})", file=sys.stderr)
        if block and (len(block) == size or name == names[-1]):
            yield np.stack(block)
            block, empty = [], False
    if empty:
        raise ValueError(f"{folder}: expected pictures that can be read, found none in {len(names)} files")


def _shape(size: int | Sequence[int], channels: int) -> tuple[int, int, int]:
    """Check the options; return (channels, height, width)."""
    if channels not in (1, 3) or isinstance(channels, bool):
        raise unexpected("dataset.channels", channels, "3 (RGB) or 1 (grey)")
    pair = [size, size] if isinstance(size, int) else list(size) if isinstance(size, Sequence) else []
    if len(pair) != 2 or isinstance(size, str):
        raise unexpected("dataset.size", size, "an integer or [height, width]")
    for side in pair:
        check("dataset.size", side, int, 1)
    return channels, *pair


def image_folder(
    *,
    path: str | os.PathLike | None = None,
    size: int | Sequence[int] = 32,
    channels: int = 3,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    root: str | os.PathLike | None = None,
) -> Dataset:
    """Load all pictures below a folder: 256 levels, no labels.

    Args:
        path: the folder, searched with all folders in it. The pictures are converted once to
            root/image_folder/KEY.npy and memory-mapped from there; KEY depends on the path, the options and
            all files' names, sizes and times.
        size: height and width, or [height, width]; each picture's centre is cropped to these proportions.
        channels: 3 for RGB, 1 for grey.
        val, test: the fractions of the pictures that these parts get.
        seed: decides which picture is in which part.
        root: see `path`; None is ~/.cache/pixelrnn.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        ValueError: an option's value is not as expected, or no picture can be read.
    """
    path = cache.source("path", path, "image_folder", "FOLDER")
    shape = _shape(size, channels)
    check("dataset.seed", seed, int, 0)
    if not path.is_dir():
        raise FileNotFoundError(f"dataset.path={path}: expected a folder, found none")
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    names = sorted(file.relative_to(path).as_posix() for file in found)
    if not names:
        raise FileNotFoundError(f"dataset.path={path}: expected pictures ({' '.join(SUFFIXES)}), found none")
    sizes(len(names), val, test, path)
    folder = cache.folder(root, "image_folder")
    files = [(name, *cache.stamp(path / name)) for name in names]
    target = folder / f"{cache.key(path.resolve(), shape, seed, files)}.npy"
    if not target.is_file():
        with cache.exclusive(folder):
            if not target.is_file():
                order = [names[k] for k in shuffled(len(names), seed)]
                cache.store(target, _blocks(path, order, shape))
    images = cache.load(target, shape, np.uint8)
    counts = sizes(len(images), val, test, path)
    return Dataset("image_folder", levels=256, classes=None, **three_way(images, None, *counts))
