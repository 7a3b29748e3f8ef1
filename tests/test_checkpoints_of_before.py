"""Checkpoints that an earlier version wrote (tests/checkpoints/make.py) load, and say and draw what they did then."""

from pathlib import Path

import pytest
import torch

from models.checkpoint import load
from models.sampling import sample

FOLDER = Path(__file__).parent / "checkpoints"
EXPECTED = torch.load(FOLDER / "expected.pt", weights_only=True)
NAMES = sorted(path.stem for path in FOLDER.glob("*-*.pt"))


def test_there_is_one_a_model_head_and_condition():
    assert len(NAMES) == 5 * 2 * 2 and set(NAMES) == set(EXPECTED) - {"images"}


@pytest.mark.parametrize("name", NAMES)
def test_nats_and_pixels_are_those_of_before(name):
    model = load(FOLDER / f"{name}.pt")
    label = torch.arange(6) % 3 if model.classes else None
    with torch.no_grad():
        nats = -model.log_prob(EXPECTED["images"].long(), label)
    torch.testing.assert_close(nats, EXPECTED[name]["nats"], rtol=1e-6, atol=0)
    pixels = sample(model, 4, seed=1, label=None if label is None else label[:4])
    assert torch.equal(pixels, EXPECTED[name]["pixels"])
