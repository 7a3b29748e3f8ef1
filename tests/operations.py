"""The operations of `kernels` in one table: what computes each, its reference, its inputs, and its sizes.

Adding an operation, or a size that one has an edge at, is adding a line to the tables below. `check` compares one with
its reference in float64: the output and the gradient of every input.

Legend: b batch · h w rows, columns · k f features in, out · n taps of the Row LSTM · m features that it reads from the
left · R C live rows, columns and live taps of a masked kernel · v levels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.cross_entropy import cross_entropy_reference
from kernels.diagonal_lstm import diagonal_lstm_reference
from kernels.gate import gate_reference
from kernels.lstm_scan import FORMS, lstm_scan
from kernels.masked_conv import masked_conv_reference
from kernels.row_lstm import row_lstm_reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the Triton forms; torch's are on the CPU
# The forms of the Triton scans: "triton" takes one of them. On a GPU, no program holds all weights in float32. For the
# one whose programs wait for each other see `tests.test_shared_scan`.
ON_CPU = ("torch", "cpu")  # the forms that are computed there
SCANS = tuple(form for form in FORMS if form != "shared" and (form != "carried" or DEVICE.type == "cpu"))

# ------------------------------------------------------------------------------------------------ what computes them
# Functions of tensors and of a `backend`: one of `kernels.BACKENDS`, or a form of the Triton scans.


def diagonal_lstm(u, input_weight, bias, state_weight, backend):
    if backend not in FORMS:
        return kernels.diagonal_lstm(u, input_weight, bias, state_weight, backend=backend)
    pre = F.linear(u, input_weight.flatten(0, 1), bias.flatten())
    return lstm_scan(pre.unflatten(3, (2, -1)), state_weight, True, backend)


def row_lstm(u, input_weight, bias, state_weight, left_weight=None, *, backend):
    if backend not in FORMS:
        return kernels.row_lstm(u, input_weight, bias, state_weight, left_weight, backend=backend)
    pre = F.linear(u, input_weight, bias)
    return lstm_scan(pre[:, :, :, None], state_weight.mT.flatten(1)[None], False, backend)[:, :, :, 0]


def masked(weight: Tensor, live: int) -> Tensor:
    """The kernel (f k R C) with its first `live` taps alone: what the others hold may not be read, or must be zero."""
    return weight * (torch.arange(weight[0, 0].numel(), device=weight.device) < live).view(weight.shape[2:])


def masked_conv(u, weight, bias, live, relu, extra, backend):
    return kernels.masked_conv(u, masked(weight, live), bias, relu, extra, live, backend=backend)


def masked_conv_oracle(u, weight, bias, live, relu, extra):
    return masked_conv_reference(u, weight, bias, relu, extra, live)


def cross_entropy(logits, target, backend):
    return kernels.cross_entropy(logits, target.to(logits.device), backend=backend)


# ---------------------------------------------------------------------------------------------------- their inputs


def numbers(*shapes: tuple, seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    """Float64 tensors, the same for every type that they are rounded to."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


Inputs = tuple[dict[str, Tensor], tuple]  # tensors that have gradients, by name; then the other arguments


def diagonal_inputs(b: int, h: int, w: int, k: int, f: int) -> Inputs:
    u, input_weight, bias, state_weight = numbers((b, h, w, k), (2, 4 * f, k), (2, 4 * f), (2, 4 * f, 2 * f))
    weights = {"input_weight": input_weight / k**0.5, "bias": bias, "state_weight": state_weight / (2 * f) ** 0.5}
    return {"u": u, **weights}, ()


def row_inputs(b: int, h: int, w: int, k: int, f: int, n: int = 3, m: int = 0) -> Inputs:
    shapes = (b, h, w, k), (4 * f, k), (4 * f,), (4 * f, f, n), (4 * f, m)
    u, input_weight, bias, state_weight, left_weight = numbers(*shapes)
    weights = {"input_weight": input_weight / k**0.5, "bias": bias, "state_weight": state_weight / (n * f) ** 0.5}
    return {"u": u, **weights, **({"left_weight": left_weight / m**0.5} if m else {})}, ()


def convolution_inputs(b, h, w, k, f, rows, columns, live, relu, extra) -> Inputs:
    u, weight, bias = numbers((b, h, w, k), (f, k, rows, columns), (f,))
    return {"u": u, "weight": weight / (k * live) ** 0.5, "bias": bias}, (live, relu, extra)


def cross_entropy_inputs(*shape: int) -> Inputs:
    target = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    return {"logits": numbers(shape, scale=3.0)[0]}, (target,)


def gate_inputs(*shape: int) -> Inputs:
    return {"u": numbers(shape, scale=3.0)[0]}, ()


# -------------------------------------------------------------------------------------------------------- the table


class Operation(NamedTuple):
    """An operation and its reference: (*tensors, *others), and `backend` for the operation.

    What the sizes are is said by the arguments of `inputs`.
    """

    run: Callable
    reference: Callable
    inputs: Callable[..., Inputs]
    small: tuple  # a size for what is the same at every size
    tiny: tuple  # sizes for finite differences
    torch: tuple  # sizes with the edges of the torch form,
    triton: tuple  # of the kernels: blocks, masked tails, several programs in each direction,
    gpu: tuple  # and those to be computed on a GPU alone
    backends: tuple[str, ...] = ("triton",)  # beside torch and the CPU's kernel
    cpu: tuple = ()  # sizes with the edges of the CPU's kernel, where there is one

    @property
    def is_scan(self) -> bool:
        return self.backends == SCANS

    @property
    def forms(self) -> tuple[str, ...]:
        """What computes it."""
        return ("torch", *(["cpu"] if self.cpu else []), *self.backends)

    def sizes(self, form: str) -> tuple:
        return {"torch": self.torch, "cpu": self.cpu}.get(form, self.triton)


def both(sizes: tuple) -> tuple:
    """Sizes of a convolution, without a ReLU and with one."""
    return tuple((*size[:8], relu, size[8]) for size in sizes for relu in (False, True))


OPERATIONS = {
    "diagonal_lstm": Operation(
        diagonal_lstm,
        diagonal_lstm_reference,
        diagonal_inputs,
        small=(2, 3, 4, 2, 3),
        tiny=((1, 1, 1, 1, 1), (2, 2, 3, 2, 1), (1, 3, 2, 1, 2), (1, 1, 4, 2, 2), (1, 4, 1, 2, 2)),
        torch=(
            (1, 1, 1, 1, 1),
            (3, 1, 1, 2, 3),
            (1, 1, 7, 3, 2),
            (3, 1, 6, 1, 7),
            (1, 7, 1, 3, 2),
            (3, 5, 1, 2, 1),
            (1, 2, 2, 1, 1),
            (1, 4, 4, 7, 3),
            (3, 3, 7, 4, 2),
            (3, 7, 3, 2, 7),
            (1, 2, 9, 7, 7),
            (2, 9, 2, 3, 5),
        ),
        triton=(
            (1, 1, 1, 3, 4),
            (3, 1, 5, 2, 3),
            (1, 6, 1, 2, 1),
            (3, 5, 2, 3, 7),  # two programs, the second with images that there are not; positions beyond the last row
            (1, 2, 2, 5, 20),  # two blocks of features, the second not full
        ),
        cpu=(
            (1, 1, 1, 1, 1),
            (3, 1, 5, 2, 3),
            (2, 6, 1, 2, 8),
            (4, 3, 4, 2, 16),  # images as many as are computed together,
            (7, 2, 3, 3, 20),  # and a part of so many; features that fill no vector
            (9, 3, 2, 2, 37),
        ),
        gpu=((3, 9, 7, 32, 16), (5, 28, 29, 128, 64), (4, 32, 33, 256, 128), (2, 64, 17, 64, 32), (1, 5, 6, 40, 20)),
        backends=SCANS,
    ),
    "row_lstm": Operation(
        row_lstm,
        row_lstm_reference,
        row_inputs,
        small=(2, 3, 4, 2, 3),
        tiny=((1, 1, 1, 1, 1, 1), (2, 3, 3, 2, 1, 3), (1, 3, 2, 1, 2, 5), (1, 4, 1, 2, 2, 3), (1, 2, 3, 2, 1, 3, 1)),
        torch=(
            (1, 1, 1, 1, 1, 1),
            (1, 1, 1, 2, 3, 3),
            (3, 1, 7, 1, 2, 3),
            (1, 7, 1, 3, 2, 3),
            (2, 5, 2, 2, 1, 5),
            (3, 5, 1, 2, 7, 5),
            (1, 2, 2, 1, 1, 3),
            (1, 4, 4, 7, 3, 3),
            (3, 3, 7, 4, 2, 3),
            (3, 7, 3, 2, 7, 5),
            (2, 2, 9, 7, 5, 5),
            (2, 9, 2, 3, 5, 1),
            (1, 5, 3, 1, 2, 7),
        ),
        triton=(
            (1, 1, 1, 3, 4),
            (3, 1, 7, 2, 3),
            (1, 6, 1, 2, 1),
            (3, 3, 5, 3, 7),
            (1, 3, 2, 5, 20),
            (2, 2, 18, 2, 8),  # more positions than a matrix product has rows
        ),
        cpu=(
            (1, 1, 1, 1, 1, 1),
            (3, 1, 5, 2, 3, 3, 1),
            (2, 6, 1, 2, 8, 5),
            (4, 3, 4, 2, 16, 3, 2),
            (7, 2, 3, 3, 20, 7, 1),
            (9, 3, 2, 2, 37, 3),
        ),
        gpu=(
            (3, 9, 7, 32, 16, 3, 32),
            (5, 28, 29, 128, 64, 3, 128),
            (4, 32, 33, 256, 128, 3, 256),
            (2, 64, 17, 64, 32, 3, 64),
            (1, 5, 6, 40, 20, 3, 40),
        ),
        backends=SCANS,
    ),
    "masked_conv": Operation(
        masked_conv,
        masked_conv_oracle,
        convolution_inputs,
        small=(2, 3, 4, 2, 3, 2, 3, 5, True, 1),
        tiny=((1, 3, 2, 2, 2, 2, 3, 5, True, 0), (1, 2, 2, 1, 1, 2, 3, 4, False, 1), (2, 3, 4, 2, 3, 2, 3, 6, True, 1)),
        torch=both(
            (
                (1, 1, 1, 1, 1, 1, 1, 1, 0),
                (2, 3, 4, 5, 2, 1, 1, 1, 0),
                (1, 1, 1, 2, 3, 2, 3, 6, 0),
                (3, 5, 3, 7, 2, 2, 3, 6, 0),
                (2, 3, 5, 1, 7, 2, 3, 6, 1),
                (1, 1, 6, 3, 2, 4, 7, 28, 1),
                (1, 6, 1, 2, 3, 4, 7, 28, 3),
                (2, 4, 7, 3, 1, 4, 7, 28, 0),
            )
        ),
        triton=(
            (1, 1, 1, 1, 1, 4, 7, 25, False, 0),
            (3, 8, 7, 3, 14, 4, 7, 25, False, 1),
            (1, 7, 8, 1, 8, 4, 7, 24, False, 0),
            (3, 5, 7, 7, 8, 2, 3, 5, True, 0),
            (1, 7, 5, 20, 17, 2, 3, 5, True, 0),
            (2, 3, 4, 16, 33, 2, 3, 6, False, 1),
            (3, 1, 7, 8, 7, 1, 3, 2, False, 0),
            (1, 8, 1, 7, 8, 1, 1, 1, True, 0),
            (2, 9, 9, 18, 3, 1, 1, 1, True, 0),
            (2, 9, 9, 17, 40, 2, 3, 5, True, 0),  # the gradient of the weight: two parts, several blocks
        ),
        gpu=(
            (4, 17, 13, 128, 128, 2, 3, 5, True, 0),
            (4, 17, 13, 3, 64, 4, 7, 25, True, 0),
            (4, 17, 13, 16, 40, 2, 3, 6, True, 0),
            (4, 17, 13, 48, 32, 1, 1, 1, True, 0),
            (3, 20, 20, 17, 40, 2, 3, 5, True, 0),
        ),
    ),
    "cross_entropy": Operation(
        cross_entropy,
        cross_entropy_reference,
        cross_entropy_inputs,
        small=(2, 3, 4),
        tiny=((1, 1), (7, 2), (3, 2, 5)),
        torch=((1, 1), (7, 2), (3, 5, 17), (2, 256), (0, 4), (2, 1025)),
        triton=((1, 1), (7, 2), (3, 5, 17), (2, 256), (1, 3, 1000), (4100, 3), (0, 4), (2, 1025)),
        gpu=((1000, 256),),
    ),
    "gate": Operation(
        lambda u, backend: kernels.gate(u, backend=backend),
        gate_reference,
        gate_inputs,
        small=(2, 3, 16),
        tiny=((2,), (6,), (1, 1, 1, 2), (3, 5, 4, 14)),
        torch=((2,), (6,), (1, 1, 1, 2), (3, 5, 4, 14), (0, 4)),
        triton=((2,), (5, 6), (3, 4, 5, 14), (1100, 2), (0, 4)),
        gpu=((999, 64),),
        cpu=((16,), (3, 2, 5, 32), (1, 7, 48), (300, 512), (0, 16), (5, 6)),
    ),
}

# --------------------------------------------------------------------------------------------------- the comparator


def relative_errors(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """The root of the mean square error over that of `expected`, and the largest error over the largest number.

    Where all that is expected is 0, they are absolute.
    """
    error, expected = got.detach().cpu().double() - expected, expected.detach()
    if not error.numel():
        return 0.0, 0.0
    rms, largest = (x if x > 1e-12 else 1.0 for x in (expected.square().mean().sqrt(), expected.abs().max()))
    return float(error.square().mean().sqrt() / rms), float(error.abs().max() / largest)


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Both relative errors of every tensor are at most `tolerance`, and nothing is infinite or NaN."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, f"{name}: {tuple(got[name].shape)}, not {tuple(value.shape)}"
        assert got[name].isfinite().all(), f"{name}: not finite at {(~got[name].isfinite()).nonzero()[0].tolist()}"
        rms, largest = relative_errors(got[name], value)
        if max(rms, largest) > tolerance:
            at = (got[name].detach().cpu().double() - value).abs().argmax()
            at = [int(i) for i in torch.unravel_index(at, value.shape)]
            raise AssertionError(f"{name}: relative error {rms:.1e} (RMS), {largest:.1e} (largest, at {at})")


# ------------------------------------------------------------------------------------------------------- comparing

TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 0.05}


def results(function: Callable, inputs: dict[str, Tensor], d_out: Tensor | Callable | None = None) -> dict[str, Tensor]:
    """The output and the gradient of every input.

    Args:
        d_out: of the output, or a function that makes a number of it; none: of its sum.
    """
    given = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    out = function(*given.values())
    if callable(d_out):
        gradients = torch.autograd.grad(d_out(out), list(given.values()))
    else:
        d_out = torch.ones_like(out) if d_out is None else d_out.to(out)
        gradients = torch.autograd.grad(out, list(given.values()), d_out)
    return {"out": out.detach(), **dict(zip((f"d_{name}" for name in given), gradients, strict=True))}


def strange(x: Tensor) -> Tensor:
    """The same numbers with the last dimension outermost in memory, every other number of it, from an odd place on."""
    room = x.new_full((2 * x.numel() + 1,), torch.nan)[1:]
    return room.view(*x.shape[::-1], 2)[..., 0].permute(*reversed(range(x.dim()))).copy_(x)


def unaligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous, from an odd place on."""
    return x.new_full((x.numel() + 1,), torch.nan)[1:].view(x.shape).copy_(x)


LAYOUTS = {  # of the inputs, and of the gradient that comes back
    "usual": (lambda x: x.contiguous(), lambda x: x.contiguous()),
    "strange": (strange, lambda x: x[..., :1].expand(x.shape)),
    "unaligned": (unaligned, strange),
}


def check(operation: Operation, size: tuple, backend: str, dtype: torch.dtype, layout: str = "usual") -> None:
    """Compare an operation with its reference in float64, from the same numbers; what it is given stays as it was."""
    inputs, others = operation.inputs(*size)
    of_inputs, of_gradient = LAYOUTS[layout]
    rounded = {name: x.to(dtype) for name, x in inputs.items()}
    with torch.no_grad():
        shape = operation.reference(*inputs.values(), *others).shape
    d_out = of_gradient(numbers(shape, seed=1)[0].to(dtype))
    exact = {name: x.double() for name, x in rounded.items()}
    expected = results(lambda *x: operation.reference(*x, *others), exact, d_out.double())
    device = torch.device("cpu") if backend in ON_CPU else DEVICE
    given = {name: of_inputs(x.to(device)) for name, x in rounded.items()}
    d_out = d_out.to(device)
    before = [x.clone() for x in (*given.values(), d_out)]
    got = results(lambda *x: operation.run(*x, *others, backend=backend), given, d_out)
    assert_close(got, expected, TOLERANCES[dtype])
    float32 = dtype == torch.bfloat16 and operation.run is cross_entropy
    assert got["out"].dtype == (torch.float32 if float32 else dtype)
    assert all(torch.equal(x, y) for x, y in zip((*given.values(), d_out), before, strict=True))


def text_of(size: tuple) -> str:
    return "x".join(str(int(n)) for n in size)
