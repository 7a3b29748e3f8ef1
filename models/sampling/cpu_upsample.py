"""Multi-Scale's maps on a CPU by compiled products: the same bits for any batch, number of threads, and CPU.

Legend: b batch · c channel (colour) · h w rows, columns · d features of the maps · k features that a convolution reads
· p q one of two rows, columns that are made.
"""

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from kernels import native
from kernels.draw_row_cpu import Arena, Operation, Parameters, Stage, Tiles
from kernels.draw_row_cpu_kernel import BATCH
from kernels.jit import cdiv
from models.multi_scale import Upsample

AT_ONCE = 8  # images that a thread takes: few, so that every thread has some, and a cache has room for their numbers


def upsampled(upsample: Upsample, scaled: Tensor) -> Tensor:
    """What `upsample` makes of scaled images (b c h w): maps (b d 2h 2w)."""
    first, _, second, _ = upsample
    (b, _, h, w), d = scaled.shape, len(second.bias)
    parts = cdiv(b, AT_ONCE)
    threads = min(parts, torch.get_num_threads())
    sizes = min(b, AT_ONCE), h, w, threads
    smaller = Convolution(rearrange(first.weight, "d c i j -> d (j i c)"), first.bias, 3, *sizes)
    # Where four pixels meet, four of the larger image lie around the corner, and see all four.
    weight = rearrange(second.weight, "k d (i p) (j q) -> i j k p q d", p=2, q=2).flip(0, 1)
    weight = rearrange(weight, "i j k p q d -> (p q d) (j i k)")
    larger = Convolution(weight, second.bias.repeat(4), 2, *sizes)
    x, maps = scaled.permute(0, 2, 3, 1).numpy(), scaled.new_empty(b, 2 * h, 2 * w, d)
    out = maps.numpy()

    def some(thread: int) -> Iterator[None]:
        for part in range(thread, parts, threads):
            images = slice(part * AT_ONCE, (part + 1) * AT_ONCE)
            around = larger(smaller(x[images], thread), thread)
            out[images] = rearrange(around, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)[:, 1:-1, 1:-1]
            yield

    native.share(some, threads)
    return maps.permute(0, 3, 1, 2)


class Convolution:
    """ReLU of a convolution of `size` × `size` pixels, with zeros around the image: (b h w k) → (b h' w' d).

    h' is h + 3 − size, and w' likewise. A lane of a vector is a row of an image.

    Args:
        weight, bias: (d column·row·k), (d).
        b, h, w: of images; there may also be fewer.
        threads: how many call it at the same time, by a number of their own.
    """

    def __init__(self, weight: Tensor, bias: Tensor, size: int, b: int, h: int, w: int, threads: int):
        (self.d, inputs), self.size, self.columns = weight.shape, size, w + 3 - size
        rows = b * (h + 3 - size)
        lanes = native.lanes(threads * rows, weight.dtype == torch.float64)
        arena, parameters = Arena(0), Parameters(weight, lanes)
        x, out = arena.take(inputs // size, w + 2), arena.take(self.d, self.columns)
        (of,) = parameters.products(weight[None], bias[None])
        self.count = cdiv(rows, lanes)  # a thread's tiles
        self.tiles = Tiles(threads * self.count * lanes, arena, parameters)
        product = Operation("product", out, x=x, **of, more=1)
        self.program = self.tiles.program([Stage([product], 0, self.columns, together=True)])
        self.nothing = torch.zeros(len(BATCH), dtype=torch.int64)  # tiles are full: no product is packed, and reads it
        numbers = self.tiles.arena.numpy().swapaxes(1, 2)  # (tile lane vector)
        self.x, self.out = numbers[:, :, : out.at], numbers[:, :, out.at : arena.size]

    def __call__(self, x: np.ndarray, thread: int) -> np.ndarray:
        x = sliding_window_view(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))), self.size, axis=1)  # (b h w k row)
        b, h, *_ = x.shape
        first, last = thread * self.count, (thread + 1) * self.count
        shape = self.x[first:last].shape
        rows = np.zeros((shape[0] * shape[1], shape[2]), x.dtype)
        rows[: b * h] = rearrange(x, "b h w k i -> (b h) (w i k)")
        self.x[first:last] = rows.reshape(shape)
        for tile in range(first, last):
            self.tiles.run(self.program, self.nothing, tile, 0)
        rows = rearrange(self.out[first:last], "tile lane n -> (tile lane) n")[: b * h]
        return rows.reshape(b, h, self.columns, self.d)
