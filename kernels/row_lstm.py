"""The scan of the Row LSTM (van den Oord et al. 2016, 1601.06759, section 3.1).

Legend: b batch · h w rows, columns · k input features · m ≤ k of them, the first, that are read from the left too ·
f hidden features · n taps along the row above (odd) · i j t a row, a column, a tap. Gates are in the order o f i g,
so `4f` is cut in four parts of f.

At pixel (i, j), zeros outside the image:

    [o f i g] = [σ σ σ tanh](input_weight · u(i, j) + left_weight · u(i, j−1)[:m] + bias
                             + Σ_t state_weight[:, :, t] · hidden(i−1, j + t − n//2))
    cell      = f ⊙ cell(i−1, j) + i ⊙ g
    hidden    = o ⊙ tanh(cell)

All pixels of a row, in all images, are computed together from those of the row above. The Triton form is in
`kernels/lstm_scan_kernel.py`, the one for CPUs in `kernels/lstm_scan_cpu.py`. The torch form below puts rows first:
(h b w ·). A pixel's features and what its taps read are side by side, [u, left, tap 0, …, tap n−1], and so are the
weights. The sum above is then one product a row, and the gradients of all weights are one product over all pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import autocast, backend_for, in_float32
from kernels.lstm import double_g, local_gradients
from kernels.lstm_scan import lstm_scan
from kernels.lstm_scan_cpu import lstm_cpu

# Features up to which a compiled function computes float32 on a CPU by default: a whole training step is 1.3 to 1.7
# times as quick as by torch with 16; with 32, 1.3 on one CPU, and slower on another.
FEW = 16


def row_lstm_reference(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor, left_weight: Tensor | None = None
) -> Tensor:
    """Compute `row_lstm` pixel by pixel, as the equations are written: slow, differentiable, the oracle."""
    b, h, w, _ = u.shape
    _, f, n = state_weight.shape
    zeros = u.new_zeros(b, f)
    hidden, cell = {}, {}
    for i in range(h):
        for j in range(w):
            gates = u[:, i, j] @ input_weight.T + bias
            if left_weight is not None and j > 0:
                gates = gates + u[:, i, j - 1, : left_weight.shape[1]] @ left_weight.T
            for t in range(n):
                gates = gates + hidden.get((i - 1, j + t - n // 2), zeros) @ state_weight[:, :, t].T
            o, forget, i_gate, g = gates.split(f, dim=1)
            cell[i, j] = forget.sigmoid() * cell.get((i - 1, j), zeros) + i_gate.sigmoid() * g.tanh()
            hidden[i, j] = o.sigmoid() * cell[i, j].tanh()
    return torch.stack([torch.stack([hidden[i, j] for j in range(w)], dim=1) for i in range(h)], dim=1)


def pair_taps(taps: Tensor, above: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Pair each tap with its inputs in the image: views of `taps` (… w n f) and `above` (… w f), both (… columns f)."""
    w, n = taps.shape[-3:-1]
    pairs = []
    for t in range(n):
        shift = t - n // 2  # tap t at column j reads column j + shift
        columns = w - abs(shift)
        if columns > 0:
            tap = taps[..., t, :].narrow(-2, max(0, -shift), columns)
            pairs.append((tap, above.narrow(-2, max(0, shift), columns)))
    return pairs


@torch.library.custom_op("pixelrnn::row_lstm", mutates_args=())
def row_lstm_op(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor, left_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the torch form: in the scan what depends on states, all else for all pixels at once, outside of it.

    Returns what `row_lstm` does, and for the backward pass: inputs, weight, gates, cells, tanh_cell.
    """
    (b, h, w, k), m = u.shape, left_weight.shape[1]
    _, f, n = state_weight.shape
    with torch.autocast(u.device.type, enabled=False):
        weight = torch.cat([input_weight, left_weight, state_weight.mT.flatten(1)], dim=1)  # (4f k+m+n·f)
        doubled = double_g(f, bias)  # so that one sigmoid serves all gates
        doubled_bias, doubled_weight = bias * doubled, weight.T * doubled
        inputs = u.new_empty(h, b, w, k + m + n * f)
        inputs[..., :k] = u.transpose(0, 1)
        inputs[:, :, 1:, k : k + m] = u.transpose(0, 1)[:, :, :-1, :m]
        inputs[:, :, 0, k : k + m] = 0
        inputs[..., k + m :] = 0  # the scan fills it but for what lies outside the image
        hidden, gates = u.new_empty(b, h, w, f), u.new_empty(h, b, w, 4 * f)
        tanh_cell, cells = u.new_empty(h, b, w, f), u.new_empty(h + 1, b, w, f)
        cell_up, cell = cells[:-1], cells[1:]
        cell_up[0] = 0

        rows = hidden.transpose(0, 1)
        pairs = pair_taps(inputs[1:, ..., k + m :].unflatten(3, (n, f)), rows[:-1])
        taps = [(), *zip(*(zip(*pair, strict=True) for pair in pairs), strict=True)]  # row 0 has none
        wholes = inputs.flatten(1, 2), gates.flatten(1, 2), *gates.split(f, dim=3), cell_up, cell, tanh_cell, rows
        for taps_now, x, now, o, forget, i, g, c_up, c, tanh_c, h_now in zip(taps, *wholes, strict=True):
            for tap, above in taps_now:
                tap.copy_(above)
            torch.addmm(doubled_bias, x, doubled_weight, out=now).sigmoid_()
            torch.mul(i, g.mul_(2).sub_(1), out=c)
            c.addcmul_(forget, c_up)
            torch.mul(o, torch.tanh(c, out=tanh_c), out=h_now)
    return hidden, inputs, weight, gates, cells, tanh_cell


@row_lstm_op.register_fake
def _(u, input_weight, bias, state_weight, left_weight):
    (b, h, w, k), m, new = u.shape, left_weight.shape[1], u.new_empty
    _, f, n = state_weight.shape
    all_inputs = k + m + n * f
    kept = new(h, b, w, all_inputs), new(4 * f, all_inputs), new(h, b, w, 4 * f), new(h + 1, b, w, f), new(h, b, w, f)
    return new(b, h, w, f), *kept


@torch.library.custom_op("pixelrnn::row_lstm_backward", mutates_args=())
def row_lstm_backward_op(
    d_hidden_states: Tensor,
    inputs: Tensor,
    weight: Tensor,
    gates: Tensor,
    cells: Tensor,
    tanh_cell: Tensor,
    k: int,
    m: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of u, bias, input_weight, state_weight, left_weight."""
    (h, b, w, f), taps = tanh_cell.shape, weight.shape[1] - k - m
    seen_weight, state_weight = weight.split([k + m, taps], dim=1)
    forget = gates.narrow(3, f, f)
    # (h b w 4f), as yet without the factors d_hidden (o) and d_cell (f i g) that only the scan knows
    d_gates, d_cell_d_hidden = local_gradients(gates, cells[:-1], tanh_cell)

    # These are needed for one row at a time; what the taps of a row hold, they pass on to the row above.
    d_hidden, d_cell, d_taps = gates.new_empty(b, w, f), gates.new_zeros(b, w, f), gates.new_zeros(b * w, taps)
    pairs = pair_taps(d_taps.view(b, w, -1, f), d_hidden)
    to_o, to_cell = d_gates[..., :f], d_gates[..., f:].unflatten(3, (3, f))
    wholes = d_hidden_states.transpose(0, 1), d_cell_d_hidden, d_gates.flatten(1, 2), to_o, to_cell, forget
    for row, d_out_now, factor, dg, dg_o, dg_cell, forget_now in reversed([*zip(range(h), *wholes, strict=True)]):
        d_hidden.copy_(d_out_now)
        for d_tap, d_above in pairs:  # of the row below, which reads this one
            d_above.add_(d_tap)
        d_cell.addcmul_(d_hidden, factor)
        dg_o.mul_(d_hidden)
        dg_cell.mul_(d_cell.unsqueeze(2))
        if row:
            d_cell.mul_(forget_now)
            torch.mm(dg, state_weight, out=d_taps)

    d_pixels = d_gates.flatten(0, 2)
    d_input_weight, d_left_weight, d_state_weight = (d_pixels.T @ inputs.flatten(0, 2)).split([k, m, taps], dim=1)
    d_u, d_left = (d_pixels @ seen_weight).view(h, b, w, k + m).split([k, m], dim=3)
    d_u[:, :, :-1, :m] += d_left[:, :, 1:]
    d_state_weight = d_state_weight.unflatten(1, (-1, f)).mT
    d_u = d_u.transpose(0, 1).contiguous()
    contiguous = torch.contiguous_format
    d_weights = (x.clone(memory_format=contiguous) for x in (d_input_weight, d_state_weight, d_left_weight))
    return d_u, d_pixels.sum(0), *d_weights


@row_lstm_backward_op.register_fake
def _(d_hidden_states, inputs, weight, gates, cells, tanh_cell, k, m):
    h, b, w, f = tanh_cell.shape
    taps = (weight.shape[1] - k - m) // f
    shapes = (b, h, w, k), (4 * f,), (4 * f, k), (4 * f, f, taps), (4 * f, m)
    return tuple(weight.new_empty(shape) for shape in shapes)


def setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the outputs kept for `backward` have no gradient: make no zeros for it
    ctx.save_for_backward(*output[1:])
    ctx.k, ctx.m = inputs[1].shape[1], inputs[4].shape[1]


def backward(ctx, d_hidden_states, *_):
    if d_hidden_states is None:
        return (None,) * 5
    gradients = row_lstm_backward_op(d_hidden_states, *ctx.saved_tensors, ctx.k, ctx.m)
    d_u, d_bias, d_input_weight, d_state_weight, d_left_weight = gradients
    return d_u, d_input_weight, d_bias, d_state_weight, d_left_weight


row_lstm_op.register_autograd(backward, setup_context=setup_context)


def row_lstm(
    u: Tensor,
    input_weight: Tensor,
    bias: Tensor,
    state_weight: Tensor,
    left_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run the Row LSTM's scan over an image, from its first row to its last.

    Args:
        u: features (b h w k). To condition on a map, append it to the features and its weights to `input_weight`.
        input_weight: input-to-state weights of the pixel itself (4f k), masked by the caller.
        bias: of the gates (4f).
        state_weight: state-to-state weights (4f f n), n odd: the taps along the row above, from left to right.
        left_weight: input-to-state weights (4f m) of the left neighbour's first m ≤ k features: with `input_weight`,
            the taps of a 1×3 convolution along the row whose third is masked. None: no such tap.
        backend: see `kernels.backend_for`. Under autocast, Triton multiplies in its type, the others in float32; states
            are float32 in all.

    Returns:
        The hidden states (b h w f), each at the pixel it belongs to.

    Source: 1601.06759, section 3.1 and equation 3.
    """
    computed_by = backend_for(state_weight, backend, compiled=state_weight.shape[1] <= FEW)
    if computed_by == "triton":
        u, input_weight, bias, left_weight = autocast(u, input_weight, bias, left_weight)
        pre = F.linear(u, input_weight, bias)
        if left_weight is not None:
            left = F.linear(u[:, :, :-1, : left_weight.shape[1]], left_weight)
            pre = pre + F.pad(left, (0, 0, 1, 0))
        state_weight = state_weight.mT.flatten(1)[None]  # (1 4f n·f)
        return lstm_scan(pre[:, :, :, None], state_weight, diagonal=False)[:, :, :, 0]
    left_weight = input_weight[:, :0] if left_weight is None else left_weight
    given = in_float32(u, input_weight, bias, state_weight, left_weight)
    if computed_by == "torch":
        return row_lstm_op(*given)[0]
    u, input_weight, bias, state_weight, left_weight = given
    states = state_weight.mT.flatten(1)  # (4f n·f)
    return lstm_cpu(u, input_weight[None], bias[None], states[None], left_weight[None], diagonal=False)[:, :, :, 0]
