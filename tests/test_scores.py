"""Scores of single images: the bits of each pixel, the table, the heat maps, and how two sets are told apart."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models.checkpoint import load
from models.multi_scale import MultiScale
from models.scores import auroc, png_bits, scores
from pixelrnn import dataset
from tests.cases import build, every_case, given, images
from tests.commands import SHORT, process


@every_case
def test_the_bits_of_pixels_add_up_to_the_likelihood(case):
    model = build(case).double()
    x, conditions = images(model, 5), given(model, 5)
    conditions |= {name: value.double() for name, value in conditions.items() if value.is_floating_point()}
    found = scores(model, x, **conditions, batch_size=2)
    with torch.no_grad():
        expected = -model.log_prob(x, **conditions)
        of_values = model.conditionals(x, **conditions).gather(-1, x[..., None])[..., 0]
    assert torch.allclose(found.nats, expected, rtol=1e-9)
    assert torch.allclose(found.bits, -of_values.sum(-3).float() / math.log(2), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.bits_per_dim, expected / math.log(2) / x[0].numel())


@pytest.mark.parametrize("copy_known", [True, False])
@pytest.mark.parametrize("doublings", [1, 2])
def test_multi_scale_puts_a_smaller_images_bits_where_it_shows_the_pixel(copy_known, doublings):
    model = MultiScale(2, 3, 4, 8, 4, 1, "pixel_cnn", "pixel_cnn", doublings=doublings, copy_known=copy_known).eval()
    x = images(model, 3)
    with torch.no_grad():
        nats, parts = model.nats_at(x), model.parts(x)
    assert torch.allclose(nats.sum((1, 2)), -model.log_prob(x))
    assert torch.allclose(nats.sum((1, 2)), sum(parts.values()))
    smallest, apart = next(iter(parts.values())), 2**doublings
    if copy_known:
        assert torch.allclose(nats[:, ::apart, ::apart].sum((1, 2)), smallest)
    else:
        assert (nats[:, ::apart, ::apart].sum((1, 2)) > smallest).all()


def test_the_area_under_the_curve_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    normal, unusual = (torch.randint(6, (n,), generator=generator).double() for n in (40, 30))
    pairs = unusual[:, None] - normal
    expected = ((pairs > 0).double() + (pairs == 0).double() / 2).mean().item()
    assert auroc(normal, unusual) == pytest.approx(expected)
    assert auroc(normal, normal + 10) == 1 and auroc(normal + 10, normal) == 0


def test_a_png_is_as_long_as_the_file(tmp_path):
    x = torch.randint(256, (3, 3, 9, 7), generator=torch.Generator().manual_seed(0))
    for k, bits in enumerate(png_bits(x, 256)):
        Image.fromarray(x[k].permute(1, 2, 0).byte().numpy()).save(tmp_path / "a.png", optimize=True)
        assert bits == 8 * (tmp_path / "a.png").stat().st_size
    assert png_bits(x, 257) is None and png_bits(x[:, :2], 256) is None
    assert (png_bits(torch.zeros(2, 1, 28, 28).long(), 2) < 8 * 100).all()  # a bit a pixel


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short run on the digits."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    process("train.py", *SHORT, "steps=60", "sample_every=0", f"hydra.run.dir={folder}", check=True)
    return folder


@pytest.mark.slow
class TestCommand:
    def test_a_table_of_a_split(self, call, trained):
        arguments = ["scores=scores.csv", "out=scores.json", "against=val"]
        status, out, err = call("evaluate", f"checkpoint={trained}", *arguments)
        assert status == 0, err
        lines = [*csv.DictReader(Path("scores.csv").read_text().splitlines())]
        found = scores(load(trained / "best.pt"), dataset({"name": "digits"}).test.batch(slice(None))[0])
        assert [float(line["nats"]) for line in lines] == pytest.approx(found.nats.tolist())
        assert [float(line["png_bits"]) for line in lines] == found.png_bits.tolist()
        assert lines[int(found.nats.argmax())]["rank"] == "1" and {int(line["rank"]) for line in lines} == {
            *range(1, len(lines) + 1)
        }
        numbers = json.loads(Path("scores.json").read_text())
        summary = json.loads((trained / "summary.json").read_text())
        assert numbers["nats"] == pytest.approx(summary["test_nats"]) and numbers["images"] == len(lines) == 360
        assert 0.4 < numbers["auroc_bits_per_dim"] < 0.6 and 0.4 < numbers["auroc_corrected_bits_per_dim"] < 0.6
        assert "AUROC" in out and Path("scores-bits_per_dim.svg").read_text().startswith("<svg")

    def test_damage_of_ones_own_pictures_shows(self, call, trained):
        x = dataset({"name": "digits"}).test.batch(slice(0, 12))[0]
        damaged = x.clone()
        damaged[:, :, 5:7, 1:3] = 16 - damaged[:, :, 5:7, 1:3]
        for name, some in (("whole", x), ("damaged", damaged)):
            Path(name).mkdir()
            for k, image in enumerate(some):
                Image.fromarray((image[0].double() * 255 / 16).round().byte().numpy()).save(f"{name}/digit-{k}.png")
        arguments = ["images=damaged", "against=whole", "scores=scores.csv", "maps=maps"]
        status, out, err = call("evaluate", f"checkpoint={trained}", *arguments)
        assert status == 0, err
        lines = [*csv.DictReader(Path("scores.csv").read_text().splitlines())]
        assert [line["image"] for line in lines] == sorted(path.name for path in Path("damaged").iterdir())
        found = scores(load(trained / "best.pt"), damaged)
        of_line = {line["image"]: float(line["nats"]) for line in lines}
        assert [of_line[f"digit-{k}.png"] for k in range(12)] == pytest.approx(found.nats.tolist())  # read to the level
        before = scores(load(trained / "best.pt"), x)
        grown = (found.bits - before.bits).mean(0)
        assert grown[5:, 1:].sum() > 0 and found.nats.mean() > before.nats.mean()
        with Image.open("maps/digit-3.png") as picture:
            assert picture.size == (2 * 28 * 8, 28 * 8) and picture.mode == "RGB"
            pixels = np.asarray(picture)
        assert (pixels[:, :224] == pixels[:, :224, :1]).all() and not (pixels[:, 224:] == pixels[:, 224:, :1]).all()
        assert "AUROC of damaged against whole" in out
