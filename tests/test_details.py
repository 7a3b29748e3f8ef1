"""What is behind a likelihood: bits by place, calibration, and the training images nearest to samples."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli.details import NEIGHBOURS
from models.details import details, nearest
from models.sampling import sample
from models.scores import scores
from tests.cases import CASES, build, every, given, images
from tests.commands import SHORT, process


class Split:
    """Images as `models.likelihood` takes them."""

    def __init__(self, x, labels=None):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def batch(self, some, generator=None):
        return self.x[some], None if self.labels is None else self.labels[some]


@every(lambda case: "map_features" not in case.extra)  # which no split has
def test_bits_by_place_add_up_and_every_value_is_in_a_bin(case):
    model = build(case).double()
    x, conditions = images(model, 5), given(model, 5)
    found = details(model, Split(x, conditions.get("label")), batch_size=2)
    pixels = scores(model, x, **conditions).bits.double().mean(0) * math.log(2)
    assert torch.allclose(found.nats.sum(-3), pixels, rtol=1e-4, atol=1e-4)
    assert found.count.sum() == x.numel() * model.levels and found.hits.sum() == x.numel()
    assert found.probabilities.sum().item() == pytest.approx(x.numel())
    used = found.count > 0
    lower = torch.arange(20) / 20
    assert ((lower - 1e-9 <= found.expected) & (found.expected <= lower + 0.05 + 1e-9))[used].all()
    assert (found.hits <= found.count).all()


def test_a_models_own_samples_find_it_calibrated_and_bolder_ones_do_not():
    model = build(CASES["pixel_cnn"]).eval()
    own, bolder = (details(model, Split(sample(model, 1500, temperature=t).long())) for t in (1.0, 0.5))
    assert own.calibration_error < 0.02 < 0.1 < bolder.calibration_error
    many = own.count > 2000
    assert many.sum() > 3
    assert torch.allclose(own.expected[many], own.observed[many], atol=0.03)


def test_the_nearest_images_are_those_of_a_plain_search(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, others = (torch.randint(256, (n, 3, 4, 5), generator=generator) for n in (6, 50))
    x[2] = others[17]
    told = []
    monkeypatch.setattr("models.details.MOST", 8 * 60 * 7)  # seven at a time
    distances, places = nearest(x, others, 4, told.append)
    every = (x[:, None] - others).double().square().mean((2, 3, 4)).sqrt()
    expected = every.topk(4, largest=False)
    assert torch.allclose(distances, expected.values) and torch.equal(places, expected.indices)
    assert distances[2, 0] == 0 and places[2, 0] == 17 and sum(told) == 50 and max(told) == 7
    with pytest.raises(ValueError, match="expected images"):
        nearest(x, others[:, :1])
    with pytest.raises(ValueError, match="k"):
        nearest(x, others, 51)


@pytest.mark.slow
def test_the_command_draws_them(call, tmp_path):
    folder = tmp_path / "run"
    process("train.py", *SHORT, "steps=60", "sample_every=0", f"hydra.run.dir={folder}", check=True)
    arguments = ["split=val", "details=details", "nearest=nearest.png", "out=numbers.json"]
    status, out, err = call("evaluate", f"checkpoint={folder}", *arguments)
    assert status == 0, err
    numbers, found = (json.loads(Path(name).read_text()) for name in ("numbers.json", "details/details.json"))
    assert numbers["bits_by_colour"] == found["bits_by_colour"]
    assert numbers["bits_by_colour"]["grey"] == pytest.approx(numbers["bits_per_dim"], rel=1e-5)
    assert sum(found["bits_by_row"]["grey"]) / 8 == pytest.approx(numbers["bits_per_dim"], rel=1e-5)
    assert 0 < numbers["calibration_error"] < 0.1 and numbers["nearest_to_samples"] > 0 < numbers["nearest_to_val"]
    for name in ("by_row", "calibration"):
        assert Path(f"details/{name}.svg").read_text().startswith("<svg")
    with Image.open("nearest.png") as picture:
        assert picture.size == ((1 + NEIGHBOURS) * 58, 10 * 58)
    assert "calibration" in out and "nearest" in out
