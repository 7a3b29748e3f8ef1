"""The Row LSTM and the Diagonal BiLSTM on a CPU: products over all pixels by torch, and a compiled scan.

Legend: b batch · h w rows, columns · d direction · k input features · m ≤ k of them, the first, that are read from the
left too · f hidden features, F with zeros up to whole vectors · n taps: in the Row LSTM along the row above, in the
Diagonal BiLSTM (d = n = 2) the left neighbour and the upper one. Gates are in the order o f i g.

`kernels.lstm_scan_cpu_kernel` has the scan, which is called for some images and one direction at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.jit import cdiv
from kernels.lstm_scan_cpu_kernel import OUTPUTS, write

IMAGES = 4  # of a call


def lanes_of(f: int, dtype: torch.dtype) -> tuple[int, int]:
    """How many numbers a vector has, and F."""
    lanes = native.lanes(f, dtype == torch.float64)
    return lanes, cdiv(f, lanes) * lanes


def pad(x: Tensor, dim: int, f: int, room: int) -> Tensor:
    """Put zeros behind each f features along a dimension, up to F."""
    if f == room:
        return x
    x = x.unflatten(dim, (-1, f))
    out = x.new_zeros(*x.shape[: dim + 1], room, *x.shape[dim + 2 :])
    out.narrow(dim + 1, 0, f).copy_(x)
    return out.flatten(dim, dim + 1)


def unpad(x: Tensor, dim: int, f: int, room: int) -> Tensor:
    """Take them away."""
    return x if f == room else x.unflatten(dim, (-1, room)).narrow(dim + 1, 0, f).flatten(dim, dim + 1)


def scan(name: str, tensors: list[Tensor], n: int, diagonal: bool, lanes: int) -> None:
    """Run "forward" or "backward" of the kernel; the tensors are in its order, the first one of (b h w d 4F)."""
    b, h, w, d, gates = tensors[0].shape
    steps = [[[0, 1], [1, 0]], [[0, -1], [1, 0]]] if diagonal else [[[1, n // 2 - tap] for tap in range(n)]]
    sizes = [h, w, d, n, gates // 4 // lanes, 0 if diagonal else n // 2]
    addresses = [x.data_ptr() for x in tensors]
    memory = torch.tensor(addresses + sizes + [x for taps in steps for step in taps for x in step])
    double = tensors[0].dtype == torch.float64
    function = native.library(write, {"forward": 4, "backward": 4}, lanes, double)[name]

    def call(k: int):
        first, direction = k // d * IMAGES, k % d
        yield function(memory.data_ptr(), first, min(IMAGES, b - first), direction)

    native.share(call, cdiv(b, IMAGES) * d)


def weight_backward(states, lanes):
    x = states.unflatten(2, (-1, lanes))  # (d 4F n·v lanes)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % OUTPUTS))
    return x.unflatten(2, (-1, OUTPUTS)).transpose(1, 2).contiguous()  # (d blocks 4F OUTPUTS lanes)


@torch.library.custom_op("pixelrnn::lstm_cpu", mutates_args=())
def lstm_cpu_op(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor, left_weight: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `lstm_cpu` does, and for the backward pass: gates, cell_before, tanh_cell, taps."""
    (b, h, w, k), d, f, m = u.shape, state_weight.shape[0], state_weight.shape[1] // 4, left_weight.shape[2]
    lanes, room = lanes_of(f, u.dtype)
    states = pad(pad(state_weight, 1, f, room), 2, f, room)  # (d 4F n·F)
    weight, of_left, bias = (pad(x, 1, f, room).flatten(0, 1) for x in (input_weight, left_weight, bias))  # (d·4F ·)
    rows, gates = u.reshape(-1, k), u.new_empty(b, h, w, d, 4 * room)
    sums = gates.view(len(rows), -1)
    with torch.autocast("cpu", enabled=False):
        if m:
            torch.addmm(bias, rows[:-1, :m], of_left.T, out=sums[1:])
            gates[:, :, 0] = bias.view(d, -1)  # nothing is to the left
            sums.addmm_(rows, weight.T)
        else:
            torch.addmm(bias, rows, weight.T, out=sums)
    taps = u.new_empty(b, h, w, d, states.shape[2])
    hidden, tanh_cell, cell_before = (u.new_empty(b, h, w, d, room) for _ in range(3))
    # (d 4F n·F) → (d v n·F 4 lanes)
    in_kernel = states.view(d, 4, -1, lanes, states.shape[2]).permute(0, 2, 4, 1, 3).contiguous()
    tensors = [gates, in_kernel, taps, hidden, cell_before, tanh_cell, u.new_zeros(b, d, w, room)]
    scan("forward", tensors, states.shape[2] // room, diagonal, lanes)
    return unpad(hidden, 4, f, room), gates, cell_before, tanh_cell, taps


@lstm_cpu_op.register_fake
def _(u, input_weight, bias, state_weight, left_weight, diagonal):
    (b, h, w, _), d, f, new = u.shape, state_weight.shape[0], state_weight.shape[1] // 4, u.new_empty
    _, room = lanes_of(f, u.dtype)
    narrow = (new(b, h, w, d, room) for _ in range(2))
    return new(b, h, w, d, f), new(b, h, w, d, 4 * room), *narrow, new(b, h, w, d, state_weight.shape[2] // f * room)


@torch.library.custom_op("pixelrnn::lstm_cpu_backward", mutates_args=())
def lstm_cpu_backward_op(
    d_hidden_states: Tensor,
    u: Tensor,
    input_weight: Tensor,
    state_weight: Tensor,
    left_weight: Tensor,
    gates: Tensor,
    cell_before: Tensor,
    tanh_cell: Tensor,
    taps: Tensor,
    diagonal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of u, input_weight, bias, state_weight, left_weight."""
    (b, h, w, k), d, f, m = u.shape, state_weight.shape[0], state_weight.shape[1] // 4, left_weight.shape[2]
    lanes, room = lanes_of(f, u.dtype)
    states = pad(pad(state_weight, 1, f, room), 2, f, room)
    weight, of_left = (pad(x, 1, f, room).flatten(0, 1) for x in (input_weight, left_weight))
    d_hidden = pad(d_hidden_states, 4, f, room).clone(memory_format=torch.contiguous_format)
    d_gates = torch.empty_like(gates)
    in_kernel = weight_backward(states, lanes)
    tensors = [gates, in_kernel, d_gates, d_hidden, cell_before, tanh_cell, u.new_zeros(b, d, w, room)]
    scan("backward", tensors, states.shape[2] // room, diagonal, lanes)

    rows, d_sums, by_direction = u.reshape(-1, k), d_gates.flatten(3).flatten(0, 2), d_gates.flatten(0, 2)
    d_states = torch.bmm(by_direction.permute(1, 2, 0), taps.flatten(0, 2).transpose(0, 1))
    d_bias, d_weight, d_u = d_sums.sum(0), d_sums.T @ rows, d_sums @ weight
    if m:
        d_gates[:, :, 0] = 0  # nothing is to the left
        d_left = d_sums[1:].T @ rows[:-1, :m]
        d_u[:-1, :m].addmm_(d_sums[1:], of_left)
    else:
        d_left = torch.empty_like(of_left)
    d_bias, d_weight, d_left = (unpad(x.unflatten(0, (d, -1)), 1, f, room) for x in (d_bias, d_weight, d_left))
    return d_u.view(b, h, w, k), d_weight, d_bias, unpad(unpad(d_states, 1, f, room), 2, f, room), d_left


@lstm_cpu_backward_op.register_fake
def _(d_hidden_states, u, input_weight, state_weight, left_weight, *_):
    new = u.new_empty
    weights = new(input_weight.shape), new(input_weight.shape[:2]), new(state_weight.shape), new(left_weight.shape)
    return new(u.shape), *weights


def setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # the outputs kept for `backward` have no gradient: make no zeros for it
    u, input_weight, _, state_weight, left_weight, ctx.diagonal = inputs
    ctx.save_for_backward(u, input_weight, state_weight, left_weight, *output[1:])


def backward(ctx, d_hidden_states, *_):
    if d_hidden_states is None:
        return (None,) * 6
    gradients = lstm_cpu_backward_op(d_hidden_states, *ctx.saved_tensors, ctx.diagonal)
    d_u, d_input_weight, d_bias, d_state_weight, d_left_weight = gradients
    return d_u, d_input_weight, d_bias, d_state_weight, d_left_weight, None


lstm_cpu_op.register_autograd(backward, setup_context=setup_context)
