"""The models that every proof in the tests is made for, small ones built from them, and proofs that files share.

Adding a model, or a switch of one, is adding a line to the tables below.

Legend: b batch · c channel (colour) · h w rows, columns · v levels · n sub-pixels (h w c).
"""

import copy
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.base import NO_LABEL, as_written
from models.logistic_mixture import LogisticMixtureHead
from models.sampling import PixelLoop, noise, sample
from models.sampling.rules import Given, Record

# -------------------------------------------------------- what each architecture sees, by its definition: (n n)


def relation(h: int, w: int, c: int, seen: Callable) -> Tensor:
    """`seen(i, j, g, a, b, colour)`: whether sub-pixel (i, j, g) sees (a, b, colour). In raster order: (n n)."""
    cells = [(i, j, g) for i in range(h) for j in range(w) for g in range(c)]
    return torch.tensor([[seen(*out, *into) for into in cells] for out in cells])


def path(*steps: Tensor) -> Tensor:
    """What is seen through relations in a row, from the last to the first; paths stay inside the image."""
    return functools.reduce(torch.matmul, (step.double() for step in steps)) > 0


def sees(h: int, w: int, c: int, reach: int, kind: str) -> Tensor:
    """A masked convolution of (2·reach + 1)²."""

    def seen(i, j, g, a, b, colour):
        before = a < i or (a == i and b < j)
        itself = (a, b) == (i, j) and (colour < g or (kind == "B" and colour == g))
        return i - a <= reach and abs(j - b) <= reach and (before or itself)

    return relation(h, w, c, seen)


def everything_before(h: int, w: int, c: int, layers: int) -> Tensor:
    return torch.ones(h * w * c, h * w * c, dtype=torch.bool).tril(-1)


def convolutions(h: int, w: int, c: int, layers: int) -> Tensor:
    """A 7×7 of mask A, then `layers` times a 3×3 of mask B."""
    return path(*[sees(h, w, c, 1, "B")] * layers, sees(h, w, c, 3, "A"))


def rectangle_above(h: int, w: int, c: int, layers: int) -> Tensor:
    """Without a hole: all of the rows above, as far as layers and stem reach, and so much of the row to the left."""
    far = 3 + layers

    def seen(i, j, g, a, b, colour):
        if a == i:
            return j - far <= b < j or (b == j and colour < g)
        return i - far <= a < i and abs(j - b) <= far

    return relation(h, w, c, seen)


def triangle_above(h: int, w: int, c: int, layers: int) -> Tensor:
    """A 7×7 of mask A, then in each layer the triangle above, whatever its height, and the pixel to its left."""

    def seen(i, j, g, a, b, colour):
        if a == i:
            return b == j - 1 or (b == j and colour <= g)
        return a < i and j - (i - a) - 1 <= b <= j + (i - a)

    return path(*[relation(h, w, c, seen)] * layers, sees(h, w, c, 3, "A"))


# ---------------------------------------------------------------------------------------------------- the table


class Case(NamedTuple):
    target: str  # the class, in `models`
    extra: dict  # its arguments beside those that all models have
    reach: Callable | None  # (h, w, c, layers) → which sub-pixels each conditional depends on (n n); None: not said


ARCHITECTURES = {
    "pixel_cnn": ("PixelCNN", convolutions),
    "gated_pixel_cnn": ("GatedPixelCNN", rectangle_above),
    "row_lstm": ("RowLSTM", triangle_above),
    "diag_bilstm": ("DiagBiLSTM", everything_before),
}
EMBEDDING = {"input": "embedding", "input_features": 3}
LABELS = {"classes": 3, "label_dropout": 0.3}
MIXTURE = {"head": "logistic_mixture", "mixtures": 3}
VARIANTS = {
    "": {},
    "-skip": {"skip": True},
    "-plain": {"residual": False},
    "-only_skip-embedding": {"residual": False, "skip": True, **EMBEDDING},
    "-given": {**LABELS, "map_features": 2},
    "-mixture-embedding": {**MIXTURE, **EMBEDDING},
    "-mixture-given": {**MIXTURE, "classes": 3, "map_features": 2},
}
CASES = {
    f"{name}{variant}": Case(target, extra, reach)
    for name, (target, reach) in ARCHITECTURES.items()
    for variant, extra in VARIANTS.items()
} | {  # each architecture as a base, each as a conditional
    "multi_scale": Case("MultiScale", {}, None),
    "multi_scale-given": Case(
        "MultiScale", {"base": "pixel_cnn", "conditional": "row_lstm", **LABELS, **EMBEDDING}, None
    ),
    "multi_scale-mixture": Case("MultiScale", {"base": "row_lstm", "conditional": "gated_pixel_cnn", **MIXTURE}, None),
    "multi_scale-mixture-given": Case(
        "MultiScale", {"base": "gated_pixel_cnn", "conditional": "pixel_cnn", "classes": 3, **MIXTURE}, None
    ),  # each architecture draws frames, given one, more than there are, none
    "video": Case("Video", {}, None),
    "video-given": Case("Video", {"net": "row_lstm", "past": 3, **LABELS, **EMBEDDING}, None),
    "video-mixture": Case("Video", {"net": "pixel_cnn", "past": 0, **MIXTURE}, None),
    "video-mixture-given": Case("Video", {"net": "diag_bilstm", "past": 1, "classes": 3, **MIXTURE}, None),
}


def slow_if_between(name: str) -> list:
    """The marks of a case: slow, unless it is an architecture as it is, or with a mixture and conditions."""
    switches = name.removeprefix(name.split("-")[0])
    return [] if switches in ("", "-mixture-given") else [pytest.mark.slow]


def every(condition: Callable[[Case], bool] = lambda case: True):
    """Parametrize a test over the cases of which `condition` holds."""
    chosen = [(name, case) for name, case in CASES.items() if condition(case)]
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=name, marks=slow_if_between(name)) for name, case in chosen]
    )


def plain(case: Case) -> bool:
    """Whether no switch is set."""
    return not {"skip", "residual"} & set(case.extra)


every_case = every()
every_softmax = every(lambda case: "head" not in case.extra)
every_architecture = every(lambda case: case.reach is not None)
every_kind = every(plain)  # class × head × conditioned or not
every_conditioned = every(lambda case: "classes" in case.extra)  # class × head
every_mapped = every(lambda case: "map_features" in case.extra)  # architecture × head
every_target = every(lambda case: not case.extra)  # one case a class
every_checker = every(lambda case: not case.extra and case.target in ("PixelCNN", "MultiScale"))  # of arguments
every_net = every(lambda case: not case.extra and case.reach is not None)  # one case an architecture


def config(case: Case, **arguments) -> dict:
    """What `models.build` takes: a small model, but for what `arguments` say; Multi-Scale has sides that are even."""
    small = {"channels": 1, "levels": 4, "height": 3, "width": 4, "hidden": 8, "layers": 2}
    small |= {"frames": 2} if case.target == "Video" else {}
    out = {"_target_": f"models.{case.target}", **small, **case.extra, **arguments}
    if case.target == "MultiScale":
        out |= {side: out[side] + max(out[side], 0) % 2 for side in ("height", "width")}
    return out


def add_noise(model, seed: int, std: float = 0.3):
    """Move every parameter by a random amount, so that nothing passes because it starts near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def build(case: Case, *, seed: int = 0, std: float = 0.3, **arguments):
    """A small model with noise on every parameter, in eval mode.

    Weights that begin large, as deep models without residual connections need them, are made smaller first: with noise,
    logits would be in the hundreds, and float32 would have no digits left for what is compared.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = models.build(config(case, **arguments))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 0.7 / weight.abs().max().clamp(min=0.7)
    return add_noise(model, seed, std).eval()


def images(model, b: int, seed: int = 0) -> Tensor:
    """Random images (b c h w) int64, or clips (b t c h w)."""
    return torch.randint(model.levels, (b, *model.shape), generator=torch.Generator().manual_seed(seed))


def given(model, b: int, seed: int = 0) -> dict[str, Tensor]:
    """The `label` and `cond` of b images, of each its own, where the model is conditioned on them."""
    out = {}
    if model.classes:
        lowest = NO_LABEL if model.label_dropout else 0  # image 0 has class 0 with seed 0
        out["label"] = (torch.arange(b) + seed - lowest) % (model.classes - lowest) + lowest
    if model.map_features:
        generator, dtype = torch.Generator().manual_seed(seed), next(model.parameters()).dtype
        out["cond"] = torch.rand(b, model.map_features, model.height, model.width, generator=generator, dtype=dtype)
    return out


def given_alike(model, b: int, seed: int = 0) -> dict[str, Tensor]:
    """The same `label` and `cond` for each of b images, where the model is conditioned on them."""
    return {name: value.expand(b, *value.shape[1:]) for name, value in given(model, 1, seed).items()}


def stages(model) -> Tensor:
    """The first stage that draws each pixel: (h w), of a clip (t h w)."""
    out = torch.zeros(1, *model.shape, dtype=torch.long)
    for k in reversed(range(len(model.nets))):
        model.of_stage(k, out).fill_(k)
    return out[0].select(-3, 0)


def order(model) -> Tensor:
    """The sub-pixels (n,), numbered in raster order, in the order in which the model takes them.

    Raster order, frame after frame, but that Multi-Scale (with copy_known) takes the pixels of smaller images first.
    """
    return stages(model).repeat_interleave(model.channels).argsort(stable=True)


def in_order(model, values: Tensor) -> Tensor:
    """(b c h w …) or (b t c h w …) → (b n …): sub-pixels in the order in which the model takes them."""
    last = len(model.shape)
    return values.movedim(last - 2, last).flatten(1, last)[:, order(model)]


# ----------------------------------------------------------------------------------- a model's states of life


def train(model, steps: int = 3):
    """A few optimizer steps on random images."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3, weight_decay=1e-2)
    model.train()
    with torch.random.fork_rng(devices=[]):
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(images(model, 8, seed=step), **given(model, 8, seed=step)).mean().backward()
            optimizer.step()
    return model.eval()


def trained(case: Case, **arguments):
    return train(build(case, **arguments))


def reloaded(case: Case, **arguments):
    model = build(case, seed=1, **arguments)
    model.load_state_dict(trained(case, **arguments).state_dict())
    return model


def copied(case: Case, **arguments):
    return copy.deepcopy(trained(case, **arguments))


def unused_weights(model, draws: int = 4) -> list[Tensor]:
    """For each parameter, where it acts on no likelihood: found by gradients, knowing nothing of masks.

    Half of the draws have positive weights and an image of the highest value too, so that no ReLU is closed.
    """
    unused = [torch.ones_like(p, dtype=torch.bool) for p in model.parameters()]
    probe = copy.deepcopy(model).double()
    for seed in range(draws):
        with torch.no_grad():
            for parameter in probe.parameters():
                parameter.zero_()
            add_noise(probe, seed, std=0.1)
            for parameter in probe.parameters():
                parameter.copy_(parameter.abs() if seed % 2 else parameter)
        x = images(probe, 16, seed)
        x[0] = probe.levels - 1
        gradients = torch.autograd.grad(probe(x, **given(probe, 16, seed)).sum(), list(probe.parameters()))
        for where, gradient in zip(unused, gradients, strict=True):
            where &= gradient == 0
    return unused


def poisoned(case: Case, **arguments):
    """Huge numbers in every weight that a mask hides."""
    model = build(case, **arguments)
    x, conditions, unused = images(model, 4), given(model, 4), unused_weights(model)
    with torch.no_grad():
        before = model.log_prob(x, **conditions)
        for parameter, where in zip(model.parameters(), unused, strict=True):
            parameter[where] = 1e6
        assert torch.equal(model.log_prob(x, **conditions), before)
    assert sum(int(where.sum()) for where in unused) > 0
    return model


STATES = {"fresh": build, "trained": trained, "reloaded": reloaded, "copied": copied, "poisoned": poisoned}
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())


# ------------------------------------------------------------------------------------- proofs that files share


def changes(model, seed: int = 0):
    """Whether changing sub-pixel k changes conditional m, in an image of its own for each k: (n n), [k, m].

    Both in the order in which the model takes them. Both forwards have the same batch, rows and random state, so what
    does not see k is equal to the last bit.
    """
    n = math.prod(model.shape)
    x = images(model, n, seed)
    every, in_raster_order = torch.arange(n), x.movedim(-3, -1)
    flat = in_raster_order.reshape(n, n).clone()
    shift = torch.randint(1, model.levels, (n,), generator=torch.Generator().manual_seed(seed))
    flat[every, order(model)] = (flat[every, order(model)] + shift) % model.levels
    perturbed = flat.view(in_raster_order.shape).movedim(-1, -3)
    conditionals = []
    for image in (x, perturbed):
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            conditionals.append(in_order(model, model.conditionals(image, **given(model, n, seed))))
    return (conditionals[0] != conditionals[1]).any(-1)


def of_stages(model, x):
    """What each stage draws of images x, in turn: (b c h w) each."""
    return [model.of_stage(k, x) for k in range(len(model.nets))]


def backends_of(model) -> tuple[str | None, ...]:
    """Who computes the rows of the cached sampler where nothing is said: the device's, and on a CPU torch too."""
    return ("cpu", "torch") if model.device.type == "cpu" else (None,)


def scored(model, x, conditions, backend=None, run=as_written):
    """What the cached sampler says of given images: conditionals (b … v), log-probabilities (b,).

    Conditionals are those of the last stage that draws a pixel anew.
    """
    out, drawn, total = torch.zeros(*x.shape, model.levels, dtype=next(model.parameters()).dtype), [], 0
    for k, (net, given_here) in enumerate(zip(model.nets, of_stages(model, x), strict=True)):
        with torch.no_grad():
            stage = model.stage(k, len(x), drawn, conditions.get("label"), conditions.get("cond"), run)
        record = Record(net, Given(given_here), len(x), conditionals=True)
        drawn.append(PixelLoop(net, "cached", record, len(x), stage.condition, backend).run())
        assert torch.equal(drawn[-1], given_here)
        log_probs = record.conditionals.gather(-1, given_here[..., None])[..., 0]
        torch.testing.assert_close(record.log_prob, log_probs.sum((1, 2, 3)), rtol=1e-5, atol=1e-4)
        here, new = model.of_stage(k, out), record.conditionals
        if stage.known is not None:
            log_probs, new = log_probs.masked_fill(stage.known, 0), torch.where(stage.known[..., None], here, new)
        here.copy_(new)
        total = total + log_probs.sum((1, 2, 3))
    return out, total


def assert_cached_equals_forward(model, b: int = 3, backend: str | None = None):
    """The cached sampler's conditionals are the network's, at every sub-pixel of given images, whoever computes them.

    The mixture's logarithms amplify rounding where a value is unlikely. They are compared in float64, and in float32
    the probabilities themselves.
    """
    compared = [(model, torch.positive, 1e-5)]
    if isinstance(model.nets[0].head, LogisticMixtureHead):
        compared = [(model, torch.exp, 3e-5), (copy.deepcopy(model).double(), torch.positive, 1e-8)]
    for net, of, limit in compared:
        x, conditions = images(net, b), given(net, b)
        with torch.no_grad():
            expected, of_images = net.conditionals(x, **conditions), net.log_prob(x, **conditions)
        for computes in (backend,) if backend else backends_of(model):
            conditionals, log_prob = scored(net, x, conditions, computes)
            error = (of(conditionals) - of(expected)).abs().amax((0, -1))
            where = (~(error < limit)).nonzero().tolist()
            assert not where, f"{computes}: {error.max():.1e}, at {where[:5]}"
            torch.testing.assert_close(log_prob, of_images, rtol=1e-5, atol=1e-4)


def assert_methods_agree(model, n: int = 3, **arguments):
    """The same noise gives the same pixels, cached, whoever computes the rows, or naive."""
    arguments = {**given(model, n), **arguments}
    naive = sample(model, n, method="naive", **arguments)
    for backend in backends_of(model):
        cached = sample(model, n, backend=backend, **arguments)
        where = (cached != naive).nonzero().tolist()
        assert not where, f"{backend}: differ first at {where[0]}"
    return naive


def noises(model, seed: int, n: int):
    """The noise that `sample` makes of a seed for n images, a tensor for each of the model's nets."""
    return [noise(seed, range(n), net.shape, k, backend="torch") for k, net in enumerate(model.nets)]


def independent(model, uniforms, temperature=1.0, x=None, known=None, guidance=1.0):
    """Sampling as its definition says it: a call of `conditionals` or two a sub-pixel, inverse CDF by numpy."""
    n, (*frames, c, h, w), stage = len(uniforms[0]), model.shape, stages(model)
    drawn, conditions = torch.zeros(n, *model.shape, dtype=torch.long), given(model, n)
    for *t, i, j, g in zip(*np.unravel_index(order(model).numpy(), (*frames, h, w, c)), strict=True):
        at = (*t, g, i, j)
        with torch.no_grad():
            p = model.conditionals(drawn, **conditions)[:, *at].double()
            if guidance != 1:
                free = model.conditionals(drawn, **{**conditions, "label": None})[:, *at].double()
                p = (free + guidance * (p - free)).log_softmax(-1)
            p = p.numpy()
        numbers = uniforms[stage[*t, i, j]]
        step = h // numbers.shape[2]
        for k in range(n):
            if known is not None and known[k, *at]:
                drawn[k, *at] = x[k, *at]
            elif temperature == 0:
                drawn[k, *at] = int(p[k].argmax())
            else:
                weights = np.exp(p[k] / temperature)
                cdf, number = (weights / weights.sum()).cumsum(), numbers[k, g, i // step, j // step].item()
                drawn[k, *at] = int(np.searchsorted(cdf[:-1], number, side="right"))
    return drawn
