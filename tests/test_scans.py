"""What the LSTM scans mean: what their states see, and what they are where they are something well known.

That they are what their references say is in `tests/test_operations.py`.

Legend: b batch · h w rows, columns · k f features in, out · n taps of the Row LSTM.
"""

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import pad

from kernels import diagonal_lstm, row_lstm
from kernels.row_lstm import row_lstm_reference
from tests.operations import OPERATIONS, assert_close, numbers, results, text_of


def arguments(name, *size):
    """Tensors of float64."""
    return list(OPERATIONS[name].inputs(*size)[0].values())


def every_size(name):
    return pytest.mark.parametrize("size", OPERATIONS[name].torch, ids=text_of)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("scan, more", [(diagonal_lstm, ()), (row_lstm, (3,))], ids=["diagonal", "row"])
def test_images_of_a_batch_do_not_mix(scan, more, backend):
    u, *weights = arguments(scan.__name__, 5, 4, 5, 2, 3, *more)
    alone = torch.cat([scan(u[k : k + 1], *weights, backend=backend) for k in range(5)])
    torch.testing.assert_close(scan(u, *weights, backend=backend), alone, rtol=1e-13, atol=1e-13)


# ------------------------------------------------------------------------------------------------- Diagonal BiLSTM


def test_one_row_is_an_ordinary_lstm():
    """Against torch's LSTM, whose gates stand in the order i f g o; direction 1 reads from the right."""
    u, input_weight, bias, state_weight = arguments("diagonal_lstm", 3, 1, 6, 4, 5)
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
    u, input_weight, bias, state_weight = arguments("diagonal_lstm", 2, 5, 1, 3, 4)
    out = diagonal_lstm(u, input_weight, bias, state_weight)
    for direction in range(2):
        hidden = torch.zeros(2, 4, dtype=torch.float64)
        for row in range(5):
            gates = u[:, row, 0] @ input_weight[direction].T + bias[direction]
            o, _, i, g = (gates + hidden @ state_weight[direction, :, 4:].T).chunk(4, dim=1)
            hidden = o.sigmoid() * (i.sigmoid() * g.tanh()).tanh()
            torch.testing.assert_close(out[:, row, 0, direction], hidden, rtol=1e-12, atol=1e-12)


@every_size("diagonal_lstm")
def test_second_direction_is_the_mirror_image_of_the_first(size):
    """Mirror the image and swap the weights: the directions change places, mirrored."""
    u, *weights = arguments("diagonal_lstm", *size)
    out = diagonal_lstm(u, *weights)
    mirrored = diagonal_lstm(u.flip(2), *(weight.flip(0) for weight in weights))
    torch.testing.assert_close(mirrored.flip(2).flip(3), out, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("direction", [0, 1])
def test_state_at_a_pixel_depends_on_the_quadrant_above_it_alone(direction):
    """(i, j) sees rows up to i, columns up to j (direction 0) or from j (direction 1), nothing by padding."""
    h, w = 4, 6
    u, *weights = arguments("diagonal_lstm", h * w, h, w, 2, 3)
    u.requires_grad_()
    out = diagonal_lstm(u, *weights)[..., direction, :].flatten(1, 2)
    (gradient,) = torch.autograd.grad(out.diagonal().sum(), u)
    seen = gradient.abs().sum(-1).flatten(1) != 0
    i, j = torch.arange(h * w) // w, torch.arange(h * w) % w
    left = j[None] <= j[:, None] if direction == 0 else j[None] >= j[:, None]
    assert torch.equal(seen, left & (i[None] <= i[:, None]))


# -------------------------------------------------------------------------------------------------------- Row LSTM


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
    u, input_weight, bias, state_weight = arguments("row_lstm", 3, 6, 1, 4, 5, 3)
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


@every_size("row_lstm")
def test_mirrored_image_and_taps_give_the_mirrored_output(size):
    u, input_weight, bias, state_weight = arguments("row_lstm", *size)
    out = row_lstm(u, input_weight, bias, state_weight)
    mirrored = row_lstm(u.flip(2), input_weight, bias, state_weight.flip(2))
    torch.testing.assert_close(mirrored.flip(2), out, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize(("h", "w"), [(4, 6), (5, 3), (3, 7)])
def test_state_at_a_pixel_depends_on_the_triangle_above_it_alone(h, w, n):
    """(i, j) sees itself and, r rows above, columns j ± r·(n//2), nothing by way of the image's edges."""
    u, *weights = arguments("row_lstm", h * w, h, w, 2, 3, n)
    u.requires_grad_()
    out = row_lstm(u, *weights).flatten(1, 2)
    (gradient,) = torch.autograd.grad(out.diagonal().sum(), u)
    seen = gradient.abs().sum(-1).flatten(1) != 0
    i, j = torch.arange(h * w) // w, torch.arange(h * w) % w
    rows_above, aside = i[:, None] - i[None], (j[:, None] - j[None]).abs()
    assert torch.equal(seen, (rows_above >= 0) & (aside <= n // 2 * rows_above))


@pytest.mark.parametrize("size", [size for size in OPERATIONS["row_lstm"].torch if size[2] > 1], ids=text_of)
@pytest.mark.parametrize("all_features", [True, False])
def test_a_tap_on_the_left_neighbour_equals_features_beside_u(size, all_features):
    """It reads all of its features, or the first ones alone; it equals its reference, too."""
    m = size[3] if all_features else (size[3] + 1) // 2
    inputs = OPERATIONS["row_lstm"].inputs(*size, m)[0]
    (d_out,) = numbers((*size[:3], size[4]), seed=1)
    got = results(row_lstm, inputs, d_out)
    assert_close(got, results(row_lstm_reference, inputs, d_out), 1e-12)
    u, input_weight, bias, state_weight, left = inputs.values()
    beside = torch.cat([u, pad(u[:, :, :-1, :m], (0, 0, 1, 0))], dim=-1)
    out = row_lstm(beside, torch.cat([input_weight, left], dim=1), bias, state_weight)
    torch.testing.assert_close(out, got["out"], rtol=1e-12, atol=1e-12)


# --------------------------------------------------------------------------------------------- the kernel for CPUs


@pytest.mark.parametrize("name", ["row_lstm", "diagonal_lstm"])
def test_the_kernel_for_cpus_gives_the_same_bits_by_any_threads(name, monkeypatch):
    """And by vectors of any CPU."""
    run, (inputs, _) = OPERATIONS[name].run, OPERATIONS[name].inputs(9, 3, 4, 2, 16)
    inputs = {key: x.float() for key, x in inputs.items()}
    compute = partial(run, backend="cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = results(compute, inputs)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setenv("PIXELRNN_CPU", "generic")
    found = results(compute, inputs)
    assert all(torch.equal(x, found[key]) for key, x in expected.items())


@pytest.mark.parametrize("name", ["row_lstm", "diagonal_lstm"])
def test_the_kernel_for_cpus_hides_no_nan(name):
    u, *weights = (x.float() for x in OPERATIONS[name].inputs(5, 2, 2, 2, 3)[0].values())
    u[4, 0, 0, 0] = math.nan
    is_nan = OPERATIONS[name].run(u, *weights, backend="cpu").isnan()
    assert is_nan.any() and torch.equal(is_nan, OPERATIONS[name].reference(u, *weights).isnan())
