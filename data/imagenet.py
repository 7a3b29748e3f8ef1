"""Downsampled ImageNet, 32×32 and 64×64, from its official .npz batches."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checks import reason_of
from data import cache
from data.splits import Dataset, Split

PARTS = {"train": tuple(f"train_data_batch_{k}.npz" for k in range(1, 11)), "test": ("val_data.npz",)}
HELD_OUT = 10_000  # of train, for val
CLASSES = 1000
MOST = 150_000  # images in a file; the official ones hold up to 128,123
SITE = "https://image-net.org/download-images"
ARCHIVES = {
    32: "Imagenet32_train_npz.zip and Imagenet32_val_npz.zip",
    64: "Imagenet64_train_part1_npz.zip, Imagenet64_train_part2_npz.zip and Imagenet64_val_npz.zip",
}


def _claim(arrays: np.lib.npyio.NpzFile, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return shape and type of an array in an .npz file, by its header."""
    with arrays.zip.open(f"{name}.npy") as file:
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, _, dtype = read[np.lib.format.read_magic(file)](file)
    return shape, dtype


def read_batch(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Read one .npz batch: images (n 3 size size) uint8, labels (n,) int64 in 0..999; ValueError if it is damaged."""
    pixels = 3 * size * size
    try:
        with open(path, "rb") as file, np.lib.npyio.NpzFile(file) as arrays:
            (shape, dtype), (its_shape, its_dtype) = _claim(arrays, "data"), _claim(arrays, "labels")
            right = dtype == np.uint8 and shape[1:] == (pixels,) and shape[0] <= MOST and its_shape == shape[:1]
            right = right and its_dtype.kind in "iu"
            data, labels = (arrays["data"], arrays["labels"]) if right else (None, None)
    except Exception as error:  # decoders meet damage with errors of nearly every type
        raise ValueError(f"{path}: expected an npz file with arrays data and labels ({reason_of(error)})") from None
    if not right:
        raise ValueError(
            f"{path}: expected data (n, {pixels}) uint8, n at most {MOST:,}, and n integers as labels, "
            f"found {shape} {dtype} and {its_shape} {its_dtype}"
        )
    if len(labels) and not 1 <= labels.min() <= labels.max() <= CLASSES:
        raise ValueError(f"{path}: expected labels from 1 to {CLASSES}, found {labels.min()} to {labels.max()}")
    return data.reshape(-1, 3, size, size), labels.astype(np.int64) - 1


def _converted(folder: Path, part: str) -> bool:
    return (folder / f"{part}.npy").is_file() and (folder / f"{part}_labels.npy").is_file()


def _convert(folder: Path, part: str, names: tuple[str, ...], size: int) -> None:
    """Write the batches as memory-mappable part.npy and part_labels.npy, unless that was done before."""
    labels = []

    def images() -> Iterator[np.ndarray]:
        for name in names:
            block, its_labels = read_batch(folder / name, size)
            labels.append(its_labels)
            yield block

    with cache.exclusive(folder):
        if not _converted(folder, part):
            cache.store(folder / f"{part}.npy", images())
            cache.store(folder / f"{part}_labels.npy", labels)


def _load(folder: Path, part: str, size: int) -> Split:
    """Memory-map a converted part; ValueError if it is damaged."""
    path = folder / f"{part}_labels.npy"
    images = cache.load(folder / f"{part}.npy", (3, size, size), np.uint8)
    labels = cache.load(path, (), np.int64)
    if len(labels) != len(images):
        raise ValueError(f"{path}: expected {len(images)} labels, found {len(labels)}; delete it and it is made again")
    return Split(images, labels)


def _imagenet(size: int, root: str | os.PathLike | None) -> Dataset:
    """Load the data set. The end of train can be val because its authors shuffled it before they cut it."""
    name = f"imagenet{size}"
    folder = cache.folder(root, name)
    todo = {part: names for part, names in PARTS.items() if not _converted(folder, part)}
    missing = [file for names in todo.values() for file in names if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{name}: put {', '.join(missing)} into {folder} (from {ARCHIVES[size]} at {SITE}, which needs a "
            f"login), or set dataset.root"
        )
    for part, names in todo.items():
        _convert(folder, part, names, size)
    train = _load(folder, "train", size)
    if len(train) <= HELD_OUT:
        raise ValueError(f"{folder}: expected more than {HELD_OUT:,} training images, found {len(train):,}")
    return Dataset(
        name,
        levels=256,
        classes=CLASSES,
        train=Split(train.images[:-HELD_OUT], train.labels[:-HELD_OUT]),
        val=Split(train.images[-HELD_OUT:], train.labels[-HELD_OUT:]),
        test=_load(folder, "test", size),
    )


def imagenet32(*, root: str | os.PathLike | None = None) -> Dataset:
    """Load downsampled ImageNet (Chrabaszcz, Loshchilov, Hutter 2017, arXiv:1707.08819), 32×32.

    1,271,167 + 10,000 + 50,000 images (3 32 32), 256 levels, 1,000 classes: val is the end of the training
    images, test is the official validation set, which papers report. The batches have to be put into
    root/imagenet32 by hand; they are converted once, after which they are no longer needed. The first papers
    (1601.06759) used another downsampling, no longer offered: bits per dimension of the two cannot be compared.
    """
    return _imagenet(32, root)


def imagenet64(*, root: str | os.PathLike | None = None) -> Dataset:
    """Load downsampled ImageNet, 64×64: images (3 64 64), in root/imagenet64; all else as for `imagenet32`."""
    return _imagenet(64, root)
