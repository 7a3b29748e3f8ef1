"""Clips of digits that move and bounce off the edges, made from images of digits: after Moving MNIST (1502.04681).

n clips · t frames · h w rows, columns, of a frame or of a digit
"""

import os

import numpy as np

from checks import check, check_one_of, unexpected
from data.digits import digits as shipped
from data.idx import mnist
from data.splits import SPLITS, Dataset, Split

SOURCES = ("digits", "mnist")
BINARIZE = ("threshold", "none")


def bounced(start: np.ndarray, velocity: np.ndarray, frames: int, room: int) -> np.ndarray:
    """Where something is that moves between 0 and `room` and turns round at both: (n) and (n) → (n t)."""
    way = (start[:, None] + velocity[:, None] * np.arange(frames)) % (2 * room)
    return room - np.abs(way - room)


def clips(
    images: np.ndarray, n: int, frames: int, digits: int, size: int, speed: float, random: np.random.RandomState
) -> np.ndarray:
    """Make n clips (n t 1 size size) of `digits` of images (k 1 h w) each; where they cross, the lighter one shows."""
    side, out = images.shape[-1], np.zeros((n, frames, 1, size, size), images.dtype)
    room, every = size - side, np.arange(n)[:, None, None]
    for _ in range(digits):
        chosen, angle = images[random.randint(len(images), size=n), 0], 2 * np.pi * random.rand(n)
        rows, columns = (
            np.rint(bounced(room * random.rand(n), speed * room * of(angle), frames, room)).astype(int)
            for of in (np.sin, np.cos)
        )
        for t in range(frames):
            at = rows[:, t, None, None] + np.arange(side)[:, None], columns[:, t, None, None] + np.arange(side)
            out[every, t, 0, *at] = np.maximum(out[every, t, 0, *at], chosen)
    return out


def moving_digits(
    *,
    source: str = "digits",
    frames: int = 20,
    digits: int = 2,
    size: int | None = None,
    speed: float = 0.1,
    binarize: str = "threshold",
    train: int = 2000,
    val: int = 200,
    test: int = 400,
    seed: int = 0,
    root: str | os.PathLike | None = None,
) -> Dataset:
    """Make clips of moving digits; those of a split are of digits of that split.

    Args:
        source: where the digits come from, "digits" (8×8, 17 levels) or "mnist" (28×28, 256 levels).
        frames: of a clip.
        digits: how many there are in a clip, each with its own start and direction.
        size: rows and columns of a frame; None: twice those of a digit.
        speed: what a digit moves from a frame to the next, as a fraction of the room that it has; places are rounded.
        binarize: "threshold" makes bits of the digits, 1 from half the highest value on; "none" leaves the levels.
        train, val, test: how many clips these parts have.
        seed: of the clips.
        root: of MNIST.
    """
    check_one_of("dataset.source", source, SOURCES)
    check_one_of("dataset.binarize", binarize, BINARIZE)
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    for name, value in {"frames": frames, "digits": digits, **counts}.items():
        check(f"dataset.{name}", value, int, 1)
    check("dataset.speed", speed, float, 0, 1)
    check("dataset.seed", seed, int, 0)
    of = shipped() if source == "digits" else mnist(root=root)
    side = of.train.images.shape[-1]
    size = 2 * side if size is None else size
    if type(size) is not int or size <= side:
        raise unexpected("dataset.size", size, f"an integer above {side}, the side of a digit")
    parts = {}
    for number, (name, n) in enumerate(counts.items()):
        random = np.random.RandomState([seed, number])  # whose numbers never change
        images = of.split(name).images
        images = (images >= of.levels // 2).astype(np.uint8) if binarize == "threshold" else images
        parts[name] = Split(clips(images, n, frames, digits, size, speed, random), None)
    return Dataset("moving_digits", levels=2 if binarize == "threshold" else of.levels, classes=None, **parts)
