"""The softmax head: turns the body's features into probabilities of all levels of each sub-pixel.

Legend: b batch · c channel · h w rows, columns · f features · v levels · g group.
"""

from einops import rearrange
from torch import Tensor, nn

import kernels
from models.features import Stretch
from models.layers import MaskedLinear


class SoftmaxHead(nn.Module):
    """(ReLU, 1×1 mask B) twice, then a softmax over the v levels of each sub-pixel (1601.06759, section 3.1)."""

    def __init__(self, inputs: int, features: int, channels: int, levels: int):
        super().__init__()
        self.channels, self.levels, self.groups = channels, levels, channels
        between = [Stretch(features, channels)]
        self.first = MaskedLinear([Stretch(inputs, channels)], between)
        self.last = MaskedLinear(between, [Stretch(channels * levels, channels)])

    def forward(self, u: Tensor) -> Tensor:
        """Features (b h w f) → logits (b h w c v)."""
        return self.last(self.first(u.relu()).relu()).unflatten(-1, (self.channels, self.levels))

    def nats(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits (b h w c v), images (b c h w) → nats of each pixel (b h w), its colours together."""
        return kernels.cross_entropy(logits, rearrange(x, "b c h w -> b h w c")).sum(-1)

    def logits(self, logits: Tensor, x: Tensor) -> Tensor:
        """The logits (… c v) of each value, given a pixel's colours x (… c): here, the parameters themselves."""
        return logits

    def conditionals(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits (b h w c v), images (b c h w) → log-probabilities (b c h w v)."""
        return rearrange(logits.float().log_softmax(-1), "b h w c v -> b c h w v")
