"""Every recipe in conf/experiment/ trains: shrunk, on few small images, its loss is lower in the second half."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import data
from tests.commands import REPOSITORY, composed

NAMES = sorted(path.stem for path in (REPOSITORY / "conf/experiment").glob("*.yaml"))
SHRUNK = [
    *("model.hidden=12", "model.layers=2", "model.head_features=12", "batch_size=8", "dataset=npy"),
    *("steps=300", "warmup=30", "log_every=10", "evaluate_every=300", "save_every=300", "evaluate_images=8"),
    "sample_every=0",
]


def small_images(levels: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """The shipped digits in black and white, or in 256 levels with a random colour for each; and their labels."""
    split = data.build({"name": "digits", "root": None}).train
    x, labels = split.batch(slice(None))
    if levels == 2:
        return (x > 7).numpy().astype(np.uint8), labels.numpy()
    colour = torch.rand(len(x), channels, 1, 1, generator=torch.Generator().manual_seed(0))
    return (x * 15 * colour).round().numpy().astype(np.uint8), labels.numpy()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_falls(name, call):
    cfg = composed(f"experiment={name}")
    levels, channels = (2, 1) if cfg.dataset.name == "binary_mnist" else (256, 3)
    x, labels = small_images(levels, channels)
    np.save("x.npy", x)
    np.save("labels.npy", labels)
    arguments = ["dataset.path=x.npy", f"dataset.levels={levels}", "dataset.labels=labels.npy", "hydra.run.dir=run"]
    status, _, err = call("train", f"experiment={name}", *SHRUNK, *arguments)
    assert status == 0, err
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    losses = [line["train_bits_per_dim"] for line in lines if "train_bits_per_dim" in line]
    assert len(losses) == 30
    assert np.mean(losses[15:]) < np.mean(losses[:15])
