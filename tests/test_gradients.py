"""A training step's gradients and averaged weights. What a GPU does, captured or not, is in `tests/test_gpu.py`."""

import copy
import math

import pytest
import torch

import train
from models.gradients import Gradients
from tests.cases import CASES, build, given, images


@pytest.mark.parametrize("case", ["pixel_cnn", "gated_pixel_cnn-given", "multi_scale-given"])
def test_gradients_are_those_of_the_nats_a_sub_pixel(case):
    """Whatever gradients there were before."""
    model = build(CASES[case], channels=1, levels=4, height=4, width=4, hidden=8)
    x, condition = images(model, 3), given(model, 3)
    inputs = x, condition.get("label"), *([condition["cond"]] if "cond" in condition else [])
    nats = model(*inputs).mean()
    expected = torch.autograd.grad(nats / math.prod(model.shape), [*model.parameters()])
    gradients = Gradients(model)
    for _ in range(2):
        assert torch.equal(gradients(*inputs), nats)
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, wanted)


def test_an_average_forgets_its_first_weights():
    """The first step copies; the decay is 2/11, 3/12, … then, until it is the one asked for."""
    model = torch.nn.Linear(2, 1)
    average, expected = copy.deepcopy(model), None
    for n in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        train.follow(average, model, 0.5, n)
        weight = model.weight.detach().double()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average.weight.double(), expected, rtol=1e-5, atol=1e-6)
