"""The noise that images are drawn from: a function of the seed and the image's number."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor


def noise(seed: int, images: Iterable[int], shape: tuple[int, int, int], stage: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) for images of `shape` (c h w): (n c h w) float32.

    Those of image k depend only on `seed`, k and `stage`: a counter-based generator has seed and k as its key, and each
    stage of a model that draws in several has a range of the counter to itself.
    """

    def draw(k: int) -> np.ndarray:
        bits = np.random.Philox(key=np.array([seed, k], dtype=np.uint64), counter=[0, 0, 0, stage])
        return np.random.Generator(bits).random(shape, dtype=np.float32)

    return torch.from_numpy(np.stack([draw(k) for k in images]))
