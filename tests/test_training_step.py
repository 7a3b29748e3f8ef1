"""A training step. What a GPU does, captured or not, is in `tests/test_gpu.py` and `tests/fake_gpu/launching.py`."""

import copy
import math

import pytest
import torch

import train
from models.optimizers import build_optimizer, load_state
from models.training_step import TrainingStep, follow
from tests.cases import CASES, build, given, images


@pytest.mark.parametrize("case", ["pixel_cnn", "gated_pixel_cnn-given", "multi_scale-given"])
def test_gradients_are_those_of_the_nats_a_sub_pixel(case):
    """Whatever gradients there were before."""
    model = build(CASES[case], channels=1, levels=4, height=4, width=4, hidden=8)
    x, condition = images(model, 3), given(model, 3)
    inputs = x, condition.get("label"), *([condition["cond"]] if "cond" in condition else [])
    nats = model(*inputs).mean()
    expected = torch.autograd.grad(nats / math.prod(model.shape), [*model.parameters()])
    step = TrainingStep(model, torch.optim.SGD(model.parameters()))
    for _ in range(2):
        assert torch.equal(step(*inputs, lr=0.0), nats)
        for parameter, wanted in zip(model.parameters(), expected, strict=True):
            assert torch.equal(parameter.grad, wanted)


def test_a_step_clips_and_moves_weights_at_its_rate_and_the_average_after_them():
    model = build(CASES["pixel_cnn"], channels=1, levels=4, height=4, width=4, hidden=8)
    x, average, before = images(model, 3), copy.deepcopy(model), copy.deepcopy(model)
    gradients = torch.autograd.grad(model(x).mean() / 16, [*model.parameters()])
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    step = TrainingStep(model, torch.optim.SGD(model.parameters()), average, clip=norm.item() / 2)
    step(x, lr=0.5, decay=0.75)
    weights = (network.parameters() for network in (before, model, average))
    for gradient, old, new, mean in zip(gradients, *weights, strict=True):
        torch.testing.assert_close(new, old - 0.25 * gradient)
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)


@pytest.mark.parametrize("config", [{"name": "rmsprop", "lr": 0.1, "momentum": 0.9}, {"name": "adamw", "lr": 0.1}])
def test_an_optimizers_state_goes_on_with_this_runs_arguments(config):
    weight = torch.nn.Parameter(torch.ones(2))
    written, going_on = (build_optimizer({**config, "weight_decay": x}, [weight]) for x in (0.1, 0.2))
    weight.grad = torch.ones(2)
    written.step()
    load_state(going_on, written.state_dict())
    assert going_on.param_groups[0]["weight_decay"] == 0.2 and going_on.state[weight]["step"] == 1


SHAPES = [(4, 3, 2, 3), (4,), (4, 3, 2, 3), (9, 2)]  # two of one shape, a bias, a matrix that is higher than wide


def test_muon_is_torchs_for_weights_and_adamw_for_biases():
    """torch's has no CUDA graph, computes in bfloat16, and takes matrices only, one after the other."""
    torch.manual_seed(0)
    ours, theirs = ([torch.nn.Parameter(torch.empty(shape)) for shape in SHAPES] for _ in range(2))
    for mine, other in zip(ours, theirs, strict=True):
        mine.data.normal_()
        other.data = mine.data.flatten(1).clone() if mine.dim() > 1 else mine.data.clone()
    made = build_optimizer({"name": "muon", "lr": 0.1, "weight_decay": 0.3}, ours)
    others = [
        torch.optim.Muon([p for p in theirs if p.dim() > 1], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([p for p in theirs if p.dim() == 1], lr=0.1, weight_decay=0.3),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.view_as(other).clone()
        for optimizer in (made, *others):
            optimizer.step()
    for mine, other in zip(ours, theirs, strict=True):
        tolerance = 2e-2 if mine.dim() > 1 else 1e-6  # bfloat16
        torch.testing.assert_close(mine.view_as(other), other, rtol=0, atol=tolerance)


def test_muons_state_goes_on():
    """And a weight without a gradient stays as it is."""
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    copied = copy.deepcopy(weights)
    first, second = (build_optimizer({"name": "muon", "lr": 0.1}, these) for these in (weights, copied))
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(2)]
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone() if weight is not weights[2] else None
        first.step()
        if step is gradients[0]:
            load_state(second, copy.deepcopy(first.state_dict()))
            for mine, other in zip(copied, weights, strict=True):
                mine.data.copy_(other.data)
    for weight, gradient in zip(copied, gradients[1], strict=True):
        weight.grad = gradient.clone() if weight is not copied[2] else None
    second.step()
    for mine, other, shape in zip(copied, weights, SHAPES, strict=True):
        assert torch.equal(mine, other), shape
    torch.manual_seed(0)
    assert torch.equal(weights[2], [torch.randn(shape) for shape in SHAPES][2])


def test_an_average_forgets_its_first_weights():
    """The first step copies; the decay is 2/11, 3/12, … then, until it is the one asked for."""
    model = torch.nn.Linear(2, 1)
    average, expected = copy.deepcopy(model), None
    for n in range(40):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2))
        follow(average, model, torch.tensor(train.averaging_decay(n, 0.5)))
        weight = model.weight.detach().double()
        decay = min(0.5, (1 + n) / (10 + n))
        assert n or torch.equal(average.weight, model.weight)
        expected = weight if expected is None else decay * expected + (1 - decay) * weight
        torch.testing.assert_close(average.weight.double(), expected, rtol=1e-5, atol=1e-6)
