"""Multi-Scale's maps on a CPU by compiled products: the same bits for any batch, number of threads, and CPU.

Legend: b batch · c channel (colour) · h w rows, columns · d features of the maps · k features that a convolution reads
· p q one of two rows, columns that are made.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kernels import native
from kernels.draw_row_cpu import Arena, Operation, Parameters, Stage, Tiles
from kernels.draw_row_cpu_kernel import BATCH
from kernels.jit import cdiv
from models.multi_scale import Upsample

AT_ONCE = 16  # images, whose numbers a cache has room for: all 256 in one go take up to half as long again


def upsampled(upsample: Upsample, scaled: Tensor) -> Tensor:
    """What `upsample` makes of scaled images (b c h w): maps (b d 2h 2w)."""
    first, _, second, _ = upsample
    b, _, h, w = scaled.shape
    weight = rearrange(first.weight, "d c i j -> d (j i c)")
    smaller = Convolution(weight, first.bias, 3, min(b, AT_ONCE), h, w)
    # Where four pixels meet, four of the larger image lie around the corner, and see all four.
    weight = rearrange(second.weight, "k d (i p) (j q) -> i j k p q d", p=2, q=2).flip(0, 1)
    weight = rearrange(weight, "i j k p q d -> (p q d) (j i k)")
    larger = Convolution(weight, second.bias.repeat(4), 2, min(b, AT_ONCE), h, w)
    out = scaled.new_empty(b, 2 * h, 2 * w, len(second.bias))
    for x, maps in zip(scaled.split(AT_ONCE), out.split(AT_ONCE), strict=True):
        around = larger(smaller(x.permute(0, 2, 3, 1)))
        maps.copy_(rearrange(around, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)[:, 1:-1, 1:-1])
    return out.permute(0, 3, 1, 2)


class Convolution:
    """ReLU of a convolution of `size` × `size` pixels, with zeros around the image: (b h w k) → (b h' w' d).

    h' is h + 3 − size, and w' likewise. A lane of a vector is a row of an image: few images keep all threads busy too.

    Args:
        weight, bias: (d column·row·k), (d).
        b, h, w: of images; there may also be fewer.
    """

    def __init__(self, weight: Tensor, bias: Tensor, size: int, b: int, h: int, w: int):
        (self.d, inputs), self.size, self.columns = weight.shape, size, w + 3 - size
        arena, parameters = Arena(0), Parameters(weight)
        self.x, self.out = arena.take(inputs // size, w + 2), arena.take(self.d, self.columns)
        (of,) = parameters.products(weight[None], bias[None])
        rows = b * (h + 3 - size)
        lanes = native.lanes(rows, weight.dtype == torch.float64)
        self.tiles = Tiles(cdiv(rows, lanes) * lanes, arena, parameters)
        product = Operation("product", self.out, x=self.x, **of, more=1)
        self.program = self.tiles.program([Stage([product], 0, self.columns, together=True)])
        self.nothing = torch.zeros(len(BATCH), dtype=torch.int64)  # tiles are full: no product is packed, and reads it

    def __call__(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 1, 1, 1, 1)).unfold(1, self.size, 1)  # (b h w k row)
        b, h, *_ = x.shape
        self.tiles.load(self.x, rearrange(x, "b h w k i -> (b h) (w i k)"))

        def tile(k: int) -> Iterator[None]:
            yield self.tiles.run(self.program, self.nothing, k, 0)

        native.share(tile, self.tiles.count)
        made = self.tiles.images_of(self.out, self.columns * self.d)[: b * h]
        return made.view(b, h, self.columns, self.d)
