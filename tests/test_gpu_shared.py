"""The form of the LSTM scans whose programs wait for each other, on a GPU: in a process of its own, and last.

In the interpreter it is in `tests/test_shared_scan.py`.
"""

import pytest
import torch

import kernels.lstm_scan
import models
from kernels.lstm_scan import lstm_scan
from models.optimizers import build_optimizer
from models.training_step import TrainingStep

pytestmark = pytest.mark.gpu


def both_ways(diagonal: bool, size: tuple, taps: int, form: str) -> list[torch.Tensor]:
    """The hidden states and the gradients of gates and weights, in bfloat16."""
    b, h, w, f = size
    d = 2 if diagonal else 1
    torch.manual_seed(0)
    pre = torch.randn(b, h, w, d, 4 * f, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = (torch.randn(d, 4 * f, taps * f, device="cuda") * (taps * f) ** -0.5).requires_grad_()
    hidden = lstm_scan(pre, weight, diagonal, form)
    return [hidden, *torch.autograd.grad(hidden, [pre, weight], torch.ones_like(hidden))]


@pytest.mark.parametrize(
    ("diagonal", "size", "taps"),
    [
        (True, (1, 1, 1, 16), 2),
        (True, (1, 7, 5, 48), 2),
        (True, (3, 28, 29, 64), 2),
        (True, (16, 32, 33, 128), 2),
        (False, (1, 5, 7, 48), 3),
        (False, (3, 28, 28, 64), 5),
        (False, (16, 32, 32, 128), 3),
    ],
)
def test_it_is_the_streamed_form_each_time(diagonal, size, taps):
    expected = both_ways(diagonal, size, taps, "streamed")
    first = both_ways(diagonal, size, taps, "shared")
    for mine, other in zip(first, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-2, atol=2e-2 * other.abs().max().item())
    for _ in range(20):
        assert all(map(torch.equal, both_ways(diagonal, size, taps, "shared"), first))


@pytest.mark.parametrize("name", ["RowLSTM", "DiagBiLSTM"])
def test_a_step_of_training_is_captured_with_it(name, monkeypatch):
    """Twenty steps as one CUDA graph: the losses of the usual form's twenty, but for bfloat16's rounding."""
    x = (torch.arange(8, device="cuda") // 2).expand(4, 1, 9, 8).contiguous()
    losses, form_of = {}, kernels.lstm_scan.form_of
    for form in ("streamed", "shared"):
        monkeypatch.setattr(kernels.lstm_scan, "form_of", lambda *of, form=form: form_of(*of[:5], form))
        torch.manual_seed(0)
        sizes = {"channels": 1, "levels": 4, "height": 9, "width": 8, "hidden": 128, "layers": 1}
        model = models.build({"_target_": f"models.{name}", **sizes}).cuda()
        optimizer = build_optimizer({"name": "adamw", "lr": 3e-3}, model)
        step = TrainingStep(model, optimizer, None, clip=1.0, bf16=True, graph=True)
        losses[form] = torch.stack([step(x, None, lr=3e-3).clone() for _ in range(20)])
    assert losses["streamed"][-1] < 0.9 * losses["streamed"][0]
    torch.testing.assert_close(losses["shared"], losses["streamed"], rtol=1e-2, atol=0)


def test_more_programs_than_run_at_once_are_refused():
    with pytest.raises(ValueError, match="form='shared'"):
        both_ways(True, (256, 4, 4, 128), 2, "shared")
