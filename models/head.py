"""Heads: what turns the body's features into a likelihood.

Legend: b batch · c channel · h w rows, columns · f features · v levels · g group.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

import kernels
from kernels.draw_row import Head
from models.layers import Buffers, MaskedLinear, group_slices, packed, with_bias


class SoftmaxHead(nn.Module):
    """(ReLU, 1×1 mask B) twice, then a softmax over the v levels of each sub-pixel (1601.06759, section 3.1)."""

    def __init__(self, inputs: int, features: int, channels: int, levels: int):
        super().__init__()
        self.channels, self.levels, self.groups = channels, levels, channels
        self.first = MaskedLinear(inputs, features, channels)
        self.last = MaskedLinear(features, channels * levels, channels)

    def forward(self, u: Tensor) -> Tensor:
        """Features (b h w f) → logits (b h w c v)."""
        return self.last(self.first(u.relu()).relu()).unflatten(-1, (self.channels, self.levels))

    def nats(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits (b h w c v), images (b c h w) → nats of each pixel (b h w), its colours together."""
        return kernels.cross_entropy(logits, rearrange(x, "b c h w -> b h w c")).sum(-1)

    def logits(self, logits: Tensor, x: Tensor) -> Tensor:
        """What the head's parameters (… c v) say of each value, given a pixel's colours x (… c): (… c v)."""
        return logits

    def conditionals(self, logits: Tensor, x: Tensor) -> Tensor:
        """Logits (b h w c v), images (b c h w) → log-probabilities (b c h w v)."""
        return rearrange(logits.float().log_softmax(-1), "b h w c v -> b c h w v")

    def packed(self) -> Head:
        """What the row kernel needs to know."""
        return Head(packed([self.first]), packed([self.last]), self.first.outputs, self.levels, 0)

    def scan(self, buffers: Buffers) -> "SoftmaxHeadScan":
        return SoftmaxHeadScan(self, buffers)


class HeadScan:
    """What all heads do at one pixel, group by group: `step(u_g, g)` takes the features to `out` (b outputs).

    Features stand behind a column of ones: biases are a row of the weights.

    Args:
        last: for each group, the weight (prefix outputs) and the bias (outputs) of the second product.
    """

    def __init__(self, head: nn.Module, buffers: Buffers, last: list[tuple[Tensor, Tensor]]):
        known_u, relu_u = buffers.after_ones(head.first.inputs)
        known, features = buffers.after_ones(head.first.outputs, dtype=buffers.state)
        first = features if features.dtype == relu_u.dtype else buffers(head.first.outputs)
        # whoever chooses reads all levels of an image
        self.out = buffers.new(buffers.b, len(last[0][1]), dtype=buffers.state)
        self.plan = []
        for g, (of_first, of_last) in enumerate(zip(head.first.steps(), last, strict=True)):
            (into,), (out,) = (group_slices(m.inputs, m.groups)[g] for m in (head.first, head.last))
            weights = with_bias(*of_first), with_bias(*(x.to(buffers.state) for x in of_last))
            self.plan.append(
                (
                    relu_u[:, into],
                    known_u[:, : 1 + into.stop],
                    first[:, out],
                    features[:, out],
                    known[:, : 1 + out.stop],
                    *weights,
                )
            )
        self.rounded = first is not features

    def step(self, u_g: Tensor, g: int) -> None:
        relu_u, known_u, first, features, known, first_weight, last_weight = self.plan[g]
        torch.clamp_min(u_g, 0, out=relu_u)
        torch.mm(known_u, first_weight, out=first).relu_()
        if self.rounded:
            features.copy_(first)
        torch.mm(known, last_weight, out=self.out)


class SoftmaxHeadScan(HeadScan):
    """The head at one pixel, group by group: `step(u_g, g)`, then `logits(c)` (b v), then `put(c, values)`."""

    def __init__(self, head: SoftmaxHead, buffers: Buffers):
        super().__init__(head, buffers, head.last.steps())

    def logits(self, c: int) -> Tensor:
        return self.out

    def put(self, c: int, values: Tensor) -> None:
        pass
