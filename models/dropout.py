"""Dropout whose masks are a function of the run's seed, the step, and an image's number in the step's batch.

So they are the same on every device, and however the images of a step are shared out to processes or to parts of a
step; and a run that goes on needs no random state.

Legend: n images of a part, or the frames of its clips, clip after clip · f features.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.philox import uniforms


class Masks:
    """Where the masks of a forward pass come from: `keys` int64 (images 2), and how many masks were made."""

    def __init__(self, keys: Tensor):
        self.keys, self.made = keys, 0


masks: Masks | None = None  # within `masks_of`


def key_of(seed: int, step: int) -> int:
    """The first word of the keys of a step."""
    return (seed << 32) + step & 2**63 - 1


@contextmanager
def masks_of(keys: Tensor) -> Iterator[None]:
    """Within, `kept` takes its masks from the keys (images 2), in the images' order."""
    global masks
    before, masks = masks, Masks(keys)
    try:
        yield
    finally:
        masks = before


def kept(n: int, features: int, p: float, device: torch.device) -> Tensor:
    """Which features of n images to keep, each with probability 1 − p: (n features), 1.0 or 0.0."""
    if masks is None:
        return torch.rand(n, features, device=device).ge_(p)
    masks.made += 1
    return uniforms(masks.keys, n // len(masks.keys) * features, masks.made - 1).view(n, features).ge_(p)


def drop_labels(label: Tensor, p: float, none: int) -> Tensor:
    """Labels (n,), each with probability p replaced by `none`."""
    return torch.where(kept(len(label), 1, p, label.device)[:, 0] > 0, label, none)


def dropout(x: Tensor, p: float) -> Tensor:
    """Set each of the features x (n … f) to zero with probability p, and divide the others by 1 − p.

    Outside `masks_of`, this is torch's own dropout.
    """
    if masks is None or p == 0:
        return F.dropout(x, p)
    return x * kept(len(x), x[0].numel(), p, x.device).view(x.shape).to(x.dtype) / (1 - p)
