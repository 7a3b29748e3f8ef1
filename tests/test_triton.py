"""What the Triton kernels promise: output and every gradient are those of the references, in float64.

On a machine without a GPU they run in Triton's interpreter, watched for races (`tests.races`); of layouts the compiler
alone knows, which `bench.compile` runs. With a GPU the same tests run on it.
"""

import pytest
import torch
from torch.library import opcheck

import kernels
import models
from kernels.cross_entropy import cross_entropy_op, cross_entropy_reference
from kernels.diagonal_lstm import diagonal_lstm_op, diagonal_lstm_reference
from kernels.gate import gate_op, gate_reference
from kernels.lstm_scan import FORMS, form_of, lstm_scan, lstm_scan_op
from kernels.masked_conv import masked_conv_op, masked_conv_reference
from kernels.row_lstm import row_lstm_op, row_lstm_reference

triton = pytest.importorskip("triton", reason="Triton is for Linux")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.usefixtures("no_hazards")


@pytest.fixture(autouse=True)
def poison():
    """Memory that is allocated and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def numbers(*shapes, seed=0, scale=1.0):
    """Float64 tensors, the same for every type that they are rounded to."""
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def relative_rms(got, expected) -> float:
    difference = (got.detach().cpu().double() - expected).square().mean().sqrt()
    return (difference / expected.square().mean().sqrt().clamp_min(1e-30)).item()


def check(operation, reference, inputs, tolerance=1e-6, dtype=torch.float32, strange=False):
    """Compare outputs and every gradient of `operation`, computed in `dtype`, with the float64 reference's.

    `strange`: with inputs that are not contiguous, and gradients that are expanded or transposed.
    """
    rounded = [x.to(dtype) for x in inputs]  # both start from the same numbers
    exact = [x.double().requires_grad_() for x in rounded]
    out = reference(*exact)
    d_out = numbers(out.shape, seed=1)[0].to(dtype)
    if strange:
        rounded = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in rounded]
        d_out = d_out[..., :1].expand(out.shape)
    given = [x.to(DEVICE).requires_grad_() for x in rounded]
    got = operation(*given)
    assert got.shape == out.shape
    gradients = torch.autograd.grad(got, given, d_out.to(DEVICE, got.dtype))
    expected = torch.autograd.grad(out, exact, d_out.double())
    for name, one, other in zip(
        ("out", *map(str, range(len(given)))), (got, *gradients), (out, *expected), strict=True
    ):
        assert one.isfinite().all(), name
        if other.abs().max() > 1e-12:
            error = relative_rms(one, other.detach())
            assert error <= tolerance, f"{name}: relative RMS {error:.1e}"
        else:
            assert one.abs().max() <= 1e-6, name


# ------------------------------------------------------------------------------------------------------ LSTM scans

SIZES = [  # b h w k f
    (1, 1, 1, 3, 4),
    (3, 1, 7, 2, 3),
    (1, 8, 1, 2, 1),
    (3, 7, 8, 3, 7),
    (1, 3, 2, 5, 20),
    (2, 2, 18, 2, 8),
]
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "b{}-h{}-w{}-k{}-f{}".format(*s))


# On a GPU, no program holds all weights in float32.
forms = [form for form in FORMS if form != "resident" or DEVICE.type == "cpu"]
every_form = pytest.mark.parametrize("form", forms)


def in_form(form):
    """The scans of kernels.lstm_scan in one form: (diagonal, row)."""

    def diagonal(u, input_weight, bias, state_weight):
        pre = torch.nn.functional.linear(u, input_weight.flatten(0, 1), bias.flatten())
        return lstm_scan(pre.unflatten(3, (2, -1)), state_weight, True, form)

    def row(u, input_weight, bias, state_weight):
        pre = torch.nn.functional.linear(u, input_weight, bias)
        return lstm_scan(pre[:, :, :, None], state_weight.mT.flatten(1)[None], False, form)[:, :, :, 0]

    return diagonal, row


def diagonal_inputs(b, h, w, k, f):
    u, input_weight, bias, state_weight = numbers((b, h, w, k), (2, 4 * f, k), (2, 4 * f), (2, 4 * f, 2 * f))
    return u, input_weight / k**0.5, bias, state_weight / f**0.5


def row_inputs(b, h, w, k, f, n=3):
    u, input_weight, bias, state_weight = numbers((b, h, w, k), (4 * f, k), (4 * f,), (4 * f, f, n))
    return u, input_weight / k**0.5, bias, state_weight / f**0.5


@every_form
@every_size
def test_diagonal_scan(size, form):
    check(in_form(form)[0], diagonal_lstm_reference, diagonal_inputs(*size), strange=size[0] == 3)


@every_form
@every_size
def test_row_scan(size, form):
    check(in_form(form)[1], row_lstm_reference, row_inputs(*size), strange=size[0] == 3)


@pytest.mark.parametrize(("n", "left"), [(1, 0), (5, 3), (3, 2)])
def test_row_scan_with_other_taps_and_a_left_neighbour(n, left):
    inputs = list(row_inputs(2, 4, 3, 3, 2, n))
    if left:
        inputs += numbers((8, left), seed=2)
    check(lambda *x: kernels.row_lstm(*x, backend="triton"), row_lstm_reference, inputs)


def test_diagonal_scan_by_its_public_name():
    inputs = diagonal_inputs(2, 3, 4, 3, 5)
    check(lambda *x: kernels.diagonal_lstm(*x, backend="triton"), diagonal_lstm_reference, inputs)


def test_more_positions_than_one_program_has():
    """Above 64 columns a row is several programs, and each step a launch."""
    assert form_of(2, 3, 66, 4, False).launches
    check(in_form("auto")[1], row_lstm_reference, row_inputs(1, 2, 66, 1, 2))
    for form in ("resident", "streamed", "nonsense"):  # programs that walk all steps do not wait for each other
        with pytest.raises(ValueError, match=f"form='{form}': expected launches for 66 positions"):
            form_of(2, 3, 66, 4, False, form)


def test_weights_that_fill_a_program_are_not_resident(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert form_of(32, 2, 28, 2, False).resident
    for f, itemsize in ((32, 4), (40, 2), (512, 2)):
        assert not form_of(f, 2, 28, itemsize, False).resident
        said = f"form='resident': expected streamed or launches for {f} features of {itemsize} bytes"
        with pytest.raises(ValueError, match=said):
            form_of(f, 2, 28, itemsize, False, "resident")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a float64 product is the interpreter's affair")
@every_form
def test_scans_equal_finite_differences(form):
    for scan, inputs in zip(in_form(form), (diagonal_inputs(1, 2, 2, 1, 1), row_inputs(1, 2, 2, 1, 1)), strict=True):
        assert torch.autograd.gradcheck(scan, [x.requires_grad_() for x in inputs], fast_mode=True)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by the interpreter's numpy
def test_saturated_gates_give_finite_gradients():
    inputs = [100 * x for x in diagonal_inputs(2, 3, 4, 2, 3)]
    given = [x.float().to(DEVICE).requires_grad_() for x in inputs]
    out = kernels.diagonal_lstm(*given, backend="triton")
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), given))


# ---------------------------------------------------------------------------------------------- masked convolution

CONVOLUTIONS = [  # b h w k f R C live extra relu
    (1, 1, 1, 1, 1, 4, 7, 25, 0, False),
    (3, 8, 7, 3, 14, 4, 7, 25, 1, False),
    (1, 7, 8, 1, 8, 4, 7, 24, 0, False),
    (3, 5, 7, 7, 8, 2, 3, 5, 0, True),
    (1, 7, 5, 20, 17, 2, 3, 5, 0, True),
    (2, 3, 4, 16, 33, 2, 3, 6, 1, False),
    (3, 1, 7, 8, 7, 1, 3, 2, 0, False),
    (1, 8, 1, 7, 8, 1, 1, 1, 0, True),
    (2, 9, 9, 18, 3, 1, 1, 1, 0, True),
]


def convolution(b, h, w, k, f, rows, columns, live, extra, relu):
    u, weight, bias = numbers((b, h, w, k), (f, k, rows, columns), (f,))
    mask = (torch.arange(rows * columns) < live).view(rows, columns)
    return (u, weight * mask, bias), (relu, extra, live)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_masked_convolution(case):
    inputs, rest = convolution(*case)
    strange = case[0] == 3
    check(
        lambda *x: kernels.masked_conv(*x, *rest, backend="triton"),
        lambda *x: masked_conv_reference(*x, *rest),
        inputs,
        strange=strange,
    )


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a float64 product is the interpreter's affair")
@pytest.mark.parametrize("case", [(1, 3, 2, 2, 2, 2, 3, 5, 0, True), (1, 2, 2, 1, 1, 2, 3, 4, 1, False)], ids=str)
def test_masked_convolution_equals_finite_differences(case):
    inputs, rest = convolution(*case)
    operation = lambda u, weight, bias: kernels.masked_conv(u, weight * mask, bias, *rest, backend="triton")  # noqa: E731
    mask = (inputs[1] != 0).double()
    assert torch.autograd.gradcheck(operation, [x.requires_grad_() for x in inputs])


def test_the_weight_gradient_is_summed_over_many_parts():
    """More pixels than one part holds, and more inputs and outputs than one block."""
    inputs, rest = convolution(3, 20, 20, 17, 40, 2, 3, 5, 0, True)
    check(
        lambda *x: kernels.masked_conv(*x, *rest, backend="triton"),
        lambda *x: masked_conv_reference(*x, *rest),
        inputs,
    )


# --------------------------------------------------------------------------------------------- cross-entropy and gate


@pytest.mark.parametrize("shape", [(1, 1), (7, 2), (3, 5, 17), (2, 256), (1, 3, 1000), (4100, 3), (0, 4)], ids=str)
def test_cross_entropy(shape):
    (logits,) = numbers(shape, scale=3.0)
    target = torch.randint(0, shape[-1], shape[:-1], generator=torch.Generator().manual_seed(0))
    if not logits.numel():
        assert kernels.cross_entropy(logits, target, backend="triton").shape == shape[:-1]
        return
    check(
        lambda x: kernels.cross_entropy(x, target.to(DEVICE), backend="triton"),
        lambda x: cross_entropy_reference(x, target),
        [logits],
        strange=len(shape) == 3,
    )


def test_cross_entropy_of_large_logits_is_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=DEVICE, requires_grad=True)
    nats = kernels.cross_entropy(logits, torch.tensor([1, 2], device=DEVICE), backend="triton")
    nats.sum().backward()
    assert nats.tolist() == pytest.approx([2e4, 1.0986123])
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", kernels.BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_cross_entropy_takes_images_as_they_are(backend, dtype):
    (logits,) = numbers((2, 3, 4, 5))
    target = torch.randint(0, 5, (2, 4, 3), generator=torch.Generator().manual_seed(0)).mT
    got = kernels.cross_entropy(logits.float().to(DEVICE), target.to(DEVICE, dtype), backend=backend)
    assert relative_rms(got, cross_entropy_reference(logits, target)) < 1e-6


@pytest.mark.parametrize("shape", [(2,), (5, 6), (3, 4, 5, 14), (1100, 2), (0, 4)], ids=str)
def test_gate(shape):
    (u,) = numbers(shape, scale=3.0)
    if not u.numel():
        assert kernels.gate(u, backend="triton").shape == (*shape[:-1], shape[-1] // 2)
        return
    check(lambda u: kernels.gate(u, backend="triton"), gate_reference, [u], strange=len(shape) == 4)


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a float64 product is the interpreter's affair")
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"])
def test_a_model_is_the_same_in_both_forms(name, channels):
    """Nats and the gradient of every parameter, with masks between the groups of colours."""
    torch.manual_seed(0)
    sizes = {"channels": channels, "levels": 3, "height": 3, "width": 4, "hidden": 5, "layers": 2}
    model = models.build({"_target_": f"models.{name}", **sizes}).double()
    x = torch.randint(0, 3, (2, channels, 3, 4), generator=torch.Generator().manual_seed(0))
    found = []
    for backend in kernels.BACKENDS:
        with kernels.use(backend):
            nats = model(x)
            found.append([nats.detach(), *torch.autograd.grad(nats.sum(), model.parameters())])
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# --------------------------------------------------------------------------------------------- as torch's operations

OPERATIONS = {
    "lstm_scan": (lstm_scan_op, [(1, 2, 3, 2, 8), (2, 8, 4)], (True, "auto")),
    "lstm_scan_row": (lstm_scan_op, [(1, 2, 3, 1, 8), (1, 8, 6)], (False, "auto")),
    "masked_conv": (masked_conv_op, [(1, 3, 4, 2), (3, 2, 2, 3), (3,)], (True, 0, 5)),
    "cross_entropy": (cross_entropy_op, [(5, 3)], (torch.tensor([0, 2, 1, 1, 0]),)),
    "gate": (gate_op, [(2, 3, 4)], ()),
    "diagonal_lstm": (diagonal_lstm_op, [(1, 2, 3, 2), (2, 4, 2), (2, 4), (2, 4, 2)], ()),
    "row_lstm": (row_lstm_op, [(1, 2, 3, 2), (4, 2), (4,), (4, 1, 3), (4, 1)], ()),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_registered_as_torch_wants_it(name):
    operation, shapes, rest = OPERATIONS[name]
    inputs = [x.float().to(DEVICE).requires_grad_() for x in numbers(*shapes)]
    rest = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in rest]
    torch.use_deterministic_algorithms(False)  # opcheck compares what is left unwritten in tensors of no use
    opcheck(operation, (*inputs, *rest))


def test_backends_are_named():
    u = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="backend='cuda': expected triton or torch"):
        kernels.gate(u, backend="cuda")
    assert kernels.backend_for(u) == "torch"
    with kernels.use("triton"):
        assert kernels.backend_for(u) == "triton"
        assert kernels.backend_for(u, "torch") == "torch"
    assert kernels.backend_for(u) == "torch"
