"""What `models.sampling` promises: the cached sampler is the network, and a sample is a sample of it.

Legend: b batch · n images · c channel (colour) · h w rows, columns · v levels.
"""

import copy
import itertools
import math

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels
import models.sampling
from kernels.jit import triton
from models.multi_scale import KINDS
from models.sampling import PixelLoop, noise, sample
from models.sampling.loop import backend_of_rows
from models.sampling.rules import Draw, Given, Keep, Record, Rule
from tests.cases import (
    CASES,
    assert_cached_equals_forward,
    assert_methods_agree,
    build,
    every_case,
    every_checker,
    every_conditioned,
    every_kind,
    every_state,
    every_target,
    given,
    given_alike,
    images,
    independent,
    noises,
    slow_if_between,
    train,
)

every_method = pytest.mark.parametrize("method", ["cached", "cached by torch", "naive"], indirect=True)


@pytest.fixture
def method(request):
    """The name of a method, while the cached sampler's rows are computed by who is meant."""
    with kernels.use("torch" if request.param == "cached by torch" else None):
        yield request.param.partition(" ")[0]


def at_sizes(sizes: list, of_all: list):
    """Every class without switches at all of `sizes` (h w c); the other cases at those of `of_all`."""
    return pytest.mark.parametrize(
        "case, size",
        [
            pytest.param(case, size, id=f"{name}-{size[0]}x{size[1]}x{size[2]}", marks=slow_if_between(name))
            for name, case in CASES.items()
            for size in (of_all if case.extra else sizes)
        ],
    )


WIDE_HIGH_THIN = [(4, 7), (7, 4), (1, 6), (6, 1), (1, 1), (2, 2)]


# ------------------------------------------------------------------------------------------- scan and network


@at_sizes([(*shape, c) for shape in WIDE_HIGH_THIN for c in (1, 2, 3)], [(4, 7, 3), (2, 2, 1)])
def test_the_cached_sampler_is_the_network(case, size):
    """At every sub-pixel, on images wider than high, higher than wide, of one row, one column, one pixel."""
    height, width, channels = size
    assert_cached_equals_forward(build(case, channels=channels, levels=5, height=height, width=width, hidden=7))


@at_sizes([(*shape, c) for shape in WIDE_HIGH_THIN[1:] for c in (1, 3)], [(3, 5, 3)])
def test_cached_and_naive_draw_the_same_pixels(case, size):
    height, width, channels = size
    model = build(case, channels=channels, levels=5, height=height, width=width, hidden=7)
    drawn = assert_methods_agree(model, seed=3)
    assert drawn.unique().numel() > 1 or height * width == 1


@pytest.mark.slow
@every_kind
@every_state
def test_the_cached_sampler_is_the_network_in_every_state_of_life(case, state):
    """After training, a reload, a copy, and with huge numbers under the masks."""
    model = state(case, channels=3, levels=5)
    assert_cached_equals_forward(model)
    assert_methods_agree(model)


@pytest.mark.slow
@every_target
@pytest.mark.parametrize("layers", [1, 4])
def test_wide_groups_that_are_not_equal(case, layers):
    """128 features in 3 groups: 43 43 42."""
    model = build(case, channels=3, levels=5, height=3, width=3, hidden=128, layers=layers, std=0.02)
    assert_cached_equals_forward(model)
    assert_methods_agree(model)


@pytest.mark.slow
@every_case
def test_sampling_follows_the_weights(case):
    """Nothing of an earlier call is kept: images drawn after more training are the trained model's."""
    model = build(case, channels=2, levels=5)
    before = assert_methods_agree(model)
    train(model)
    assert not torch.equal(assert_methods_agree(model), before)
    assert_cached_equals_forward(model)


@every_kind
def test_training_works_after_sampling(case):
    """At an image size that was first met in inference mode."""
    model = build(case, height=2, width=13)
    for method in ("cached", "naive"):
        sample(model, 1, method=method, **given(model, 1))
    model(images(model, 2), **given(model, 2)).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    case=st.sampled_from([case for case in CASES.values() if not case.extra]),
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
            "head": st.sampled_from(["softmax", "logistic_mixture"]),
            "head_features": st.integers(3, 9),
            "mixtures": st.integers(1, 4),
            "classes": st.integers(0, 3),
        }
    ),
    of_one_net=st.fixed_dictionaries({"map_features": st.integers(0, 3)}),
    of_several=st.fixed_dictionaries(
        {"base": st.sampled_from(list(KINDS)), "conditional": st.sampled_from(list(KINDS)), "copy_known": st.booleans()}
    ),
    of_clips=st.fixed_dictionaries(
        {"net": st.sampled_from(list(KINDS)), "past": st.integers(0, 3), "frames": st.integers(1, 3)}
    ),
    seed=st.integers(0, 9),
)
@pytest.mark.slow
def test_scan_network_and_samplers_agree_for_any_model(case, arguments, of_one_net, of_several, of_clips, seed):
    more = {"MultiScale": of_several, "Video": of_clips}.get(case.target, of_one_net)
    model = build(case, seed=seed, **arguments, **more)
    assert_cached_equals_forward(model, b=2)
    assert_methods_agree(model, n=2, seed=seed)


# ---------------------------------------------------------------------------------------------- what is drawn


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("temperature", [1.0, 0.5, 0])
def test_a_sample_is_what_the_definition_gives(case, temperature):
    model = build(case, channels=2, levels=5, height=2, width=5)
    uniforms = noises(model, 7, 3)
    drawn = assert_methods_agree(model, uniforms=uniforms, temperature=temperature)
    assert torch.equal(drawn.long(), independent(model, uniforms, temperature))


@pytest.mark.slow
@every_case
def test_frequencies_of_drawn_images_are_their_probabilities(case):
    """Chi-square over all images: above the limit once in 1,000.

    They are 9 of 1×2 with 3 levels, 8 degrees of freedom; for Multi-Scale 16 of 2×2 with 2 levels, 15; so for clips.
    """
    levels, limit = (2, 37.7) if case.target in ("MultiScale", "Video") else (3, 26.1)
    model = build(case, levels=levels, height=1, width=2, std=0.15)
    pixels = math.prod(model.shape)
    every_image = torch.tensor(list(itertools.product(range(levels), repeat=pixels))).view(-1, *model.shape)
    conditions = given_alike(model, len(every_image), seed=1)
    expected = 4000 * model.log_prob(every_image, **conditions).detach().double().exp()
    assert expected.min() > 5
    drawn = sample(model, 4000, seed=1, batch_size=4000, **given_alike(model, 4000, seed=1)).long().flatten(1)
    observed = torch.bincount(drawn @ levels ** torch.arange(pixels).flip(0), minlength=len(expected))
    assert ((observed - expected) ** 2 / expected).sum() < limit


@every_kind
@every_method
def test_log_probability_added_up_while_sampling_is_that_of_the_sample(case, method):
    """At temperature 1, whatever the temperature of the draw. What a smaller image shows costs nothing."""
    model = build(case, channels=3, levels=5)
    conditions = given(model, 4)
    for temperature in (1.0, 0.5):
        drawn, total = [], 0
        for k, numbers in enumerate(noises(model, 0, 4)):
            with torch.no_grad():
                stage = model.stage(k, 4, drawn, conditions.get("label"), conditions.get("cond"))
            rule = Draw(numbers, temperature)
            rule = rule if stage.known is None else Keep(stage.x, stage.known, rule)
            record = Record(stage.net, rule, 4, conditionals=True)
            drawn.append(PixelLoop(stage.net, method, record, 4, stage.condition).run())
            if stage.known is None:
                total = total + record.log_prob
            else:
                log_probs = record.conditionals.gather(-1, drawn[-1][..., None])[..., 0]
                total = total + log_probs.masked_fill(stage.known, 0).sum((1, 2, 3))
        x = model.joined(drawn)
        torch.testing.assert_close(total, model.log_prob(x, **conditions).detach(), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@every_case
@pytest.mark.parametrize("temperature", [1.0, 0])
def test_known_sub_pixels_are_kept_and_the_rest_is_drawn(case, temperature):
    """Any mask, scattered over pixels and colours, of its own for each image."""
    model = build(case, channels=3, levels=5, height=2, width=4)
    x, uniforms = images(model, 3, seed=5), noises(model, 2, 3)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    drawn = assert_methods_agree(model, uniforms=uniforms, known=(x, known), temperature=temperature).long()
    assert torch.equal(drawn[known], x[known]) and not torch.equal(drawn, x)
    assert torch.equal(drawn, independent(model, uniforms, temperature, x, known))


@every_kind
def test_all_known_gives_the_image_and_none_known_gives_a_sample(case):
    model = build(case, channels=2, levels=5)
    x, conditions = images(model, 3), given(model, 3)
    everywhere = torch.ones_like(x, dtype=torch.bool)
    assert torch.equal(sample(model, 3, known=(x, everywhere), **conditions).long(), x)
    assert torch.equal(sample(model, 3, known=(x, ~everywhere), **conditions), sample(model, 3, **conditions))


def test_keep_asks_the_other_rule_only_where_nothing_is_known():
    x, known = torch.tensor([[[[3]]], [[[2]]]]), torch.tensor([[[[True]]], [[[False]]]])

    class One(Rule):
        def __call__(self, j, g, logits):
            return torch.tensor([1, 1])

    assert Keep(x, known, One())(0, 0, torch.zeros(2, 4)).tolist() == [3, 1]


def test_draw_never_takes_a_value_of_probability_zero():
    """Least noise takes the first value that can be, most noise the last."""
    never = -float("inf")
    logits = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    logits[:, [0, 1, 4, 6, 7]] = never
    for number, value in ((0.0, 2), (1 - 2**-24, 5)):
        drawn = Draw(torch.full((1000, 1, 1, 1), number))(0, 0, logits)
        assert (drawn == value).all()


def test_draw_is_the_inverse_of_the_cumulative_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, 4)
    uniforms = torch.tensor([0.05, 0.15, 0.29, 0.31, 0.59, 0.61]).view(6, 1, 1, 1)
    assert Draw(uniforms)(0, 0, logits).tolist() == [0, 1, 1, 2, 2, 3]
    assert Draw(uniforms, temperature=0)(0, 0, logits).tolist() == [3] * 6
    assert Draw(uniforms, temperature=1e-3)(0, 0, logits).tolist() == [3] * 6


@every_kind
@every_method
def test_injected_noise_is_what_is_used(case, method):
    model = build(case)
    zeros = [torch.zeros(2, *net.shape) for net in model.nets]
    assert (sample(model, 2, method=method, uniforms=zeros, **given(model, 2)) == 0).all()
    conditions, own = given(model, 3), noises(model, 4, 3)
    drawn = sample(model, 3, method=method, uniforms=own, **conditions)
    assert torch.equal(drawn, sample(model, 3, method=method, seed=4, **conditions))
    assert not torch.equal(drawn, sample(model, 3, method=method, seed=5, **conditions))
    if len(own) == 1:
        assert torch.equal(drawn, sample(model, 3, method=method, uniforms=own[0], **conditions))


@pytest.mark.slow
@every_kind
@every_method
def test_an_image_depends_on_seed_and_number_not_on_the_batch(case, method):
    model = build(case, channels=2, levels=5, height=2)
    x, conditions = images(model, 5), given(model, 5)
    drawn = sample(model, 5, seed=9, method=method, **conditions)
    assert torch.equal(sample(model, 5, seed=9, method=method, batch_size=2, **conditions), drawn)
    two = {name: value[:2] for name, value in conditions.items()}
    assert torch.equal(sample(model, 2, seed=9, method=method, **two), drawn[:2])
    assert len(drawn.flatten(1).unique(dim=0)) == 5
    known = x < 2
    whole = sample(model, 5, known=(x, known), method=method, **conditions)
    assert torch.equal(sample(model, 5, known=(x, known), method=method, batch_size=2, **conditions), whole)


@every_conditioned
@every_method
def test_an_image_depends_on_its_own_label_and_map(case, method):
    """And on no other's: those of image 1 are changed, with the noise as it was."""
    model = build(case, channels=2, levels=16, width=6)
    conditions = given(model, 3)
    drawn = sample(model, 3, method=method, **conditions)
    for name, value in conditions.items():
        other = value.clone()
        other[1] = (value[1] + 1) % model.classes if name == "label" else value[1] + 2
        changed = sample(model, 3, method=method, **{**conditions, name: other}) != drawn
        assert changed.flatten(1).any(1).tolist() == [False, True, False]


@every_conditioned
@every_method
def test_one_label_for_all_is_a_tensor_of_it(case, method):
    model = build(case, levels=5)
    conditions = given(model, 3)
    for label in range(3):
        conditions["label"] = torch.full((3,), label)
        drawn = sample(model, 3, method=method, **conditions)
        assert torch.equal(sample(model, 3, method=method, **{**conditions, "label": label}), drawn)


def test_noise_is_uniform_and_of_each_image_its_own():
    numbers = noise(0, range(200), (3, 4, 5))
    assert numbers.shape == (200, 3, 4, 5) and numbers.dtype == torch.float32
    assert 0 <= numbers.min() < 1e-3 and 0.999 < numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02 and numbers.unique().numel() > 11_900
    assert torch.equal(noise(0, range(7, 9), (3, 4, 5)), numbers[7:9])
    assert not torch.equal(noise(1, range(7, 9), (3, 4, 5)), numbers[7:9])
    assert noise(2**64 - 1, range(1), (1, 1, 1)).isfinite().all()


@pytest.mark.skipif(triton is None or torch.cuda.is_available(), reason="it runs in Triton's interpreter")
@pytest.mark.parametrize(
    ("seed", "images", "shape", "stage"),
    [(0, [0, 1, 5], (3, 4, 5), 0), (2**64 - 1, [2**40, 7], (1, 33, 32), 2), (2**63 + 5, [2**64 - 1], (1, 1, 1), 1)],
)
def test_the_kernel_makes_the_same_noise(seed, images, shape, stage):
    """Parts of a block of eight numbers, more blocks than a program makes, and keys of 64 bits."""
    arguments = seed, images, shape, stage
    assert torch.equal(noise(*arguments, backend="triton"), noise(*arguments))


def test_each_stage_has_noise_of_its_own():
    """And that of the first is what a model with one net has."""
    numbers = [noise(3, range(5), (1, 8, 8), stage) for stage in range(3)]
    assert torch.equal(numbers[0], noise(3, range(5), (1, 8, 8)))
    assert torch.cat(numbers).unique().numel() > 3 * 5 * 64 - 5


@every_target
@pytest.mark.parametrize("levels", [2, 256, 257, 1000])
def test_images_are_bytes_up_to_256_levels_and_int64_above(case, levels):
    model = build(case, levels=levels, height=2, width=3)
    dtype = torch.uint8 if levels <= 256 else torch.int64
    drawn = assert_methods_agree(model, n=2, uniforms=[torch.full((2, *net.shape), 1 - 2**-24) for net in model.nets])
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
    conditions = given(model, 2)
    drawn = sample(model, 2, method=method, **conditions)
    assert model.training == training and all(module.training == training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(sample(model.eval(), 2, method=method, **conditions), drawn)  # dropout played no part


def any_condition(net, b):
    """Of a net of its own or one of Multi-Scale's."""
    return net.condition(**given(net, b))


@every_kind
@every_method
def test_the_mode_is_left_as_it_was_when_a_rule_fails(case, method):
    class Fail(Rule):
        def __call__(self, j, g, logits):
            raise RuntimeError("no value")

    for net in build(case).nets:
        net.train()
        with pytest.raises(RuntimeError, match="no value"):
            PixelLoop(net, method, Fail(), 1, any_condition(net, 1)).run()
        assert all(module.training for module in net.modules())


@every_kind
@every_method
def test_what_is_drawn_can_be_trained_on(case, method):
    for net in build(case).nets:
        condition = any_condition(net, 2)
        x = PixelLoop(net, method, Draw(noise(0, range(2), net.shape)), 2, condition).run()
        assert x.dtype == torch.int64
        net.head.nats(net.outputs(x, condition), x).sum().backward()


@every_target
def test_progress_tells_every_row_of_every_image(case):
    model, told = build(case, height=3, width=2), []
    rows = sum(net.height for net in model.nets)
    sample(model, 5, batch_size=2, tell=told.append)
    assert told == [2] * rows + [2] * rows + [1] * rows and rows == (6 if case.target in ("MultiScale", "Video") else 3)


@every_checker
@pytest.mark.parametrize("wrong, named", [
    (lambda x: {"n": 0}, ["n=0", "at least 1"]),
    (lambda x: {"n": 2.0}, ["n=2.0", "integer"]),
    (lambda x: {"seed": -1}, ["seed=-1", "0"]),
    (lambda x: {"method": "fast"}, ["method='fast'", "cached", "naive"]),
    (lambda x: {"temperature": -1.0}, ["temperature=-1.0", "at least 0"]),
    (lambda x: {"temperature": float("nan")}, ["temperature=nan", "at least 0"]),
    (lambda x: {"temperature": "hot"}, ["temperature='hot'", "number"]),
    (lambda x: {"batch_size": 0}, ["batch_size=0", "at least 1"]),
    (lambda x: {"uniforms": torch.zeros(2, 1, 6, 4)}, ["(2, 1, 6, 4)", "(2, 1, 4, 6)"]),
    (lambda x: {"uniforms": torch.zeros(3, 1, 4, 6)}, ["(3, 1, 4, 6)", "(2, 1, 4, 6)"]),
    (lambda x: {"known": (x + 4, x > 0)}, ["7", "0 to 3"]),
    (lambda x: {"known": (x.float(), x > 0)}, ["float32", "integers"]),
    (lambda x: {"known": (x[:1], x[:1] > 0)}, ["(1, 1, 4, 6)", "2"]),
    (lambda x: {"known": (x, x[:, :, :2] > 0)}, ["(2, 1, 2, 6)"]),
    (lambda x: {"known": (x[..., :3], x[..., :3] > 0)}, ["(2, 1, 4, 3)", "(b, 1, 4, 6)"]),
], ids=[
    "n", "n_float", "seed", "method", "temperature", "temperature_nan", "temperature_str", "batch_size",
    "uniforms_sides", "uniforms_n", "known_levels", "known_float", "known_n", "known_mask", "known_sides",
])  # fmt: skip
def test_a_wrong_argument_is_refused_with_its_value_and_what_is_allowed(case, wrong, named):
    model = build(case, height=4, width=6)
    x = images(model, 2)
    x.flatten()[0] = 3
    with pytest.raises(ValueError) as error:
        sample(model, **{"n": 2, **wrong(x)})
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


# ------------------------------------------------------------------------------------------------------ edges


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e-6])
def test_a_temperature_near_zero_is_that_of_zero(temperature):
    model = build(CASES["pixel_cnn"])
    assert torch.equal(sample(model, 3, temperature=temperature), sample(model, 3, temperature=0))


@every_kind
def test_no_images_have_no_likelihoods(case):
    model = build(case)
    assert model.log_prob(images(model, 0), **given(model, 0)).shape == (0,)


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


@every_case
@every_method
def test_bfloat16_moves_conditionals_by_little(case, method):
    """By a hundredth of themselves or so; those of all values still sum to one."""
    model = build(case, channels=3, levels=5, height=3, width=3)
    for exact in model.nets:
        net, condition, x = copy.deepcopy(exact).bfloat16(), any_condition(exact, 2), images(exact, 2)
        record = Record(net, Given(x), 2, conditionals=True)
        PixelLoop(net, method, record, 2, None if condition is None else condition.bfloat16()).run()
        with torch.no_grad():
            expected = exact.head.conditionals(exact.outputs(x, condition), x)
        assert record.conditionals.dtype == torch.float32 and not torch.equal(record.conditionals, expected)
        moved = (record.conditionals.exp() - expected.exp()).abs().sum(-1) / 2
        assert moved.mean() < 0.02, moved
        torch.testing.assert_close(record.conditionals.exp().sum(-1), torch.ones(x.shape), rtol=1e-5, atol=1e-5)


@every_kind
def test_bfloat16_draws_other_images_from_a_copy(case):
    model = build(case, channels=3, levels=256)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    conditions = given(model, 8)
    drawn = [sample(model, 8, bf16=bf16, **conditions).float() for bf16 in (False, True)]
    most = 0.75 if "input" in case.extra else 0.5  # another value is another vector, however near it is
    assert 0 < (drawn[0] != drawn[1]).float().mean() < most
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    sample(build(CASES["pixel_cnn"]), 1)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


class Trace(TorchDispatchMode):
    """What is asked of torch in each row: operations, numbers, and the static memory that they read and write."""

    def __init__(self):
        super().__init__()
        self.rows, self.made = [], set()

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        keywords = keywords or {}
        given = [x for x in tree_leaves((arguments, keywords)) if x is not None]
        out = operation(*arguments, **keywords)
        if self.rows:
            seen = [self.place(x) if isinstance(x, torch.Tensor) else x for x in given]
            self.rows[-1].append((str(operation), tuple(map(str, seen))))
            old = {x.untyped_storage().data_ptr() for x in given if isinstance(x, torch.Tensor)}
            for x in tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in old:
                    self.made.add(x.untyped_storage().data_ptr())
        return out

    def place(self, x):
        new = x.untyped_storage().data_ptr() in self.made
        return "new" if new else x.data_ptr(), tuple(x.shape), x.stride()


@pytest.mark.slow
@every_case
def test_all_rows_but_the_first_do_the_same_to_the_same_memory(case):
    """So do the first ones of two batches: both kinds can be captured and replayed, and the host is asked nothing."""

    class Mark(Draw):
        def load(self, i):
            super().load(i)
            trace.rows.append([])
            trace.made.clear()

        def store(self, i):
            trace.rows.append([])

    for net in build(case, channels=3, levels=4, height=4, width=3).nets:
        condition = any_condition(net, 2)
        rules, trace = [Mark(noise(seed, range(2), net.shape)) for seed in (0, 1)], Trace()
        loop = PixelLoop(net, "cached", rules[0], 2, condition, backend="torch")
        loop.run()  # a rule makes its memory at its first call
        trace.rows.clear()
        with trace:
            first = loop.run()
            second = loop.again(rules[1], None if condition is None else condition + 1)
        assert not torch.equal(first, second)
        rows = trace.rows[::2]  # between load and store; what follows belongs to the loop
        assert len(rows) == 2 * net.height and len(rows[-1]) > 50 * net.width
        for row in rows[2 : net.height] + rows[net.height + 1 :]:
            assert row == rows[1]
        assert rows[0] == rows[net.height]
        asked = {operation for operation, _ in rows[1]}
        assert not any("_local_scalar_dense" in operation or "nonzero" in operation for operation in asked)


def test_two_rows_are_captured_in_all_once_something_ran(monkeypatch):
    """Any but the first in the first batch, the first in the second; those after it capture nothing."""
    model, captured = build(CASES["row_lstm"], channels=2, levels=5, height=4), []
    kept = captured.append
    monkeypatch.setattr(models.sampling.loop, "captured", lambda run, stream: kept(run.args[-1]) or run.__call__)
    rules = [Draw(noise(seed, range(2), model.shape)) for seed in range(3)]
    expected = [PixelLoop(model, "cached", rule, 2).run() for rule in rules]
    loop = PixelLoop(model, "cached", Draw(noise(0, range(2), model.shape)), 2, backend="torch")
    assert not loop.capture and not captured
    loop.capture = True
    for rule, x, count in zip(rules, expected, (1, 2, 2), strict=True):
        assert torch.equal(loop.again(rule, None), x) and captured == [False, True][:count]


@every_target
def test_the_backend_may_be_named(case):
    model = build(case)
    with pytest.raises(ValueError, match="backend='cuda': expected triton, torch or cpu"):
        sample(model, 1, backend="cuda", **given(model, 1))
    drawn = [sample(model, 2, backend=backend, **given(model, 2)) for backend in (None, "torch", "cpu")]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[1], drawn[2])
    with kernels.use("torch"):
        assert backend_of_rows(model.nets[0], Draw(torch.zeros(1, *model.nets[0].shape))) == "torch"
