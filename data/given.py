"""Images that a user hands to a trained model: from a .npy file, a picture, or a folder of pictures."""

from pathlib import Path

import numpy as np
import torch

from data.arrays import open_integers
from data.folder import SUFFIXES, read_picture


def read_images(path: Path, shape: tuple[int, int, int], levels: int, n: int | None = None) -> torch.Tensor:
    """Read images of `shape` (c h w): (n c h w) int64, the first n of them (None: all).

    Args:
        path: a .npy file of integers, (n c h w), (n h w c) or (n h w); or a picture, or a folder of pictures, which are
            cropped and resized to the shape, for a model of 256 levels and one or three colours.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: not such images; it names what was found.
    """
    if path.suffix.lower() == ".npy":
        x = read_array(path, shape)[:n]
        x = torch.from_numpy(np.array(x, dtype=np.int64))
    else:
        x = read_pictures(path, shape, levels, n)
    if not len(x):
        raise ValueError(f"{path} holds no images")
    low, high = int(x.min()), int(x.max())
    if low < 0 or high >= levels:
        raise ValueError(f"{path} has values from {low} to {high}: the model's are from 0 to {levels - 1}")
    return x


def read_array(path: Path, shape: tuple[int, int, int]) -> np.ndarray:
    """Memory-map images of `shape` (c h w) from a .npy file, whatever the place of the colours: (n c h w)."""
    x, (c, h, w) = open_integers(path, path), shape
    if x.shape[1:] == shape:
        return x
    if x.shape[1:] == (h, w, c):
        return np.moveaxis(x, 3, 1)
    if c == 1 and x.shape[1:] == (h, w):
        return x[:, None]
    raise ValueError(f"{path} has the shape {x.shape}: (n, {c}, {h}, {w}) or (n, {h}, {w}, {c}) is needed")


def read_pictures(path: Path, shape: tuple[int, int, int], levels: int, n: int | None) -> torch.Tensor:
    """Read a picture, or the first n of a folder in the order of their names: (n c h w) int64."""
    if levels != 256 or shape[0] not in (1, 3):
        raise ValueError(f"{path}: pictures are of 256 levels, grey or RGB; this model needs a .npy file")
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)[:n]
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not files:
        raise FileNotFoundError(f"there is no picture in {path} ({' '.join(SUFFIXES)})")
    c, h, w = shape
    pictures = []
    for file in files:
        try:
            pictures.append(read_picture(file, h, w, c))
        except Exception as error:  # decoders meet damage with errors of nearly every type
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file} cannot be read as a picture ({reason})") from None
    return torch.from_numpy(np.stack(pictures)).long()
