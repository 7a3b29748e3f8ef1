"""What `models` promises: causality, receptive fields, probabilities, likelihoods, construction.

Legend: b batch · c channel (colour) · h w rows, columns · v levels · n sub-pixels in raster order (h w c).
"""

import copy
import itertools
import math

import pytest
import torch

import models
from models.base import bits_per_dim
from models.layers import MaskedConv, MaskedLinear, colour_mask, group_sizes, group_slices
from tests.cases import (
    CASES,
    TARGETS,
    add_noise,
    build,
    config,
    every_case,
    every_state,
    every_target,
    images,
    raster,
    sees,
)

every_colours = pytest.mark.parametrize("channels", [1, 3])

# -------------------------------------------------------------------------------------------------- causality


def changes(model, seed: int = 0):
    """Whether changing sub-pixel k changes conditional m, in an image of its own for each k: (n n), [k, m].

    Both forwards have the same batch, rows and random state, so what does not see k is equal to the last bit.
    """
    c, h, w = model.shape
    n = c * h * w
    x = images(model, n, seed)
    every = torch.arange(n)
    flat = x.permute(0, 2, 3, 1).reshape(n, n).clone()
    shift = torch.randint(1, model.levels, (n,), generator=torch.Generator().manual_seed(seed))
    flat[every, every] = (flat[every, every] + shift) % model.levels
    perturbed = flat.view(n, h, w, c).permute(0, 3, 1, 2)
    conditionals = []
    for given in (x, perturbed):
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(seed)
            conditionals.append(raster(model.conditionals(given)))
    return (conditionals[0] != conditionals[1]).any(-1)


@every_case
@every_colours
@pytest.mark.parametrize("mode", ["train", "eval"])
@every_state
def test_no_conditional_sees_itself_or_what_comes_after(case, channels, mode, state):
    """Perturbing any sub-pixel leaves every conditional at or before it as it was, to the last bit."""
    model = state(case, channels=channels, levels=5, height=4, width=5, dropout=0.3)
    model.train(mode == "train")
    changed = changes(model)
    assert not changed.tril().any(), f"(changed, seen by): {changed.tril().nonzero()[:5].tolist()}"
    assert changed.triu(1).any()


def ever_changes(case, channels):
    """The union of `changes` over a few models and images: in one alone, a ReLU may be closed."""
    size = {"channels": channels, "levels": 5, "height": 4, "width": 5, "hidden": 12}
    return torch.stack([changes(build(case, seed=seed, **size), seed) for seed in range(4)]).any(0)


@every_case
@every_colours
def test_the_next_conditional_of_the_row_sees_each_sub_pixel(case, channels):
    """Green sees red of its pixel, blue sees green, and red sees blue of the pixel to the left."""
    of_row = torch.arange(4 * 5 * channels).view(4, -1)
    k = of_row[:, :-1].flatten()
    assert ever_changes(case, channels)[k, k + 1].all()


@every_case
def test_blue_sees_red_of_its_pixel(case):
    red = torch.arange(0, 60, 3)
    assert ever_changes(case, 3)[red, red + 2].all()


@every_case
@pytest.mark.parametrize("channels", [1, 2])
def test_the_first_conditional_is_the_same_for_every_image(case, channels):
    model = build(case, channels=channels)
    first = raster(model.conditionals(images(model, 6)))[:, 0]
    assert torch.equal(first, first[:1].expand_as(first)) and first.std() > 0


@every_target
def test_images_of_a_batch_do_not_mix(case):
    """Neither in eval nor in train mode: no normalization over the batch."""
    model = build(case, channels=3, levels=5)
    x = images(model, 4)
    other = torch.cat([x[:1], (x[1:] + 1) % 5])
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model.conditionals(x)[0], model.conditionals(other)[0])


@every_target
def test_dropout_acts_in_training_only(case):
    model = build(case, dropout=0.3)
    x = images(model, 4)
    with torch.random.fork_rng():
        assert torch.equal(model.log_prob(x), model.log_prob(x))
        model.train()
        assert not torch.equal(model.log_prob(x), model.log_prob(x))


# -------------------------------------------------------------------------------------------- receptive field


def influence(model, u):
    """Which inputs the logits of each sub-pixel depend on (n n), by gradients at the image u (h w c)."""
    n = u.numel()
    u = u.expand(n, *u.shape).clone().requires_grad_()
    logits = model.head(model.body(model.stem(u)))  # (n h w c v)
    own = logits.flatten(1, 3).diagonal()  # (v n): row k's conditional k
    weights = torch.linspace(1, 2, len(own), dtype=u.dtype)[:, None]
    (gradient,) = torch.autograd.grad((own * weights).sum(), u)
    return gradient.flatten(1) != 0


@every_case
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", [(1, 7, 9), (1, 9, 4), (2, 6, 3), (3, 3, 5)], ids=str)
def test_receptive_field_is_exactly_what_the_architecture_allows(case, layers, shape):
    """Non-zero gradient on all that should be seen, from every position, corners too; zero elsewhere.

    The union of a random model and one whose weights and inputs are positive, where no ReLU is ever closed.
    """
    c, h, w = shape
    model = build(case, channels=c, height=h, width=w, layers=layers).double()
    positive = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()
    u = torch.rand(h, w, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = influence(model, 2 * u - 1) | influence(positive, u)
    expected = case.reach(h, w, c, layers)
    assert not expected.triu().any()
    wrong = (seen != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} differ, (from, into): {wrong[:5].tolist()}"


def test_pixel_cnn_is_bounded_and_diagonal_bilstm_is_not():
    """The table of expectations says what the paper says, with a blind spot to the right in the PixelCNN."""
    pixel_cnn, diagonal = (TARGETS[t].reach(7, 9, 1, 1) for t in ("PixelCNN", "DiagBiLSTM"))
    here, blind, far = 4 * 9 + 2, 3 * 9 + 8, 0 * 9 + 0
    assert not pixel_cnn[here, blind] and diagonal[here, blind]
    assert pixel_cnn[here, far] and not pixel_cnn[6 * 9 + 8, far] and diagonal[6 * 9 + 8, far]
    assert torch.equal(diagonal.sum(1), torch.arange(63))


# ------------------------------------------------------------------------------------- masks of single layers


@pytest.mark.parametrize("features, groups, sizes", [
    (128, 3, [43, 43, 42]), (7, 3, [3, 2, 2]), (5, 5, [1] * 5), (6, 2, [3, 3]), (9, 1, [9]),
])  # fmt: skip
@pytest.mark.parametrize("parts", [1, 4])
def test_groups_are_contiguous_and_differ_by_at_most_one(features, groups, sizes, parts):
    assert group_sizes(features, groups) == sizes
    slices = group_slices(parts * features, groups, parts)
    assert len(slices) == groups and all(len(group) == parts for group in slices)
    for part in range(parts):
        places = [torch.arange(parts * features)[group[part]].tolist() for group in slices]
        assert [len(place) for place in places] == sizes
        assert list(itertools.chain(*places)) == list(range(part * features, (part + 1) * features))


def test_more_groups_than_features_are_refused():
    with pytest.raises(ValueError, match=r"\b2 features.*\b3 groups"):
        group_sizes(2, 3)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("parts", [1, 4])
def test_colour_mask_lets_a_group_see_those_before_it_and_with_b_itself(kind, parts):
    inputs, outputs = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2] * parts
    mask = colour_mask(kind, 7, 5 * parts, 3, parts)
    expected = [[into < out or (kind == "B" and into == out) for into in inputs] for out in outputs]
    assert mask.tolist() == expected


def connected(layer, inputs: int, h: int, w: int):
    """Which inputs (h w inputs) each output (h w outputs) of a layer depends on."""
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
    u = torch.zeros(1, h, w, inputs, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda u: layer(u).flatten(), u)
    return jacobian.flatten(1) != 0


@pytest.mark.parametrize("kind, kernel", [("A", 7), ("A", 3), ("B", 3), ("B", 1)])
@pytest.mark.parametrize("groups, inputs, outputs", [(1, 1, 1), (1, 2, 3), (2, 2, 5), (3, 3, 3), (3, 5, 4)])
def test_masked_convolution_sees_what_its_mask_says(kind, kernel, groups, inputs, outputs):
    h, w = 5, 4
    of_input = torch.repeat_interleave(torch.arange(groups), torch.tensor(group_sizes(inputs, groups)))
    of_output = torch.repeat_interleave(torch.arange(groups), torch.tensor(group_sizes(outputs, groups)))
    pixel = groups * torch.arange(h * w)[:, None]
    of_output, of_input = (pixel + of_output).flatten(), (pixel + of_input).flatten()
    expected = sees(h, w, groups, kernel // 2, kind)[of_output][:, of_input]
    assert torch.equal(connected(MaskedConv(kind, kernel, inputs, outputs, groups), inputs, h, w), expected)


@pytest.mark.parametrize("inputs, outputs, groups, parts", [(4, 6, 1, 1), (5, 7, 3, 1), (7, 20, 3, 4)])
def test_masked_linear_sees_what_its_mask_says(inputs, outputs, groups, parts):
    seen = connected(MaskedLinear(inputs, outputs, groups, parts), inputs, 1, 1)
    assert torch.equal(seen, colour_mask("B", inputs, outputs, groups, parts))


# ------------------------------------------------------------------------------------------------- likelihood


@every_case
@pytest.mark.parametrize("shape, levels", [((1, 2, 2), 3), ((2, 2, 2), 2), ((3, 1, 2), 3)], ids=str)
def test_probabilities_of_all_images_sum_to_one(case, shape, levels):
    c, h, w = shape
    model = build(case, channels=c, height=h, width=w, levels=levels)
    every_image = torch.tensor(list(itertools.product(range(levels), repeat=c * h * w))).view(-1, c, h, w)
    probabilities = model.log_prob(every_image).detach().double().exp()
    assert abs(probabilities.sum().item() - 1) < 1e-5
    assert probabilities.max() > 2 * probabilities.min()  # and they are not all the same


@every_case
@every_colours
def test_log_prob_is_the_sum_of_the_conditionals_at_the_image(case, channels):
    model = build(case, channels=channels, levels=5)
    x = images(model, 6)
    conditionals = model.conditionals(x)
    assert conditionals.shape == (6, *model.shape, 5)
    torch.testing.assert_close(conditionals.exp().sum(-1), torch.ones(x.shape))
    gathered = conditionals.gather(-1, x[..., None]).flatten(1).sum(1)
    torch.testing.assert_close(gathered, model.log_prob(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-model(x), model.log_prob(x), rtol=0, atol=0)


@every_case
@every_colours
def test_uniform_logits_cost_eight_bits_a_sub_pixel(case, channels):
    """256 equal probabilities are exactly 8.00 bits/dim."""
    model = build(case, channels=channels, levels=256)
    *_, weight, bias = model.head.parameters()
    with torch.no_grad():
        weight.zero_()
        bias.zero_()
    nats = -model.log_prob(images(model, 3))
    torch.testing.assert_close(bits_per_dim(nats, model.shape), torch.full((3,), 8.0), rtol=1e-6, atol=0)


def test_bits_per_dim_is_nats_over_log_two_and_sub_pixels():
    assert bits_per_dim(12 * math.log(2), (3, 2, 2)) == pytest.approx(1)
    assert bits_per_dim(80.75, (1, 28, 28)) == pytest.approx(80.75 / 784 / math.log(2))


@every_target
def test_likelihood_is_the_same_for_any_integer_type_and_leaves_the_image_alone(case):
    model = build(case)
    x = images(model, 3)
    expected, before = model.log_prob(x), x.clone()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model.log_prob(x.to(dtype)), expected)
    assert torch.equal(x, before)


@every_target
def test_every_parameter_gets_a_gradient_at_a_common_size(case):
    """From initialisation, without noise: nothing starts dead."""
    torch.manual_seed(0)
    model = models.build(config(case, channels=3, height=6, width=6, hidden=12, levels=8, skip=True))
    gradients = torch.autograd.grad(model(images(model, 16)).mean(), list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@every_target
def test_a_few_steps_of_training_lower_the_loss(case):
    torch.manual_seed(0)
    model = models.build(config(case))
    x = images(model, 1).expand(8, -1, -1, -1)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@every_case
def test_a_reload_gives_the_same_likelihoods(case):
    model, other = build(case, channels=3), build(case, channels=3, seed=1)
    x = images(model, 4)
    assert not torch.equal(other.log_prob(x), model.log_prob(x))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x), model.log_prob(x))


@every_target
@pytest.mark.parametrize("wrong, named", [
    (torch.zeros(1, 4, 3), ["(1, 4, 3)", "(b, 1, 3, 4)"]),
    (torch.zeros(1, 1, 4, 3, dtype=torch.long), ["(1, 1, 4, 3)", "(b, 1, 3, 4)"]),
    (torch.zeros(2, 3, 3, 4, dtype=torch.long), ["(2, 3, 3, 4)", "(b, 1, 3, 4)"]),
    (torch.zeros(1, 1, 3, 4), ["float32", "integers"]),
    (torch.full((1, 1, 3, 4), 4), ["4", "0 to 3"]),
    (torch.full((1, 1, 3, 4), 255, dtype=torch.uint8), ["255", "0 to 3"]),
    (torch.full((1, 1, 3, 4), -1), ["-1", "0 to 3"]),
], ids=["dimensions", "sides", "colours", "float", "levels", "uint8", "negative"])  # fmt: skip
def test_images_of_another_kind_are_refused(case, wrong, named):
    model = build(case)
    for method in (model.log_prob, model.conditionals):
        with pytest.raises(ValueError) as error:
            method(wrong)
        assert all(text in str(error.value) for text in named), error.value


# ----------------------------------------------------------------------------------------------- construction


@every_case
def test_same_seed_same_parameters(case):
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(models.build(config(case, channels=3)).state_dict())
    first, second, other = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@every_target
def test_a_class_may_be_called_directly(case):
    arguments = {key: value for key, value in config(case).items() if key != "_target_"}
    model = getattr(models, case.target)(**arguments)
    assert isinstance(model, torch.nn.Module) and model.shape == (1, 3, 4)


@every_target
def test_features_need_not_be_divisible_by_the_colours(case):
    """128 features in 3 groups: 43 43 42. Causality at that width is proven as at any other."""
    model = build(case, channels=3, levels=5, height=2, width=3, hidden=128, layers=1, std=0.03)
    changed = changes(model)
    assert not changed.tril().any() and changed.triu(1).any()


def test_every_class_has_a_case():
    assert set(TARGETS) == set(models.__all__)


WRONG = [  # what is wrong in the config, what the message names: the value, then what is allowed
    ({"hiden": 8}, ["'hiden'", "hidden"]),
    ({"classes_": 8}, ["'classes_'", "hidden"]),
    ({"layers": 0}, ["layers=0", "at least 1"]),
    ({"layers": 1.0}, ["layers=1.0", "integer"]),
    ({"hidden": "abc"}, ["hidden='abc'", "integer"]),
    ({"hidden": True}, ["hidden=True", "integer"]),
    ({"hidden": None}, ["hidden=None", "integer"]),
    ({"hidden": {"_target_": "os.system", "command": "false"}}, ["hidden={", "integer"]),
    ({"hidden": 2, "channels": 3}, ["hidden=2", "at least 3"]),
    ({"channels": 0}, ["channels=0", "at least 1"]),
    ({"channels": "rgb"}, ["channels='rgb'", "integer"]),
    ({"levels": 1}, ["levels=1", "at least 2"]),
    ({"height": 0}, ["height=0", "at least 1"]),
    ({"width": -3}, ["width=-3", "at least 1"]),
    ({"head_features": 0}, ["head_features=0", "at least 1"]),
    ({"dropout": 2}, ["dropout=2", "from 0.0 to 0.95"]),
    ({"dropout": float("nan")}, ["dropout=nan", "from 0.0 to 0.95"]),
    ({"residual": "yes"}, ["residual='yes'", "true or false"]),
    ({"skip": 1}, ["skip=1", "true or false"]),
]


@every_target
@pytest.mark.parametrize("wrong, named", WRONG, ids=lambda value: "-".join(value)[:16])
def test_a_wrong_argument_is_refused_with_its_name_and_what_is_allowed(case, wrong, named):
    with pytest.raises(ValueError) as error:
        models.build(config(case, **wrong))
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


@every_target
@pytest.mark.parametrize("name", ["channels", "levels", "height", "width", "hidden", "layers"])
def test_a_missing_argument_is_named(case, name):
    arguments = config(case)
    del arguments[name]
    with pytest.raises(ValueError, match=rf"needs .*{name}"):
        models.build(arguments)


@pytest.mark.parametrize("target", [
    "models.Pixel", "PixelCNN", "os.system", "models.build", "models.base.AutoregressiveModel",
    "models.inspect", "", None,
])  # fmt: skip
def test_no_other_target_is_ever_built(target):
    """Exact class names alone, so a config from elsewhere runs nothing."""
    arguments = config(CASES["pixel_cnn"])
    arguments["_target_"] = target
    with pytest.raises(ValueError) as error:
        models.build(arguments)
    assert repr(target) in str(error.value)
    assert all(f"models.{name}" in str(error.value) for name in models.__all__)


def test_a_config_without_target_is_refused_and_no_config_is_changed():
    arguments = config(CASES["pixel_cnn"])
    before = dict(arguments)
    models.build(arguments)
    assert arguments == before
    del arguments["_target_"]
    with pytest.raises(ValueError, match="_target_=None"):
        models.build(arguments)


@every_state
@every_target
def test_noise_moves_every_parameter(case, state):
    """The helper of these tests: none of them looks at a parameter that is still zero."""
    model = state(case, channels=3, levels=5)
    assert all(parameter.ne(0).all() for parameter in model.parameters())
    before = copy.deepcopy(model)
    add_noise(model, 1)
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    assert all(not torch.equal(p, q) for p, q in pairs)
