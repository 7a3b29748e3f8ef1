"""A training step. What a GPU does, captured or not, is in `tests/test_gpu.py` and `tests/fake_gpu/launching.py`."""

import copy
import math
from functools import partial
from itertools import product

import pytest
import torch

import train
from models.optimizers import build_optimizer, load_state, matrix_of
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
    model = torch.nn.ParameterDict({"weight": torch.ones(2)})
    written, going_on = (build_optimizer({**config, "weight_decay": x}, model) for x in (0.1, 0.2))
    model.weight.grad = torch.ones(2)
    written.step()
    load_state(going_on, written.state_dict())
    assert going_on.param_groups[0]["weight_decay"] == 0.2 and going_on.state[model.weight]["step"] == 1


MUON = {"name": "muon", "lr": 0.1, "weight_decay": 0.3}


def parameters_for_muon() -> torch.nn.ParameterDict:
    """Two weights of one shape, one that is higher than wide, one of two directions, and biases."""
    torch.manual_seed(0)
    shapes = {"a": (8, 3, 2, 3), "b": (9, 2), "c": (8, 3, 2, 3), "d": (2, 8, 5), "bias": (2, 8), "e": (7,)}
    return torch.nn.ParameterDict({name: torch.randn(shape) for name, shape in shapes.items()})


def give_gradients(model: torch.nn.ParameterDict, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_is_torchs_for_weights_and_adamw_for_biases():
    """torch's takes matrices only, one after the other, and computes in bfloat16."""
    model, others, optimizers = parameters_for_muon(), {}, []
    for name, parameter in model.items():
        is_bias = name in ("bias", "e")
        shape = parameter.shape if is_bias else matrix_of(parameter.shape)
        others[name] = torch.nn.Parameter(parameter.detach().clone().view(shape))
        rates = {"lr": 0.1, "weight_decay": 0.3}
        made = torch.optim.AdamW if is_bias else partial(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
        optimizers.append(made([others[name]], **rates))
    optimizers.append(build_optimizer(MUON, model))
    for seed in range(3):
        give_gradients(model, seed)
        for name, other in others.items():
            other.grad = model[name].grad.clone().view_as(other)
        for optimizer in optimizers:
            optimizer.step()
    for name, other in others.items():
        tolerance = 1e-6 if name in ("bias", "e") else 3e-2
        torch.testing.assert_close(model[name].view_as(other), other, rtol=0, atol=tolerance)


def test_weights_as_matrices():
    """Of each architecture: outputs by inputs with their taps, and both directions' outputs."""
    for name, f in product(("pixel_cnn", "gated_pixel_cnn", "row_lstm", "diag_bilstm"), (16, 128)):
        model = build(CASES[name], channels=3, levels=256, height=4, width=4, hidden=f)
        for of, parameter in model.named_parameters():
            if parameter.dim() > 2 and not of.endswith("bias"):
                both = name == "diag_bilstm" and "lstm" in of
                assert matrix_of(parameter.shape)[0] == parameter.shape[0] * (parameter.shape[1] if both else 1), of


def test_muons_state_goes_on():
    """And a weight without a gradient stays as it is."""
    model, copied = parameters_for_muon(), parameters_for_muon()
    first, second = build_optimizer(MUON, model), build_optimizer(MUON, copied)
    give_gradients(model, 0)
    first.step()
    load_state(second, copy.deepcopy(first.state_dict()))
    copied.load_state_dict(model.state_dict())
    before = model["b"].detach().clone()
    for of, optimizer in ((model, first), (copied, second)):
        give_gradients(of, 1)
        of["b"].grad = None
        optimizer.step()
    assert all(torch.equal(model[name], copied[name]) for name in model)
    assert torch.equal(model["b"], before) and not torch.equal(model["a"], parameters_for_muon()["a"])


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
