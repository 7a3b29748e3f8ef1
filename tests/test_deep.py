"""Models of the paper's depth train from the first step, with every setting of the switches."""

import math

import pytest
import torch

import data
import models

DEPTHS = {"PixelCNN": 15, "GatedPixelCNN": 15, "RowLSTM": 12, "DiagBiLSTM": 12}


@pytest.mark.slow
@pytest.mark.parametrize("target", DEPTHS)
@pytest.mark.parametrize(
    ("residual", "skip"), [(True, False), (True, True), (False, True), (False, False)], ids=["r", "rs", "s", "plain"]
)
def test_losses_fall_at_once(target, residual, skip):
    """Half an epoch of warm-up takes the loss on digits from log 17, 2.83 nats, towards a histogram's 2.05 or below."""
    torch.manual_seed(0)
    train = data.build({"name": "digits"}).train
    config = {"_target_": f"models.{target}", "channels": 1, "levels": 17, "height": 8, "width": 8}
    model = models.build({**config, "hidden": 16, "layers": DEPTHS[target], "residual": residual, "skip": skip})
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.95, momentum=0.9, foreach=True)
    losses = []
    for step in range(40):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101  # as train.py does
        x, _ = train.batch(slice(16 * step, 16 * step + 16))
        loss = model(x).mean() / 64
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(loss) for loss in losses), losses
    assert sum(losses[-5:]) / 5 < 2.4, losses
