"""What `models` promises: causality, receptive fields, probabilities, likelihoods, construction.

Legend: b batch · c channel (colour) · h w rows, columns · v levels · n sub-pixels (h w c).
"""

import copy
import itertools
import math

import pytest
import torch

import models
from models.base import bits_per_dim
from models.features import Stretch, by_group, group_sizes, visible
from models.layers import MaskedConv, MaskedLinear, left_and_here
from models.sampling import sample
from tests.cases import (
    ARCHITECTURES,
    CASES,
    STATES,
    add_noise,
    build,
    changes,
    config,
    every_architecture,
    every_case,
    every_checker,
    every_conditioned,
    every_kind,
    every_mapped,
    every_net,
    every_softmax,
    every_state,
    every_target,
    given,
    given_alike,
    images,
    in_order,
    order,
    plain,
    sees,
    slow_if_between,
)

every_colours = pytest.mark.parametrize("channels", [1, 3])

# -------------------------------------------------------------------------------------------------- causality


@pytest.mark.parametrize(
    "case, state",
    [
        pytest.param(case, state, id=f"{name}-{which}", marks=slow_if_between(name))
        for name, case in CASES.items()
        for which, state in STATES.items()
        if plain(case) or which in ("fresh", "trained")
    ],
)
@every_colours
def test_no_conditional_sees_itself_or_what_comes_after(case, channels, state):
    """Perturbing any sub-pixel leaves every conditional at or before it as it was, to the last bit."""
    model = state(case, channels=channels, levels=5, height=4, width=5, dropout=0.3)
    for training in (True, False):
        changed = changes(model.train(training))
        wrong = changed.tril().nonzero()[:5].tolist()
        assert not wrong, f"(changed, seen by) in {'training' if training else 'evaluation'}: {wrong}"
        assert changed.triu(1).any()


def ever_changes(case, channels):
    """The union of `changes` over a few models and images, in one alone a ReLU may be closed; and one of the models."""
    size = {"channels": channels, "levels": 5, "height": 4, "width": 5, "hidden": 12}
    made = [build(case, seed=seed, **size) for seed in range(4)]
    return torch.stack([changes(model, seed) for seed, model in enumerate(made)]).any(0), made[0]


@every_case
@every_colours
def test_the_next_conditional_of_the_row_sees_each_sub_pixel(case, channels):
    """Green sees red of its pixel, blue sees green, and red sees blue of the pixel to the left."""
    changed, model = ever_changes(case, channels)
    row = order(model) // (model.width * channels)
    k = (row[:-1] == row[1:]).nonzero()[:, 0]
    assert changed[k, k + 1].all() and len(k) == len(row) - sum(net.height for net in model.nets)


@every_case
def test_blue_sees_red_of_its_pixel(case):
    changed, _ = ever_changes(case, 3)
    red = torch.arange(0, len(changed), 3)
    assert changed[red, red + 2].all()


@every_case
@pytest.mark.parametrize("channels", [1, 2])
def test_the_first_conditional_is_the_same_for_every_image(case, channels):
    model = build(case, channels=channels)
    first = in_order(model, model.conditionals(images(model, 6), **given_alike(model, 6)))[:, 0]
    assert torch.equal(first, first[:1].expand_as(first)) and first.std() > 0


@every_kind
def test_images_of_a_batch_do_not_mix(case):
    """Neither in eval nor in train mode: no normalization over the batch. Nor do labels and maps."""
    model = build(case, channels=3, levels=5)
    x = images(model, 4)
    other = torch.cat([x[:1], (x[1:] + 1) % 5])
    conditions, others = given(model, 4), given(model, 4, seed=3)
    for name, value in others.items():
        value[0] = conditions[name][0]
    for mode in (True, False):
        model.train(mode)
        assert torch.equal(model.conditionals(x, **conditions)[0], model.conditionals(other, **others)[0])


@every_kind
def test_dropout_acts_in_training_only(case):
    model = build(case, dropout=0.3)
    x, conditions = images(model, 4), given(model, 4)
    with torch.random.fork_rng(devices=[]):
        assert torch.equal(model.log_prob(x, **conditions), model.log_prob(x, **conditions))
        model.train()
        assert not torch.equal(model.log_prob(x, **conditions), model.log_prob(x, **conditions))


# -------------------------------------------------------------------------------------------- receptive field


def influence(model, u):
    """Which inputs the head's parameters for each sub-pixel depend on (n n), by gradients at the image u (h w c).

    A head with one group has the same parameters (p) for all colours of a pixel, others some for each.
    """
    n = u.numel()
    every = torch.arange(n)
    u = u.expand(n, *u.shape).clone().requires_grad_()
    condition = model.condition(**given_alike(model, n))
    read = u.repeat_interleave(model.stem.inputs.size // model.channels, -1)  # of an embedding, several numbers
    parameters = model.head(model.body(model.stem(read), condition)).flatten(1, -2)  # (n places p)
    own = parameters[every, every * parameters.shape[1] // n]  # (n p): row k's parameters for k
    weights = torch.linspace(1, 2, own.shape[1], dtype=u.dtype)
    (gradient,) = torch.autograd.grad((own * weights).sum(), u)
    return gradient.flatten(1) != 0


@every_architecture
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("shape", [(1, 7, 9), (1, 9, 4), (2, 6, 3), (3, 3, 5)], ids=str)
def test_receptive_field_is_exactly_what_the_architecture_allows(case, layers, shape):
    """Non-zero gradient on all that should be seen, from every position, corners too; zero elsewhere.

    The union of a random model and one whose weights and inputs are positive, where no ReLU is ever closed, and
    small, where no gate is flat. With the mixture no network sees a colour of the pixel itself: the head does.
    """
    c, h, w = shape
    model = build(case, channels=c, height=h, width=w, layers=layers).double()
    positive = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_().mul_(0.3)
    u = torch.rand(h, w, c, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = influence(model, 2 * u - 1) | influence(positive, u)
    groups = 1 if "head" in case.extra else c
    expected = case.reach(h, w, groups, layers)
    for dimension in range(2):
        expected = expected.repeat_interleave(c // groups, dimension)
    assert not expected.triu().any()
    wrong = (seen != expected).nonzero()
    assert not len(wrong), f"{len(wrong)} differ, (from, into): {wrong[:5].tolist()}"


def test_the_architectures_see_what_their_papers_say():
    """The table of expectations, on images of 7×9 with one layer.

    The PixelCNN has a blind spot to the right above, which the Gated PixelCNN has not; both are bounded. The Row LSTM
    reaches all rows above, but no further to the sides than they are above, and the Diagonal BiLSTM sees everything.
    """
    pixel_cnn, gated, row, diagonal = (CASES[name].reach(7, 9, 1, 1) for name in ARCHITECTURES)
    here, blind, far = 4 * 9 + 2, 3 * 9 + 6, 0 * 9 + 0
    last, corner, top = 6 * 9 + 8, 6 * 9 + 0, 0 * 9 + 4
    assert not pixel_cnn[here, blind] and gated[here, blind] and diagonal[here, blind] and not row[here, blind]
    assert pixel_cnn[here, far] and gated[here, far] and row[here, far]
    for bounded in (pixel_cnn, gated):
        assert not bounded[last, far] and not bounded[6 * 9 + 4, top]
    assert row[6 * 9 + 4, top] and row[last, far] and not row[corner + 1, 5 * 9 + 8]
    assert torch.equal(diagonal.sum(1), torch.arange(63))


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_gated_pixel_cnn_has_no_blind_spot_and_the_pixel_cnn_has_one(layers):
    """Of the rows above the one sees a full rectangle. The other, however deep, sees no more of the row above than its
    stem does to the right.
    """
    h, w, reach = 9, 15, 3 + layers
    i, j = h - 1, w // 2
    rectangle = torch.zeros(h, w, dtype=torch.bool)
    rectangle[i - reach : i, j - reach : j + reach + 1] = True
    seen = []
    for name in ("gated_pixel_cnn", "pixel_cnn"):
        model = build(CASES[name], height=h, width=w, layers=layers).double()
        u = 2 * torch.rand(1, h, w, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
        u.requires_grad_()
        (gradient,) = torch.autograd.grad(model.head(model.body(model.stem(u)))[0, i, j].square().sum(), u)
        seen.append(gradient.view(h, w) != 0)
        assert seen[-1][i].nonzero().flatten().tolist() == list(range(j - reach, j))
    assert torch.equal(seen[0][:i], rectangle[:i])
    blind = rectangle & ~seen[1]
    assert not (seen[1] & ~rectangle)[:i].any() and not blind[:, : j + 4].any()
    assert blind[i - 1, j + 4 : j + reach + 1].all()


# ------------------------------------------------------------------------------------- masks of single layers


@pytest.mark.parametrize("features, groups, sizes", [
    (128, 3, [43, 43, 42]), (7, 3, [3, 2, 2]), (5, 5, [1] * 5), (6, 2, [3, 3]), (9, 1, [9]),
])  # fmt: skip
@pytest.mark.parametrize("parts", [1, 4])
def test_groups_are_contiguous_and_differ_by_at_most_one(features, groups, sizes, parts):
    stretch = Stretch(features, groups)
    assert stretch.sizes == sizes
    assert list(itertools.chain(*(range(features)[s] for s in stretch.slices))) == list(range(features))
    places = by_group([stretch] * parts)
    for part in range(parts):
        of_part = [place[part * size : (part + 1) * size].tolist() for place, size in zip(places, sizes, strict=True)]
        assert list(itertools.chain(*of_part)) == list(range(part * features, (part + 1) * features))


def test_more_groups_than_features_are_refused():
    with pytest.raises(ValueError, match=r"\b2 features.*\b3 groups"):
        group_sizes(2, 3)


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("parts", [1, 4])
def test_colour_mask_lets_a_group_see_those_before_it_and_with_b_itself(kind, parts):
    inputs, outputs = [0, 0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2] * parts
    mask = visible(kind, [Stretch(5, 3)] * parts, [Stretch(7, 3)])
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
    assert torch.equal(
        connected(MaskedConv(kind, kernel, Stretch(inputs, groups), [Stretch(outputs, groups)]), inputs, h, w), expected
    )


@pytest.mark.parametrize("inputs, outputs, groups, parts", [(4, 6, 1, 1), (5, 7, 3, 1), (7, 20, 3, 4)])
def test_masked_linear_sees_what_its_mask_says(inputs, outputs, groups, parts):
    stretches = [Stretch(inputs, groups)], [Stretch(outputs // parts, groups)] * parts
    of_input, of_output = (
        torch.tensor([g for s in some for g, size in enumerate(group_sizes(s.size, groups)) for _ in range(size)])
        for some in stretches
    )
    assert torch.equal(connected(MaskedLinear(*stretches), inputs, 1, 1), of_output[:, None] >= of_input)


@pytest.mark.parametrize("groups, colours, vertical, outputs", [(1, 1, 2, 3), (3, 3, 2, 4), (1, 3, 3, 3)])
def test_vertical_features_of_a_masked_convolution_see_rows_above_alone(groups, colours, vertical, outputs):
    """All of their colours, to both sides; the other features' groups are as without."""
    h, w, reach = 5, 4, 2
    inputs, others = Stretch(colours, groups), Stretch(outputs, groups)
    layer = MaskedConv("A", 5, inputs, [Stretch(vertical, before=True), others])
    seen = connected(layer, colours, h, w).view(h, w, vertical + outputs, h, w, colours)
    i, j = torch.arange(h), torch.arange(w)
    rows = (i[:, None] > i) & (i[:, None] - i <= reach)
    columns = (j[:, None] - j).abs() <= reach
    above = rows[:, None, None, :, None, None] & columns[None, :, None, None, :, None]
    assert torch.equal(seen[:, :, :vertical], above.expand(h, w, vertical, h, w, colours))
    torch.manual_seed(0)
    alone = connected(MaskedConv("A", 5, inputs, [others]), colours, h, w)
    assert torch.equal(seen[:, :, vertical:].flatten(0, 2).flatten(1), alone)


@pytest.mark.parametrize("inputs, outputs, groups, parts, free", [(4, 6, 1, 1, 0), (5, 8, 3, 2, 4), (7, 20, 3, 4, 2)])
def test_a_convolution_along_the_row_sees_what_its_mask_says(inputs, outputs, groups, parts, free):
    """All of the pixel to the left, of its own what mask B shows, and all of what is free at the pixel itself."""
    own, gate = Stretch(inputs, groups), Stretch(outputs // parts, groups)
    before = [Stretch(free, before=True)] if free else []
    layer = MaskedLinear([own.of_pixels_before(), own, *before], [gate] * parts)
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
    given_at = torch.zeros(1, 2, 3, inputs + free)
    jacobian = torch.autograd.functional.jacobian(
        lambda u: layer(left_and_here(*u.split([inputs, free], -1))), given_at
    )
    centre = torch.cat([visible("B", [gate] * parts, [own]), torch.ones(outputs, free, dtype=torch.bool)], dim=1)
    expected = torch.zeros(2, 3, outputs, 2, 3, inputs + free, dtype=torch.bool)
    for i, j in itertools.product(range(2), range(3)):
        expected[i, j, :, i, j] = centre
        expected[i, j, :, i, :j, :inputs][:, -1:] = True
    assert torch.equal(jacobian[0, :, :, :, 0] != 0, expected)


# ------------------------------------------------------------------------------------------------- likelihood


def assert_sums_to_one(model):
    """Over all images, given any one condition."""
    values = itertools.product(range(model.levels), repeat=math.prod(model.shape))
    every_image = torch.tensor(list(values)).view(-1, *model.shape)
    probabilities = model.log_prob(every_image, **given_alike(model, len(every_image), seed=1)).detach().double().exp()
    assert abs(probabilities.sum().item() - 1) < 1e-5
    assert probabilities.max() > 2 * probabilities.min()  # and they are not all the same


@every_case
@pytest.mark.parametrize("shape, levels", [((1, 2, 2), 3), ((2, 2, 2), 2)], ids=str)
def test_probabilities_of_all_images_sum_to_one(case, shape, levels):
    c, h, w = shape
    assert_sums_to_one(build(case, channels=c, height=h, width=w, levels=levels))


@every_architecture
def test_probabilities_of_all_images_of_one_row_and_three_colours_sum_to_one(case):
    assert_sums_to_one(build(case, channels=3, height=1, width=2, levels=3))


@every_case
@every_colours
def test_log_prob_is_the_sum_of_the_conditionals_at_the_image(case, channels):
    model = build(case, channels=channels, levels=5)
    x, conditions = images(model, 6), given(model, 6)
    conditionals = model.conditionals(x, **conditions)
    assert conditionals.shape == (6, *model.shape, 5)
    torch.testing.assert_close(conditionals.exp().sum(-1), torch.ones(x.shape))
    gathered = conditionals.gather(-1, x[..., None]).flatten(1).sum(1)
    log_prob = model.log_prob(x, **conditions)
    torch.testing.assert_close(gathered, log_prob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(-model(x, **conditions), log_prob, rtol=0, atol=0)


@every_softmax
@every_colours
def test_uniform_logits_cost_eight_bits_a_sub_pixel(case, channels):
    """256 equal probabilities are exactly 8.00 bits/dim."""
    model = build(case, channels=channels, levels=256)
    for net in model.nets:
        *_, weight, bias = net.head.parameters()
        with torch.no_grad():
            weight.zero_()
            bias.zero_()
    nats = -model.log_prob(images(model, 3), **given(model, 3))
    torch.testing.assert_close(bits_per_dim(nats, model.shape), torch.full((3,), 8.0), rtol=1e-6, atol=0)


def test_bits_per_dim_is_nats_over_log_two_and_sub_pixels():
    assert bits_per_dim(12 * math.log(2), (3, 2, 2)) == pytest.approx(1)
    assert bits_per_dim(80.75, (1, 28, 28)) == pytest.approx(80.75 / 784 / math.log(2))


@every_kind
def test_likelihood_is_the_same_for_any_integer_type_and_leaves_the_image_alone(case):
    model = build(case)
    x, conditions = images(model, 3), given(model, 3)
    expected, before = model.log_prob(x, **conditions), x.clone()
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(model.log_prob(x.to(dtype), **conditions), expected)
        if "label" in conditions:
            typed = {**conditions, "label": conditions["label"].to(dtype)}
            assert torch.equal(model.log_prob(x, **typed), expected)
    assert torch.equal(x, before)


@every_kind
def test_every_parameter_gets_a_gradient_at_a_common_size(case):
    """From initialisation, without noise: nothing starts dead."""
    torch.manual_seed(0)
    model = models.build(config(case, channels=3, height=6, width=6, hidden=12, levels=8, skip=True))
    gradients = torch.autograd.grad(model(images(model, 16), **given(model, 16)).mean(), list(model.parameters()))
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)


@every_kind
def test_a_few_steps_of_training_lower_the_loss(case):
    torch.manual_seed(0)
    model = models.build(config(case))
    x, conditions = images(model, 1).expand(8, *model.shape), given(model, 8)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = model(x, **conditions).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@every_case
def test_a_reload_gives_the_same_likelihoods(case):
    model, other = build(case, channels=3), build(case, channels=3, seed=1)
    x, conditions = images(model, 4), given(model, 4)
    assert not torch.equal(other.log_prob(x, **conditions), model.log_prob(x, **conditions))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.log_prob(x, **conditions), model.log_prob(x, **conditions))


@every_target
@pytest.mark.parametrize("wrong, named", [
    (torch.zeros(1, 6, 4), ["(1, 6, 4)", "1, 4, 6)"]),
    (torch.zeros(1, 1, 6, 4, dtype=torch.long), ["(1, 1, 6, 4)", "1, 4, 6)"]),
    (torch.zeros(2, 3, 4, 6, dtype=torch.long), ["(2, 3, 4, 6)", "1, 4, 6)"]),
    (torch.zeros(1, 1, 4, 6), ["float32", "integers"]),
    (torch.full((1, 1, 4, 6), 4), ["4", "0 to 3"]),
    (torch.full((1, 1, 4, 6), 255, dtype=torch.uint8), ["255", "0 to 3"]),
    (torch.full((1, 1, 4, 6), -1), ["-1", "0 to 3"]),
], ids=["dimensions", "sides", "colours", "float", "levels", "uint8", "negative"])  # fmt: skip
def test_images_of_another_kind_are_refused(case, wrong, named):
    model = build(case, height=4, width=6)
    if wrong.shape[1:] == (1, 4, 6):
        wrong = wrong.expand(len(wrong), *model.shape)
    for method in (model.log_prob, model.conditionals):
        with pytest.raises(ValueError) as error:
            method(wrong)
        assert all(text in str(error.value) for text in named), error.value


# ------------------------------------------------------------------------------------------------- conditions


@every_conditioned
@pytest.mark.parametrize("channels", [1, 3])
def test_the_label_moves_every_conditional(case, channels):
    """The first too, which no pixel moves."""
    model = build(case, channels=channels, levels=5, hidden=12)
    conditions = {**given_alike(model, 3), "label": torch.arange(3)}
    first, second, third = model.conditionals(images(model, 1).expand(3, *model.shape), **conditions)
    for one, other in ((first, second), (first, third), (second, third)):
        assert (one != other).any(-1).all()


@every_mapped
@pytest.mark.parametrize("channels", [1, 3])
def test_each_feature_of_a_map_moves_the_conditionals_of_the_pixel_itself(case, channels):
    """A map is known in advance: that of the first pixel moves the first conditional."""
    model = build(case, channels=channels, levels=5, hidden=12)
    pixels = model.height * model.width
    every, x, conditions = torch.arange(pixels), images(model, 1).expand(pixels, -1, -1, -1), given_alike(model, pixels)
    before = model.conditionals(x, **conditions)
    for feature in range(model.map_features):
        cond = conditions["cond"].clone()
        cond[:, feature].flatten(1)[every, every] += 1
        changed = (model.conditionals(x, **{**conditions, "cond": cond}) != before).any(-1)
        assert changed.flatten(2)[every, :, every].all()


@every_net
@pytest.mark.parametrize("conditions", [{"classes": 3}, {"map_features": 2}], ids=["label", "map"])
def test_a_label_or_a_map_alone_is_a_condition(case, conditions):
    model = build(case, channels=2, **conditions)
    x = images(model, 4)
    assert list(given(model, 4)) == [{"classes": "label", "map_features": "cond"}[name] for name in conditions]
    one, other = (model.log_prob(x, **given(model, 4, seed)) for seed in (0, 1))
    assert (one != other).all()
    changed = changes(model)
    assert not changed.tril().any() and changed.triu(1).any()


@every_net
def test_a_map_of_another_precision_is_converted(case):
    model = build(case, map_features=2)
    x, cond = images(model, 2), given(model, 2)["cond"]
    assert torch.equal(model.log_prob(x, cond=cond.double()), model.log_prob(x, cond=cond))


LABEL, MAP = {"classes": 3}, {"map_features": 2}


@every_checker
@pytest.mark.parametrize("made, wrong, named", [
    (LABEL, {}, ["label: expected one of 3 classes", "found none"]),
    (LABEL, {"label": torch.tensor([0, 3])}, ["label", "found 0 to 3", "0 to 2"]),
    (LABEL, {"label": torch.tensor([-1, 2])}, ["label", "found -1 to 2", "0 to 2"]),
    (LABEL, {"label": torch.tensor([255, 2], dtype=torch.uint8)}, ["label", "found 2 to 255", "0 to 2"]),
    (LABEL, {"label": torch.tensor([1])}, ["label", "(1,)", "(2,)"]),
    (LABEL, {"label": torch.tensor(1)}, ["label", "()", "(2,)"]),
    (LABEL, {"label": torch.tensor([[0, 1]])}, ["label", "(1, 2)", "(2,)"]),
    (LABEL, {"label": torch.tensor([0.0, 1.0])}, ["label", "float32", "integers"]),
    (LABEL, {"label": torch.tensor([True, False])}, ["label", "bool", "integers"]),
    (LABEL, {"label": ["0", 1]}, ["label", "list", "tensor"]),
    ({}, {"label": torch.tensor([0, 1])}, ["label: expected none", "without classes"]),
    ({}, {"cond": torch.zeros(2, 2, 4, 6)}, ["cond: expected none", "without map_features"]),
], ids=[
    "missing", "too_high", "negative", "uint8", "number", "scalar", "dimensions", "float", "bool", "list",
    "no_classes", "no_maps",
])  # fmt: skip
def test_a_wrong_condition_is_refused_with_its_value_and_what_is_allowed(case, made, wrong, named):
    assert_refused(build(case, height=4, width=6, **made), wrong, named)


@every_net
@pytest.mark.parametrize("wrong, named", [
    ({}, ["cond: expected maps (2, 2, 4, 6)", "found none"]),
    ({"cond": torch.zeros(2, 2, 6, 4)}, ["cond", "(2, 2, 6, 4)", "(2, 2, 4, 6)"]),
    ({"cond": torch.zeros(2, 3, 4, 6)}, ["cond", "(2, 3, 4, 6)", "(2, 2, 4, 6)"]),
    ({"cond": torch.zeros(1, 2, 4, 6)}, ["cond", "(1, 2, 4, 6)", "(2, 2, 4, 6)"]),
    ({"cond": torch.zeros(2, 4, 6)}, ["cond", "(2, 4, 6)", "(2, 2, 4, 6)"]),
    ({"cond": torch.zeros(2, 2, 4, 6, dtype=torch.long)}, ["cond", "int64", "floats"]),
], ids=["missing", "sides", "features", "number", "dimensions", "integers"])  # fmt: skip
def test_a_wrong_map_is_refused_with_its_shape_and_what_is_allowed(case, wrong, named):
    assert_refused(build(case, height=4, width=6, **MAP), wrong, named)


def assert_refused(model, conditions, named):
    x = images(model, 2)
    for call in (model.log_prob, model.conditionals, lambda x, **conditions: sample(model, 2, **conditions)):
        with pytest.raises(ValueError) as error:
            call(x, **conditions)
        message = str(error.value)
        assert all(text in message for text in named) and "\n" not in message, message


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
    assert isinstance(model, torch.nn.Module)
    assert model.shape[-3:] == (1, arguments["height"], arguments["width"])


@every_target
def test_features_need_not_be_divisible_by_the_colours(case):
    """128 features in 3 groups: 43 43 42. Causality at that width is proven as at any other."""
    model = build(case, channels=3, levels=5, height=2, width=3, hidden=128, layers=1, std=0.03)
    changed = changes(model)
    assert not changed.tril().any() and changed.triu(1).any()


def test_every_class_has_a_case():
    assert {case.target for case in CASES.values()} == set(models.__all__)


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
    ({"head": "gaussian"}, ["head='gaussian'", "softmax or logistic_mixture"]),
    ({"head": None}, ["head=None", "softmax or logistic_mixture"]),
    ({"mixtures": 0}, ["mixtures=0", "at least 1"]),
    ({"mixtures": 2.5, "head": "logistic_mixture"}, ["mixtures=2.5", "integer"]),
    ({"classes": -1}, ["classes=-1", "at least 0"]),
    ({"classes": True}, ["classes=True", "integer"]),
]


@every_checker
@pytest.mark.parametrize("wrong, named", WRONG, ids=lambda value: "-".join(value)[:16])
def test_a_wrong_argument_is_refused_with_its_name_and_what_is_allowed(case, wrong, named):
    with pytest.raises(ValueError) as error:
        models.build(config(case, **wrong))
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


@every_net
@pytest.mark.parametrize("wrong, named", [
    ({"map_features": -1}, ["map_features=-1", "at least 0"]),
    ({"map_features": 1.5}, ["map_features=1.5", "integer"]),
], ids=["negative", "float"])  # fmt: skip
def test_a_wrong_number_of_map_features_is_refused(case, wrong, named):
    with pytest.raises(ValueError) as error:
        models.build(config(case, **wrong))
    assert all(text in str(error.value) for text in named), error.value


@every_target
@pytest.mark.parametrize("name", ["channels", "levels", "height", "width", "hidden", "layers"])
def test_a_missing_argument_is_named(case, name):
    arguments = config(case)
    del arguments[name]
    with pytest.raises(ValueError, match=rf"expected .*{name}.* too"):
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


@pytest.mark.slow
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
