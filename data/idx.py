"""MNIST and Fashion-MNIST, from gzipped IDX files."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

from checks import check_one_of
from data import cache
from data.download import fetch
from data.splits import BINARIZE, Dataset, Split, hold_out

COUNTS = {"train": 60_000, "t10k": 10_000}
SIDES = (28, 28)
HELD_OUT = 10_000  # of train, for val: as many as the fixed binarized MNIST holds out
CLASSES = 10

MNIST_BASES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "http://yann.lecun.com/exdb/mnist/",  # the original site, last because it often refuses
)
MNIST_FILES = {
    "train-images-idx3-ubyte.gz": "sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
FASHION_BASES = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
)
FASHION_FILES = {
    "train-images-idx3-ubyte.gz": "sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes: an array of `shape`, uint8, read-only.

    Raises:
        ValueError: gzip's checksum, the header or the length is wrong.
    """
    start, size = 4 + 4 * len(shape), math.prod(shape)
    try:
        with gzip.open(path) as file:
            data = file.read(start + size + 1)  # no more is unpacked than can be right
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file ({error}); delete it and it is downloaded again") from None
    if data[:4] != bytes([0, 0, 8, len(shape)]) or len(data) < start:
        raise ValueError(
            f"{path}: expected an IDX file of bytes with {len(shape)} axes, found first bytes {data[:4].hex() or None}"
        )
    found = struct.unpack(f">{len(shape)}I", data[4:start])
    if found != shape:
        raise ValueError(f"{path}: expected shape {shape}, found {found}")
    if len(data) != start + size:
        found = f"{len(data):,}" if len(data) < start + size else "more"
        raise ValueError(f"{path}: damaged: expected {start + size:,} bytes, found {found}")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _part(folder: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Read images (n 1 28 28) uint8 and labels (n,) int64 of "train" or "t10k"."""
    n = COUNTS[prefix]
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (n, *SIDES))
    path = folder / f"{prefix}-labels-idx1-ubyte.gz"
    labels = read_idx(path, (n,))
    if labels.max() >= CLASSES:
        raise ValueError(f"{path}: expected labels in 0..{CLASSES - 1}, found {labels.max()}")
    return images[:, None], labels.astype(np.int64)


def _load(name: str, folder: Path, binarize: str) -> Dataset:
    images, labels = _part(folder, "train")
    train, val = hold_out(images, labels, HELD_OUT)
    parts = {"train": train, "val": val, "test": Split(*_part(folder, "t10k"))}
    if binarize == "threshold":
        parts = {key: Split((part.images >= 128).view(np.uint8), part.labels) for key, part in parts.items()}
    if binarize == "stochastic":
        parts = {key: Split(part.images, part.labels, binarize) for key, part in parts.items()}
    return Dataset(name, levels=256 if binarize == "none" else 2, classes=CLASSES, **parts)


def mnist(*, root: str | os.PathLike | None = None, binarize: str = "none") -> Dataset:
    """Load MNIST: 50,000 + 10,000 + 10,000 images (1 28 28), 10 classes.

    val is held out of the 60,000 training images in a fixed order; test is the official one.

    Args:
        root: the files lie in, or are downloaded to, root/mnist.
        binarize: "none" (256 levels), or with 2 levels "threshold" (a pixel is 1 from 128 on) or "stochastic"
            (1 with probability value/255, drawn each time a batch is fetched).
    """
    check_one_of("dataset.binarize", binarize, BINARIZE)
    folder = cache.folder(root, "mnist")
    fetch(folder, MNIST_BASES, MNIST_FILES)
    return _load("mnist", folder, binarize)


def fashion_mnist(*, root: str | os.PathLike | None = None, binarize: str = "none") -> Dataset:
    """Load Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747): sizes and options as for `mnist`."""
    check_one_of("dataset.binarize", binarize, BINARIZE)
    folder = cache.folder(root, "fashion_mnist")
    fetch(folder, FASHION_BASES, FASHION_FILES)
    return _load("fashion_mnist", folder, binarize)
