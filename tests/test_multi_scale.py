"""What `models.MultiScale` promises beside what all models do: how its nets make one likelihood, and one image.

Legend: b batch · n images · c channel (colour) · h w rows, columns · v levels.
"""

import pytest
import torch

import models
from models.sampling import noise, sample
from tests.cases import (
    CASES,
    assert_cached_equals_forward,
    assert_methods_agree,
    build,
    changes,
    config,
    given,
    given_alike,
    images,
    independent,
    noises,
    order,
    stages,
)

CASE = CASES["multi_scale"]
SMALL = {"base": "pixel_cnn", "conditional": "gated_pixel_cnn", "channels": 2, "levels": 5}
TWICE = {**SMALL, "doublings": 2, "height": 4, "width": 8}

every_pair = pytest.mark.parametrize("base, conditional", [
    ("pixel_cnn", "gated_pixel_cnn"), ("gated_pixel_cnn", "row_lstm"),
    ("row_lstm", "diag_bilstm"), ("diag_bilstm", "pixel_cnn"),
], ids="-".join)  # fmt: skip
every_head = pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
every_classes = pytest.mark.parametrize("classes", [0, 3])
every_copy_known = pytest.mark.parametrize("copy_known", [True, False])
every_doubling = pytest.mark.parametrize("doublings", [1, 2])


def halves(x):
    """The pixels of images (b c h w) in even rows and columns."""
    return x[:, :, ::2, ::2]


# ------------------------------------------------------------------------------------------------- likelihood


def total_probability(model):
    """The probabilities of all images of a model of binary values, given any one condition, added up."""
    n = model.height * model.width
    every_image = (torch.arange(2**n)[:, None] >> torch.arange(n)) % 2
    total = 0.0
    with torch.no_grad():
        for x in every_image.view(-1, *model.shape).split(8192):
            total += model.log_prob(x, **given_alike(model, len(x), seed=1)).double().exp().sum().item()
    return total


@pytest.mark.parametrize("arguments", [
    {"base": "diag_bilstm", "conditional": "diag_bilstm"},
    {"base": "pixel_cnn", "conditional": "row_lstm", "classes": 3},
    {"base": "row_lstm", "conditional": "gated_pixel_cnn", "head": "logistic_mixture", "classes": 3},
    {"base": "gated_pixel_cnn", "conditional": "pixel_cnn", "doublings": 2},
    {"base": "diag_bilstm", "conditional": "gated_pixel_cnn", "doublings": 2, "head": "logistic_mixture", "classes": 3},
], ids=lambda arguments: "-".join(map(str, arguments.values())))  # fmt: skip
@pytest.mark.slow
def test_probabilities_of_all_65536_images_of_4x4_sum_to_one(arguments):
    """From smallest images of 2×2, or of 1×1 where they are doubled twice."""
    model = build(CASE, levels=2, height=4, width=4, hidden=4, layers=1, **arguments)
    assert abs(total_probability(model) - 1) < 1e-5


@every_head
def test_without_copy_known_mass_is_lost(head):
    """On large images that disagree with the small one: what is left is no normalized likelihood."""
    lost = 1 - total_probability(build(CASE, levels=2, height=2, width=4, copy_known=False, head=head))
    assert 0.1 < lost < 0.9


@every_copy_known
@every_head
@every_classes
@every_doubling
def test_the_likelihood_is_a_product_over_the_nets(copy_known, head, classes, doublings):
    """Each net is conditioned on the whole smaller image, and pays for the pixels that this does not show."""
    model = build(CASE, **{**TWICE, "doublings": doublings}, copy_known=copy_known, head=head, classes=classes)
    x, conditions = images(model, 4), given(model, 4)
    sizes = [x]
    for _ in range(doublings):
        sizes.insert(0, halves(sizes[0]))
    expected = model.nets[0].log_prob(sizes[0], **conditions)
    for k in range(1, doublings + 1):
        cond = model.upsample[k - 1](2 * sizes[k - 1] / 4 - 1.0)
        log_probs = model.nets[k].conditionals(sizes[k], **conditions, cond=cond)
        log_probs = log_probs.gather(-1, sizes[k][..., None])[..., 0]
        if copy_known:
            halves(log_probs).zero_()
        expected = expected + log_probs.sum((1, 2, 3))
    torch.testing.assert_close(model.log_prob(x, **conditions), expected, rtol=1e-5, atol=1e-4)


@every_copy_known
@every_doubling
@every_classes
def test_parts_sum_to_the_nats(copy_known, doublings, classes):
    model = build(CASE, **{**TWICE, "doublings": doublings}, copy_known=copy_known, classes=classes)
    x, conditions = images(model, 4), given(model, 4)
    parts = model.parts(x, **conditions)
    names = {1: ["base_2x4", "conditional_4x8"], 2: ["base_1x2", "conditional_2x4", "conditional_4x8"]}
    assert list(parts) == names[doublings] and all(part.shape == (4,) for part in parts.values())
    torch.testing.assert_close(sum(parts.values()), -model.log_prob(x, **conditions))
    assert all(part.min() > 0 for part in parts.values())


def test_models_with_one_net_have_no_parts():
    model = build(CASES["pixel_cnn"])
    assert model.parts(images(model, 2)) == {}


@every_copy_known
def test_conditionals_are_the_smaller_nets_where_it_shows_a_pixel(copy_known):
    """Without copy_known, all are the largest net's."""
    model = build(CASE, **SMALL, height=4, width=6, copy_known=copy_known)
    x = images(model, 3)
    conditionals = model.conditionals(x)
    cond = model.from_smaller(1, halves(x))
    large = model.nets[1].conditionals(x, cond=cond)
    new = torch.ones(4, 6, dtype=torch.bool)
    new[::2, ::2] = False
    assert torch.equal(conditionals[:, :, new], large[:, :, new])
    assert torch.equal(halves(conditionals), model.nets[0].conditionals(halves(x)) if copy_known else halves(large))


# ----------------------------------------------------------------------------------------- order of generation


def test_the_order_is_that_of_the_smallest_image_first():
    """The helper of these tests, on an image of 4×4 doubled twice."""
    model = build(CASE, doublings=2, height=4, width=4, channels=2)
    assert stages(model).tolist() == [[0, 2, 1, 2], [2, 2, 2, 2], [1, 2, 1, 2], [2, 2, 2, 2]]
    assert (order(model) // 2)[::2].tolist() == [0, 2, 8, 10, 1, 3, 4, 5, 6, 7, 9, 11, 12, 13, 14, 15]
    assert (order(model) % 2).tolist() == [0, 1] * 16


@every_pair
@every_head
def test_no_conditional_sees_itself_or_what_comes_after_of_three_sizes(base, conditional, head):
    model = build(CASE, **{**TWICE, "base": base, "conditional": conditional}, head=head, classes=3, dropout=0.3)
    for training in (True, False):
        changed = changes(model.train(training))
        assert not changed.tril().any() and changed.triu(1).any()


@every_pair
def test_a_new_pixel_sees_what_is_known_below_and_to_its_right(base, conditional):
    """The first new pixel, (0, 1), depends on the known (0, 2), (2, 0) and (2, 2), which come later in raster order."""
    arguments = {"base": base, "conditional": conditional, "height": 4, "width": 4, "levels": 5, "hidden": 12}
    made = [build(CASE, seed=seed, **arguments) for seed in range(4)]
    changed = torch.stack([changes(model, seed) for seed, model in enumerate(made)]).any(0)
    assert changed[:4, 4].all()


def test_a_pixel_of_the_smaller_image_reaches_the_four_in_its_place_and_those_around():
    """Features are upsampled where they lie: pixel (2, 2) moves those at (4, 4) to (5, 5), some around, no far ones."""
    model = build(CASE, height=12, width=12, hidden=12)
    x = halves(images(model, 1))
    other = x.clone()
    other[0, 0, 2, 2] = (other[0, 0, 2, 2] + 1) % 4
    changed = (model.from_smaller(1, x) != model.from_smaller(1, other)).any(1)[0]
    assert changed[4:6, 4:6].all()
    changed[1:9, 1:9] = False  # a 3×3 on the small image, then a 4×4 of stride 2
    assert not changed.any()


# --------------------------------------------------------------------------------------------------- sampling


@pytest.mark.slow
@every_copy_known
@every_head
@every_classes
def test_the_cached_sampler_is_the_network_of_three_sizes(copy_known, head, classes):
    model = build(CASE, **TWICE, copy_known=copy_known, head=head, classes=classes)
    assert_cached_equals_forward(model)
    assert_methods_agree(model, seed=2)


@every_pair
@every_doubling
def test_a_sample_shows_the_smallest_net_s_sample(base, conditional, doublings):
    """With the same seed, to the last pixel."""
    arguments = {**TWICE, "base": base, "conditional": conditional, "doublings": doublings}
    model = build(CASE, **arguments, classes=3)
    label, step = torch.arange(4) % 3, 2**doublings
    small = sample(model.nets[0], 4, seed=6, label=label)
    assert torch.equal(sample(model, 4, seed=6, label=label)[:, :, ::step, ::step], small)


@every_copy_known
@pytest.mark.parametrize("method", ["cached", "naive"])
def test_each_net_draws_given_the_smaller_image_with_noise_of_its_own(copy_known, method):
    model = build(CASE, **TWICE, copy_known=copy_known)
    x = sample(model.nets[0], 3, seed=8, method=method)
    for k, net in enumerate(model.nets[1:], start=1):
        known = None
        if copy_known:
            canvas, mask = torch.zeros(2, 3, *net.shape, dtype=torch.long)
            halves(canvas)[:], halves(mask)[:] = x, 1
            known = canvas, mask.bool()
        with torch.no_grad():
            cond = model.from_smaller(k, x)
        larger = sample(net, 3, cond=cond, known=known, uniforms=noise(8, range(3), net.shape, k), method=method)
        assert torch.equal(halves(larger), x) == copy_known
        x = larger
    assert torch.equal(sample(model, 3, seed=8, method=method), x)


@every_copy_known
def test_stages_do_not_share_noise(copy_known):
    """A stage's noise moves what it draws, and nothing of the smaller image."""
    model = build(CASE, **SMALL, height=4, width=6, copy_known=copy_known)
    first, second = noises(model, 0, 3), noises(model, 1, 3)
    drawn = sample(model, 3, uniforms=first)
    other = sample(model, 3, uniforms=[first[0], second[1]])
    assert not torch.equal(drawn, other)
    assert torch.equal(halves(drawn), halves(other)) == copy_known
    assert not torch.equal(drawn, sample(model, 3, uniforms=[second[0], first[1]]))


@pytest.mark.parametrize("shapes", [
    [(2, 2, 4, 6)],
    [(2, 2, 4, 6), (2, 2, 2, 3)],
    [(2, 2, 2, 3), (2, 2, 4, 6), (2, 2, 8, 12)],
    [(3, 2, 2, 3), (3, 2, 4, 6)],
], ids=["one", "order", "three", "number"])  # fmt: skip
def test_noise_of_other_shapes_is_refused(shapes):
    model = build(CASE, **SMALL, height=4, width=6)
    uniforms = [torch.zeros(shape) for shape in shapes]
    for wrong in (uniforms, uniforms[0]) if len(uniforms) == 1 else (uniforms,):
        with pytest.raises(ValueError) as error:
            sample(model, 2, uniforms=wrong)
        message = str(error.value)
        assert all(str(shape) in message for shape in [*shapes, (2, 2, 2, 3), (2, 2, 4, 6)]), message
        assert "\n" not in message


@every_copy_known
@every_doubling
def test_known_pixels_are_kept(copy_known, doublings):
    """Whatever size they are drawn in, and drawn from is what is before them."""
    model = build(CASE, **{**TWICE, "doublings": doublings}, copy_known=copy_known)
    x = images(model, 3, seed=5)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    drawn = assert_methods_agree(model, known=(x, known), seed=2).long()
    assert torch.equal(drawn[known], x[known]) and not torch.equal(drawn, x)
    if copy_known:
        assert torch.equal(drawn, independent(model, noises(model, 2, 3), 1.0, x, known))


def test_known_pixels_of_the_smaller_image_alone_leave_the_rest_to_be_drawn():
    model = build(CASE, **SMALL, height=4, width=6)
    x = images(model, 3)
    known = torch.zeros_like(x, dtype=torch.bool)
    halves(known)[:] = True
    one, other = (sample(model, 3, known=(x, known), seed=seed).long() for seed in (0, 1))
    assert torch.equal(halves(one), halves(x)) and torch.equal(halves(other), halves(x))
    assert not torch.equal(one, other)


# ---------------------------------------------------------------------------------------------------- training


@every_copy_known
def test_training_the_base_alone(copy_known):
    """In training the loss is that of the smallest images; a likelihood is always of the whole."""
    model = build(CASE, **SMALL, height=4, width=6, copy_known=copy_known, train="base")
    joint = build(CASE, **SMALL, height=4, width=6, copy_known=copy_known)
    assert list(model.state_dict()) == list(joint.state_dict())
    x = images(model, 4)
    assert torch.equal(model.log_prob(x), joint.log_prob(x))
    loss = model.train()(x)
    torch.testing.assert_close(loss, model.parts(x)["base_2x3"], rtol=0, atol=0)
    loss.sum().backward()
    of_base = [p.grad is not None for name, p in model.named_parameters() if name.startswith("all_nets.0.")]
    others = [p.grad is not None for name, p in model.named_parameters() if not name.startswith("all_nets.0.")]
    assert all(of_base) and not any(others)
    joint.train()(x).sum().backward()
    assert all(p.grad is not None for p in joint.parameters())


# ------------------------------------------------------------------------------------------------ construction


@every_pair
def test_each_net_is_what_is_asked_for(base, conditional):
    classes = {"pixel_cnn": models.PixelCNN, "gated_pixel_cnn": models.GatedPixelCNN}
    classes |= {"row_lstm": models.RowLSTM, "diag_bilstm": models.DiagBiLSTM}
    arguments = {**TWICE, "base": base, "conditional": conditional, "hidden": 6, "layers": 1}
    small, *larger = build(CASE, **arguments, base_hidden=10, base_layers=3).nets
    assert type(small) is classes[base] and [type(net) for net in larger] == [classes[conditional]] * 2
    assert [net.shape for net in (small, *larger)] == [(2, 1, 2), (2, 2, 4), (2, 4, 8)]
    assert (small.body.hidden, small.body.layers) == (10, 3)
    assert all((net.body.hidden, net.body.layers) == (6, 1) for net in larger)
    small = build(CASE, **arguments).nets[0]
    assert (small.body.hidden, small.body.layers) == (6, 1)


def test_the_paper_s_form_is_not_the_default():
    model = build(CASE)
    assert model.copy_known and len(model.nets) == 2
    assert all(isinstance(net, models.DiagBiLSTM) for net in model.nets)


@pytest.mark.parametrize("wrong, named", [
    ({"height": 5}, ["height=5", "multiple", "= 2"]),
    ({"width": 7}, ["width=7", "multiple", "= 2"]),
    ({"height": 6, "doublings": 2}, ["height=6", "multiple", "= 4"]),
    ({"width": 6, "doublings": 2}, ["width=6", "multiple", "= 4"]),
    ({"doublings": 3}, ["height=4", "multiple", "= 8"]),
    ({"doublings": 0}, ["doublings=0", "from 1 to 30"]),
    ({"doublings": 1.0}, ["doublings=1.0", "integer"]),
    ({"base": "transformer"}, ["base='transformer'", "pixel_cnn, gated_pixel_cnn, row_lstm or diag_bilstm"]),
    ({"base": "multi_scale"}, ["base='multi_scale'", "pixel_cnn"]),
    ({"base": None}, ["base=None", "pixel_cnn"]),
    ({"conditional": "PixelCNN"}, ["conditional='PixelCNN'", "pixel_cnn"]),
    ({"conditional": ["pixel_cnn"]}, ["conditional=['pixel_cnn']", "pixel_cnn"]),
    ({"train": "x"}, ["train='x'", "joint or base"]),
    ({"train": True}, ["train=True", "joint or base"]),
    ({"copy_known": "yes"}, ["copy_known='yes'", "true or false"]),
    ({"doublings": 20_000}, ["doublings=20000", "from 1 to 30"]),
    ({"base_hidden": -1}, ["base_hidden=-1", "at least 1"]),
    ({"base_hidden": 0}, ["base_hidden=0", "at least 1"]),
    ({"base_hidden": "abc"}, ["base_hidden='abc'", "integer"]),
    ({"base_layers": 0}, ["base_layers=0", "at least 1"]),
    ({"base_layers": False}, ["base_layers=False", "integer"]),
    ({"map_features": 2}, ["'map_features'", "copy_known"]),
], ids=lambda value: "-".join(map(str, value))[:24])  # fmt: skip
def test_a_wrong_argument_is_refused_with_its_name_and_what_is_allowed(wrong, named):
    arguments = {**config(CASE, height=4, width=4), **wrong}
    with pytest.raises(ValueError) as error:
        models.build(arguments)
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


def test_the_smallest_image_may_be_one_pixel():
    model = build(CASE, doublings=3, height=8, width=8, levels=2)
    assert [net.shape[1:] for net in model.nets] == [(1, 1), (2, 2), (4, 4), (8, 8)]
    drawn = sample(model, 400, seed=0, batch_size=400)[:, 0, 0, 0]
    p = model.nets[0].conditionals(torch.zeros(1, 1, 1, 1, dtype=torch.long)).exp()[..., 1].item()
    assert abs(drawn.double().mean() - p) < 4 * (p * (1 - p) / 400) ** 0.5
