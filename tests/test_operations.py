"""What `kernels` promises of every operation: each form is what its reference says, outputs and gradients.

The operations, their sizes and the comparison are in `tests/operations.py`; what the LSTM scans mean is in
`tests/test_scans.py`. The torch forms run on the CPU, and so do those compiled for it. The Triton forms run on a GPU
where there is one, else in Triton's interpreter, watched for races (`tests.races`); of layouts the compiler alone
knows: see `bench.compile`.
"""

import pytest
import torch
from torch.library import opcheck

import kernels
import models
from kernels.activations import tanh
from kernels.cross_entropy import cross_entropy_op
from kernels.diagonal_lstm import diagonal_lstm_op
from kernels.gate import gate_op
from kernels.gate_cpu import gate_cpu_op
from kernels.jit import jit, tl, triton
from kernels.lstm_scan import form_of, lstm_scan, lstm_scan_op
from kernels.lstm_scan_cpu import lstm_cpu_op
from kernels.masked_conv import masked_conv_op
from kernels.row_lstm import row_lstm_op
from tests.operations import (
    DEVICE,
    LAYOUTS,
    ON_CPU,
    OPERATIONS,
    SCANS,
    assert_close,
    check,
    numbers,
    relative_errors,
    results,
    text_of,
)

pytestmark = pytest.mark.usefixtures("no_hazards")
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is for Linux")
where_there_is_no_gpu = pytest.mark.skipif(DEVICE.type == "cuda", reason="the CPU's kernel is proven without a GPU")
in_the_interpreter = pytest.mark.skipif(DEVICE.type == "cuda", reason="a float64 product is the interpreter's affair")
FLOATS = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
TYPES = {"torch": ("float64", "float32", "bfloat16"), "cpu": ("float64", "float32")}  # of others, float32


@pytest.fixture(autouse=True)
def poison():
    """Memory that is allocated and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def takes_seconds(name: str, backend: str, size: tuple) -> bool:
    """In the interpreter: a scan, but for the smallest one in each form."""
    return OPERATIONS[name].is_scan and backend not in ON_CPU and size != OPERATIONS[name].triton[0]


def case(name: str, backend: str, *rest, size: tuple | None = None):
    """A case of a test: (name, backend, *rest), and the size where there is one."""
    marks = {"torch": [], "cpu": [where_there_is_no_gpu]}.get(backend, [needs_triton])
    if DEVICE.type == "cpu" and takes_seconds(name, backend, size or OPERATIONS[name].small):
        marks.append(pytest.mark.slow)
    words = [name, backend, *map(str, rest), *([] if size is None else [text_of(size)])]
    values = name, backend, *rest, *([] if size is None else [size])
    return pytest.param(*values, marks=marks, id="-".join(words))


on_a_cpu = pytest.mark.parametrize(
    ("name", "backend"),
    [case(name, backend) for name, operation in OPERATIONS.items() for backend in ON_CPU if backend in operation.forms],
)


# ------------------------------------------------------------------------------------- output and every gradient


@pytest.mark.parametrize(
    ("name", "backend", "dtype", "size"),
    [
        case(name, backend, dtype, size=size)
        for name, operation in OPERATIONS.items()
        for backend in operation.forms
        for dtype in TYPES.get(backend, ("float32",))
        for size in operation.sizes(backend)
    ],
)
def test_output_and_every_gradient_equal_the_reference(name, backend, dtype, size):
    check(OPERATIONS[name], size, backend, FLOATS[dtype])


@pytest.mark.parametrize(("name", "backend"), [case(name, "triton") for name in OPERATIONS])
def test_public_names_take_the_form_that_fits(name, backend):
    check(OPERATIONS[name], OPERATIONS[name].small, backend, torch.float32)


@pytest.mark.parametrize(
    ("name", "backend", "layout"),
    [
        case(name, backend, layout)
        for name, operation in OPERATIONS.items()
        for backend in operation.forms
        for layout in LAYOUTS
        if layout != "usual"
    ],
)
def test_any_layout_in_memory_is_accepted(name, backend, layout):
    """Of the inputs and of the gradient that comes back."""
    check(OPERATIONS[name], OPERATIONS[name].small, backend, torch.float32, layout)


@pytest.mark.parametrize(
    ("name", "backend", "size"),
    [
        case(name, backend, size=size)
        for name, operation in OPERATIONS.items()
        for backend, sizes in (("torch", operation.tiny), ("cpu", operation.tiny), ("triton", operation.tiny[:2]))
        for size in sizes
        if backend in operation.forms
    ],
)
@pytest.mark.slow
def test_gradients_equal_finite_differences(name, backend, size):
    if backend == "triton" and DEVICE.type == "cuda":
        pytest.skip("a float64 product is the interpreter's affair")
    inputs, others = OPERATIONS[name].inputs(*size)
    inputs = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(lambda *x: OPERATIONS[name].run(*x, *others, backend=backend), inputs)


@needs_triton
@pytest.mark.slow
@in_the_interpreter
@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "row"])
@pytest.mark.parametrize("form", SCANS)
def test_gradients_of_scans_in_triton_equal_finite_differences(form, diagonal):
    shapes = ((1, 2, 2, 2, 4), (2, 4, 2)) if diagonal else ((1, 2, 2, 1, 4), (1, 4, 3))
    inputs = [x.requires_grad_() for x in numbers(*shapes)]
    assert torch.autograd.gradcheck(lambda *x: lstm_scan(*x, diagonal, form), inputs, fast_mode=True)


@jit
def rough_tanh(x):
    """Off by as much as the GPU's own, for the interpreter, which has no such instruction."""
    return (tanh(x) * (1 + 2.0**-11)).to(tl.float32)


@needs_triton
@pytest.mark.slow
@in_the_interpreter
@pytest.mark.parametrize("form", SCANS)
def test_a_scan_by_the_gpus_own_tanh_is_little_off(form, monkeypatch):
    shapes = (2, 5, 4, 2, 32), (2, 32, 16), (2, 5, 4, 2, 8)
    pre, weight, d_hidden = (x.float() for x in numbers(*shapes))

    def both_ways() -> list[torch.Tensor]:
        inputs = pre.clone().requires_grad_(), (weight / 4).requires_grad_()
        hidden = lstm_scan(*inputs, True, form)
        return [hidden, *torch.autograd.grad(hidden, inputs, d_hidden)]

    exact = both_ways()
    monkeypatch.setattr(kernels.lstm_scan, "form_of", lambda *of: form_of(*of)._replace(fast=True))
    monkeypatch.setattr(kernels.lstm_scan_kernel, "tanh_approx", rough_tanh)
    for name, x, fast in zip(("hidden", "d_pre", "d_weight"), exact, both_ways(), strict=True):
        off = ((fast - x).abs().max() / x.abs().max()).item()
        assert 2**-15 < off < 2**-8, (name, off)
    with pytest.raises(ValueError, match=r"fast=True: expected False for torch\.float32: it is for torch\.bfloat16"):
        lstm_scan(pre, weight, True, form, fast=True)


# ------------------------------------------------------------------------------------------------------- autograd


def small(name: str, backend: str, dtype=torch.float64):
    """An operation at its small size: as a function of its tensors, its reference, and the tensors."""
    operation = OPERATIONS[name]
    inputs, others = operation.inputs(*operation.small)
    device = "cpu" if backend in ON_CPU else DEVICE
    inputs = {key: x.to(device, dtype) for key, x in inputs.items()}
    run, reference = operation.run, operation.reference
    return lambda *x: run(*x, *others, backend=backend), lambda *x: reference(*x, *others), inputs


@on_a_cpu
def test_any_incoming_gradient_is_accepted(name, backend):
    """Expanded (of a sum), transposed, and of the last row, column, direction or feature alone."""
    run, reference, inputs = small(name, backend)
    reads = [lambda out: out.sum(), lambda out: out.mT.contiguous().exp().sum()]
    reads += [lambda out, dim=dim: out.select(dim, -1).sum() for dim in range(reference(*inputs.values()).dim())]
    for read in reads:
        assert_close(results(run, inputs, read), results(reference, inputs, read), 1e-12)


@on_a_cpu
def test_a_gradient_may_be_asked_for_alone(name, backend):
    run, reference, inputs = small(name, backend)
    for wanted in inputs:
        found = []
        for function in (run, reference):
            given = {key: x.detach().requires_grad_(key == wanted) for key, x in inputs.items()}
            found.append(torch.autograd.grad(function(*given.values()).square().sum(), given[wanted])[0])
        assert_close({wanted: found[0]}, {wanted: found[1]}, 1e-12)


@pytest.mark.parametrize("wanted", ["u", "weight", "bias"])
@needs_triton
def test_a_gradient_of_a_convolution_may_be_asked_for_alone_in_triton(wanted):
    run, reference, inputs = small("masked_conv", "triton", torch.float32)
    given = {key: x.detach().requires_grad_(key == wanted) for key, x in inputs.items()}
    (got,) = torch.autograd.grad(run(*given.values()).square().sum(), given[wanted])
    exact = {key: x.detach().cpu().double().requires_grad_(key == wanted) for key, x in inputs.items()}
    (expected,) = torch.autograd.grad(reference(*exact.values()).square().sum(), exact[wanted])
    assert_close({wanted: got}, {wanted: expected}, 2e-6)


@on_a_cpu
def test_backward_may_run_twice_and_output_be_written_to(name, backend):
    """Nothing that the backward pass reads is changed by it, or is part of the output (or else torch says so)."""
    run, _, inputs = small(name, backend)
    given = [x.requires_grad_() for x in inputs.values()]
    out = run(*given)
    first = torch.autograd.grad(out.sum(), given, retain_graph=True)
    if name not in ("diagonal_lstm", "masked_conv"):  # torch does not let views be written to
        out.detach().zero_()
    second = torch.autograd.grad(out.sum(), given)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_gradients_work_at_a_size_first_met_without_them():
    """Index maps made in inference mode are used again in training."""
    operation, size = OPERATIONS["diagonal_lstm"], (1, 11, 3, 2, 2)
    with torch.inference_mode():
        operation.run(*operation.inputs(*size)[0].values(), backend="torch")
    check(operation, size, "torch", torch.float64)


# -------------------------------------------------------------------------------------------------- large numbers


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # by the interpreter's numpy
@pytest.mark.parametrize(
    ("name", "backend"), [case(name, backend) for name in OPERATIONS for backend in kernels.BACKENDS]
)
def test_saturated_gates_give_finite_gradients(name, backend):
    run, _, inputs = small(name, backend, torch.float32)
    assert all(x.isfinite().all() for x in results(run, {key: 100 * x for key, x in inputs.items()}).values())


every_backend = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_triton)])


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@every_backend
def test_gate_of_large_numbers(backend):
    u = torch.tensor([[1e4, -1e4, 0.0, 1e4, -1e4, 0.0]], device=DEVICE)
    out, d_u = results(lambda u: kernels.gate(u, backend=backend), {"u": u}).values()
    assert out.tolist() == [[1.0, 0.0, 0.0]] and d_u.isfinite().all()


@where_there_is_no_gpu
def test_the_cpus_gate_of_large_numbers():
    a = torch.tensor([1e4, -1e4, 0.0, -1e4, 1e4, 1.0, -1.0, 0.0])
    out, d_u = results(lambda u: kernels.gate(u, backend="cpu"), {"u": torch.cat([a, a.roll(3)])[None]}).values()
    torch.testing.assert_close(out[0], a.tanh() * a.roll(3).sigmoid(), rtol=1e-6, atol=1e-30)
    assert d_u.isfinite().all()


@every_backend
def test_cross_entropy_of_large_logits(backend):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], device=DEVICE)
    target = torch.tensor([1, 2], device=DEVICE)
    nats, d_logits = results(lambda x: kernels.cross_entropy(x, target, backend=backend), {"x": logits}).values()
    assert nats.tolist() == pytest.approx([2e4, 1.0986123]) and d_logits.isfinite().all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_cross_entropy_takes_images_as_they_are(backend, dtype):
    (logits,) = numbers((2, 3, 4, 5))
    target = torch.randint(0, 5, (2, 4, 3), generator=torch.Generator().manual_seed(0)).mT
    got = kernels.cross_entropy(logits.float().to(DEVICE), target.to(DEVICE, dtype), backend=backend)
    assert_close({"out": got}, {"out": OPERATIONS["cross_entropy"].reference(logits, target)}, 2e-6)


# ----------------------------------------------------------------------------------------- forms of the Triton scans


@needs_triton
def test_more_positions_than_one_program_has():
    """Above 64 columns a row is several programs, and each step a launch."""
    assert form_of(2, 3, 66, 4, False).name == "launches"
    check(OPERATIONS["row_lstm"], (1, 2, 66, 1, 2), "triton", torch.float32)
    for form in ("carried", "streamed", "nonsense"):  # programs that walk all steps do not wait for each other
        with pytest.raises(ValueError, match=rf"form='{form}'.* 66 positions"):
            form_of(2, 3, 66, 4, False, form)


@needs_triton
@pytest.mark.parametrize("n, m", [(1, 0), (5, 3), (3, 2)])
def test_row_scan_with_other_taps_and_a_left_neighbour(n, m):
    check(OPERATIONS["row_lstm"], (2, 3, 3, 3, 2, n, m), "triton", torch.float32)


@needs_triton
def test_weights_that_fill_a_program_are_not_carried(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    assert form_of(32, 2, 28, 2, False).name == "carried"
    for f, itemsize in ((32, 4), (40, 2), (512, 2)):
        assert form_of(f, 2, 28, itemsize, False).name != "carried"
        with pytest.raises(ValueError, match=rf"form='carried'.* {f} features of {itemsize} bytes"):
            form_of(f, 2, 28, itemsize, False, "carried")


def test_backends_are_named():
    u = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"backend='cuda'.* triton, torch or cpu"):
        kernels.gate(u, backend="cuda")
    assert kernels.backend_for(u) == "torch"
    with kernels.use("triton"):
        assert kernels.backend_for(u) == "triton"
        assert kernels.backend_for(u, "torch") == "torch"
    assert kernels.backend_for(u) == "torch"


@where_there_is_no_gpu
def test_the_cpus_kernel_is_asked_where_there_is_one():
    u = torch.zeros(1, 4)
    with kernels.use("cpu"):  # where an operation has such a kernel
        assert kernels.backend_for(u) == "torch" and kernels.backend_for(u, compiled=False) == "cpu"
    for x, expected in ((u, "cpu"), (u.double(), "torch"), (u.bfloat16(), "torch")):
        assert kernels.backend_for(x, compiled=True) == expected
    with pytest.raises(ValueError, match=r"backend='cpu': expected triton or torch with torch.bfloat16 on cpu"):
        kernels.backend_for(u.bfloat16(), "cpu", compiled=True)


@where_there_is_no_gpu
def test_the_cpus_gate_computes_whole_vectors_of_features():
    for f, same in ((8, False), (24, False), (6, True), (12, True)):
        u = OPERATIONS["gate"].inputs(5, 7, 2 * f)[0]["u"].float()
        usual, by_torch, by_cpu = (kernels.gate(u, backend=backend) for backend in (None, *ON_CPU))
        assert torch.equal(usual, by_cpu) and torch.equal(by_torch, by_cpu) == same, f


@where_there_is_no_gpu
@pytest.mark.parametrize("name, few", [("diagonal_lstm", 32), ("row_lstm", 16)])
@pytest.mark.parametrize("more, dtype, form", [(0, "float32", "cpu"), (1, "float32", "torch"), (0, "float64", "torch")])
def test_the_cpus_kernel_computes_few_features_in_float32(name, few, more, dtype, form):
    f = few + more
    inputs = [x.to(FLOATS[dtype]) for x in OPERATIONS[name].inputs(2, 5, 6, 7, f)[0].values()]
    found = {backend: OPERATIONS[name].run(*inputs, backend=backend) for backend in (None, *ON_CPU)}
    assert torch.equal(found[None], found[form]) and not torch.equal(found["torch"], found["cpu"])


# --------------------------------------------------------------------------------------------- as torch's operations

REGISTERED = {
    "lstm_scan": (lstm_scan_op, [(1, 2, 2, 2, 8), (2, 8, 4)], (True, "auto", False)),
    "lstm_scan_row": (lstm_scan_op, [(1, 2, 3, 1, 8), (1, 8, 6)], (False, "auto", False)),
    "masked_conv": (masked_conv_op, [(1, 3, 4, 2), (3, 2, 2, 3), (3,)], (True, 0, 5)),
    "cross_entropy": (cross_entropy_op, [(5, 3)], (torch.tensor([0, 2, 1, 1, 0]),)),
    "gate": (gate_op, [(2, 3, 4)], ()),
    "gate_cpu": (gate_cpu_op, [(2, 3, 16)], ()),
    "diagonal_lstm": (diagonal_lstm_op, [(1, 2, 3, 2), (2, 4, 2), (2, 4), (2, 4, 2)], ()),
    "row_lstm": (row_lstm_op, [(1, 2, 3, 2), (4, 2), (4,), (4, 1, 3), (4, 1)], ()),
    "lstm_cpu": (lstm_cpu_op, [(1, 2, 3, 2), (1, 4, 2), (1, 4), (1, 4, 3), (1, 4, 1)], (False,)),
}


@needs_triton
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, in torch 2.14
@pytest.mark.slow
@pytest.mark.parametrize("name", REGISTERED)
def test_operation_is_registered_as_torch_wants_it(name):
    operation, shapes, rest = REGISTERED[name]
    device = "cpu" if name.endswith("_cpu") else DEVICE
    inputs = [x.float().to(device).requires_grad_() for x in numbers(*shapes)]
    rest = [x.to(device) if isinstance(x, torch.Tensor) else x for x in rest]
    torch.use_deterministic_algorithms(False)  # opcheck compares what is left unwritten in tensors of no use
    opcheck(operation, (*inputs, *rest))


@pytest.mark.parametrize("name", ["lstm_cpu", "gate_cpu"])
def test_the_cpus_kernels_refuse_what_is_not_on_the_cpu(name):
    """They read memory by address, and there is none of these tensors that they could read."""
    operation, shapes, rest = REGISTERED[name]
    inputs = [x.float().to_sparse() for x in numbers(*shapes)]
    with pytest.raises(NotImplementedError, match=f"pixelrnn::{name}"):
        operation(*inputs, *rest)


# ------------------------------------------------------------------------------------------------------ whole models


@pytest.mark.slow
@needs_triton
@in_the_interpreter
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM"])
def test_a_model_is_the_same_in_all_forms(name, channels):
    """Nats and the gradient of every parameter, with masks between the groups of colours."""
    torch.manual_seed(0)
    sizes = {"channels": channels, "levels": 3, "height": 2, "width": 3, "hidden": 5, "layers": 2}
    model = models.build({"_target_": f"models.{name}", **sizes}).double()
    x = torch.randint(0, 3, (2, channels, 2, 3), generator=torch.Generator().manual_seed(0))
    found = []
    for backend in kernels.BACKENDS:
        with kernels.use(backend):
            nats = model(x)
            gradients = torch.autograd.grad(nats.sum(), model.parameters())
        names = (name for name, _ in model.named_parameters())
        found.append({"nats": nats.detach(), **dict(zip(names, gradients, strict=True))})
    for other in found[1:]:
        assert_close(found[0], other, 1e-10)


# ------------------------------------------------------------------------------------------------------- on a GPU

on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.parametrize(
        ("name", "size"),
        [
            pytest.param(name, size, id=f"{name}-{text_of(size)}")
            for name, operation in OPERATIONS.items()
            for size in operation.gpu
        ],
    ),
]


def gpu_case(function):
    for mark in on_a_gpu:
        function = mark(function)
    return function


def exact_and_rounded(name, size, dtype):
    """What torch computes in float64 on the CPU, and a function of a backend: what that computes on the GPU in `dtype`.

    That torch form is held against the reference above; the reference itself would take minutes.
    """
    operation = OPERATIONS[name]
    inputs, others = operation.inputs(*size)
    rounded = {key: x.to(dtype) for key, x in inputs.items()}
    exact = {key: x.double() for key, x in rounded.items()}
    with torch.no_grad():
        shape = operation.run(*exact.values(), *others, backend="torch").shape
    d_out = numbers(shape, seed=1)[0].to(dtype)
    expected = results(lambda *x: operation.run(*x, *others, backend="torch"), exact, d_out.double())
    here, d_out = {key: x.cuda() for key, x in rounded.items()}, d_out.cuda()
    return expected, lambda backend: results(lambda *x: operation.run(*x, *others, backend=backend), here, d_out)


@gpu_case
def test_bfloat16_is_as_near_as_torch_in_bfloat16(name, size):
    """Both are compared with float64 on the CPU, from the same rounded numbers; and two runs are equal."""
    expected, run = exact_and_rounded(name, size, torch.bfloat16)
    got, again, plain = run("triton"), run("triton"), run("torch")
    for key, value in expected.items():
        assert torch.equal(got[key], again[key]), key
        assert got[key].isfinite().all(), key
        assert relative_errors(got[key], value)[0] < 2 * relative_errors(plain[key], value)[0] + 1e-5, key


@gpu_case
def test_float32_is_exact_and_two_runs_are_equal(name, size):
    expected, run = exact_and_rounded(name, size, torch.float32)
    got, again = run("triton"), run("triton")
    assert all(torch.equal(got[key], again[key]) for key in got)
    assert all(relative_errors(got[key], value)[0] < 5e-6 for key, value in expected.items())
