"""Static memory of the cached sampler, and the products that it does once a row.

Legend: b batch · w columns · f features · k inputs of a product · d features of the condition.
"""

import copy

import torch
from torch import Tensor

from kernels.row_product import row_product
from models.layers import state_dtype


class Buffers:
    """Makes zeros for b images, of the type of `weight`, in one of two orders in memory.

    With `images_last` the images are next to each other, so that any features of a pixel are contiguous: on a CPU
    products with few images are quicker then. The row kernel reads features that are next to each other.
    `backend` says who does the products of a `RowProduct`, "torch" or "triton".
    """

    def __init__(self, b: int, weight: Tensor, images_last: bool = False, backend: str = "torch"):
        self.b, self.new, self.images_last, self.state = b, weight.new_zeros, images_last, state_dtype(weight)
        self.backend = backend

    def of_rows(self) -> "Buffers":
        """The same with features next to each other."""
        out = copy.copy(self)
        out.images_last = False
        return out

    def __call__(self, *shape: int, layers: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """(b shape), or with `layers` (layers b shape)."""
        before = () if layers is None else (layers,)
        if self.images_last:
            return self.new((*before, *shape, self.b), dtype=dtype).movedim(-1, len(before))
        return self.new((*before, self.b, *shape), dtype=dtype)

    def after_ones(
        self, *shape: int, layers: int | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features ([layers] b … f) behind a column of ones ([layers] b … 1+f), and the features by themselves.

        A bias is a row of the weights (`with_bias`) of a product that reads the ones too.
        """
        behind = self(*shape[:-1], 1 + shape[-1], layers=layers, dtype=dtype)
        behind[..., 0] = 1
        return behind, behind[..., 1:]


def with_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """Weights (f k) and bias (f) of a product → weights (1+k f) for features behind a column of ones.

    In memory the weights of an output are next to each other, as a product of few images wants them.
    """
    return torch.cat([bias[:, None], weight], dim=1).T


def windows(rows: Tensor, k: int) -> Tensor:
    """For each of w columns, k of them side by side, beginning with its own: (… w+k-1 f) → (… w k f), a view."""
    return rows.unfold(-2, k, 1).mT


def in_words(*tensors: Tensor) -> tuple[Tensor, ...]:
    """View tensors of one type as numbers of 64 bits, where all of them can be.

    It is for copies of strided memory, which a GPU does number by number.
    """
    several = 8 // tensors[0].element_size()

    def fits(x: Tensor) -> bool:
        *strides, last = x.stride()
        return last == 1 and not any(n % several for n in (x.shape[-1], x.storage_offset(), *strides))

    return tuple(x.view(torch.int64) for x in tensors) if all(map(fits, tensors)) else tensors


class ConditionRow:
    """Adds the condition's part to every layer's pre-activations, a row at a time.

    Args:
        condition: an example of those to come: (b h w d), or (b 1 1 d) where it is the same everywhere, or None.
        weight: from its d features (layers f d); None without a condition.
        width: w, the columns of a row.

    `row` (b w d) is the condition's present row.
    """

    def __init__(self, condition: Tensor | None, weight: Tensor | None, width: int):
        self.weight = None
        if weight is not None:
            self.weight = weight.mT.contiguous()
            self.row = condition[:, 0].expand(-1, width, -1).clone()

    def load(self, i: int, condition: Tensor | None) -> None:
        """Make row i of the condition the present one."""
        if self.weight is not None:
            self.row.copy_(condition[:, min(i, condition.shape[1] - 1)])

    def add_to(self, above: Tensor) -> None:
        """Add the row's part to pre-activations (layers b·w f)."""
        if self.weight is not None:
            above.baddbmm_(self.row.flatten(0, 1).expand(len(above), -1, -1), self.weight)


class RowProduct:
    """One product in all layers for all columns of a row, done once a row, with the condition's part added.

    From what `read` names to `out` (layers b w f), by weights (layers f k) and biases (layers f). A step may add to
    `out` in place: each row writes all of it. `memory` is another product of these sizes, whose memory it shares.
    """

    def __init__(
        self,
        buffers: Buffers,
        width: int,
        weight: Tensor,
        bias: Tensor,
        condition: ConditionRow,
        memory: "RowProduct | None" = None,
    ):
        (layers, f, k), self.b, self.width, self.triton = weight.shape, buffers.b, width, buffers.backend == "triton"
        self.weight, self.bias, self.condition = weight.mT.contiguous(), bias.contiguous(), condition
        if memory is None:
            self.product = buffers.new(layers, self.b * width, f)
            self.inputs = None if self.triton else buffers.new(layers, self.b * width, k)
        else:
            self.product, self.inputs = memory.product, memory.inputs
        self.out = self.rows = self.product.unflatten(1, (self.b, width))
        if buffers.images_last:
            self.out = buffers(width, f, layers=layers)

    def read(self, *sources: Tensor) -> None:
        """Make these the inputs, side by side: views (layers b w taps features), at most two of them."""
        self.sources = sources
        if not self.triton:
            sizes = [x.shape[3] * x.shape[4] for x in sources]
            parts = zip(self.inputs.unflatten(1, (self.b, self.width)).split(sizes, dim=3), sources, strict=True)
            self.copies = [in_words(part.unflatten(3, x.shape[3:]), x) for part, x in parts]

    def __call__(self) -> None:
        if self.triton:
            row_product(self.sources, self.weight, self.bias, self.rows)
        else:
            for side_by_side, source in self.copies:
                side_by_side.copy_(source)
            torch.baddbmm(self.bias[:, None], self.inputs, self.weight, out=self.product)
        self.condition.add_to(self.product)
        if self.out is not self.rows:
            self.out.copy_(self.rows)
