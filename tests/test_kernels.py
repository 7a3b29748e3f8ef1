"""What `kernels` promises: each operation is what its reference says, outputs and gradients."""

import pytest
import torch

import kernels
from kernels.diagonal_lstm import diagonal_lstm, diagonal_lstm_reference
from kernels.gate import gate_reference
from kernels.masked_conv import masked_conv, masked_conv_reference

SIZES = [  # b h w k f
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
]
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "b{}-h{}-w{}-k{}-f{}".format(*s))
NAMES = ("u", "input_weight", "bias", "state_weight")


def arguments(size, dtype=torch.float64, seed=0):
    b, h, w, k, f = size
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, w, k), (2, 4 * f, k), (2, 4 * f), (2, 4 * f, 2 * f)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def output_and_gradients(operation, inputs, d_out, names=NAMES):
    out = operation(*inputs)
    return {"out": out.detach(), **dict(zip(names, torch.autograd.grad(out, inputs, d_out), strict=True))}


def assert_close(got: dict, expected: dict, tolerance: float):
    """Every tensor's largest difference, relative to its largest value."""
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        error = (got[name] - value).abs().max().item() / max(value.abs().max().item(), 1e-300)
        where = (got[name] - value).abs().argmax().item()
        assert error <= tolerance, f"{name}: relative error {error:.1e}, largest at {where} of {tuple(value.shape)}"


def compare(inputs, tolerance, seed=1):
    b, h, w, _ = inputs[0].shape
    f = inputs[3].shape[1] // 4
    d_out = torch.randn(b, h, w, 2, f, generator=torch.Generator().manual_seed(seed), dtype=inputs[0].dtype)
    got = output_and_gradients(diagonal_lstm, inputs, d_out)
    assert_close(got, output_and_gradients(diagonal_lstm_reference, inputs, d_out), tolerance)


@every_size
def test_output_and_every_gradient_equal_the_reference(size):
    compare(arguments(size), 1e-12)


@every_size
def test_float32_equals_the_reference(size):
    compare(arguments(size, torch.float32), 1e-5)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 2, 3, 2, 1), (1, 3, 2, 1, 2), (1, 1, 4, 2, 2), (1, 4, 1, 2, 2)])
def test_gradients_equal_finite_differences(size):
    assert torch.autograd.gradcheck(diagonal_lstm, arguments(size))


def test_one_row_is_an_ordinary_lstm():
    """Against torch's LSTM, whose gates stand in the order i f g o; direction 1 reads from the right."""
    u, input_weight, bias, state_weight = (x.detach() for x in arguments((3, 1, 6, 4, 5)))
    out = diagonal_lstm(u, input_weight, bias, state_weight)
    for direction in range(2):
        lstm = torch.nn.LSTM(4, 5, batch_first=True, dtype=torch.float64)
        for name, value in (
            ("weight_ih_l0", input_weight[direction]),
            ("weight_hh_l0", state_weight[direction, :, :5]),
            ("bias_ih_l0", bias[direction]),
            ("bias_hh_l0", torch.zeros_like(bias[direction])),
        ):
            o, f, i, g = value.chunk(4)
            getattr(lstm, name).data.copy_(torch.cat([i, f, g, o]))
        row = u[:, 0].flip(1) if direction else u[:, 0]
        expected = lstm(row)[0].flip(1) if direction else lstm(row)[0]
        torch.testing.assert_close(out[:, 0, :, direction], expected, rtol=1e-12, atol=1e-12)


def test_one_column_has_hidden_but_no_cell_from_above():
    """The cell state comes from the left neighbour alone, so in one column each cell is i ⊙ g."""
    u, input_weight, bias, state_weight = (x.detach() for x in arguments((2, 5, 1, 3, 4)))
    out = diagonal_lstm(u, input_weight, bias, state_weight)
    for direction in range(2):
        hidden = torch.zeros(2, 4, dtype=torch.float64)
        for row in range(5):
            gates = u[:, row, 0] @ input_weight[direction].T + bias[direction]
            o, _, i, g = (gates + hidden @ state_weight[direction, :, 4:].T).chunk(4, dim=1)
            hidden = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
            torch.testing.assert_close(out[:, row, 0, direction], hidden, rtol=1e-12, atol=1e-12)


@every_size
def test_second_direction_is_the_mirror_image_of_the_first(size):
    """Mirror the image and swap the weights: the directions change places, mirrored."""
    u, *weights = (x.detach() for x in arguments(size))
    out = diagonal_lstm(u, *weights)
    mirrored = diagonal_lstm(u.flip(2), *(weight.flip(0) for weight in weights))
    torch.testing.assert_close(mirrored.flip(2).flip(3), out, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("direction", [0, 1])
def test_state_at_a_pixel_depends_on_the_quadrant_above_it_alone(direction):
    """(i, j) sees rows up to i, columns up to j (direction 0) or from j (direction 1), nothing by padding."""
    h, w = 4, 6
    u, *weights = arguments((h * w, h, w, 2, 3))
    out = diagonal_lstm(u, *weights)[..., direction, :].flatten(1, 2)
    (gradient,) = torch.autograd.grad(out.diagonal().sum(), u)
    seen = gradient.abs().sum(-1).flatten(1) != 0
    i, j = torch.arange(h * w) // w, torch.arange(h * w) % w
    left = j[None] <= j[:, None] if direction == 0 else j[None] >= j[:, None]
    assert torch.equal(seen, left & (i[None] <= i[:, None]))


def test_images_of_a_batch_do_not_mix():
    u, *weights = (x.detach() for x in arguments((3, 4, 5, 2, 3)))
    alone = torch.cat([diagonal_lstm(u[k : k + 1], *weights) for k in range(3)])
    torch.testing.assert_close(diagonal_lstm(u, *weights), alone, rtol=1e-13, atol=1e-13)


def test_any_memory_layout_is_accepted():
    """Inputs that are views: (b k h w) seen as channels last, transposed weights, every other bias."""
    u, input_weight, bias, state_weight = (x.detach() for x in arguments((2, 3, 5, 4, 2)))
    views = [
        u.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        input_weight.mT.contiguous().mT,
        torch.stack([bias, bias], dim=-1)[..., 0],
        state_weight.mT.contiguous().mT,
    ]
    assert not any(view.is_contiguous() for view in views)
    compare([view.requires_grad_() for view in views], 1e-12)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (2, 3, 5, 4, 2), (3, 5, 2, 2, 3)])
def test_any_incoming_gradient_is_accepted(size):
    """Expanded (of a sum), transposed, and of one direction alone."""
    inputs = arguments(size)
    for read in (
        lambda out: out.sum(),
        lambda out: out.mT.contiguous().exp().sum(),
        lambda out: out[..., 1, :].sum(),
    ):
        got = torch.autograd.grad(read(diagonal_lstm(*inputs)), inputs)
        expected = torch.autograd.grad(read(diagonal_lstm_reference(*inputs)), inputs)
        assert_close(dict(zip(NAMES, got, strict=True)), dict(zip(NAMES, expected, strict=True)), 1e-12)


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_a_gradient_may_be_asked_for_alone(wanted):
    inputs = [x.detach() for x in arguments((2, 3, 4, 2, 3))]
    inputs[wanted].requires_grad_()
    (got,) = torch.autograd.grad(diagonal_lstm(*inputs).square().sum(), inputs[wanted])
    (expected,) = torch.autograd.grad(diagonal_lstm_reference(*inputs).square().sum(), inputs[wanted])
    assert_close({"gradient": got}, {"gradient": expected}, 1e-12)


def test_arguments_and_incoming_gradient_are_left_as_they_were():
    inputs = arguments((2, 3, 4, 2, 3))
    before = [x.detach().clone() for x in inputs]
    d_out = torch.randn(2, 3, 4, 2, 3, dtype=torch.float64)
    d_before = d_out.clone()
    output_and_gradients(diagonal_lstm, inputs, d_out)
    assert all(torch.equal(x, y) for x, y in zip([*inputs, d_out], [*before, d_before], strict=True))


def test_gradients_work_at_a_size_first_met_without_them():
    """Index maps made in inference mode are used again in training."""
    inputs = arguments((1, 11, 3, 2, 2))
    with torch.inference_mode():
        diagonal_lstm(*inputs)
    compare(inputs, 1e-12)


def test_saturated_gates_give_finite_gradients():
    inputs = [(100 * x.detach()).requires_grad_() for x in arguments((2, 4, 5, 3, 2))]
    for value in output_and_gradients(diagonal_lstm, inputs, torch.ones(2, 4, 5, 2, 2, dtype=torch.float64)).values():
        assert value.isfinite().all()


def test_the_public_name_is_the_operation():
    assert kernels.diagonal_lstm is diagonal_lstm


# --------------------------------------------------------------------------------------------- masked convolution


def conv_arguments(b, h, w, k, f, reach, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (b, h, w, k), (f, k, reach + 1, 2 * reach + 1), (f,)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("size", "extra"),
    [
        ((1, 1, 1, 1, 1, 0), 0),
        ((2, 3, 4, 5, 2, 0), 0),
        ((1, 1, 1, 2, 3, 1), 0),
        ((3, 5, 3, 7, 2, 1), 0),
        ((2, 3, 5, 1, 7, 1), 1),
        ((1, 1, 6, 3, 2, 3), 1),
        ((1, 6, 1, 2, 3, 3), 3),
        ((2, 4, 7, 3, 1, 3), 0),
    ],
    ids=str,
)
def test_masked_convolution_equals_a_dense_one(size, extra, relu, dtype, tolerance):
    """Output and every gradient, for any strides of the input and of the gradient that comes back."""
    inputs = conv_arguments(*size, dtype)
    d_out = torch.randn(*masked_conv(*inputs, relu, extra).shape[::-1], dtype=dtype).permute(3, 2, 1, 0)
    got, expected = (
        output_and_gradients(lambda *x, f=f: f(*x, relu, extra), inputs, d_out, ("u", "weight", "bias"))
        for f in (masked_conv, masked_conv_reference)
    )
    assert_close(got, expected, tolerance)


@pytest.mark.parametrize("extra", [0, 1])
def test_masked_convolution_equals_finite_differences(extra):
    assert torch.autograd.gradcheck(lambda *x: masked_conv(*x, True, extra), conv_arguments(2, 3, 4, 2, 3, 1))


@pytest.mark.parametrize("shape", [(2,), (6,), (1, 1, 1, 2), (3, 5, 4, 14)])
def test_gate_equals_its_reference(shape):
    u = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul_(3).requires_grad_()
    d_out = torch.randn(*shape[:-1], shape[-1] // 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got, expected = (output_and_gradients(operation, [u], d_out, ["u"]) for operation in (kernels.gate, gate_reference))
    assert_close(got, expected, 1e-12)
    assert torch.autograd.gradcheck(kernels.gate, u)


def test_gate_of_large_numbers_is_finite():
    u = torch.tensor([[1e4, -1e4, 0.0, 1e4, -1e4, 0.0]], requires_grad=True)
    out = kernels.gate(u)
    out.sum().backward()
    assert out.tolist() == [[1.0, 0.0, 0.0]] and u.grad.isfinite().all()
