"""The noise that images are drawn from: a function of the seed and the image's number."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kernels.philox import uniforms


def noise(
    seed: int,
    images: Iterable[int],
    shape: tuple[int, int, int],
    stage: int = 0,
    device: torch.device | str = "cpu",
    backend: str | None = None,
) -> Tensor:
    """Uniform numbers in [0, 1) for images of `shape` (c h w): (n c h w) float32, on `device`.

    Those of image k depend only on `seed`, k and `stage`: a counter-based generator has seed and k as its key, and each
    stage of a model that draws in several has a range of the counter to itself.

    `backend`, see `kernels.backend_for`, changes no bit.
    """
    keys = np.array([(seed, k) for k in images], dtype=np.uint64)
    of_keys = torch.from_numpy(keys.view(np.int64)).to(device)
    return uniforms(of_keys, math.prod(shape), stage, backend).view(-1, *shape)
