"""What only a GPU can show of models: samplers in captured graphs, bfloat16, and training in earnest.

What it shows of operations is in `tests/test_operations.py`.
"""

import copy
import itertools

import pytest
import torch

import models
from kernels.lstm_scan import lstm_scan
from models.optimizers import build_optimizer
from models.sampling import PixelLoop, noise, sample
from models.sampling.rules import Given, Record
from models.training_step import TrainingStep

pytestmark = pytest.mark.gpu
CLASSES = ("PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM")


def build(name, channels=1, levels=4, height=9, width=7, hidden=16, layers=2, **others):
    torch.manual_seed(0)
    sizes = {"channels": channels, "levels": levels, "height": height, "width": width}
    return models.build({"_target_": f"models.{name}", **sizes, "hidden": hidden, "layers": layers, **others})


@pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_model_is_the_same_on_the_gpu(name, head):
    model = build(name, channels=3, hidden=18, head=head)
    x = torch.randint(0, 4, (3, 3, 9, 7))
    expected = model.log_prob(x)
    torch.testing.assert_close(model.cuda().log_prob(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_no_leak_in_bfloat16(name):
    """Changing a sub-pixel moves no conditional at or before it, not by one bit."""
    model = build(name, channels=3, hidden=24, height=5, width=6).cuda()
    x = torch.randint(0, 4, (1, 3, 5, 6), device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        before = model.conditionals(x)
        for k in range(0, 90, 7):
            i, j, c = k // 18, k // 3 % 6, k % 3
            changed = x.clone()
            changed[0, c, i, j] = (changed[0, c, i, j] + 1) % 4
            moved = (model.conditionals(changed) != before).any(-1)[0].permute(1, 2, 0).flatten()
            assert not moved[: k + 1].any()


@pytest.mark.parametrize("f", [16, 128])
def test_its_own_tanh_is_little_off(f):
    torch.manual_seed(0)
    pre = torch.randn(3, 9, 7, 2, 4 * f, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(2, 4 * f, 2 * f, device="cuda") / f**0.5 / 2).requires_grad_()
    d_hidden = torch.randn(3, 9, 7, 2, f, device="cuda", dtype=torch.bfloat16)

    def both_ways(fast: bool) -> list[torch.Tensor]:
        hidden = lstm_scan(pre, weight, True, fast=fast)
        return [hidden, *torch.autograd.grad(hidden, [pre, weight], d_hidden)]

    for exact, fast in zip(both_ways(False), both_ways(True), strict=True):
        assert 0 < ((fast - exact).abs().max() / exact.abs().max()).item() < 2**-5


def test_noise_is_the_same_as_on_a_cpu():
    for stage in (0, 1):
        arguments = 2**64 - 1, range(2**40, 2**40 + 100), (3, 32, 32), stage
        assert torch.equal(noise(*arguments, device="cuda").cpu(), noise(*arguments, backend="torch"))


@pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
@pytest.mark.parametrize("name", CLASSES)
def test_the_cached_sampler_draws_what_the_network_says(name, head):
    """By each backend, in one program and in several, with the row captured in the first batch or in the second."""
    model = build(name, channels=3, hidden=18, height=4, width=5, head=head).cuda().eval()
    uniforms = noise(0, range(60), model.shape, backend="torch").cuda()
    naive = sample(model, 60, method="naive", uniforms=[uniforms])
    for backend, batch_size in itertools.product(("triton", "torch"), (15, 20, 60)):
        drawn = sample(model, 60, backend=backend, uniforms=[uniforms], batch_size=batch_size)
        assert torch.equal(drawn, naive), (backend, batch_size)


@pytest.mark.parametrize("head", ["softmax", "logistic_mixture"])
@pytest.mark.parametrize("name", CLASSES)
def test_bfloat16_moves_conditionals_by_little(name, head):
    model = build(name, channels=3, hidden=18, height=6, width=5, head=head).cuda().eval()
    x = torch.randint(0, 4, (20, 3, 6, 5), device="cuda")
    with torch.no_grad():
        expected = model.conditionals(x).exp()
    for how in ({"method": "naive"}, *({"method": "cached", "backend": name} for name in ("triton", "torch"))):
        record = Record(copy.deepcopy(model).bfloat16(), Given(x), 20, conditionals=True)
        PixelLoop(copy.deepcopy(model).bfloat16(), rule=record, b=20, **how).run()
        moved = (record.conditionals.exp() - expected).abs().sum(-1) / 2
        assert 0 < moved.mean() < 0.02, how


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", CLASSES)
def test_training_in_bfloat16_learns(name, compiled):
    torch._dynamo.reset()
    model = build(name, hidden=32).cuda()
    x = torch.randint(0, 4, (1, 1, 9, 7), device="cuda").expand(8, -1, -1, -1).contiguous()
    step = torch.compile(model, fullgraph=True) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        with torch.autocast("cuda", torch.bfloat16):
            loss = step(x).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw", "muon"])
@pytest.mark.parametrize("name", [*CLASSES, "MultiScale"])
def test_captured_training_steps_are_the_same(name, optimizer):
    """Losses, gradients and weights, the averaged ones too, bit for bit, dropout included, with a rate that falls."""
    others = {"layers": 1} if name == "MultiScale" else {"dropout": 0.3, "classes": 3}
    captured = build(name, hidden=32, height=8, width=6, **others).cuda()
    eager, averages, steps = copy.deepcopy(captured), [], []
    for model in (captured, eager):
        averages.append(copy.deepcopy(model))
        made = build_optimizer({"name": optimizer, "lr": 1e-2}, model)
        steps.append(TrainingStep(model, made, averages[-1], clip=0.1, bf16=True, graph=model is captured))
    for k in range(8):
        x, label = torch.randint(0, 4, (6, 1, 8, 6)), torch.randint(0, 3, (6,)).cuda()
        losses = []
        for step in steps:
            torch.cuda.manual_seed(k)
            losses.append(step(x, label if captured.classes else None, lr=1e-2 / (k + 1), decay=k / 10))
        assert torch.equal(*losses), k
        for mine, other in zip(captured.parameters(), eager.parameters(), strict=True):
            assert torch.equal(mine, other), k
            assert optimizer == "muon" or torch.equal(mine.grad, other.grad), k  # Muon uses them up
        for mine, other in zip(*(average.parameters() for average in averages), strict=True):
            assert torch.equal(mine, other), k
