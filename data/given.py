"""Images for a trained model to complete, compress or score: from a .npy file, a picture, or a folder of pictures."""

from pathlib import Path

import numpy as np
import torch

from checks import reason_of
from data.arrays import open_integers
from data.pictures import SUFFIXES, read_picture


def read_images(
    path: Path, shape: tuple[int, ...], levels: int, n: int | None = None, rounded: bool = False
) -> torch.Tensor:
    """Read images of `shape` (c h w): (n c h w) int64, the first n of them (None: all); or clips, of (t c h w).

    Args:
        path: a .npy file of integers, (n c h w), (n h w c) or (n h w), of clips with t after n; or a picture, or a
            folder of pictures, which are cropped and resized to the shape, for a model of 256 levels and one or three
            colours.
        rounded: take pictures for a model of fewer levels too: each value becomes the nearest level.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: the images are not as expected; it says what was found.
    """
    x = read_array(path, shape)[:n] if path.suffix.lower() == ".npy" else read_pictures(path, shape, levels, n, rounded)
    if not len(x):
        raise ValueError(f"{path}: expected images, found none")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        raise ValueError(f"{path}: expected values from 0 to {levels - 1}, found {low} to {high}")
    return torch.from_numpy(np.array(x, dtype=np.int64))


def read_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Memory-map images of `shape`, (c h w) or (t c h w), from a .npy file, with the colours before or after the sides:
    (n c h w) or (n t c h w).
    """
    x, (*t, c, h, w) = open_integers(path), shape
    if x.shape[1:] == shape:
        return x
    if x.shape[1:] == (*t, h, w, c):
        return np.moveaxis(x, -1, -3)
    if c == 1 and x.shape[1:] == (*t, h, w):
        return np.expand_dims(x, -3)
    first, last = (f"(n, {', '.join(map(str, (*t, *sides)))})" for sides in ((c, h, w), (h, w, c)))
    raise ValueError(f"{path}: expected shape {first} or {last}, found {x.shape}")


def files_of(path: Path, n: int | None = None) -> list[Path]:
    """List a picture, or the first n of a folder in the order of their names.

    Raises:
        FileNotFoundError: nothing is there.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[:n]
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"{path}: expected a file or a folder, found none")
    if not files:
        raise FileNotFoundError(f"{path}: expected pictures ({' '.join(SUFFIXES)}), found none")
    return files


def read_pictures(path: Path, shape: tuple[int, ...], levels: int, n: int | None, rounded: bool) -> np.ndarray:
    """Read a picture, or the first n of a folder in the order of their names: (n c h w) uint8."""
    if len(shape) != 3:
        raise ValueError(f"{path}: expected a .npy file, as the model is of clips")
    c, h, w = shape
    if levels > 256 or (levels < 256 and not rounded) or c not in (1, 3):
        raise ValueError(f"{path}: expected a .npy file, as pictures have 256 levels and are grey or RGB")
    pictures = []
    for file in files_of(path, n):
        try:
            pictures.append(read_picture(file, h, w, c))
        except Exception as error:  # decoders meet damage with errors of nearly every type
            raise ValueError(f"{file}: expected a picture, found none that can be read ({reason_of(error)})") from None
    x = np.stack(pictures)
    return x if levels == 256 else np.rint(x * ((levels - 1) / 255)).astype(np.uint8)
