"""The Row LSTM and the Diagonal BiLSTM on a CPU: products over all pixels by torch, and a compiled scan.

Legend: b batch · h w rows, columns · d direction · k input features · m ≤ k of them, the first, that are read from the
left too · f hidden features, F of them with zeros up to whole vectors · v vectors · n taps. Gates are in the order
o f i g.

`kernels.lstm_scan_cpu_kernel` has the scan; a call of it is for some images and one direction. What a pixel's gates
were computed from stays side by side, so the gradient of the state weights is one product, too.
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
    return (
        F.pad(x.unflatten(dim, (-1, f)).movedim(dim + 1, -1), (0, room - f)).movedim(-1, dim + 1).flatten(dim, dim + 1)
    )


def unpad(x: Tensor, dim: int, f: int, room: int) -> Tensor:
    """Take them away."""
    if f == room:
        return x
    return x.unflatten(dim, (-1, room)).narrow(dim + 1, 0, f).flatten(dim, dim + 1).contiguous()


def scan(name: str, tensors: list[Tensor], n: int, diagonal: bool, lanes: int) -> None:
    """Run "forward" or "backward" of the kernel; the tensors are in its order, the first one is gates (b h w d 4F)."""
    b, h, w, d, gates = tensors[0].shape
    steps = [[0, 1, 1, 0], [0, -1, 1, 0]] if diagonal else [[x for t in range(n) for x in (1, n // 2 - t)]]
    sizes = [h, w, d, n, gates // 4 // lanes, 0 if diagonal else n // 2]
    memory = torch.tensor([*(x.data_ptr() for x in tensors), *sizes, *(x for of_taps in steps for x in of_taps)])
    job = native.library(write, {"forward": 1, "backward": 1}, lanes, tensors[0].dtype == torch.float64)[name]
    parts = [(first, min(IMAGES, b - first)) for first in range(0, b, IMAGES)]
    native.in_parallel(job, [(memory.data_ptr(), *part, direction) for part in parts for direction in range(d)])


@torch.library.custom_op("pixelrnn::lstm_cpu", mutates_args=(), device_types="cpu")
def lstm_cpu_op(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor, left_weight: Tensor, diagonal: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute what `lstm_cpu` does, and for the backward pass: gates, cell_before, tanh_cell, taps."""
    (b, h, w, k), d, f, m = u.shape, state_weight.shape[0], state_weight.shape[1] // 4, left_weight.shape[2]
    lanes, room = lanes_of(f, u.dtype)
    states = pad(pad(state_weight, 1, f, room), 2, f, room)  # (d 4F n·F)
    weight, of_left, bias = (pad(x, 1, f, room).flatten(0, 1) for x in (input_weight, left_weight, bias))  # (d·4F …)
    rows, gates = u.reshape(-1, k), u.new_empty(b, h, w, d, 4 * room)
    sums = gates.view(-1, d * 4 * room)
    with torch.autocast("cpu", enabled=False):
        if m:  # of the pixel before; but for the first of a row, to whose left there is none
            torch.addmm(bias, rows[:-1, :m], of_left.T, out=sums[1:])
            gates[:, :, 0] = bias.view(d, -1)
            sums.addmm_(rows, weight.T)
        else:
            torch.addmm(bias, rows, weight.T, out=sums)
    taps = u.new_empty(b, h, w, d, states.shape[2])
    hidden, cell_before, tanh_cell = (u.new_empty(b, h, w, d, room) for _ in range(3))
    in_kernel = states.unflatten(1, (4, -1, lanes)).permute(0, 2, 4, 1, 3).contiguous()  # (d v n·F 4 lanes)
    tensors = [gates, in_kernel, taps, hidden, cell_before, tanh_cell, u.new_zeros(b, d, w, room)]
    scan("forward", tensors, states.shape[2] // room, diagonal, lanes)
    return unpad(hidden, 4, f, room), gates, cell_before, tanh_cell, taps


@lstm_cpu_op.register_fake
def _(u, input_weight, bias, state_weight, left_weight, diagonal):
    (b, h, w, _), d, f = u.shape, state_weight.shape[0], state_weight.shape[1] // 4
    _, room = lanes_of(f, u.dtype)
    sizes = f, 4 * room, room, room, state_weight.shape[2] // f * room
    return tuple(u.new_empty(b, h, w, d, size) for size in sizes)


@torch.library.custom_op("pixelrnn::lstm_cpu_backward", mutates_args=(), device_types="cpu")
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
    states = pad(pad(state_weight, 1, f, room), 2, f, room).unflatten(2, (-1, lanes))  # (d 4F n·v lanes)
    weight, of_left = (pad(x, 1, f, room).flatten(0, 1) for x in (input_weight, left_weight))
    d_hidden = pad(d_hidden_states, 4, f, room).clone(memory_format=torch.contiguous_format)
    d_gates = torch.empty_like(gates)
    in_kernel = F.pad(states, (0, 0, 0, -states.shape[2] % OUTPUTS)).unflatten(2, (-1, OUTPUTS))
    in_kernel = in_kernel.transpose(1, 2).contiguous()  # (d n·v/OUTPUTS 4F OUTPUTS lanes)
    tensors = [gates, in_kernel, d_gates, d_hidden, cell_before, tanh_cell, u.new_zeros(b, d, w, room)]
    scan("backward", tensors, taps.shape[4] // room, diagonal, lanes)

    rows, d_sums = u.reshape(-1, k), d_gates.view(-1, d * 4 * room)
    d_states = torch.bmm(d_gates.flatten(0, 2).permute(1, 2, 0), taps.flatten(0, 2).transpose(0, 1))
    d_bias, d_weight, d_u, d_left = d_sums.sum(0), d_sums.T @ rows, d_sums @ weight, torch.empty_like(of_left)
    if m:
        d_gates[:, :, 0] = 0  # what was to the left of these pixels was none
        torch.mm(d_sums[1:].T, rows[:-1, :m], out=d_left)
        d_u[:-1, :m].addmm_(d_sums[1:], of_left)
    d_bias, d_weight, d_left = (unpad(x.unflatten(0, (d, -1)), 1, f, room) for x in (d_bias, d_weight, d_left))
    return d_u.view(b, h, w, k), d_weight, d_bias, unpad(unpad(d_states, 1, f, room), 2, f, room), d_left


@lstm_cpu_backward_op.register_fake
def _(d_hidden_states, u, input_weight, state_weight, left_weight, *_):
    shapes = u.shape, input_weight.shape, input_weight.shape[:2], state_weight.shape, left_weight.shape
    return tuple(u.new_empty(shape) for shape in shapes)


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


def lstm_cpu(
    u: Tensor, input_weight: Tensor, bias: Tensor, state_weight: Tensor, left_weight: Tensor, diagonal: bool
) -> Tensor:
    """Run a scan of images whose every number is float32, or float64.

    Args:
        u: features (b h w k).
        input_weight, bias, left_weight: (d 4f k), (d 4f), (d 4f m), as `row_lstm` has them for one direction.
        state_weight: (d 4f n·f), the taps side by side.
        diagonal: the Diagonal BiLSTM's scan (d = n = 2), else the Row LSTM's (d = 1, n odd).

    Returns:
        The hidden states (b h w d f).
    """
    return lstm_cpu_op(u, input_weight, bias, state_weight, left_weight, diagonal)[0]
