"""What the discretized logistic mixture promises, of the head alone: probabilities, density, gradients, the scan.

Legend: b batch · c channel (colour) · h w rows, columns · n pixels · p parameters of a pixel · v levels · m component.
"""

import itertools
import math

import numpy as np
import pytest
import torch

from models.layers import side_by_side
from models.logistic_mixture import SHARPNESS, LogisticMixtureHead
from models.sampling.heads import CachedLogisticMixture
from models.sampling.memory import Buffers

every_levels = pytest.mark.parametrize("levels", [2, 3, 17, 256, 1000])
every_channels = pytest.mark.parametrize("channels", [1, 2, 3, 4])


def make(channels=3, levels=256, mixtures=5, inputs=6, features=8):
    """A head with noise on every parameter, and a generator for the rest."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = LogisticMixtureHead(inputs, features, channels, levels, mixtures)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + parameter)
    return head, generator


def pixels(head, n, generator, extreme=False):
    """Random parameters (n p) and colours (n c), a third of them the lowest or the highest level.

    Extreme parameters are up to some 1e4, each of another magnitude; others have scales of a few levels or more.
    """
    parameters = torch.randn(n, sum(head.sizes), generator=generator)
    if extreme:
        parameters *= 10 ** (5 * torch.rand(parameters.shape, generator=generator) - 1)
    x = torch.randint(head.levels, (n, head.channels), generator=generator)
    edge = (head.levels - 1) * torch.randint(2, x.shape, generator=generator)
    return parameters, torch.where(torch.rand(x.shape, generator=generator) < 1 / 3, edge, x)


def images(x):
    """Colours (n c) → n images of one pixel (n c 1 1)."""
    return x[:, :, None, None]


def sigmoid(x):
    """The logistic's CDF, in numpy."""
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def reference(head, parameters, x):
    """p(value | colours before) of one pixel by equations 1 to 3 of 1701.05517, parameters (p), x (c): (c v), float64.

    Where the colours before have probability 0 in float64, it is nan.
    """
    c, v, m = head.channels, head.levels, head.mixtures
    parameters, x = parameters.double().numpy(), x.numpy()
    weights, parameters = parameters[:m], parameters[m:]
    means, log_scales = parameters[: 2 * c * m].reshape(2, c, m)
    coefficients = np.tanh(parameters[2 * c * m :].reshape(c * (c - 1) // 2, m))
    low, high = SHARPNESS
    # 1 / scale, in levels, within limits; then back to the units of [-1, 1]
    scales = np.exp(-np.clip(np.log(2 / (v - 1)) - log_scales, low, high)) * 2 / (v - 1)
    joint = np.exp(weights - weights.max())
    joint /= joint.sum()
    out, pair = [], 0
    for k in range(c):
        mean = means[k].copy()
        for j in range(k):
            mean += coefficients[pair] * (2 * x[j] / (v - 1) - 1)
            pair += 1
        values = np.linspace(-1, 1, v)[:, None]
        above, below = (sigmoid((values + half - mean) / scales[k]) for half in (1 / (v - 1), -1 / (v - 1)))
        above[-1], below[0] = 1, 0
        masses = above - below  # (v m)
        with np.errstate(invalid="ignore"):
            out.append(masses @ joint / joint.sum())
        joint = joint * masses[x[k]]
        if joint.sum() < 1e-9:  # less than what differences of CDFs leave correct
            joint[:] = 0
    return np.stack(out)


# ----------------------------------------------------------------------------------------------- probabilities


@every_levels
@every_channels
@pytest.mark.parametrize("extreme", [False, True])
def test_conditionals_sum_to_one(levels, channels, extreme):
    head, generator = make(channels, levels)
    parameters, x = pixels(head, 64, generator, extreme)
    log_probs = head.conditionals(parameters[:, None, None], images(x))
    assert log_probs.shape == (64, channels, 1, 1, levels) and log_probs.isfinite().all()
    assert (log_probs.double().exp().sum(-1) - 1).abs().max() < 1e-5


@every_levels
def test_one_logistic_sums_to_one_whatever_its_scale(levels):
    head = LogisticMixtureHead(1, 1, 1, levels, 1)
    means, log_scales = [-1e4, -1.0, 0.3, 1.1, 1e3], [-1e4, -7.0, -3.0, 0.0, 5.0, 12.0, 1e4]
    parameters = torch.tensor([[0.0, mean, log_scale] for mean in means for log_scale in log_scales])
    sums = head.logits(parameters, torch.zeros(len(parameters), 1, dtype=torch.long)).double().exp().sum(-1)[:, 0]
    assert (sums - 1).abs().max() < 1e-5, parameters[(sums - 1).abs().argmax()]


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 1000, 65536])
def test_a_level_can_be_all_but_certain(levels):
    head = LogisticMixtureHead(1, 1, 1, levels, 1)
    value = torch.tensor([0, levels // 2, levels - 1])[:, None]
    mean = 2 * value / (levels - 1) - 1
    parameters = torch.cat([torch.zeros(3, 1), mean, torch.full((3, 1), -100.0)], 1)
    log_prob = head.logits(parameters, value)[:, 0].gather(1, value)
    assert log_prob.exp().min() > 1 - 1e-6 and (head.nats(parameters[:, None, None], images(value)) < 1e-6).all()


@pytest.mark.parametrize("extreme", [False, True])
def test_the_joint_of_a_pixels_colours_sums_to_one(extreme):
    head, generator = make(3, 3)
    x = torch.tensor(list(itertools.product(range(3), repeat=3)))
    for parameters in pixels(head, 16, generator, extreme)[0]:
        nats = head.nats(parameters.expand(27, 1, 1, -1), images(x))
        assert abs((-nats.double()).exp().sum().item() - 1) < 1e-5


@every_levels
@every_channels
def test_the_density_is_that_of_the_equations(levels, channels):
    """Log-probabilities within 1e-3 where p > 1e-8: float32 means are rounded, and float64 CDFs subtracted."""
    head, generator = make(channels, levels)
    parameters, x = pixels(head, 32, generator)
    expected = torch.from_numpy(np.stack([reference(head, *pixel) for pixel in zip(parameters, x, strict=True)]))
    logits, compared = head.logits(parameters, x).double(), expected > 1e-8
    assert compared.double().mean() > 0.5
    assert (logits - expected.log())[compared].abs().max() < 1e-3
    exact = head.double().logits(parameters.double(), x)
    assert (exact - expected.log())[compared].abs().max() < 1e-6


@every_levels
@every_channels
def test_the_density_is_that_of_the_equations_at_extreme_parameters(levels, channels):
    """Probabilities within 1e-6 · levels: a mean's rounding grows with the levels that it is counted in."""
    head, generator = make(channels, levels)
    parameters, x = pixels(head, 128, generator, extreme=True)
    expected = torch.from_numpy(np.stack([reference(head, *pixel) for pixel in zip(parameters, x, strict=True)]))
    compared = ~expected.isnan()
    assert compared[:, 0].all() and compared.double().mean() > 0.3
    assert (head.logits(parameters, x).double().exp() - expected)[compared].abs().max() < 1e-6 * levels


@every_channels
@pytest.mark.parametrize("levels", [2, 256])
def test_nats_are_the_sum_of_the_conditionals(levels, channels):
    head, generator = make(channels, levels)
    parameters, x = pixels(head, 2 * 3 * 5, generator)
    parameters, x = parameters.view(2, 3, 5, -1), x.view(2, 3, 5, channels).permute(0, 3, 1, 2)
    gathered = head.conditionals(parameters, x).gather(-1, x[..., None])[..., 0].sum(1)
    nats = head.nats(parameters, x)
    assert nats.shape == (2, 3, 5)
    torch.testing.assert_close(nats, -gathered, atol=1e-4, rtol=1e-5)
    assert torch.equal(head.nats(parameters, x.to(torch.uint8)), nats)


@every_channels
@pytest.mark.parametrize("extreme", [False, True])
def test_a_colour_sees_those_before_it_and_no_other(channels, extreme):
    head, generator = make(channels, 17)
    parameters, x = pixels(head, 64, generator, extreme)
    logits = head.logits(parameters, x)
    for k in range(channels):
        other = x.clone()
        other[:, k] = (x[:, k] + 5) % 17
        changed = (head.logits(parameters, other) != logits).any(-1).any(0)
        assert not changed[: k + 1].any(), "a colour sees itself or one after it"
        assert changed[k + 1 :].all(), "a colour does not see one before it"


def test_equal_pixels_have_equal_conditionals():
    """To the last bit, wherever in a batch they stand."""
    head, generator = make(3, 17, mixtures=7)
    parameters, x = (t[:1].expand(13, -1) for t in pixels(head, 1, generator))
    logits = head.logits(parameters, x)
    assert torch.equal(logits, logits[:1].expand_as(logits))


# --------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [2, 256, 1000])
@pytest.mark.parametrize("kind", ["random", "extreme", "saturated"])
def test_gradients_are_finite(dtype, levels, kind):
    head, generator = make(3, levels)
    parameters, x = pixels(head, 10_000, generator, extreme=kind == "extreme")
    if kind == "saturated":
        parameters = parameters.sign() * 1e4
    parameters = parameters.to(dtype).requires_grad_()
    nats = head.nats(parameters[:, None, None], images(x))
    (gradient,) = torch.autograd.grad(nats.sum(), parameters)
    assert nats.dtype == torch.float32 and nats.isfinite().all() and gradient.isfinite().all()
    assert nats.min() >= -1e-5


@pytest.mark.slow
@pytest.mark.parametrize("levels", [2, 5, 256])
def test_gradients_are_those_of_finite_differences(levels):
    head, generator = make(3, levels, mixtures=2)
    parameters, x = pixels(head, 6, generator)
    x[0], x[1] = 0, levels - 1
    parameters = (0.5 * parameters.double()).requires_grad_()
    assert torch.autograd.gradcheck(lambda p: head.nats(p[:, None, None], images(x)), parameters)
    if levels < 256:
        assert torch.autograd.gradcheck(lambda p: head.logits(p, x), parameters)


def test_a_scale_has_its_gradient_from_the_flattest_to_the_sharpest():
    """Of a level at the mean, in float32 as in float64, within 1e-3 of itself; none is rounded to 0."""
    head = LogisticMixtureHead(1, 1, 1, 257, 1)
    low, high = SHARPNESS
    log_scales = -math.log(head.highest) - torch.linspace(low + 0.01, high - 0.01, 200)
    x = torch.full((200, 1), 128)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        log_scale = log_scales.to(dtype).requires_grad_()
        parameters = torch.stack([torch.zeros_like(log_scale), torch.zeros_like(log_scale), log_scale], 1)
        nats = head.nats(parameters[:, None, None], images(x))
        gradients.append(torch.autograd.grad(nats.sum(), log_scale)[0].double())
    assert (gradients[1] > 0).all()
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=0)


# ---------------------------------------------------------------------------------------------------- the head


@every_channels
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("mixtures", [1, 2, 7])
def test_the_scan_gives_the_same_logits(channels, levels, mixtures):
    head, generator = make(channels, levels, mixtures)
    with torch.inference_mode():
        first, last = side_by_side([head.first]), side_by_side([head.last])
        scan = CachedLogisticMixture(head, first, last, Buffers(4, head.first.weight))
        for _ in range(3):  # nothing stays of the pixel before
            u = torch.randn(4, 6, generator=generator)
            x = pixels(head, 4, generator)[1]
            expected = head.logits(head(u), x)
            scan.step(u)
            for c in range(channels):
                torch.testing.assert_close(scan.logits(c), expected[:, c], rtol=1e-5, atol=1e-5)
                scan.put(c, x[:, c])


def test_parameters_are_float32_under_autocast():
    head, generator = make()
    u = torch.randn(2, 3, 4, 6, generator=generator)
    x = torch.randint(256, (2, 3, 3, 4), generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        parameters = head(u)
        assert head.first(u).dtype == torch.bfloat16  # which shows that autocast acts
        assert parameters.dtype == torch.float32 and parameters.shape == (2, 3, 4, sum(head.sizes))
        nats = head.nats(parameters, x)
    assert torch.equal(nats, head.nats(parameters, x)) and nats.dtype == torch.float32


@pytest.mark.parametrize("mixtures", [1, 10, 30])
@every_channels
def test_an_untrained_head_is_about_as_good_as_the_uniform_distribution(channels, mixtures):
    """On colours that vary together, as those of photographs do, it is within 0.1 nats a sub-pixel, or better."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = LogisticMixtureHead(64, 32, channels, 256, mixtures)
    n = 2000
    grey = 0.5 * torch.randn(n, 1, generator=generator)
    colours = grey + 0.15 * torch.randn(n, channels, generator=generator)
    x = ((colours + 1) * 127.5).round().clamp(0, 255).long()
    u = 0.25 * torch.randn(n, 1, 1, 64, generator=generator)  # as large as an untrained body's features
    with torch.no_grad():
        nats = head.nats(head(u), images(x)).mean() / channels
    assert nats < math.log(256) + 0.1
