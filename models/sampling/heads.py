"""Heads of the cached sampler, at one pixel: features of group g → logits of a sub-pixel.

Legend: b batch · c channel (colour) · v levels · g group · m mixture component.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.in_row import Weights
from models.logistic_mixture import FAR, SHARPNESS, SOFTPLUS_IS_LINEAR, LogisticMixtureHead
from models.sampling.memory import Buffers, with_bias
from models.softmax import SoftmaxHead


def cached_head(head: nn.Module, first: Weights, last: Weights, buffers: Buffers) -> "CachedHead":
    """The cached form of a model's head, whose two products are given."""
    kind = {SoftmaxHead: CachedSoftmax, LogisticMixtureHead: CachedLogisticMixture}[type(head)]
    return kind(head, first, last, buffers)


class CachedHead:
    """The two products of all heads, group by group: `step(u_g, g)` takes the features to `out` (b outputs).

    Args:
        first: the first product.
        last: for each group, weight (outputs k) and bias (outputs) of the second product.
    """

    def __init__(self, first: Weights, last: list[tuple[Tensor, Tensor]], buffers: Buffers):
        (inputs,), (between,) = first.inputs, first.outputs
        behind_ones_u, relu_u = buffers.after_ones(inputs.size)
        behind_ones, features = buffers.after_ones(between.size, dtype=buffers.state)
        mid = features if features.dtype == relu_u.dtype else buffers(between.size)
        # in one order of memory on all devices: a rule reads all levels of an image
        self.out = buffers.new(buffers.b, len(last[0][1]), dtype=buffers.state)
        self.plan = []
        for g, (into, out, of_last) in enumerate(zip(inputs.slices, between.slices, last, strict=True)):
            of_first = (x[0] for x in first.of_group(g))
            self.plan.append(
                (
                    relu_u[:, into],
                    behind_ones_u[:, : 1 + into.stop],
                    mid[:, out],
                    features[:, out],
                    behind_ones[:, : 1 + out.stop],
                    with_bias(*of_first),
                    with_bias(*(x.to(buffers.state) for x in of_last)),
                )
            )
        self.rounded = mid is not features

    def step(self, u_g: Tensor, g: int) -> None:
        relu_u, behind_ones_u, mid, features, behind_ones, first_weight, last_weight = self.plan[g]
        torch.clamp_min(u_g, 0, out=relu_u)
        torch.mm(behind_ones_u, first_weight, out=mid).relu_()
        if self.rounded:
            features.copy_(mid)
        torch.mm(behind_ones, last_weight, out=self.out)


class CachedSoftmax(CachedHead):
    """The head at one pixel, group by group: `step(u_g, g)`, then `logits(c)` (b v), then `put(c, values)`."""

    def __init__(self, head: SoftmaxHead, first: Weights, last: Weights, buffers: Buffers):
        super().__init__(first, [tuple(x[0] for x in last.of_group(g)) for g in range(head.channels)], buffers)

    def logits(self, c: int) -> Tensor:
        return self.out

    def put(self, c: int, values: Tensor) -> None:
        pass


def in_levels(head: LogisticMixtureHead, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A mixture's last product (… p k), (… p), with means in levels from the middle, and log(1 / scale) for scales."""
    sizes, total = torch.tensor(head.sizes, device=bias.device), sum(head.sizes)
    factor = bias.new_tensor([1, head.highest, -1, 1]).repeat_interleave(sizes, output_size=total)
    offset = bias.new_tensor([0, 0, -math.log(head.highest), 0]).repeat_interleave(sizes, output_size=total)
    return weight * factor[:, None], bias * factor + offset


class CachedLogisticMixture(CachedHead):
    """The head at one pixel: `step(u)` once, then for each colour in order `logits(c)` (b v) and `put(c, values)`.

    It computes what `LogisticMixtureHead` does, in static memory. The weights of the second product have factors in
    them, so that means come in levels and scales as log(1 / scale). With softplus(z) = −log σ(−z), the mass of a bin is

        log(σ(β) − σ(α)) = −softplus(−β) − softplus(α) + log(1 − exp(−(β − α)))

    where the last term is one number a component, `within`, but in the lowest and the highest bin: 0 there.
    """

    def __init__(self, head: LogisticMixtureHead, first: Weights, last: Weights, buffers: Buffers):
        m, channels, sizes = head.mixtures, head.channels, head.sizes
        weight, bias = (x[0].to(buffers.state) for x in last.of_group(0))
        super().__init__(first, [in_levels(head, weight, bias)], buffers)

        new, colours = partial(buffers.new, dtype=buffers.state), (channels, m)
        self.weights, means, self.sharpness, self.slopes = self.out.split(sizes, 1)
        self.unnormalized, self.log_weights, self.x = new(buffers.b, m), new(buffers.b, m), new(buffers.b, channels)
        # for all colours; −1 / scale and 1 / scale
        self.within, self.signed = new(buffers.b, channels * m), new(2, buffers.b, channels * m)
        self.masses, self.terms = new(buffers.b, m, head.levels), new(2, buffers.b, m, head.levels)
        self.likeliest, self.log_probs = new(buffers.b, 1, head.levels), new(buffers.b, head.levels)

        self.values = head.centred(head.values[:, 0]).to(buffers.state)
        self.ends = torch.stack([self.values + 0.5, self.values - 0.5])[:, None, None]  # (2 1 1 v): upper and lower
        self.ends[0, ..., -1], self.ends[1, ..., 0] = FAR, -FAR
        self.bounded = torch.ones_like(self.values)
        self.bounded[0] = self.bounded[-1] = 0

        means, within, signed = (x.unflatten(-1, colours)[..., None] for x in (means, self.within, self.signed))
        slopes = self.slopes.split([k * m for k in range(channels)], 1)
        self.colours = [
            (means[:, k], within[:, k], signed[:, :, k], slopes[k].unflatten(1, (k, m)).mT) for k in range(channels)
        ]

    def step(self, u: Tensor, g: int = 0) -> None:
        super().step(u, g)
        self.unnormalized.copy_(self.weights)
        torch.log_softmax(self.unnormalized, 1, out=self.log_weights)
        minus, plus = self.signed
        torch.exp(self.sharpness.clamp_(*SHARPNESS), out=plus)
        torch.neg(plus, out=minus)
        torch.expm1(minus, out=self.within).neg_().log_()
        self.slopes.tanh_()

    def logits(self, c: int) -> Tensor:
        mean, within, signed, _ = self.colours[c]  # (b m 1), signed (2 b m 1)
        torch.addcmul(self.log_weights[..., None], within, self.bounded, out=self.masses)
        torch.sub(self.ends, mean, out=self.terms).mul_(signed)
        F.softplus(self.terms, 1, SOFTPLUS_IS_LINEAR, out=self.terms)
        term, other = self.terms
        self.masses.sub_(term).sub_(other)
        torch.amax(self.masses, 1, keepdim=True, out=self.likeliest)
        torch.sub(self.masses, self.likeliest, out=term).exp_()
        return torch.sum(term, 1, out=self.log_probs).log_().add_(self.likeliest[:, 0])

    def put(self, c: int, values: Tensor) -> None:
        """Make known the values (b,) of colour c: they move the weights and the means of the colours after it."""
        if c + 1 < len(self.colours):
            weights = self.unnormalized[..., None]
            torch.gather(self.masses, 2, values[:, None, None].expand(weights.shape), out=weights)  # `logits` left them
            torch.log_softmax(self.unnormalized, 1, out=self.log_weights)
            torch.index_select(self.values, 0, values, out=self.x[:, c])
            mean, *_, slopes = self.colours[c + 1]
            mean.baddbmm_(slopes, self.x[:, : c + 1, None])
