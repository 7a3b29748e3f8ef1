"""The order in which training goes through images."""

import torch
from torch import Tensor


class EpochOrder:
    """A new random order each epoch that depends only on seed and epoch, so that a run can begin at any step.

    Args:
        n: images; those that do not fill a last batch are left out of an epoch.
        batch_size: images a step, at most n.
        seed: of the orders.
    """

    def __init__(self, n: int, batch_size: int, seed: int):
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self.per_epoch, self.epoch = n // self.batch_size, -1

    def batch(self, step: int) -> Tensor:
        """Return the indices of the images of a step, counted from 0: (b,)."""
        epoch, k = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed((self.seed << 20) + epoch)
            self.permutation, self.epoch = torch.randperm(self.n, generator=generator), epoch
        return self.permutation[k * self.batch_size : (k + 1) * self.batch_size]
