"""The form of every data set: three parts of integer images, fetched a batch at a time.

n images, or clips · b batch · t frames · c channels · h w rows, columns · v levels (the values a sub-pixel takes)
"""

from dataclasses import dataclass

import numpy as np
import torch

from checks import check_one_of, unexpected

SPLITS = ("train", "val", "test")
BINARIZE = ("none", "threshold", "stochastic")


@dataclass(frozen=True, eq=False)
class Split:
    """One part of a data set.

    Args:
        images: (n c h w), or clips (n t c h w), uint8, or int64 where v > 256; in memory or memory-mapped.
        labels: (n,) int64, or None.
        binarize: "stochastic" turns grey values 0..255 into bits, drawn each time a batch is fetched
            (a threshold is applied on loading).
    """

    images: np.ndarray
    labels: np.ndarray | None
    binarize: str = "none"

    def __len__(self) -> int:
        return len(self.images)

    def first(self, n: int | None) -> "Split":
        """Return the first n images with their labels; None: all."""
        return Split(self.images[:n], None if self.labels is None else self.labels[:n], self.binarize)

    def batch(
        self, index: np.ndarray | torch.Tensor | slice, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Fetch the images that `index` selects, in its order.

        Args:
            index: (b,) integers, or a slice.
            generator: a CPU generator, used only if binarize is "stochastic". A fresh one with a
                fixed seed makes an evaluation repeatable.

        Returns:
            x: (b c h w), or clips (b t c h w), uint8 (int64 where v > 256), owning its memory; labels: (b,) int64, or
                None.
        """
        if isinstance(index, torch.Tensor):
            index = index.cpu().numpy()
        # A copy: the memory map is read-only, and the model should not work on its pages.
        x = torch.from_numpy(np.array(self.images[index], order="C"))
        if self.binarize == "stochastic":
            x = (torch.rand(x.shape, generator=generator) < x / 255).to(torch.uint8)
        labels = None if self.labels is None else torch.from_numpy(np.array(self.labels[index]))
        return x, labels


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: `levels` values a sub-pixel, `classes` labels (None if there are none), three parts.

    `names` are those of the labels 0, 1, …, where the source has names.
    """

    name: str
    levels: int
    classes: int | None
    train: Split
    val: Split
    test: Split
    names: tuple[str, ...] | None = None

    @property
    def shape(self) -> dict[str, int]:
        """The arguments of a model that the data decides: channels, height, width, levels; frames, of clips."""
        *frames, channels, height, width = self.train.images.shape[1:]
        of_frames = {"channels": channels, "height": height, "width": width, "levels": self.levels}
        return of_frames | dict(zip(["frames"], frames, strict=False))

    def split(self, name: str) -> Split:
        """Return the part called `name`; ValueError unless it is train, val or test."""
        check_one_of("split", name, SPLITS)
        return getattr(self, name)


def shuffled(n: int, seed: int) -> np.ndarray:
    """Return a fixed random order of n rows: (n,) int64."""
    # RandomState, not default_rng: numpy promises that its numbers never change, so a split stays as it is.
    return np.random.RandomState(seed).permutation(n)


def hold_out(images: np.ndarray, labels: np.ndarray | None, count: int) -> tuple[Split, Split]:
    """Cut arrays in memory into (train, val): val is the last `count` rows of a fixed order (seed 0)."""
    order = shuffled(len(images), 0)
    cut = len(images) - count
    parts = [Split(images[rows], None if labels is None else labels[rows]) for rows in np.split(order, [cut])]
    return parts[0], parts[1]


def sizes(n: int, val: float, test: float, source: object) -> tuple[int, int]:
    """Turn the fractions of an n-image data set into numbers of (val, test) images, at least one each."""
    for option, fraction in (("val", val), ("test", test)):
        if not isinstance(fraction, (int, float)) or isinstance(fraction, bool) or not 0 < fraction < 1:
            raise unexpected(f"dataset.{option}", fraction, "a fraction between 0 and 1")
    counts = max(1, round(n * val)), max(1, round(n * test))
    if sum(counts) >= n:
        raise ValueError(f"{source}: expected more images than val={val} and test={test} take, found {n}")
    return counts


def three_way(images: np.ndarray, labels: np.ndarray | None, val: int, test: int) -> dict[str, Split]:
    """Cut rows that are already in random order into train, val and test, contiguously, as views."""
    cuts = [len(images) - val - test, len(images) - test]
    bounds = zip(SPLITS, [0, *cuts], [*cuts, len(images)], strict=True)
    return {
        name: Split(images[start:stop], None if labels is None else labels[start:stop]) for name, start, stop in bounds
    }
