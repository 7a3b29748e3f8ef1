"""The scan of the Diagonal BiLSTM (van den Oord et al. 2016, 1601.06759, section 3.2).

Legend: b batch · h w rows, columns · d direction (2) · k input features · f hidden features · i j a row, a column.
Gates are in the order o f i g, so `4f` is cut in four parts of f.

At pixel (i, j), with `left` = (i, j−1) and `up` = (i−1, j), zeros outside the image:

    [o f i g] = [σ σ σ tanh](input_weight · u(i, j) + bias + state_weight · [hidden(left), hidden(up)])
    cell      = f ⊙ cell(left) + i ⊙ g
    hidden    = o ⊙ tanh(cell)

Direction 0 reads the image from left to right, direction 1 its mirror image: `left` is (i, j+1) there.

All pixels of one diagonal i + j = t are computed together, from those of t − 1. The Triton form is in
`kernels/lstm_scan_kernel.py`, the one for CPUs in `kernels/lstm_scan_cpu.py`. The torch form below packs the pixels
diagonal after diagonal, so that every diagonal, and every diagonal's neighbours, is one slice; pixels outside the image
do not exist there, and no state can pass through them.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import autocast, backend_for, in_float32
from kernels.lstm import double_g, local_gradients
from kernels.lstm_scan import lstm_scan
from kernels.lstm_scan_cpu import lstm_cpu

# Features up to which a compiled function computes float32 on a CPU by default: a whole training step is 1.6 to 2 times
# as quick as by torch with 16, on two CPUs, and 1.1 to 1.5 with 32. With more, products take the time.
FEW = 32


def diagonal_lstm_reference(u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor) -> Tensor:
    """Compute `diagonal_lstm` pixel by pixel, as the equations are written: slow, differentiable, the oracle."""
    b, h, w, _ = u.shape
    f = state_weight.shape[1] // 4
    zeros = u.new_zeros(b, f)
    directions = []
    for direction in range(2):
        columns = range(w) if direction == 0 else range(w - 1, -1, -1)
        hidden, cell = {}, {}
        for i in range(h):
            left = None
            for j in columns:
                states = torch.cat([hidden.get((i, left), zeros), hidden.get((i - 1, j), zeros)], dim=1)
                gates = u[:, i, j] @ input_weight[direction].T + bias[direction] + states @ state_weight[direction].T
                o, forget, i_gate, g = gates.split(f, dim=1)
                cell[i, j] = forget.sigmoid() * cell.get((i, left), zeros) + i_gate.sigmoid() * g.tanh()
                hidden[i, j] = o.sigmoid() * cell[i, j].tanh()
                left = j
        rows = [torch.stack([hidden[i, j] for j in range(w)], dim=1) for i in range(h)]
        directions.append(torch.stack(rows, dim=1))
    return torch.stack(directions, dim=3)


class Diagonal(NamedTuple):
    """One diagonal of the packed order; every number counts pixels."""

    start: int  # where it begins
    size: int  # how many pixels it has
    left: int  # where its first pixel with a left neighbour begins the slice of those neighbours
    num_left: int  # its first `num_left` pixels have a left neighbour
    up: int  # where the slice of upper neighbours begins
    num_up: int  # its last `num_up` pixels have an upper neighbour


@lru_cache(maxsize=32)
def diagonals(h: int, w: int) -> tuple[Diagonal, ...]:
    """List the diagonals of an h × w image; pixels of one lie in the order of their rows."""
    out, start, above, above_first = [], 0, 0, 0  # `above` is the diagonal before
    for t in range(h + w - 1):
        first, last = max(0, t - w + 1), min(t, h - 1)
        size = last - first + 1
        num_left = min(last, t - 1) - first + 1  # all but the pixel in column 0
        num_up = last - max(first, 1) + 1  # all but the pixel in row 0
        left = above + first - above_first
        up = above + max(first, 1) - 1 - above_first
        out.append(Diagonal(start, size, left, num_left, up, num_up))
        start, above, above_first = start + size, start, first
    return tuple(out)


class Packing(NamedTuple):
    """Where rows of features of one layout are in another: each is the index of one gather.

    Packed rows are (d·hw·b): direction after direction, diagonal after diagonal, row after row, image after image. One
    more row, at the end, is zero: it takes the place of a missing neighbour.
    """

    from_image: Tensor  # (d·hw·b) rows of a (b h w) layout
    from_directions: Tensor  # (d·hw·b) rows of a (b h w d) layout
    to_directions: Tensor  # (b·h·w·d) packed rows
    left: Tensor  # (d·hw·b) packed rows: the left neighbours
    up: Tensor  # (d·hw·b) packed rows: the upper neighbours


@lru_cache(maxsize=32)
def packing(b: int, h: int, w: int, device: torch.device) -> Packing:
    """Make the packed order of b images of h × w."""
    cells = [(i, t - i) for t in range(h + w - 1) for i in range(max(0, t - w + 1), min(t, h - 1) + 1)]
    where = {cell: p for p, cell in enumerate(cells)}
    images, directions = torch.arange(b), torch.arange(2)[:, None, None]
    pixels = torch.tensor([[i * w + j for i, j in cells], [i * w + w - 1 - j for i, j in cells]])  # (d hw)
    image = pixels[:, :, None] + images * h * w  # (d hw b)

    def packed_rows(of: Tensor) -> Tensor:
        """Packed pixels (d hw), −1 where there is none → packed rows (d hw b)."""
        rows = (of[:, :, None] + directions * h * w) * b + images
        return rows.masked_fill((of < 0)[:, :, None], 2 * h * w * b)

    left, up = (
        packed_rows(torch.tensor([[where.get((i - di, j - dj), -1) for i, j in cells]] * 2))
        for di, dj in ((0, 1), (1, 0))
    )
    to_directions = packed_rows(pixels.argsort(dim=1)).permute(2, 1, 0)  # (b hw d)
    return Packing(*(x.flatten().to(device) for x in (image, 2 * image + directions, to_directions, left, up)))


def gather(rows: Tensor, index: Tensor) -> Tensor:
    """Take rows of (… f) in another order, cut in the two directions: (d n f)."""
    return rows.reshape(-1, rows.shape[-1]).index_select(0, index).unflatten(0, (2, -1))


@torch.library.custom_op("pixelrnn::diagonal_lstm", mutates_args=())
def diagonal_lstm_op(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the torch form: products over all pixels before the scan, in it only what depends on states.

    Returns what `diagonal_lstm` does, and for the backward pass: packed, gates, hidden_rows, cell_rows, tanh_cell.
    """
    b, h, w, _ = u.shape
    f, n = state_weight.shape[1] // 4, h * w * b
    with torch.autocast(u.device.type, enabled=False):
        order = packing(b, h, w, u.device)
        packed = gather(u, order.from_image)  # (d hw·b k)
        doubled = double_g(f, bias)  # so that one sigmoid serves all gates
        gates = torch.baddbmm((bias * doubled)[:, None], packed, input_weight.mT * doubled)  # (d hw·b 4f)
        left_weight, up_weight = (state_weight.mT * doubled).split(f, dim=1)  # (d f 4f) each
        hidden_rows, cell_rows = (gates.new_empty(2 * n + 1, f) for _ in range(2))
        hidden_rows[-1] = cell_rows[-1] = 0
        hidden, cell = hidden_rows[:-1].view(2, n, f), cell_rows[:-1].view(2, n, f)
        tanh_cell = torch.empty_like(cell)
        sizes = [b * diagonal.size for diagonal in diagonals(h, w)]
        wholes = (x.split(sizes, dim=1) for x in (gates, *gates.split(f, dim=2), cell, tanh_cell, hidden))
        for diagonal, now, o, forget, i, g, c, tanh_c, h_now in zip(diagonals(h, w), *wholes, strict=True):
            _, size, left, num_left, up, num_up = (b * pixels for pixels in diagonal)
            if num_left:
                now.narrow(1, 0, num_left).baddbmm_(hidden.narrow(1, left, num_left), left_weight)
            if num_up:
                now.narrow(1, size - num_up, num_up).baddbmm_(hidden.narrow(1, up, num_up), up_weight)
            now.sigmoid_()
            torch.mul(i, g.mul_(2).sub_(1), out=c)
            if num_left:
                c_left = cell.narrow(1, left, num_left)
                c.narrow(1, 0, num_left).addcmul_(forget.narrow(1, 0, num_left), c_left)
            torch.mul(o, torch.tanh(c, out=tanh_c), out=h_now)
        hidden = hidden_rows.index_select(0, order.to_directions).view(b, h, w, 2, f)
    return hidden, packed, gates, hidden_rows, cell_rows, tanh_cell


@diagonal_lstm_op.register_fake
def _(u, input_weight, bias, state_weight):
    (b, h, w, k), f = u.shape, state_weight.shape[1] // 4
    n, new = h * w * b, u.new_empty
    kept = new(2, n, k), new(2, n, 4 * f), new(2 * n + 1, f), new(2 * n + 1, f), new(2, n, f)
    return new(b, h, w, 2, f), *kept


@torch.library.custom_op("pixelrnn::diagonal_lstm_backward", mutates_args=())
def diagonal_lstm_backward_op(
    d_hidden_states: Tensor,
    input_weight: Tensor,
    state_weight: Tensor,
    packed: Tensor,
    gates: Tensor,
    hidden_rows: Tensor,
    cell_rows: Tensor,
    tanh_cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of u, input_weight, bias, state_weight."""
    b, h, w = d_hidden_states.shape[:3]
    k, f = packed.shape[2], tanh_cell.shape[2]
    order = packing(b, h, w, gates.device)
    forget = gates.narrow(2, f, f)
    # (d hw·b 4f), as yet without the factors d_hidden (o) and d_cell (f i g) that only the scan knows
    d_gates, d_cell_d_hidden = local_gradients(gates, gather(cell_rows, order.left), tanh_cell)

    d_hidden, d_cell = gather(d_hidden_states, order.from_directions), torch.zeros_like(tanh_cell)
    left_weight, up_weight = state_weight.split(f, dim=2)  # (d 4f f) each
    sizes = [b * diagonal.size for diagonal in diagonals(h, w)]
    to_o, to_cell = d_gates.narrow(2, 0, f), d_gates.narrow(2, f, 3 * f).unflatten(2, (3, f))
    wholes = (x.split(sizes, dim=1) for x in (d_hidden, d_cell, d_cell_d_hidden, d_gates, to_o, to_cell, forget))
    for diagonal, dh, dc, factor, dg, dg_o, dg_cell, forget_now in reversed(
        [*zip(diagonals(h, w), *wholes, strict=True)]
    ):
        _, size, left, num_left, up, num_up = (b * pixels for pixels in diagonal)
        dc.addcmul_(dh, factor)
        dg_o.mul_(dh)
        dg_cell.mul_(dc.unsqueeze(2))
        if num_left:
            dc_left = d_cell.narrow(1, left, num_left)
            torch.mul(dc.narrow(1, 0, num_left), forget_now.narrow(1, 0, num_left), out=dc_left)
            d_hidden.narrow(1, left, num_left).baddbmm_(dg.narrow(1, 0, num_left), left_weight)
        if num_up:
            d_hidden.narrow(1, up, num_up).baddbmm_(dg.narrow(1, size - num_up, num_up), up_weight)

    inputs = torch.cat([packed, gather(hidden_rows, order.left), gather(hidden_rows, order.up)], dim=2)
    d_weights = (d_gates.mT @ inputs).split([k, 2 * f], dim=2)
    d_input_weight, d_state_weight = (x.clone(memory_format=torch.contiguous_format) for x in d_weights)
    d_u = (d_gates @ input_weight).flatten(0, 1).index_select(0, order.to_directions)
    return d_u.view(b, h, w, 2, k).sum(3), d_input_weight, d_gates.sum(1), d_state_weight


@diagonal_lstm_backward_op.register_fake
def _(d_hidden_states, input_weight, state_weight, packed, *_):
    d_u = packed.new_empty(*d_hidden_states.shape[:3], packed.shape[2])
    weights = input_weight.shape, input_weight.shape[:2], state_weight.shape
    return d_u, *(packed.new_empty(shape) for shape in weights)


def setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the outputs kept for `backward` have no gradient: make no zeros for it
    _, input_weight, _, state_weight = inputs
    ctx.save_for_backward(input_weight, state_weight, *output[1:])


def backward(ctx, d_hidden_states, *_):
    if d_hidden_states is None:
        return (None,) * 4
    return diagonal_lstm_backward_op(d_hidden_states, *ctx.saved_tensors)


diagonal_lstm_op.register_autograd(backward, setup_context=setup_context)


def diagonal_lstm(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor, backend: str | None = None
) -> Tensor:
    """Run both directions of the Diagonal BiLSTM's scan over an image.

    Args:
        u: features (b h w k). To condition on a map, append it to the features and its weights to `input_weight`.
        input_weight: input-to-state weights (2 4f k), masked by the caller.
        bias: of the gates (2 4f).
        state_weight: state-to-state weights (2 4f 2f), the left neighbour's before the upper one's.
        backend: see `kernels.backend_for`. Under autocast, Triton multiplies in its type, the others in float32; states
            are float32 in all.

    Returns:
        The hidden states (b h w 2 f), each direction at the pixel it belongs to, not yet moved down a row.

    Source: 1601.06759, section 3.2 and equation 3.
    """
    computed_by = backend_for(state_weight, backend, compiled=state_weight.shape[1] <= 4 * FEW)
    if computed_by == "triton":
        u, input_weight, bias = autocast(u, input_weight, bias)
        pre = F.linear(u, input_weight.flatten(0, 1), bias.flatten())
        return lstm_scan(pre.unflatten(3, (2, -1)), state_weight, diagonal=True)
    given = in_float32(u, input_weight, bias, state_weight)
    if computed_by == "torch":
        return diagonal_lstm_op(*given)[0]
    return lstm_cpu(*given, left_weight=given[1][..., :0], diagonal=True)
