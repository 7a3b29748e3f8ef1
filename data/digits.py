"""The handwritten digits that come with the project: 8×8 pixels, 17 levels (see DIGITS.md)."""

import os
from pathlib import Path

import numpy as np

from data.splits import SPLITS, Dataset, Split


def digits(*, root: str | os.PathLike | None = None) -> Dataset:
    """Load 1,297 + 140 + 360 images (1 8 8), 17 levels, 10 classes, from digits.npz; `root` plays no part."""
    with np.load(Path(__file__).with_name("digits.npz"), allow_pickle=False) as arrays:
        images, labels, part = arrays["images"], arrays["labels"].astype(np.int64), arrays["split"]
    parts = {name: Split(images[part == k], labels[part == k]) for k, name in enumerate(SPLITS)}
    return Dataset("digits", levels=17, classes=10, **parts)
