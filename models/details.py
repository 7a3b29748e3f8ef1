"""What is behind a likelihood: where its bits are, whether its probabilities come true, what its samples are near to.

Legend: b batch · n images, or clips · t frames · c channel (colour) · h w rows, columns · v levels · d sub-pixels.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from checks import check
from models.base import ImageModel
from models.likelihood import EVALUATION_BATCH, label_for

BINS = 20
MOST = 1 << 23  # probabilities that are in memory at a time


class Details(NamedTuple):
    """Of the conditionals of many images; the bins hold every value of every sub-pixel, by its probability."""

    nats: (
        Tensor  # (c h w), of clips (t c h w), float64: of each sub-pixel given all before it, the mean over the images
    )
    probabilities: Tensor  # (bins,) float64: of the values in a bin, added up
    hits: Tensor  # (bins,) float64: how many of them the images have
    count: Tensor  # (bins,) float64: how many there are

    @property
    def expected(self) -> Tensor:
        """Mean probability of the values in each bin: (bins,), NaN where there are none."""
        return self.probabilities / self.count

    @property
    def observed(self) -> Tensor:
        """The share of the values in each bin that the images have: (bins,), NaN where there are none."""
        return self.hits / self.count

    @property
    def calibration_error(self) -> float:
        """The share of the probability that is in a wrong bin, from 0 to 1."""
        return float((self.probabilities - self.hits).abs().sum() / self.hits.sum() / 2)


def details(
    model: ImageModel,
    split,
    batch_size: int = EVALUATION_BATCH,
    seed: int = 0,
    tell: Callable[[int], None] = lambda images: None,
    bins: int = BINS,
) -> Details:
    """Look at all conditionals of a split, in eval mode; the model keeps the mode it was in.

    A model is calibrated if of all that it gives a probability of 30 %, 30 % happens. So each value that a sub-pixel
    might have goes into a bin by its probability (equally wide ones from 0 to 1), and those that it has are counted.

    Args:
        split, batch_size, seed, tell: as in `models.likelihood.nats_of`; batches may be smaller, for want of memory.
    """
    check("bins", bins, int, 1)
    training, batch_size = model.training, max(1, min(batch_size, MOST // (math.prod(model.shape) * model.levels)))
    generator = torch.Generator().manual_seed(seed)
    nats, sums = torch.zeros(model.shape, dtype=torch.float64), torch.zeros(3, bins, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            x, labels = split.batch(slice(start, start + batch_size), generator)
            x = model.check(x.to(model.device)).long()
            log_p = model.conditionals(x, label_for(model, labels))
            nats -= log_p.gather(-1, x[..., None])[..., 0].double().sum(0).cpu()
            p = log_p.exp().double()
            bin_of = (p * bins).long().clamp_(max=bins - 1)
            hits = bin_of.gather(-1, x[..., None])
            for k, (places, weights) in enumerate(((bin_of, p.flatten()), (hits, None), (bin_of, None))):
                sums[k] += torch.bincount(places.flatten(), weights, minlength=bins).cpu()
            tell(len(x))
    model.train(training)
    return Details(nats / len(split), *sums)


def nearest(x: Tensor, others: Tensor, k: int = 1, tell: Callable[[int], None] = lambda images: None):
    """Find the images of `others` (n c h w) nearest to each image of x (b c h w), by their values.

    Args:
        k: how many of each.
        tell: called with numbers of others that were looked at.

    Returns:
        distances: (b k), root mean square differences of values, ascending; places: (b k), which ones.
    """
    if x.shape[1:] != others.shape[1:]:
        raise ValueError(f"others: expected images {tuple(x.shape[1:])}, found {tuple(others.shape[1:])}")
    check("k", k, int, 1, len(others))
    x, chunk = x.cpu().double().flatten(1), max(1, MOST // (8 * x[0].numel()))
    best, places = torch.full((len(x), k), torch.inf, dtype=torch.float64), torch.zeros(len(x), k, dtype=torch.long)
    for start in range(0, len(others), chunk):
        some = others[start : start + chunk].cpu().double().flatten(1)
        squares = x.square().sum(1)[:, None] + some.square().sum(1) - 2 * x @ some.T  # exact, as values are integers
        found = torch.arange(start, start + len(some)).expand(len(x), -1)
        best, order = torch.cat([best, squares], 1).topk(k, largest=False)
        places = torch.cat([places, found], 1).gather(1, order)
        tell(len(some))
    return (best / x.shape[1]).sqrt(), places
