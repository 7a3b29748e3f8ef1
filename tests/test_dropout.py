"""Dropout's masks: a function of seed, step and the image's number, however the images of a step are shared out."""

import numpy as np
import pytest
import torch

from kernels.philox import by_cpu, by_torch
from models.dropout import dropout, key_of, masks_of
from models.training_step import TrainingStep
from tests.cases import ARCHITECTURES, CASES, build, given, images


def keys(n: int, step: int = 0, seed: int = 0, first: int = 0) -> torch.Tensor:
    return torch.tensor([[key_of(seed, step), first + k] for k in range(n)])


@pytest.mark.parametrize("m", [1, 7, 8, 9, 1000])
@pytest.mark.parametrize("stage", [0, 1, 2**40])
@pytest.mark.parametrize("device", [by_torch, by_cpu])
def test_every_device_makes_the_numbers_that_numpy_makes(device, m, stage):
    of = torch.tensor([[0, 0], [1, 2], [-5, 2**62], [key_of(3, 10**9), -1]])
    for made, key in zip(device(of, m, stage), of.numpy().view(np.uint64), strict=True):
        bits = np.random.Philox(key=key, counter=[0, 0, 0, stage])
        assert np.array_equal(made.numpy(), np.random.Generator(bits).random(m, dtype=np.float32))


def test_a_share_of_the_features_is_left_out_and_the_others_are_larger():
    x = torch.ones(4, 50, 50, 8)
    with masks_of(keys(4)):
        out = dropout(x, 0.3)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert abs((out == 0).float().mean().item() - 0.3) < 5 * (0.3 * 0.7 / out.numel()) ** 0.5


def test_masks_differ_by_image_step_seed_and_place_in_the_network():
    x, masks = torch.ones(2, 9, 9, 8), []
    for of in (keys(2), keys(2, step=1), keys(2, seed=1), keys(2, first=2)):
        with masks_of(of):
            masks += [*(dropout(x, 0.5) == 0), *(dropout(x, 0.5) == 0)]
    agree = [(a == b).float().mean().item() for i, a in enumerate(masks) for b in masks[:i]]
    assert all(abs(share - 0.5) < 5 * 0.5 / 648**0.5 for share in agree)


def test_outside_a_training_step_it_is_torchs():
    x = torch.ones(3, 4)
    torch.manual_seed(0)
    expected = torch.nn.functional.dropout(x, 0.5)
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.5), expected)


@pytest.mark.parametrize("case", [*ARCHITECTURES, "multi_scale-given", "video-given"])
def test_a_step_in_parts_is_a_step(case):
    model = build(CASES[case], channels=1, levels=4, height=4, width=4, hidden=8, dropout=0.4).double().train()
    x, condition = images(model, 7), given(model, 7)
    inputs = x, condition.get("label"), *([condition["cond"]] if "cond" in condition else [])
    found = []
    for accumulate in (1, 2, 3, 7):
        step = TrainingStep(model, torch.optim.SGD(model.parameters()), accumulate=accumulate, seed=5)
        nats = step(*inputs, lr=0.0, step=9)
        found.append([nats, *(parameter.grad for parameter in model.parameters())])
    for parts in found[1:]:
        for mine, expected in zip(parts, found[0], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)
    other = TrainingStep(model, torch.optim.SGD(model.parameters()), seed=5)(*inputs, lr=0.0, step=10)
    assert other != found[0][0]
