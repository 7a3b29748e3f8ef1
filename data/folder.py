"""Images from any folder of pictures, cropped and resized to one size."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from checks import check, reason_of, unexpected
from data import cache
from data.pictures import SUFFIXES, in_blocks, read_picture, shape_of
from data.splits import Dataset, shuffled, sizes, three_way


def _pictures(folder: Path, names: Sequence[str], shape: tuple[int, int, int], kept: list[str]) -> Iterator[np.ndarray]:
    """Read pictures (c h w) and add their names to `kept`; those that cannot be read are named on stderr, left out."""
    channels, height, width = shape
    for name in names:
        try:
            picture = read_picture(folder / name, height, width, channels)
        except Exception as error:  # decoders meet damage with errors of nearly every type
            print(f"{folder / name}: skipped, cannot be read ({reason_of(error)})", file=sys.stderr)
            continue
        kept.append(name)
        yield picture
    if not kept:
        raise ValueError(f"{folder}: expected pictures that can be read, found none in {len(names)} files")


def _folder_of(name: str) -> str:
    """Return the first folder of a picture's name "FOLDER/…"."""
    return name.partition("/")[0]


def _classes(path: Path, names: Sequence[str]) -> dict[str, int]:
    """Number the folders directly below `path` that the pictures are in, by name.

    Raises:
        ValueError: a picture is in none of them, or all are in one.
    """
    for name in names:
        if "/" not in name:
            raise ValueError(f"{path / name}: expected a picture in a folder below {path}, which is its label")
    classes = {folder: k for k, folder in enumerate(sorted({_folder_of(name) for name in names}))}
    if len(classes) < 2:
        raise ValueError(f"{path}: expected a folder of pictures for each label, found {_folder_of(names[0])} alone")
    return classes


def image_folder(
    *,
    path: str | os.PathLike | None = None,
    size: int | Sequence[int] = 32,
    channels: int = 3,
    labels: str | None = None,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    root: str | os.PathLike | None = None,
) -> Dataset:
    """Load all pictures below a folder: 256 levels.

    Args:
        path: the folder, searched with all folders in it. The pictures are converted once to
            root/image_folder/KEY.npy and memory-mapped from there; KEY depends on the path, the options and
            all files' names, sizes and times.
        size: height and width, or [height, width]; each picture's centre is cropped to these proportions.
        channels: 3 for RGB, 1 for grey.
        labels: "folders": a picture's label is the folder directly below `path` that it is in, numbered in the order of
            their names, and kept beside the pictures in KEY_labels.npy; None: no labels.
        val, test: the fractions of the pictures that these parts get.
        seed: decides which picture is in which part.
        root: see `path`; None is ~/.cache/pixelrnn.

    Raises:
        FileNotFoundError: there is no such folder, or no picture in it.
        ValueError: an option's value is not as expected, or no picture can be read.
    """
    path = cache.source("path", path, "image_folder", "FOLDER")
    shape = shape_of(size, channels)
    check("dataset.seed", seed, int, 0)
    if labels not in (None, "folders"):
        raise unexpected("dataset.labels", labels, "folders, or null for no labels")
    if not path.is_dir():
        raise FileNotFoundError(f"dataset.path={path}: expected a folder, found none")
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    names = sorted(file.relative_to(path).as_posix() for file in found)
    if not names:
        raise FileNotFoundError(f"dataset.path={path}: expected pictures ({' '.join(SUFFIXES)}), found none")
    classes = _classes(path, names) if labels else {}
    sizes(len(names), val, test, path)
    files = [(name, *cache.stamp(path / name)) for name in names]
    key = cache.key(path.resolve(), shape, seed, files)
    folder = cache.folder(root, "image_folder")
    targets = [folder / f"{key}.npy"] + [folder / f"{key}_labels.npy"] * bool(labels)

    def make() -> None:
        kept = []
        order = [names[k] for k in shuffled(len(names), seed)]
        cache.store(targets[0], in_blocks(_pictures(path, order, shape, kept), shape))
        if labels:
            cache.store(targets[1], [np.array([classes[_folder_of(name)] for name in kept])])

    cache.once(make, *targets)
    images = cache.load(targets[0], shape, np.uint8)
    its_labels = cache.load(targets[1], (), np.int64, n=len(images)) if labels else None
    parts = three_way(images, its_labels, *sizes(len(images), val, test, path))
    return Dataset("image_folder", levels=256, classes=len(classes) or None, names=tuple(classes) or None, **parts)
