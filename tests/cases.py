"""The models that every proof in the tests is made for, and small ones built from them.

Adding a model, or a switch of one, is adding a line to `CASES`.

Legend: b batch · c channel (colour) · h w rows, columns · v levels · n sub-pixels in raster order (h w c).
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import models


def sees(h: int, w: int, c: int, reach: int, kind: str) -> Tensor:
    """Which sub-pixels a masked convolution of (2·reach + 1)² sees from each (n n), by its definition."""
    cells = [(i, j, g) for i in range(h) for j in range(w) for g in range(c)]

    def seen(i, j, g, a, b, colour):
        before = a < i or (a == i and b < j)
        itself = (a, b) == (i, j) and (colour < g or (kind == "B" and colour == g))
        return i - a <= reach and abs(j - b) <= reach and (before or itself)

    return torch.tensor([[seen(*out, *into) for into in cells] for out in cells])


def everything_before(h: int, w: int, c: int, layers: int) -> Tensor:
    return torch.ones(h * w * c, h * w * c, dtype=torch.bool).tril(-1)


def convolutions(h: int, w: int, c: int, layers: int) -> Tensor:
    """A 7×7 of mask A, then `layers` times a 3×3 of mask B; paths stay inside the image."""
    body = torch.matrix_power(sees(h, w, c, 1, "B").double(), layers)
    return body @ sees(h, w, c, 3, "A").double() > 0


class Case(NamedTuple):
    target: str  # the class, in `models`
    extra: dict  # its arguments beside those that all models have
    reach: Callable  # (h, w, c, layers) → which sub-pixels each conditional depends on (n n)


CASES = {
    "pixel_cnn": Case("PixelCNN", {}, convolutions),
    "pixel_cnn-skip": Case("PixelCNN", {"skip": True}, convolutions),
    "pixel_cnn-plain": Case("PixelCNN", {"residual": False}, convolutions),
    "pixel_cnn-only_skip": Case("PixelCNN", {"residual": False, "skip": True}, convolutions),
    "diag_bilstm": Case("DiagBiLSTM", {}, everything_before),
    "diag_bilstm-skip": Case("DiagBiLSTM", {"skip": True}, everything_before),
    "diag_bilstm-plain": Case("DiagBiLSTM", {"residual": False}, everything_before),
    "diag_bilstm-only_skip": Case("DiagBiLSTM", {"residual": False, "skip": True}, everything_before),
}
TARGETS = {case.target: case for case in reversed(CASES.values())}  # one case a class

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_target = pytest.mark.parametrize("case", TARGETS.values(), ids=TARGETS.keys())


def config(case: Case, **arguments) -> dict:
    """What `models.build` takes: a small model, but for what `arguments` say."""
    small = {"channels": 1, "levels": 4, "height": 3, "width": 4, "hidden": 8, "layers": 2}
    return {"_target_": f"models.{case.target}", **small, **case.extra, **arguments}


def add_noise(model, seed: int, std: float = 0.3):
    """Move every parameter by a random amount, so that nothing passes because it starts near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def build(case: Case, *, seed: int = 0, std: float = 0.3, **arguments):
    """A small model with noise on every parameter, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = models.build(config(case, **arguments))
    return add_noise(model, seed, std).eval()


def images(model, b: int, seed: int = 0) -> Tensor:
    """Random images (b c h w) int64."""
    return torch.randint(model.levels, (b, *model.shape), generator=torch.Generator().manual_seed(seed))


def raster(values: Tensor) -> Tensor:
    """(b c h w …) → (b n …): sub-pixels in the order in which the model takes them."""
    return values.movedim(1, 3).flatten(1, 3)


# ----------------------------------------------------------------------------------- a model's states of life


def train(model, steps: int = 3):
    """A few optimizer steps on random images."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=3e-3, weight_decay=1e-2)
    model.train()
    with torch.random.fork_rng():
        for step in range(steps):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(images(model, 8, seed=step)).mean().backward()
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
        gradients = torch.autograd.grad(probe(x).sum(), list(probe.parameters()))
        for where, gradient in zip(unused, gradients, strict=True):
            where &= gradient == 0
    return unused


def poisoned(case: Case, **arguments):
    """Huge numbers in every weight that a mask hides."""
    model = build(case, **arguments)
    x, unused = images(model, 4), unused_weights(model)
    with torch.no_grad():
        before = model.log_prob(x)
        for parameter, where in zip(model.parameters(), unused, strict=True):
            parameter[where] = 1e6
        assert torch.equal(model.log_prob(x), before)
    assert sum(int(where.sum()) for where in unused) > 0
    return model


STATES = {"fresh": build, "trained": trained, "reloaded": reloaded, "copied": copied, "poisoned": poisoned}
every_state = pytest.mark.parametrize("state", STATES.values(), ids=STATES.keys())
