"""What `kernels.row_lstm` promises: it is what its reference says, outputs and gradients."""

import math

import pytest
import torch

import kernels
from kernels.row_lstm import row_lstm, row_lstm_reference
from tests.test_kernels import NAMES, assert_close, output_and_gradients

SIZES = [  # b h w k f n
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
]
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "b{}-h{}-w{}-k{}-f{}-n{}".format(*s))


def arguments(size, dtype=torch.float64, seed=0):
    b, h, w, k, f, n = size
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, h, w, k), (4 * f, k), (4 * f,), (4 * f, f, n)
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def compare(inputs, tolerance, seed=1):
    shape = *inputs[0].shape[:3], inputs[3].shape[1]
    d_out = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=inputs[0].dtype)
    got = output_and_gradients(row_lstm, inputs, d_out)
    assert_close(got, output_and_gradients(row_lstm_reference, inputs, d_out), tolerance)


@every_size
def test_output_and_every_gradient_equal_the_reference(size):
    compare(arguments(size), 1e-12)


@every_size
def test_float32_equals_the_reference(size):
    compare(arguments(size, torch.float32), 1e-5)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 1), (2, 3, 3, 2, 1, 3), (1, 3, 2, 1, 2, 5), (1, 4, 1, 2, 2, 3)])
def test_gradients_equal_finite_differences(size):
    assert torch.autograd.gradcheck(row_lstm, arguments(size))


def test_two_rows_by_hand():
    """One feature, three columns, gates that each weight moves in another way."""

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    u = [[0.5, -1.0, 2.0], [1.5, 0.25, -0.75]]
    input_weight, bias = [0.3, -0.6, 0.9, 1.2], [0.1, 0.2, -0.3, 0.4]
    state_weight = [[0.5, -0.2, 0.7], [-0.4, 0.6, 0.1], [0.8, 0.3, -0.9], [-0.1, 1.1, 0.2]]
    cell, hidden = [], []
    for x in u[0]:
        o, _, i, g = (a * x + c for a, c in zip(input_weight, bias, strict=True))
        cell.append(sigmoid(i) * math.tanh(g))
        hidden.append(sigmoid(o) * math.tanh(cell[-1]))
    left, middle, right = hidden
    second = []
    for x, taps, up in zip(u[1], [(0, left, middle), (left, middle, right), (middle, right, 0)], cell, strict=True):
        o, f, i, g = (
            a * x + c + sum(s * tap for s, tap in zip(row, taps, strict=True))
            for a, c, row in zip(input_weight, bias, state_weight, strict=True)
        )
        second.append(sigmoid(o) * math.tanh(sigmoid(f) * up + sigmoid(i) * math.tanh(g)))
    values = [u], [[a] for a in input_weight], bias, [[row] for row in state_weight]
    u, *weights = (torch.tensor(x, dtype=torch.float64) for x in values)
    out = row_lstm(u[..., None], *weights)
    expected = torch.tensor([[hidden, second]], dtype=torch.float64)[..., None]
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-13)


def test_one_column_is_an_ordinary_lstm():
    """Read downwards, with the middle taps alone. Against torch's LSTM, whose gates stand in the order i f g o."""
    u, input_weight, bias, state_weight = (x.detach() for x in arguments((3, 6, 1, 4, 5, 3)))
    lstm = torch.nn.LSTM(4, 5, batch_first=True, dtype=torch.float64)
    for name, value in (
        ("weight_ih_l0", input_weight),
        ("weight_hh_l0", state_weight[:, :, 1]),
        ("bias_ih_l0", bias),
        ("bias_hh_l0", torch.zeros_like(bias)),
    ):
        o, f, i, g = value.chunk(4)
        getattr(lstm, name).data.copy_(torch.cat([i, f, g, o]))
    out = row_lstm(u, input_weight, bias, state_weight)
    torch.testing.assert_close(out[:, :, 0], lstm(u[:, :, 0])[0], rtol=1e-12, atol=1e-12)


@every_size
def test_mirrored_image_and_taps_give_the_mirrored_output(size):
    u, input_weight, bias, state_weight = (x.detach() for x in arguments(size))
    out = row_lstm(u, input_weight, bias, state_weight)
    mirrored = row_lstm(u.flip(2), input_weight, bias, state_weight.flip(2))
    torch.testing.assert_close(mirrored.flip(2), out, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 3), (3, 7)])
def test_state_at_a_pixel_depends_on_the_triangle_above_it_alone(h, w, n):
    """(i, j) sees itself and, r rows above, columns j ± r·(n//2), nothing by way of the image's edges."""
    u, *weights = arguments((h * w, h, w, 2, 3, n))
    out = row_lstm(u, *weights).flatten(1, 2)
    (gradient,) = torch.autograd.grad(out.diagonal().sum(), u)
    seen = gradient.abs().sum(-1).flatten(1) != 0
    i, j = torch.arange(h * w) // w, torch.arange(h * w) % w
    rows_above, aside = i[:, None] - i[None], (j[:, None] - j[None]).abs()
    assert torch.equal(seen, (rows_above >= 0) & (aside <= n // 2 * rows_above))


def test_images_of_a_batch_do_not_mix():
    u, *weights = (x.detach() for x in arguments((3, 4, 5, 2, 3, 3)))
    alone = torch.cat([row_lstm(u[k : k + 1], *weights) for k in range(3)])
    torch.testing.assert_close(row_lstm(u, *weights), alone, rtol=1e-13, atol=1e-13)


def test_any_memory_layout_is_accepted():
    """Inputs that are views: (b k h w) seen as channels last, transposed weights, every other bias."""
    u, input_weight, bias, state_weight = (x.detach() for x in arguments((2, 3, 5, 4, 2, 3)))
    views = [
        u.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
        input_weight.mT.contiguous().mT,
        torch.stack([bias, bias], dim=-1)[..., 0],
        state_weight.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    ]
    assert not any(view.is_contiguous() for view in views)
    compare([view.requires_grad_() for view in views], 1e-12)


@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 1), (2, 3, 5, 4, 2, 3), (3, 5, 2, 2, 3, 5)])
def test_any_incoming_gradient_is_accepted(size):
    """Expanded (of a sum), transposed, and of the last row alone."""
    inputs = arguments(size)
    for read in (
        lambda out: out.sum(),
        lambda out: out.mT.contiguous().exp().sum(),
        lambda out: out[:, -1].sum(),
    ):
        got = torch.autograd.grad(read(row_lstm(*inputs)), inputs)
        expected = torch.autograd.grad(read(row_lstm_reference(*inputs)), inputs)
        assert_close(dict(zip(NAMES, got, strict=True)), dict(zip(NAMES, expected, strict=True)), 1e-12)


@pytest.mark.parametrize("wanted", range(4), ids=NAMES)
def test_a_gradient_may_be_asked_for_alone(wanted):
    inputs = [x.detach() for x in arguments((2, 3, 4, 2, 3, 3))]
    inputs[wanted].requires_grad_()
    (got,) = torch.autograd.grad(row_lstm(*inputs).square().sum(), inputs[wanted])
    (expected,) = torch.autograd.grad(row_lstm_reference(*inputs).square().sum(), inputs[wanted])
    assert_close({"gradient": got}, {"gradient": expected}, 1e-12)


def test_arguments_and_incoming_gradient_are_left_as_they_were():
    inputs = arguments((2, 3, 4, 2, 3, 3))
    before = [x.detach().clone() for x in inputs]
    d_out = torch.randn(2, 3, 4, 3, dtype=torch.float64)
    d_before = d_out.clone()
    output_and_gradients(row_lstm, inputs, d_out)
    assert all(torch.equal(x, y) for x, y in zip([*inputs, d_out], [*before, d_before], strict=True))


def test_backward_may_run_twice_and_output_be_written_to():
    """Nothing that the backward pass reads is changed by it, or is part of the output."""
    inputs = arguments((2, 3, 4, 2, 3, 3))
    out = row_lstm(*inputs)
    first = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    out.detach().zero_()
    second = torch.autograd.grad(out.sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_saturated_gates_give_finite_gradients():
    inputs = [(100 * x.detach()).requires_grad_() for x in arguments((2, 4, 5, 3, 2, 3))]
    for value in output_and_gradients(row_lstm, inputs, torch.ones(2, 4, 5, 2, dtype=torch.float64)).values():
        assert value.isfinite().all()


def test_the_public_name_is_the_operation():
    assert kernels.row_lstm is row_lstm


@pytest.mark.parametrize("size", [size for size in SIZES if size[2] > 1], ids=str)
@pytest.mark.parametrize("all_features", [True, False])
def test_a_tap_on_the_left_neighbour_equals_the_reference(size, all_features):
    """It reads all of its features, or the first ones alone; it equals features that stand beside u's."""
    inputs = arguments(size)
    k, f = inputs[1].shape[1], inputs[3].shape[1]
    m = k if all_features else (k + 1) // 2
    left = torch.randn(4 * f, m, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    d_out = torch.randn(*size[:3], f, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names = (*NAMES, "left_weight")
    expected = output_and_gradients(row_lstm_reference, [*inputs, left], d_out, names)
    assert_close(output_and_gradients(row_lstm, [*inputs, left], d_out, names), expected, 1e-12)
    u, input_weight, bias, state_weight = inputs
    beside = torch.cat([u, torch.nn.functional.pad(u[:, :, :-1, :m], (0, 0, 1, 0))], dim=-1)
    out = row_lstm(beside, torch.cat([input_weight, left], dim=1), bias, state_weight)
    torch.testing.assert_close(out, expected["out"], rtol=1e-12, atol=1e-12)
