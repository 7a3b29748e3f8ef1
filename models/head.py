"""Heads: what turns the body's features into a likelihood.

Legend: b batch · c channel · h w rows, columns · f features · v levels · g group.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

import kernels
from kernels.row_scan import Head
from models.layers import Buffers, MaskedLinear, group_slices, packed


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


class SoftmaxHeadScan:
    """The head at one pixel, group by group: `step(u_g, g)`, then `logits(c)` (b v), then `put(c, values)`."""

    def __init__(self, head: SoftmaxHead, buffers: Buffers):
        self.u, self.hidden = buffers(head.first.inputs), buffers(head.first.outputs)
        # whoever chooses reads all levels of an image
        self.out = buffers.new(buffers.b, head.levels, dtype=buffers.state)
        self.plan = []
        for g in range(head.channels):
            (u_g,), (hidden_g,) = (group_slices(m.inputs, m.groups)[g] for m in (head.first, head.last))
            first, logits = head.first.steps()[g], [x.to(buffers.state) for x in head.last.steps()[g]]
            u, hidden = self.u[:, : u_g.stop], self.hidden[:, : hidden_g.stop]
            self.plan.append((self.u[:, u_g], u, *first, self.hidden[:, hidden_g], hidden, *logits))

    def step(self, u_g: Tensor, g: int) -> None:
        u_out, u, w1, b1, hidden_out, hidden, w2, b2 = self.plan[g]
        torch.clamp_min(u_g, 0, out=u_out)
        torch.addmm(b1, u, w1, out=hidden_out).relu_()
        torch.addmm(b2, hidden.to(b2.dtype), w2, out=self.out)

    def logits(self, c: int) -> Tensor:
        return self.out

    def put(self, c: int, values: Tensor) -> None:
        pass
