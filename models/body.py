"""The base of all architectures' bodies: how a layer's output joins the residual stream and the head's input.

Legend: b batch · h w rows, columns · f = hidden features · d features of the condition · g group.

Each layer computes f features from the stream; a 1×1 of mask B takes them to the stream's width, and the result is
added to the stream (`residual`) or takes its place. With `skip`, a second 1×1 takes them to the head.
"""

from typing import ClassVar

from torch import Tensor, nn

from models.dropout import dropout
from models.features import Stretch
from models.in_row import InRow, Weights
from models.layers import MaskedLinear, stack


class Body(nn.Module):
    """The layers of an architecture: `forward(u (b h w+extra 2f), condition)` → (b h w features).

    A subclass has `make_layers`, `layer` (or a `forward` of its own), and `in_row`.

    Args:
        hidden: f, the features of a layer.
        layers, groups, residual, skip, dropout: see `AutoregressiveModel`.
        condition_features: d; 0: without a condition.
    """

    extra_columns: ClassVar[int] = 0  # columns of features at the right end of the image that the layers need
    stream_factor: ClassVar[int] = 2  # the residual stream is this many times as wide as a layer
    vertical_factor: ClassVar[int] = 0  # features of the stem that see only the rows above, in multiples of f
    gain: ClassVar[float] = 1.0  # of `up` where its output takes the stream's place

    def __init__(
        self, hidden: int, layers: int, groups: int, residual: bool, skip: bool, dropout: float, condition_features: int
    ):
        super().__init__()
        self.hidden, self.layers, self.groups = hidden, layers, groups
        self.residual, self.skip, self.dropout = residual, skip, dropout
        self.features = self.stream_factor * hidden
        self.narrow, self.wide = Stretch(hidden, groups), Stretch(self.features, groups)  # of a layer, of the stream
        self.free = [Stretch(condition_features, before=True)] if condition_features else []
        self.condition_features = condition_features
        self.make_layers()
        gain = (2 * layers) ** -0.5 if residual else self.gain  # the sum of all branches is no larger than the stream
        self.up = nn.ModuleList(MaskedLinear([self.narrow], [self.wide], gain) for _ in range(layers))
        gain = (2 * layers) ** -0.5
        self.to_head = nn.ModuleList(
            MaskedLinear([self.narrow], [self.wide], gain) for _ in range(layers if skip else 0)
        )

    def make_layers(self) -> None:
        """Create what comes before `up` in each layer."""
        raise NotImplementedError

    def layer(self, k: int, u: Tensor, condition: Tensor | None) -> Tensor:
        """The features (b h w f) that layer k computes from the stream u (b h w features)."""
        raise NotImplementedError

    def in_row(self) -> InRow:
        """The layers inside a row, as the cached sampler computes them."""
        raise NotImplementedError

    def forward(self, u: Tensor, condition: Tensor | None = None) -> Tensor:
        skips = 0
        for k in range(self.layers):
            u, skips = self.join(k, u, skips, self.layer(k, u, condition))
        return (u + skips)[:, :, : u.shape[2] - self.extra_columns]

    def conditions(self, outputs: int) -> nn.ModuleList | None:
        """An unmasked 1×1 from the condition to `outputs` features for each layer; None without a condition."""
        if not self.condition_features:
            return None
        linears = (nn.Linear(self.condition_features, outputs, bias=False) for _ in range(self.layers))
        return nn.ModuleList(linears)

    def from_condition_in_row(self, outputs: list[Stretch]) -> Weights | None:
        """The `conditions` of all layers."""
        if not self.condition_features:
            return None
        return Weights(stack(linear.weight for linear in self.from_condition), None, outputs, self.free)

    def join(self, layer: int, u: Tensor, skips: Tensor | int, hidden: Tensor) -> tuple[Tensor, Tensor | int]:
        """The stream (b h w features) and the sum of skips after a layer computed `hidden` (b h w f)."""
        if self.training:
            hidden = dropout(hidden, self.dropout)
        out = self.up[layer](hidden)
        if self.skip:
            skips = skips + self.to_head[layer](hidden)
        return u + out if self.residual else out, skips
