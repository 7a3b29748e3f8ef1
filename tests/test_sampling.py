"""What `models.sampling` promises: the row scan is the network, and a sample is a sample of it.

Legend: b batch · n images · c channel (colour) · h w rows, columns · v levels.
"""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.sampling import METHODS, Draw, Given, Keep, Record, noise, pixel_loop, sample
from tests.cases import CASES, build, every_case, every_state, every_target, images, train

every_method = pytest.mark.parametrize("method", METHODS)
every_shape = pytest.mark.parametrize(
    "height, width", [(4, 7), (7, 4), (1, 6), (6, 1), (1, 1), (2, 2)], ids=lambda side: str(side)
)


def assert_scan_equals_forward(model, b: int = 3):
    """The row scan's conditionals are the network's, at every sub-pixel of given images."""
    x = images(model, b)
    record = Record(model, Given(x), b, conditionals=True)
    assert torch.equal(pixel_loop(model, "cached", record, b), x)
    with torch.no_grad():
        error = (record.conditionals - model.conditionals(x)).abs().amax((0, 4))
        where = (error >= 1e-5).nonzero().tolist()
        assert not where, f"{error.max():.1e}, at (c h w) {where[:5]}"
        torch.testing.assert_close(record.log_prob, model.log_prob(x), rtol=1e-5, atol=1e-4)


def assert_methods_agree(model, n: int = 3, **arguments):
    """The same noise gives the same pixels, cached or naive."""
    cached, naive = (sample(model, n, method=method, **arguments) for method in ("cached", "naive"))
    assert torch.equal(cached, naive), f"differ first at (n c h w) {(cached != naive).nonzero()[0].tolist()}"
    return cached


def independent(model, uniforms, temperature=1.0, x=None, known=None):
    """Sampling as its definition says it: one call of `conditionals` a sub-pixel, inverse CDF by numpy."""
    drawn = torch.zeros(uniforms.shape, dtype=torch.long)
    c, h, w = model.shape
    for k, i, j, g in itertools.product(range(len(drawn)), range(h), range(w), range(c)):
        if known is not None and known[k, g, i, j]:
            drawn[k, g, i, j] = x[k, g, i, j]
            continue
        with torch.no_grad():
            p = model.conditionals(drawn[k : k + 1])[0, g, i, j].double().numpy()
        if temperature == 0:
            drawn[k, g, i, j] = int(p.argmax())
        else:
            p = np.exp(p / temperature)
            cdf, number = (p / p.sum()).cumsum(), uniforms[k, g, i, j].item()
            drawn[k, g, i, j] = int(np.searchsorted(cdf[:-1], number, side="right"))
    return drawn


# ------------------------------------------------------------------------------------------- scan and network


@every_case
@every_shape
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_the_row_scan_is_the_network(case, height, width, channels):
    """At every sub-pixel, on images wider than high, higher than wide, of one row, one column, one pixel."""
    assert_scan_equals_forward(build(case, channels=channels, levels=5, height=height, width=width, hidden=7))


@every_case
@every_shape
@pytest.mark.parametrize("channels", [1, 3])
def test_cached_and_naive_draw_the_same_pixels(case, height, width, channels):
    model = build(case, channels=channels, levels=5, height=height, width=width, hidden=7)
    drawn = assert_methods_agree(model, seed=3)
    assert drawn.unique().numel() > 1 or height * width == 1


@every_case
@every_state
def test_the_row_scan_is_the_network_in_every_state_of_life(case, state):
    """After training, a reload, a copy, and with huge numbers under the masks."""
    model = state(case, channels=3, levels=5, height=4, width=5)
    assert_scan_equals_forward(model)
    assert_methods_agree(model)


@every_target
@pytest.mark.parametrize("layers", [1, 4])
def test_wide_groups_that_are_not_equal(case, layers):
    """128 features in 3 groups: 43 43 42."""
    model = build(case, channels=3, levels=5, height=3, width=3, hidden=128, layers=layers, std=0.02)
    assert_scan_equals_forward(model)
    assert_methods_agree(model)


@every_case
def test_sampling_follows_the_weights(case):
    """Nothing of an earlier call is kept: images drawn after more training are the trained model's."""
    model = build(case, channels=2, levels=5)
    before = assert_methods_agree(model)
    train(model)
    assert not torch.equal(assert_methods_agree(model), before)
    assert_scan_equals_forward(model)


@every_target
def test_training_works_after_sampling(case):
    """At an image size that was first met in inference mode."""
    model = build(case, height=2, width=13)
    for method in METHODS:
        sample(model, 1, method=method)
    model(images(model, 2)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    case=st.sampled_from(list(CASES.values())),
    arguments=st.fixed_dictionaries(
        {
            "channels": st.integers(1, 3),
            "levels": st.integers(2, 5),
            "height": st.integers(1, 5),
            "width": st.integers(1, 5),
            "hidden": st.integers(3, 8),
            "layers": st.integers(1, 3),
            "residual": st.booleans(),
            "skip": st.booleans(),
            "head_features": st.integers(3, 9),
        }
    ),
    seed=st.integers(0, 9),
)
def test_scan_network_and_samplers_agree_for_any_model(case, arguments, seed):
    model = build(case, seed=seed, **arguments)
    assert_scan_equals_forward(model, b=2)
    assert_methods_agree(model, n=2, seed=seed)


# ---------------------------------------------------------------------------------------------- what is drawn


@every_case
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0])
def test_a_sample_is_what_the_definition_gives(case, temperature):
    model = build(case, channels=2, levels=5, height=3, width=4)
    uniforms = noise(7, range(3), model.shape)
    drawn = assert_methods_agree(model, uniforms=uniforms, temperature=temperature)
    assert torch.equal(drawn.long(), independent(model, uniforms, temperature))


@every_case
def test_frequencies_of_drawn_images_are_their_probabilities(case):
    """Chi-square over all 9 images of 1×2 with 3 levels, 8 degrees of freedom: above 26.1 once in 1,000."""
    model = build(case, levels=3, height=1, width=2, std=0.2)
    every_image = torch.tensor(list(itertools.product(range(3), repeat=2))).view(9, 1, 1, 2)
    expected = 4000 * model.log_prob(every_image).detach().double().exp()
    assert expected.min() > 5
    drawn = sample(model, 4000, seed=1, batch_size=4000).long().flatten(1)
    observed = torch.bincount(3 * drawn[:, 0] + drawn[:, 1], minlength=9)
    assert ((observed - expected) ** 2 / expected).sum() < 26.1


@every_target
@every_method
def test_log_probability_added_up_while_sampling_is_that_of_the_sample(case, method):
    """At temperature 1, whatever the temperature of the draw."""
    model = build(case, channels=3, levels=5)
    for temperature in (1.0, 0.5):
        record = Record(model, Draw(noise(0, range(4), model.shape), temperature), 4)
        x = pixel_loop(model, method, record, 4)
        torch.testing.assert_close(record.log_prob, model.log_prob(x).detach(), rtol=1e-5, atol=1e-4)


@every_case
@pytest.mark.parametrize("temperature", [1.0, 0])
def test_known_sub_pixels_are_kept_and_the_rest_is_drawn(case, temperature):
    """Any mask, scattered over pixels and colours, of its own for each image."""
    model = build(case, channels=3, levels=5, height=3, width=3)
    x, uniforms = images(model, 3, seed=5), noise(2, range(3), model.shape)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    drawn = assert_methods_agree(model, uniforms=uniforms, known=(x, known), temperature=temperature).long()
    assert torch.equal(drawn[known], x[known]) and not torch.equal(drawn, x)
    assert torch.equal(drawn, independent(model, uniforms, temperature, x, known))


@every_target
def test_all_known_gives_the_image_and_none_known_gives_a_sample(case):
    model = build(case, channels=2, levels=5)
    x = images(model, 3)
    everywhere = torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(sample(model, 3, known=(x, everywhere)).long(), x)
    assert torch.equal(sample(model, 3, known=(x, ~everywhere)), sample(model, 3))


def test_keep_asks_the_other_rule_only_where_nothing_is_known():
    x, known = torch.tensor([[[[3]]], [[[2]]]]), torch.tensor([[[[True]]], [[[False]]]])
    rule = Keep(x, known, lambda i, j, g, logits: torch.tensor([1, 1]))
    assert rule(0, 0, 0, torch.zeros(2, 4)).tolist() == [3, 1]


def test_draw_never_takes_a_value_of_probability_zero():
    """Least noise takes the first value that can be, most noise the last."""
    never = -float("inf")
    logits = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 4, 6, 7]] = never
    for number, value in ((0.0, 2), (1 - 2**-24, 5)):
        drawn = Draw(torch.full((1000, 1, 1, 1), number))(0, 0, 0, logits)
        assert (drawn == value).all()


def test_draw_is_the_inverse_of_the_cumulative_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, 4)
    uniforms = torch.tensor([0.05, 0.15, 0.29, 0.31, 0.59, 0.61]).view(6, 1, 1, 1)
    assert Draw(uniforms)(0, 0, 0, logits).tolist() == [0, 1, 1, 2, 2, 3]
    assert Draw(uniforms, temperature=0)(0, 0, 0, logits).tolist() == [3] * 6
    assert Draw(uniforms, temperature=1e-3)(0, 0, 0, logits).tolist() == [3] * 6


@every_target
@every_method
def test_injected_noise_is_what_is_used(case, method):
    model = build(case)
    assert (sample(model, 2, method=method, uniforms=torch.zeros(2, *model.shape)) == 0).all()
    own = noise(4, range(3), model.shape)
    drawn = sample(model, 3, method=method, uniforms=own)
    assert torch.equal(drawn, sample(model, 3, method=method, seed=4))
    assert not torch.equal(drawn, sample(model, 3, method=method, seed=5))


@every_target
@every_method
def test_an_image_depends_on_seed_and_number_not_on_the_batch(case, method):
    model = build(case, channels=2, levels=5)
    drawn = sample(model, 5, seed=9, method=method)
    assert torch.equal(sample(model, 5, seed=9, method=method, batch_size=2), drawn)
    assert torch.equal(sample(model, 2, seed=9, method=method), drawn[:2])
    assert len(drawn.flatten(1).unique(dim=0)) == 5
    x = images(model, 5)
    known = x < 2
    whole = sample(model, 5, known=(x, known), method=method)
    assert torch.equal(sample(model, 5, known=(x, known), method=method, batch_size=2), whole)


def test_noise_is_uniform_and_of_each_image_its_own():
    numbers = noise(0, range(200), (3, 4, 5))
    assert numbers.shape == (200, 3, 4, 5) and numbers.dtype == torch.float32
    assert 0 <= numbers.min() < 1e-3 and 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and numbers.unique().numel() > 11_900
    assert torch.equal(noise(0, range(7, 9), (3, 4, 5)), numbers[7:9])
    assert not torch.equal(noise(1, range(7, 9), (3, 4, 5)), numbers[7:9])
    assert noise(2**64 - 1, range(1), (1, 1, 1)).isfinite().all()


@every_target
@pytest.mark.parametrize("levels", [2, 256, 257, 1000])
def test_images_are_bytes_up_to_256_levels_and_int64_above(case, levels):
    model = build(case, levels=levels, height=2, width=3)
    dtype = torch.uint8 if levels <= 256 else torch.int64
    drawn = assert_methods_agree(model, n=2, uniforms=torch.full((2, *model.shape), 1 - 2**-24))
    assert drawn.dtype == dtype and drawn.shape == (2, *model.shape) and drawn.device.type == "cpu"
    assert drawn.max() > 0.9 * (levels - 1)  # values above 255 survive


# ----------------------------------------------------------------------------------------- what is left alone


@every_case
@every_method
@pytest.mark.parametrize("training", [True, False])
def test_sampling_leaves_mode_parameters_and_random_states_alone(case, method, training):
    model = build(case, dropout=0.5).train(training)
    before = copy.deepcopy(model.state_dict())
    random_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    drawn = sample(model, 2, method=method)
    assert model.training == training and all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(sample(model.eval(), 2, method=method), drawn)  # dropout played no part


@every_target
@every_method
def test_the_mode_is_left_as_it_was_when_a_rule_fails(case, method):
    def fail(i, j, g, logits):
        raise RuntimeError("no value")

    model = build(case).train()
    with pytest.raises(RuntimeError, match="no value"):
        pixel_loop(model, method, fail, 1)
    assert model.training


@every_target
@every_method
def test_what_is_drawn_can_be_trained_on(case, method):
    model = build(case)
    x = pixel_loop(model, method, Draw(noise(0, range(2), model.shape)), 2)
    assert x.dtype == torch.int64
    model(x).sum().backward()


@every_target
def test_progress_tells_every_row_of_every_image(case):
    model, told = build(case, height=3, width=2), []
    sample(model, 5, batch_size=2, tell=told.append)
    assert told == [2, 2, 2, 2, 2, 2, 1, 1, 1]


@every_target
@pytest.mark.parametrize("wrong, named", [
    (lambda x: {"n": 0}, ["n=0", "at least 1"]),
    (lambda x: {"n": 2.0}, ["n=2.0", "integer"]),
    (lambda x: {"seed": -1}, ["seed=-1", "0"]),
    (lambda x: {"method": "fast"}, ["method='fast'", "cached", "naive"]),
    (lambda x: {"temperature": -1.0}, ["temperature=-1.0", "at least 0"]),
    (lambda x: {"temperature": float("nan")}, ["temperature=nan", "at least 0"]),
    (lambda x: {"temperature": "hot"}, ["temperature='hot'", "number"]),
    (lambda x: {"batch_size": 0}, ["batch_size=0", "at least 1"]),
    (lambda x: {"uniforms": torch.zeros(2, 1, 4, 3)}, ["(2, 1, 4, 3)", "(2, 1, 3, 4)"]),
    (lambda x: {"uniforms": torch.zeros(3, 1, 3, 4)}, ["(3, 1, 3, 4)", "(2, 1, 3, 4)"]),
    (lambda x: {"known": (x + 4, x > 0)}, ["7", "0 to 3"]),
    (lambda x: {"known": (x.float(), x > 0)}, ["float32", "integers"]),
    (lambda x: {"known": (x[:1], x[:1] > 0)}, ["(1, 1, 3, 4)", "2"]),
    (lambda x: {"known": (x, x[:, :, :2] > 0)}, ["(2, 1, 2, 4)"]),
    (lambda x: {"known": (x[..., :3], x[..., :3] > 0)}, ["(2, 1, 3, 3)", "(b, 1, 3, 4)"]),
], ids=[
    "n", "n_float", "seed", "method", "temperature", "temperature_nan", "temperature_str", "batch_size",
    "uniforms_sides", "uniforms_n", "known_levels", "known_float", "known_n", "known_mask", "known_sides",
])  # fmt: skip
def test_a_wrong_argument_is_refused_with_its_value_and_what_is_allowed(case, wrong, named):
    model = build(case)
    x = images(model, 2)
    x.flatten()[0] = 3
    with pytest.raises(ValueError) as error:
        sample(model, **{"n": 2, **wrong(x)})
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


# ------------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("temperature", [1e-39, 1e-6])
def test_a_temperature_near_zero_is_that_of_zero(temperature):
    model = build(CASES["pixel_cnn"])
    assert torch.equal(sample(model, 3, temperature=temperature), sample(model, 3, temperature=0))


def test_no_images_have_no_likelihoods():
    model = build(CASES["diag_bilstm"])
    assert model.log_prob(torch.zeros(0, *model.shape, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("value", [1.0, -0.1, float("nan")])
def test_noise_outside_the_unit_interval_is_refused(value):
    model = build(CASES["pixel_cnn"])
    with pytest.raises(ValueError, match="uniforms"):
        sample(model, 2, uniforms=torch.full((2, *model.shape), value))


def test_a_mask_of_numbers_is_refused():
    model = build(CASES["pixel_cnn"])
    x = torch.zeros(2, *model.shape, dtype=torch.long)
    with pytest.raises(ValueError, match=r"torch\.bool"):
        sample(model, 2, known=(x, torch.full(x.shape, 0.5)))


def test_a_frozen_part_stays_in_eval_mode():
    model = build(CASES["pixel_cnn"]).train()
    model.stem.eval()
    sample(model, 1)
    assert model.training and model.head.training and not model.stem.training


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    sample(build(CASES["pixel_cnn"]), 1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
