"""The LSTM scans on a CPU: their calls and their gradients."""

import torch
from torch import Tensor

from kernels import native
from kernels.jit import cdiv
from kernels.lstm_scan_cpu_kernel import write

IMAGES = 4  # of a call, at most


def scan(name: str, tensors: list[Tensor], shape: tuple, n: int, vectors: int, lanes: int, diagonal: bool) -> None:
    b, h, w, d = shape
    steps = [[[0, 1], [1, 0]], [[0, -1], [1, 0]]] if diagonal else [[[1, n // 2 - tap] for tap in range(n)]]
    numbers = [x.data_ptr() for x in tensors]
    numbers += [h, w, d, n, vectors, 0 if diagonal else n // 2]
    memory = torch.tensor(numbers + [x for direction in steps for step in direction for x in step])
    double = tensors[0].dtype == torch.float64
    function = native.library(write, {"forward": 4, "backward": 4}, lanes, double)[name]
    parts = cdiv(b, IMAGES)

    def call(k: int):
        first, direction = k // d * IMAGES, k % d
        function(memory.data_ptr(), first, min(IMAGES, b - first), direction)
        yield

    native.share(call, parts * d)


@torch.library.custom_op("pixelrnn::lstm_scan_cpu", mutates_args=())
def lstm_scan_cpu_op(
    pre: Tensor, state_weight: Tensor, diagonal: bool, lanes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, h, w, d, f = (*pre.shape[:4], pre.shape[4] // 4)
    n, V = state_weight.shape[2] // f, f // lanes
    pre = pre.contiguous()
    # (d 4f n·f) → (d V n·f 4 lanes)
    weight = state_weight.view(d, 4, V, lanes, n * f).permute(0, 2, 4, 1, 3).contiguous()
    gates, hidden, before, tanh_cell = torch.empty_like(pre), *(pre.new_empty(b, h, w, d, f) for _ in range(3))
    taps, cell = pre.new_zeros(b, h, w, d, n * f), pre.new_zeros(b, d, w, f)
    if pre.numel():
        scan("forward", [pre, weight, gates, taps, hidden, before, tanh_cell, cell], (b, h, w, d), n, V, lanes, diagonal)
    return hidden, gates, before, tanh_cell, taps


@torch.library.custom_op("pixelrnn::lstm_scan_cpu_backward", mutates_args=())
def lstm_scan_cpu_backward_op(
    d_hidden: Tensor, state_weight: Tensor, gates: Tensor, before: Tensor, tanh_cell: Tensor, taps: Tensor, diagonal: bool, lanes: int
) -> tuple[Tensor, Tensor]:
    b, h, w, d, f = tanh_cell.shape
    n, V = state_weight.shape[2] // f, f // lanes
    d_hidden = d_hidden.clone(memory_format=torch.contiguous_format)
    weight = state_weight.view(d, 4 * f, n, V, lanes).permute(0, 2, 3, 1, 4).contiguous()
    d_pre, d_cell = torch.empty_like(gates), gates.new_zeros(b, d, w, f)
    tensors = [d_hidden, weight, gates, before, tanh_cell, d_pre, d_cell, d_cell]
    scan("backward", tensors, (b, h, w, d), n, V, lanes, diagonal)
    d_weight = torch.bmm(d_pre.view(-1, d, 4 * f).permute(1, 2, 0), taps.view(-1, d, n * f).transpose(0, 1))
    return d_pre, d_weight


def setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1], *output[1:])
    ctx.named = inputs[2:]


def backward(ctx, d_hidden, *_):
    if d_hidden is None:
        return (None,) * 4
    return *lstm_scan_cpu_backward_op(d_hidden, *ctx.saved_tensors, *ctx.named), None, None


lstm_scan_cpu_op.register_autograd(backward, setup_context=setup_context)


def lstm_scan_cpu(pre: Tensor, state_weight: Tensor, diagonal: bool) -> Tensor:
    f = pre.shape[4] // 4
    return lstm_scan_cpu_op(pre, state_weight, diagonal, native.lanes(f, pre.dtype == torch.float64))[0]
