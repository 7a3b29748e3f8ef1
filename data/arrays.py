"""Images, or clips, from any integer array in a .npy file: codes of another model, medical pictures, maps."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checks import check, check_one_of, reason_of, unexpected
from data import cache
from data.splits import Dataset, shuffled, sizes, three_way

BLOCK = 1 << 24  # values in memory at a time
MOST = 1 << 16  # levels, or classes, if only a file's largest value says how many: a model has weights for each


def open_integers(path: Path, option: str | None = None) -> np.ndarray:
    """Memory-map a .npy file of integers.

    Args:
        option: the name of the argument that gave the path, if it is known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or does not hold integers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path if option is None else f'{option}={path}'}: expected a .npy file, found none")
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # NumPy reads the header as Python would, and meets errors of nearly every type
        raise ValueError(f"{path}: expected a whole .npy file of numbers ({reason_of(error)})") from None
    if array.dtype.kind not in "iub":
        raise ValueError(f"{path}: expected integers, found {array.dtype}")
    return array


def _blocks(images: np.ndarray) -> Iterator[slice]:
    """Cut the rows into slices of about BLOCK values each."""
    step = max(1, BLOCK // max(1, images[0].size))
    return (slice(start, start + step) for start in range(0, len(images), step))


def count_levels(images: np.ndarray, levels: int | None, path: Path) -> int:
    """Return `levels`, or for None the largest value + 1 (at least 2); ValueError: a value is outside."""
    largest, most = 0, MOST if levels is None else levels
    for rows in _blocks(images):
        low, high = int(images[rows].min()), int(images[rows].max())
        largest = max(largest, high)
        for value in (low, high):
            if not 0 <= value < most:
                unless = " unless dataset.levels says otherwise" if levels is None else f" with levels={levels}"
                raise ValueError(f"{path}: expected values from 0 to {most - 1}{unless}, found {value}")
    return max(2, largest + 1) if levels is None else levels


def channels_first(raw: np.ndarray, channels: str | None, path: Path, clips: bool = False) -> np.ndarray:
    """Return an array (n h w), (n c h w) or (n h w c) as (n c h w); of clips, with t after n.

    Args:
        channels: "first" or "last". None: the order that makes at most four colours, and no side shorter than their
            number, if only one of the two does.
        clips: whether there is t after n.

    Raises:
        ValueError: it may be either, and `channels` does not say.
    """
    if raw.ndim == 3 + clips:
        return np.expand_dims(raw, -3)
    shape = raw.shape[-3:]
    fitting = [name for name, c in (("first", shape[0]), ("last", shape[2])) if c <= min(4, *shape)]
    if channels is None and len(fitting) != 1:
        (a, b, c), found = shape, f"images of {' × '.join(map(str, shape))} in {path}"
        first, last = f"first, {a} colours of {b}×{c}", f"last, {c} colours of {a}×{b}"
        raise unexpected("dataset.channels", channels, f"{first}, or {last}, for {found}")
    return raw if (channels or fitting[0]) == "first" else np.moveaxis(raw, -1, -3)


def _convert(
    path: Path, raw: np.ndarray, channels: str | None, levels: int | None, seed: int, folder: Path, clips: bool
) -> tuple[np.ndarray, int]:
    """Return (images, levels): as `channels_first`, in a random order, memory-mapped, written once into `folder`."""
    images = channels_first(raw, channels, path, clips)
    target = folder / f"{cache.key(path.resolve(), cache.stamp(path), images.strides, levels, seed)}.npy"
    if not target.is_file():
        counted = count_levels(raw, levels, path)
        order, dtype = shuffled(len(images), seed), np.uint8 if counted <= 256 else np.int64
        with cache.exclusive(folder):
            if not target.is_file():
                cache.store(target, (images[order[rows]].astype(dtype) for rows in _blocks(images)))
    images = cache.load(target, images.shape[1:], np.uint8, np.int64)
    return images, max(2, int(images.max()) + 1) if levels is None else levels


def _labels(path: Path, n: int) -> np.ndarray:
    """Read n labels: (n,) int64."""
    labels = open_integers(path, "dataset.labels")
    if labels.shape != (n,):
        raise ValueError(f"{path}: expected ({n},) labels, found shape {labels.shape}")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= MOST:
        raise ValueError(f"{path}: expected labels from 0 to {MOST - 1}, found {low} to {high}")
    return labels.astype(np.int64)


def npy(
    *,
    path: str | os.PathLike | None = None,
    channels: str | None = None,
    clips: bool = False,
    levels: int | None = None,
    labels: str | os.PathLike | None = None,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    root: str | os.PathLike | None = None,
) -> Dataset:
    """Load an integer array (n h w), (n c h w) or (n h w c) from a .npy file, or clips, with an axis of time after n.

    Args:
        path: the file. It is converted once to root/npy/KEY.npy, (n c h w) uint8 (int64 where levels > 256)
            with the images in a random order, and memory-mapped from there.
        channels: which of the last two it is, "first" or "last"; None: see `channels_first`.
        clips: whether the second axis is time; five axes are always clips.
        levels: values a sub-pixel takes; None: the largest value in the file + 1, if that is at most MOST.
        labels: a .npy file with (n,) integers from 0 to MOST - 1, or None.
        val, test: the fractions of the images that these parts get.
        seed: decides which image is in which part.
        root: see `path`; None is ~/.cache/pixelrnn.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the array has another shape, or a value outside 0..levels-1.
    """
    path = cache.source("path", path, "npy", "FILE.npy")
    if levels is not None:
        check("dataset.levels", levels, int, 2, 2**31)
    check("dataset.seed", seed, int, 0)
    if channels is not None:
        check_one_of("dataset.channels", channels, ("first", "last"))
    check("dataset.clips", clips, bool, False, True)
    raw = open_integers(path, "dataset.path")
    clips = clips or raw.ndim == 5
    if raw.ndim - clips not in (3, 4) or 0 in raw.shape:
        t = "t " if clips else ""
        raise ValueError(f"{path}: expected shape (n {t}h w), (n {t}c h w) or (n {t}h w c), found {raw.shape}")
    counts = sizes(len(raw), val, test, path)
    its_labels, classes = None, None
    if labels is not None:
        its_labels = _labels(cache.source("labels", labels, "npy", "FILE.npy"), len(raw))
        classes, its_labels = int(its_labels.max()) + 1, its_labels[shuffled(len(raw), seed)]
    images, levels = _convert(path, raw, channels, levels, seed, cache.folder(root, "npy"), clips)
    return Dataset("npy", levels=levels, classes=classes, **three_way(images, its_labels, *counts))
