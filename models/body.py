"""What the bodies of all architectures share: how a layer's output joins the residual stream and the head's input.

Legend: b batch · h w rows, columns · f = hidden features · d features of the condition · g group.

Each layer computes f features from the stream; a 1×1 of mask B takes them to the stream's width, and the result is
added to the stream (`residual`) or takes its place. With `skip`, a second 1×1 takes them to the head.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.draw_row import Product
from models.layers import Buffers, MaskedLinear, group_sizes, packed, with_bias


class Body(nn.Module):
    """The layers of an architecture: `forward(u (b h w+extra 2f), condition)` → (b h w features).

    Args:
        hidden: f, the features of a layer.
        layers, groups, residual, skip, dropout: see `AutoregressiveModel`.
        condition: d, the features of the condition; 0: none.
    """

    extra_columns: ClassVar[int] = 0  # columns of features at the right end of the image that the layers need
    stream: ClassVar[int] = 2  # the residual stream is so many times as wide as a layer
    gain: ClassVar[float] = 1.0  # of `up` where its output takes the stream's place
    vertical: ClassVar[int] = 0  # as wide, in layers, is the first part of the stem, which sees the rows above alone

    def __init__(
        self, hidden: int, layers: int, groups: int, residual: bool, skip: bool, dropout: float, condition: int
    ):
        super().__init__()
        self.hidden, self.layers, self.groups, self.given = hidden, layers, groups, condition
        self.residual, self.skip, self.dropout = residual, skip, dropout
        self.features = self.stream * hidden
        self.make_layers()
        gain = (2 * layers) ** -0.5 if residual else self.gain  # the sum of all branches is no larger than the stream
        self.up = nn.ModuleList(MaskedLinear(hidden, self.features, groups, gain=gain) for _ in range(layers))
        self.to_head = nn.ModuleList(
            MaskedLinear(hidden, self.features, groups, gain=(2 * layers) ** -0.5) for _ in range(layers if skip else 0)
        )

    def make_layers(self) -> None:
        """Create what stands before `up` in each layer."""
        raise NotImplementedError

    def conditions(self, outputs: int) -> nn.ModuleList | list[None]:
        """An unmasked 1×1 from the condition to `outputs` features for each layer; Nones without a condition."""
        if not self.given:
            return [None] * self.layers
        return nn.ModuleList(nn.Linear(self.given, outputs, bias=False) for _ in range(self.layers))

    def condition_weights(self) -> Tensor | None:
        """What `conditions` made, side by side: (layers outputs d), or None without a condition."""
        return torch.stack([given.weight for given in self.from_condition]) if self.given else None

    def join(self, layer: int, u: Tensor, skips: Tensor | int, hidden: Tensor) -> tuple[Tensor, Tensor | int]:
        """The stream (b h w features) and the sum of skips after a layer computed `hidden` (b h w f)."""
        hidden = F.dropout(hidden, self.dropout, self.training)
        out = self.up[layer](hidden)
        if self.skip:
            skips = skips + self.to_head[layer](hidden)
        return u + out if self.residual else out, skips


class JoinScan:
    """`Body.join` at one pixel, for one group's features: `begin`, then a call for each layer, then `end`.

    What a layer computed stands behind a column of ones (`Buffers.after_ones`): biases are a row of the weights then.
    `out` is where the last layer's stream goes, (b features_g) for each group.

    A body that changes its stream `in_place` keeps it in `out` from the first layer on, and hands `stream` to the calls
    as u and out: the sum of skips stands beside it, and both are one product.
    """

    def __init__(self, body: Body, buffers: Buffers, in_place: bool = False):
        self.residual, self.skip = body.residual, body.skip
        self.up, self.to_head = ([m.steps() for m in part] for part in (body.up, body.to_head))
        self.one_product = in_place and self.residual and self.skip
        both = [buffers(2 * size) for size in group_sizes(body.features, body.groups)]
        self.out, self.skips = zip(*(x.chunk(2, dim=1) for x in both), strict=True)
        self.stream = both if self.one_product else self.out

    def weights(self, layer: int, g: int) -> tuple[Tensor, Tensor | None]:
        """What a call takes as its last two arguments: (1+known features_g) each."""
        up, to_head = with_bias(*self.up[layer][g]), with_bias(*self.to_head[layer][g]) if self.skip else None
        return (torch.cat([up.T, to_head.T]).T, None) if self.one_product else (up, to_head)

    @staticmethod
    def packed(body: Body) -> tuple[Product, Product | None]:
        """`up` and `to_head` of all layers, as the row kernel reads them."""
        return packed(body.up), packed(body.to_head) if body.skip else None

    def begin(self, g: int) -> None:
        if self.skip:
            self.skips[g].zero_()

    def __call__(self, g: int, u: Tensor, hidden: Tensor, out: Tensor, weight: Tensor, to_head: Tensor | None) -> None:
        """From group g of the stream, u (b features_g), and what the layer computed (b 1+known), to `out`, like u."""
        if self.residual:
            torch.addmm(u, hidden, weight, out=out)
        else:
            torch.mm(hidden, weight, out=out)
        if to_head is not None:
            self.skips[g].addmm_(hidden, to_head)

    def end(self, g: int) -> Tensor:
        """The head's input (b features_g)."""
        return self.out[g].add_(self.skips[g]) if self.skip else self.out[g]
