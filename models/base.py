"""What all models share: p(x) = Π p(x_k | x_<k) over sub-pixels in raster order, red before green before blue.

Legend: b batch · c channel (colour) · h w rows, columns · f features · v levels · g group.

A model is a stem (7×7 convolution, mask A), a body (the architecture, from 2·hidden features to as many) and a head
(the likelihood). Features are cut in one group a colour wherever the head tells colours apart. A body may ask for
`extra_columns` of features at the right end of the image, and leaves them out of what it returns.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from models.head import SoftmaxHead
from models.layers import MaskedConv, check


class AutoregressiveModel(nn.Module):
    """An exact-likelihood model of images (b c h w) of integers in [0, levels); a subclass names its `Body`.

    Args:
        channels, levels, height, width: what the images are.
        hidden: the paper's h; the residual stream between layers has 2·hidden features.
        layers: how many layers or blocks the body has.
        head_features: features of the layer before the logits.
        residual, skip: whether a layer's output is added to its input; whether every layer also feeds the head.
        dropout: probability with which a feature is left out of a layer's output in training.

    Raises:
        ValueError: for an argument outside what is allowed.
    """

    Body: ClassVar[type[nn.Module]]

    def __init__(
        self,
        channels: int,
        levels: int,
        height: int,
        width: int,
        hidden: int,
        layers: int,
        residual: bool = True,
        skip: bool = False,
        head_features: int = 32,
        dropout: float = 0.0,
    ):
        super().__init__()
        for name, value, low in (
            ("channels", channels, 1),
            ("levels", levels, 2),
            ("height", height, 1),
            ("width", width, 1),
            ("layers", layers, 1),
            ("hidden", hidden, channels if isinstance(channels, int) else 1),
            ("head_features", head_features, channels if isinstance(channels, int) else 1),
        ):
            check(name, value, int, low)
        check("residual", residual, bool, False, True)
        check("skip", skip, bool, False, True)
        check("dropout", dropout, float, 0.0, 0.95)
        self.channels, self.levels, self.height, self.width = channels, levels, height, width
        self.stem = MaskedConv("A", 7, channels, 2 * hidden, channels, extra=self.Body.extra_columns)
        self.body = self.Body(hidden, layers, channels, residual, skip, dropout)
        self.head = SoftmaxHead(2 * hidden, head_features, channels, levels)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(c, h, w) of an image."""
        return self.channels, self.height, self.width

    def scale(self, x: Tensor) -> Tensor:
        """Integers in [0, levels) → numbers in [-1, 1], as the network reads them."""
        return x.to(self.stem.weight.dtype) * (2 / (self.levels - 1)) - 1

    def check(self, x: Tensor) -> Tensor:
        """Return `x` (b c h w) if it holds images of this model, raise ValueError otherwise."""
        if x.dim() != 4 or x.shape[1:] != self.shape or x.is_floating_point() or x.is_complex():
            given = f"{tuple(x.shape)} of {x.dtype}"
            raise ValueError(f"x is {given}: integers of shape (b, {', '.join(map(str, self.shape))}) are allowed")
        if x.numel():
            low, high = (int(n) for n in x.aminmax())
            if low < 0 or high >= self.levels:
                raise ValueError(f"x has values from {low} to {high}: 0 to {self.levels - 1} are allowed")
        return x

    def parameters_at(self, x: Tensor) -> Tensor:
        """The head's parameters of every conditional: images (b c h w) → for `softmax`, logits (b h w c v)."""
        return self.head(self.body(self.stem(self.scale(x.permute(0, 2, 3, 1)))))

    def forward(self, x: Tensor) -> Tensor:
        """Images (b c h w), not checked → nats of each (b,): the loss of training."""
        return self.head.nats(self.parameters_at(x), x)

    def log_prob(self, x: Tensor) -> Tensor:
        """The log-likelihood of images: x (b c h w) integers in [0, levels) → (b,) nats.

        Raises:
            ValueError: x has another shape or type, or values outside.
        """
        return -self(self.check(x))

    def conditionals(self, x: Tensor) -> Tensor:
        """log p(value | everything before it) of every sub-pixel: x (b c h w) → (b c h w v).

        Raises:
            ValueError: x has another shape or type, or values outside.
        """
        return self.head.conditionals(self.parameters_at(self.check(x)))


def bits_per_dim(nats: Tensor | float, shape: tuple[int, int, int]):
    """Nats an image → bits a sub-pixel, for images of shape (c, h, w)."""
    c, h, w = shape
    return nats / (torch.log(torch.tensor(2.0)).item() * c * h * w)
