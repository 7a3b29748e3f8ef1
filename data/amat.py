"""The fixed binarized MNIST, from text files of zeros and ones."""

import os
from pathlib import Path

import numpy as np

from data import cache
from data.download import fetch
from data.splits import Dataset, Split

SIDE = 28
SPACE = ord(" ")  # all characters up to it are white space
COUNTS = {"train": 50_000, "valid": 10_000, "test": 10_000}
BASES = ("https://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",)
FILES = {
    "binarized_mnist_train.amat": "sha256:ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
    "binarized_mnist_valid.amat": "sha256:1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
    "binarized_mnist_test.amat": "sha256:e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
}


def read_amat(path: Path, n: int) -> np.ndarray:
    """Read n images as text: n × 784 of "0" or "1" with white space between them.

    Returns:
        (n 1 28 28) uint8.

    Raises:
        ValueError: another number of values, or a character other than 0 and 1.
    """
    count = n * SIDE**2
    expected = f"{path}: damaged: expected {count:,} values 0 or 1 ({n:,} images of {SIDE}×{SIDE})"
    if path.stat().st_size > 4 * count + 1024:
        raise ValueError(f"{expected}, found {path.stat().st_size:,} bytes")
    text = np.fromfile(path, np.uint8)
    paired = len(text) == 2 * count and (text[1::2] <= SPACE).all()  # digit, space, …: the published files
    digits = text[::2] if paired else text[text > SPACE]  # the first is three times as fast
    bits = digits - ord("0")  # below "0" wraps around: anything but 0 and 1 is above 1
    if len(bits) != count:
        raise ValueError(f"{expected}, found {len(bits):,}")
    if bits.max() > 1:
        raise ValueError(f"{expected}, found the character {chr(digits[bits > 1][0])!r}")
    if ((text[1:] > SPACE) & (text[:-1] > SPACE)).any():
        raise ValueError(f"{expected}, found values with no space between them")
    return bits.reshape(n, 1, SIDE, SIDE)


def binary_mnist(*, root: str | os.PathLike | None = None) -> Dataset:
    """Load the binarized MNIST of Salakhutdinov and Murray (2008) in Larochelle's files: 2 levels, no labels.

    50,000 + 10,000 + 10,000 images (1 28 28) in the files' own split; they lie in, or are downloaded to,
    root/binary_mnist. The test part is sorted by class: its first images are not typical of all.
    """
    folder = cache.folder(root, "binary_mnist")
    fetch(folder, BASES, FILES)
    train, val, test = (
        Split(read_amat(folder / f"binarized_mnist_{part}.amat", n), None) for part, n in COUNTS.items()
    )
    return Dataset("binary_mnist", levels=2, classes=None, train=train, val=val, test=test)
