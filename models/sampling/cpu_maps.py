"""The maps that a stage is conditioned on, on a CPU by compiled products: the same bits for any batch and any CPU.

Legend: b batch · h w rows, columns · d features of the maps · k features that a convolution reads · p q one of two
rows, columns that are made.
"""

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from kernels import native
from kernels.draw_row_cpu import Arena, Operation, Parameters, Stage, Tiles
from kernels.draw_row_cpu_kernel import BATCH
from kernels.jit import cdiv

AT_ONCE = 8  # images that a thread takes: few, so that every thread has some, and a cache has room for their numbers


def compiled(module: nn.Sequential, x: Tensor) -> Tensor:
    """What convolutions, each with a ReLU, make of images x (b k h w): maps (b d h' w').

    Args:
        module: its convolutions are 3×3, or transposed, 4×4 of stride 2, which make twice as many rows and columns.
    """
    b, _, h, w = x.shape
    parts = cdiv(b, AT_ONCE)
    threads = min(parts, torch.get_num_threads())
    layers = []
    for conv, relu in zip(*2 * [iter(module)], strict=True):
        assert isinstance(relu, nn.ReLU)
        layers.append((Larger if isinstance(conv, nn.ConvTranspose2d) else Same)(conv, min(b, AT_ONCE), h, w, threads))
        h, w, d = layers[-1].makes
    images, maps = x.permute(0, 2, 3, 1).numpy(), x.new_empty(b, h, w, d)
    out = maps.numpy()

    def some(thread: int) -> Iterator[None]:
        for part in range(thread, parts, threads):
            at = slice(part * AT_ONCE, (part + 1) * AT_ONCE)
            of_part = images[at]
            for layer in layers:
                of_part = layer(of_part, thread)
            out[at] = of_part
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


class Same(Convolution):
    """A 3×3 convolution: images (b h w k) → (b h w d)."""

    def __init__(self, conv: nn.Conv2d, b: int, h: int, w: int, threads: int):
        super().__init__(rearrange(conv.weight, "d k i j -> d (j i k)"), conv.bias, 3, b, h, w, threads)
        self.makes = h, w, self.d


class Larger(Convolution):
    """A transposed convolution of 4×4 and stride 2: images (b h w k) → (b 2h 2w d)."""

    def __init__(self, conv: nn.ConvTranspose2d, b: int, h: int, w: int, threads: int):
        # Where four pixels meet, four of the larger image lie around the corner, and see all four.
        weight = rearrange(conv.weight, "k d (i p) (j q) -> i j k p q d", p=2, q=2).flip(0, 1)
        weight = rearrange(weight, "i j k p q d -> (p q d) (j i k)")
        super().__init__(weight, conv.bias.repeat(4), 2, b, h, w, threads)
        self.makes = 2 * h, 2 * w, len(conv.bias)

    def __call__(self, x: np.ndarray, thread: int) -> np.ndarray:
        around = super().__call__(x, thread)
        return rearrange(around, "b h w (p q d) -> b (h p) (w q) d", p=2, q=2)[:, 1:-1, 1:-1]
