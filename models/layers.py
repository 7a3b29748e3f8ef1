"""Masked convolutions over groups of colours (1601.06759, section 3.4).

Legend: b batch · h w rows, columns · f features · g group · i j a row, a column.

The output at a pixel sees all groups of the pixels above and to the left; at the pixel itself, group g sees the groups
before g (mask A) or up to g (mask B): `models.features`.

Everything is channels last: features (b h w f). A kernel keeps only its rows up to the centre; of the last row,
the taps right of the centre are masked. A mask is applied in every forward pass, for an optimizer, a copy or a
checkpoint would undo one that was applied once.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from models.features import Stretch, Stretches, size_of, visible
from models.in_row import Weights


def initialise(weight: Tensor, mask: Tensor, gain: float = 1.0) -> None:
    """Uniform numbers of variance gain² / (3 · number of live inputs), output by output: masked inputs do not count."""
    live = mask.flatten(1).sum(1).clamp(min=1).view(-1, *[1] * (mask.dim() - 1))
    with torch.no_grad():
        weight.uniform_(-1, 1).mul_(gain / live.sqrt())


class Masked(nn.Module):
    """A weight with a mask, and a bias."""

    def __init__(self, mask: Tensor, gain: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(mask.shape))
        self.register_buffer("mask", mask.to(self.weight), persistent=False)
        self.bias = nn.Parameter(torch.zeros(len(mask)))
        initialise(self.weight, self.mask, gain)

    def masked_weight(self) -> Tensor:
        return self.weight * self.mask


class MaskedLinear(Masked):
    """A 1×1 convolution with mask B: (… inputs) → (… outputs)."""

    def __init__(self, inputs: Stretches, outputs: Stretches, gain: float = 1.0):
        super().__init__(visible("B", outputs, inputs), gain)
        self.inputs, self.outputs = inputs, outputs

    def forward(self, u: Tensor) -> Tensor:
        return F.linear(u, self.masked_weight(), self.bias)


class MaskedConv(Masked):
    """A k×k convolution of mask A or B: (b h w inputs) → (b h w outputs).

    `weight` is (outputs, inputs, (k+1)/2, k): the rows above and the centre row. With `extra` the output has that many
    more columns at the right end, where the kernel's centre stands outside the image: w becomes w + extra. Outputs of
    pixels before (`Stretch.before`) see only the rows above.
    """

    def __init__(self, kind: str, kernel: int, inputs: Stretch, outputs: Stretches, extra: int = 0):
        assert kind in ("A", "B") and kernel % 2 == 1
        reach = kernel // 2
        mask = torch.ones(size_of(outputs), inputs.size, reach + 1, kernel, device="cpu")
        mask[:, :, -1, reach] = visible(kind, outputs, [inputs]).float()
        mask[:, :, -1, reach + 1 :] = 0
        mask[: size_of([s for s in outputs if s.before]), :, -1] = 0
        super().__init__(mask)
        self.kind, self.reach, self.inputs, self.outputs, self.extra = kind, reach, inputs, outputs, extra
        self.live = reach * kernel + reach + (kind == "B" or inputs.groups > 1)  # taps that any output may see

    def forward(self, u: Tensor, relu: bool = False) -> Tensor:
        """The convolution of u, or of ReLU(u)."""
        return kernels.masked_conv(u, self.masked_weight(), self.bias, relu, self.extra, self.live)


def stack(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors))


def side_by_side(layers: Sequence[MaskedLinear]) -> Weights:
    """The same 1×1 of all layers."""
    weight, bias = stack(layer.masked_weight() for layer in layers), stack(layer.bias for layer in layers)
    return Weights(weight, bias, layers[0].outputs, layers[0].inputs)


def in_rows(convs: Sequence[MaskedConv]) -> tuple[Weights, Weights]:
    """The same convolution of all layers: its taps in the row, [left ones, centre], with the bias; those above it."""
    first, weight = convs[0], stack(conv.masked_weight() for conv in convs)
    taps = weight.permute(0, 1, 3, 4, 2).flatten(2, 3)  # row after row: (layers outputs taps inputs)
    reach, kernel = first.reach, 2 * first.reach + 1
    before, bias = first.inputs.of_pixels_before(), stack(conv.bias for conv in convs)
    row, above = taps[:, :, reach * kernel :][:, :, : reach + 1].flatten(2), taps[:, :, : reach * kernel].flatten(2)
    return (
        Weights(row, bias, first.outputs, [before] * reach + [first.inputs], first.kind),
        Weights(above, None, first.outputs, [before] * (reach * kernel), first.kind),
    )


def left_and_here(u: Tensor, *free: Tensor) -> Tensor:
    """Each pixel's left neighbour's features, its own, and others (b h w …), side by side; zeros left of the image."""
    return torch.cat([F.pad(u[:, :, :-1], (0, 0, 1, 0)), u, *free], dim=-1)


def state_dtype(weight: Tensor) -> torch.dtype:
    """The type that sums over many steps are kept in: float32 where weights are bfloat16."""
    return torch.promote_types(weight.dtype, torch.float32)
