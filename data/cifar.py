"""CIFAR-10, from its binary version: records of one label byte and 3,072 pixel bytes. No pickle is opened."""

import gzip
import io
import os
import tarfile
import zlib
from pathlib import Path

import numpy as np

from checks import reason_of
from data import cache
from data.download import fetch
from data.splits import Dataset, Split, hold_out
from files import write_atomically

COUNT = 10_000  # records a file
HELD_OUT = 5_000  # of train, for val
CLASSES = 10
PIXELS = (3, 32, 32)
RECORD = 1 + 3 * 32 * 32
FOLDER = "cifar-10-batches-bin"
TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
TEST = "test_batch.bin"

ARCHIVE = "cifar-10-binary.tar.gz"
BASES = ("https://www.cs.toronto.edu/~kriz/", "https://cave.cs.toronto.edu/kriz/")
DIGEST = "sha256:c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"


def _extract(archive: Path, names: tuple[str, ...]) -> None:
    """Take the named files, and nothing else, out of the archive into FOLDER beside it."""
    folder, most = archive.parent / FOLDER, 8 * COUNT * RECORD + (1 << 20)
    with cache.exclusive(folder):
        try:
            with gzip.open(archive) as file:
                content = file.read(most + 1)
            if len(content) > most:
                raise ValueError(f"more than {most:,} bytes unpacked")
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                for name in names:
                    # Looked up by name and read as bytes: no path in the archive decides where anything goes.
                    member = tar.getmember(f"{FOLDER}/{name}")
                    content = tar.extractfile(member) if member.size == COUNT * RECORD else None
                    if content is None:
                        raise ValueError(f"expected {name} of {COUNT * RECORD:,} bytes, found {member.size:,}")
                    write_atomically(folder / name, lambda file, content=content: file.write(content.read()))
        except (tarfile.TarError, EOFError, KeyError, ValueError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{archive}: damaged ({reason_of(error)}); delete it and it is downloaded again") from None


def read_records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read one file: images (n 3 32 32) uint8, labels (n,) int64; ValueError if it is damaged."""
    size = path.stat().st_size
    if size != COUNT * RECORD:
        raise ValueError(f"{path}: damaged: expected {COUNT * RECORD:,} bytes ({COUNT:,} records), found {size:,}")
    records = np.fromfile(path, np.uint8).reshape(COUNT, RECORD)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= CLASSES:
        raise ValueError(f"{path}: damaged: expected labels in 0..{CLASSES - 1}, found {labels.max()}")
    return records[:, 1:].reshape(COUNT, *PIXELS), labels


def cifar10(*, root: str | os.PathLike | None = None) -> Dataset:
    """Load CIFAR-10 (Krizhevsky 2009): 45,000 + 5,000 + 10,000 images (3 32 32), 256 levels, 10 classes.

    val is held out of the 50,000 training images in a fixed order; test is the official one. The files lie in
    root/cifar10/cifar-10-batches-bin, or come from the archive beside that folder, downloaded where needed.
    """
    home = cache.folder(root, "cifar10")
    folder = home / FOLDER
    missing = tuple(name for name in (*TRAIN, TEST) if not (folder / name).is_file())
    if missing:
        fetch(home, BASES, {ARCHIVE: DIGEST})
        _extract(home / ARCHIVE, missing)
    images, labels = map(np.concatenate, zip(*(read_records(folder / name) for name in TRAIN), strict=True))
    train, val = hold_out(images, labels, HELD_OUT)
    return Dataset(
        "cifar10", levels=256, classes=CLASSES, train=train, val=val, test=Split(*read_records(folder / TEST))
    )
