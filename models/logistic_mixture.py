"""The discretized logistic mixture: a likelihood whose size does not grow with the number of levels (1701.05517, 2.2).

Legend: b batch · c channel (colour) · h w rows, columns · f features · v levels · m mixture component.

One step of the network describes a whole pixel. Each of m components has a weight π and, for each colour, a logistic
of mean μ and scale s. The mean depends linearly on the colours before it (equation 3):

    μ_k = mean_k + Σ_{j<k} tanh(coefficient_kj) · x_j        in the network's units, where levels span [-1, 1]
    p(x) = Σ_m π_m Π_k (σ((x_k + ½ − μ_k) / s_k) − σ((x_k − ½ − μ_k) / s_k))        in levels (equation 2)

The lowest level's bin reaches to −∞ and the highest's to ∞, so that the levels' probabilities sum to one. A component
is shared by the colours of a pixel: for colour k, its weight is the posterior given the colours before,

    p(x_k | x_<k) = Σ_m w_m p_m(x_k | x_<k),        w_m ∝ π_m Π_{j<k} p_m(x_j | x_<j).

Numerics. Means and values are counted in levels from the middle of the range, where values are exact and the distance
of a bin's edge from the mean is rounded relative to itself. For a bin from α to β, in scales from the mean,

    log(σ(β) − σ(α)) = log σ(β) + log σ(−α) + log(1 − exp(−(β − α)))

exactly. Nothing cancels, and far from the mean it decreases linearly instead of becoming log 0. Where exp(α − β) is so
small that the last term's gradient is rounded to 0, another has one of about exp((α − β) / 2) or more.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.features import Stretch
from models.layers import MaskedLinear

# The range of log(1 / scale), with the scale in levels, whatever their number. At the upper end a level at the mean has
# the probability tanh(exp(3.5) / 4) = 1 − 1.3e-7; float32 holds hardly anything sharper. At the lower end a logistic is
# flat over a million levels, and 1 − exp(−1 / scale) is far from float32's smallest number still.
SHARPNESS = (-14.0, 3.5)
FAR = 1e30  # levels from a value to its bin's edge where the bin is unbounded: finite, so that 0 · FAR is 0
SOFTPLUS_IS_LINEAR = 40.0  # from here on, even in float64: log(1 + exp(40)) − 40 is 4e-18
SCALE = 0.25  # of an untrained head, in the network's units: broad, as colours given a component are independent


def log_mass(x: Tensor, mean: Tensor, sharpness: Tensor, highest: float) -> Tensor:
    """log p_m(x), the logistic's mass in the bin of x: (… m), or what the arguments broadcast to.

    Args:
        x: values from the middle of the range, from −highest to highest in steps of one.
        mean, sharpness: of the logistics, in levels from the middle and in 1 / levels.
    """
    below, above = (x == -highest) * FAR + 0.5, (x == highest) * FAR + 0.5
    distance = x - mean
    return (
        F.logsigmoid((distance + above) * sharpness)
        + F.logsigmoid((below - distance) * sharpness)
        + torch.log(-torch.expm1((below + above).neg() * sharpness))
    )


class LogisticMixtureHead(nn.Module):
    """(ReLU, 1×1) twice, then a mixture of discretized logistics over the colours of each pixel.

    The parameters of a pixel are, in this order: m logits of the weights; (c m) means; (c m) logarithms of scales,
    both in the network's units; (pairs m) coefficients of the pairs of colours (1 0) (2 0) (2 1) (3 0) …
    """

    def __init__(self, inputs: int, features: int, channels: int, levels: int, mixtures: int = 10):
        super().__init__()
        self.groups, self.channels, self.levels, self.mixtures = 1, channels, levels, mixtures
        self.highest = (levels - 1) / 2  # levels from the middle
        self.register_buffer("values", torch.arange(levels)[:, None], persistent=False)  # integers are never rounded
        self.sizes = [n * mixtures for n in (1, channels, channels, channels * (channels - 1) // 2)]
        between = [Stretch(features)]
        self.first = MaskedLinear([Stretch(inputs)], between)
        self.last = MaskedLinear(between, [Stretch(sum(self.sizes))])
        with torch.no_grad():
            _, means, log_scales, _ = self.last.bias.split(self.sizes)
            means.copy_(((2 * torch.arange(mixtures) + 1) / mixtures - 1).repeat(channels))
            log_scales.fill_(math.log(SCALE))

    def forward(self, u: Tensor) -> Tensor:
        """Features (… f) → parameters (… p), float32 under autocast too: bfloat16 would move a mean by levels."""
        hidden = self.first(u.relu()).relu()
        with torch.autocast(u.device.type, enabled=False):
            return self.last(hidden.to(self.last.weight.dtype))

    def unpack(self, parameters: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
        """Parameters (… p) → log π (… m), and for each colour k: mean (… m), sharpness (… m), slopes (… k m).

        Means are in levels from the middle, without what the colours before add: their values times the slopes.
        """
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        weights, means, log_scales, coefficients = parameters.split(self.sizes, -1)
        colours = (self.channels, self.mixtures)
        means = (means * self.highest).unflatten(-1, colours).unbind(-2)
        # the scale is in units of `highest` levels
        sharpness = (-math.log(self.highest) - log_scales).clamp(*SHARPNESS).exp().unflatten(-1, colours).unbind(-2)
        slopes = coefficients.tanh().split([k * self.mixtures for k in range(self.channels)], -1)
        slopes = [s.unflatten(-1, (k, self.mixtures)) for k, s in enumerate(slopes)]
        return weights.log_softmax(-1), list(zip(means, sharpness, slopes, strict=True))

    def centred(self, x: Tensor) -> Tensor:
        """Integers in [0, levels) → levels from the middle of the range, exact in float32."""
        return x.float() - self.highest

    def logistics(self, colour: tuple[Tensor, Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """One colour of `unpack` and centred colours x (… c), of which it reads those before: mean, sharpness (… m)."""
        mean, sharpness, slopes = colour
        before = slopes.shape[-2]
        return (mean + (slopes * x[..., :before, None]).sum(-2) if before else mean), sharpness

    def table(self, log_weights: Tensor, mean: Tensor, sharpness: Tensor) -> Tensor:
        """A mixture of logistics, (… m) each → log-probabilities of all levels (… v)."""
        masses = log_mass(self.centred(self.values), mean[..., None, :], sharpness[..., None, :], self.highest)
        return (log_weights[..., None, :] + masses).logsumexp(-1)

    def posterior(self, log_weights: Tensor, x: Tensor, mean: Tensor, sharpness: Tensor) -> Tensor:
        """The weights' logarithms (… m) once a centred value x (…) of the mixture is known.

        They are normalized again after each colour: sums of far values' logarithms would leave no digits to the rest.
        """
        return (log_weights + log_mass(x[..., None], mean, sharpness, self.highest)).log_softmax(-1)

    def logits(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Parameters (… p), colours x (… c) → log p(value | context, colours before) (… c v), normalized."""
        x, (log_weights, colours) = self.centred(x), self.unpack(parameters)
        out = []
        for k, colour in enumerate(colours):
            logistics = self.logistics(colour, x)
            out.append(self.table(log_weights, *logistics))
            log_weights = self.posterior(log_weights, x[..., k], *logistics)
        return torch.stack(out, -2)

    def nats(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Parameters (b h w p), images (b c h w) → nats of each pixel (b h w), its colours together."""
        x = self.centred(rearrange(x, "b c h w -> b h w c"))
        joint, colours = self.unpack(parameters)
        for k, colour in enumerate(colours):
            joint = joint + log_mass(x[..., k, None], *self.logistics(colour, x), self.highest)
        return -joint.logsumexp(-1)

    def conditionals(self, parameters: Tensor, x: Tensor) -> Tensor:
        """Parameters (b h w p), images (b c h w) → log-probabilities (b c h w v), by way of tensors (b h w v m)."""
        logits = self.logits(parameters, rearrange(x, "b c h w -> b h w c"))
        return rearrange(logits, "b h w c v -> b c h w v")
