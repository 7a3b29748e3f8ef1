"""What the project promises about pictures with labels, in folders named by them and in Parquet files: the colour of a
picture says its label, from loading to training, drawing and classifying."""

import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table

import data
from models.checkpoint import read
from tests.commands import TINY, refused

COLOURS = ("blue", "green", "red")  # in sorted order: the labels 0, 1, 2
EACH = 12


def picture(colour: str, k: int) -> Image.Image:
    """The k-th picture of a colour, unlike all others."""
    pixels = np.full((6, 8, 3), 2 * k, np.uint8)
    pixels[..., 2 - COLOURS.index(colour)] = 255 - k
    return Image.fromarray(pixels)


def encoded(colour: str, k: int) -> bytes:
    out = io.BytesIO()
    picture(colour, k).save(out, "png")
    return out.getvalue()


def make_folder(folder: Path) -> dict:
    for colour in COLOURS[::-1]:
        (folder / colour / "deeper").mkdir(parents=True)
        for k in range(EACH):
            picture(colour, k).save(folder / colour / ("deeper" if k % 2 else "") / f"{k}.png")
    return {"name": "image_folder", "path": str(folder), "labels": "folders"}


def make_parquet(folder: Path) -> dict:
    folder.mkdir()
    for colour in COLOURS[::-1]:
        rows = [{"bytes": encoded(colour, k), "path": None} for k in range(EACH)]
        table = pyarrow.table({"image": rows, "label": [colour] * EACH})
        write_table(table, folder / f"{colour}.parquet", row_group_size=5)
    return {"name": "parquet", "path": str(folder), "label": "label"}


@pytest.fixture(params=[make_folder, make_parquet], ids=["image_folder", "parquet"])
def config(request, tmp_path):
    """Of a data set of 36 pictures in three colours."""
    return {**request.param(tmp_path / "pictures"), "size": [3, 4], "root": str(tmp_path / "cache")}


def labels_of(images: np.ndarray) -> np.ndarray:
    """The labels that the colours of images (n 3 h w) say."""
    return 2 - images[:, :, 0, 0].argmax(1)


def parts_of(config: dict) -> list[data.Split]:
    dataset = data.build(config)
    return [dataset.split(name) for name in ("train", "val", "test")]


def test_labels_are_those_of_their_pictures(config):
    dataset = data.build(config)
    assert dataset.shape == {"channels": 3, "height": 3, "width": 4, "levels": 256}
    assert (dataset.classes, dataset.names) == (3, COLOURS)
    parts = parts_of(config)
    assert [len(part) for part in parts] == [28, 4, 4]
    for part in parts:
        x, labels = part.batch(slice(None))
        assert labels.dtype.is_signed and np.array_equal(labels, labels_of(x.numpy()))
    images = np.concatenate([part.images for part in parts])
    assert len(np.unique(images, axis=0)) == 3 * EACH, "a picture is lost, or there twice"
    assert len(set(labels_of(parts[0].images[:9]))) == 3, "they come in the order of their labels"


def test_the_order_of_a_file_system_plays_no_part(config, monkeypatch):
    parts = parts_of(config)
    shutil.rmtree(config["root"])
    for find in ("glob", "rglob"):
        found = getattr(Path, find)
        monkeypatch.setattr(Path, find, lambda *pattern, found=found: iter([*found(*pattern)][::-1]))
    for before, after in zip(parts, parts_of(config), strict=True):
        assert np.array_equal(before.images, after.images) and np.array_equal(before.labels, after.labels)


def test_the_seed_decides_the_parts(config):
    first, again, other = (parts_of({**config, "seed": seed})[2].images for seed in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_without_labels_the_pictures_are_the_same(config):
    plain = {**config, "labels" if "labels" in config else "label": None}
    for one in (config, plain, config, plain):
        dataset = data.build(one)
        assert (dataset.train.labels is None, dataset.classes) == ((False, 3) if one is config else (True, None))
        assert np.array_equal(dataset.train.images, data.build(plain).train.images)


class TestFolders:
    @pytest.fixture
    def config(self, tmp_path):
        return {**make_folder(tmp_path / "pictures"), "size": 4, "root": str(tmp_path / "cache")}

    def test_labels_follow_where_a_picture_cannot_be_read(self, config, capsys):
        for name in ("blue/0.png", "red/deeper/5.png"):
            Path(config["path"], name).write_text("no picture")
        parts = parts_of(config)
        assert sum(map(len, parts)) == 3 * EACH - 2 and capsys.readouterr().err.count("skipped") == 2
        assert all(np.array_equal(part.labels, labels_of(part.images)) for part in parts)

    def test_labels_that_were_lost_are_made_again(self, config):
        before = data.build(config).test.labels.copy()
        (path,) = Path(config["root"]).rglob("*_labels.npy")
        np.save(path, np.zeros(7, np.int64))
        with pytest.raises(ValueError, match=r"_labels\.npy: damaged .*delete it and it is made again"):
            data.build(config)
        path.unlink()
        assert np.array_equal(data.build(config).test.labels, before)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda path: picture("red", 0).save(path / "loose.png"), ["loose.png: expected", "in a folder below"]),
            (lambda path: [shutil.rmtree(path / name) for name in COLOURS[1:]], ["pictures: expected", "blue alone"]),
        ],
        ids=["a picture in none", "one folder"],
    )
    def test_pictures_without_a_folder_of_their_label_are_named(self, config, change, words):
        change(Path(config["path"]))
        with pytest.raises(ValueError) as error:
            data.build(config)
        assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
        assert not os.path.exists(config["root"])
        assert data.build({**config, "labels": None}).classes is None

    def test_any_other_labels_are_refused(self, config):
        for wrong in ("folder", ["folders"], True, 3):
            with pytest.raises(ValueError, match=r"dataset\.labels=.*: expected folders, or null"):
                data.build({**config, "labels": wrong})


def arguments(config: dict, steps: int) -> list[str]:
    """Of train.py, for a model that is quick to learn the colours of 2×2 pictures."""
    options = [f"dataset.{key}={value}" for key, value in {**config, "size": 2}.items() if key != "name"]
    rare = [f"{key}={steps}" for key in ("log_every", "evaluate_every", "save_every")]
    model = [*TINY, "model=pixel_cnn", "model.head=logistic_mixture", "model.mixtures=2", "model.classes=auto"]
    quick = ["optimizer.lr=0.1", "warmup=2", "ema=0", "sample_every=0"]
    return [f"dataset={config['name']}", *options, f"steps={steps}", *rare, *model, *quick]


@pytest.mark.slow
def test_a_model_of_the_colours_is_trained_drawn_from_and_classifies(call, config):
    status, out, err = call("train", *arguments(config, 30))
    assert status == 0 and "labels: 0 'blue', 1 'green', 2 'red'\n" in out, err
    status, _, err = call("sample", "label=1", "n=20", "npy=green.npy")
    assert status == 0, err
    assert (labels_of(np.load("green.npy")) == 1).sum() > 15
    status, out, err = call("evaluate", "classify=true", "split=train", "out=train.json")
    assert status == 0, err
    assert json.loads(Path("train.json").read_text())["right"] > 20, "of 28; 9 by chance"


@pytest.mark.slow
def test_a_run_holds_the_number_of_classes_and_goes_on(call, tmp_path):
    given = arguments({**make_folder(tmp_path / "pictures"), "root": str(tmp_path)}, 2)
    assert call("train", *given, "hydra.run.dir=runs/one")[0] == 0
    last, summary = read("runs/one/last.pt"), Path("runs/one/summary.json")
    assert last["config"]["model"]["classes"] == last["model"]["classes"] == 3
    assert "classes: 3\n" in Path("runs/one/.hydra/config.yaml").read_text()
    assert json.loads(summary.read_text())["classes"] == 3
    summary.unlink()
    for again in ([*given, "resume=auto"], ["resume=runs/one", "steps=4", "model.classes=auto"]):
        status, out, err = call("train", *again)
        assert status == 0 and "steps 2 to" in out and "model.classes" not in out, err
    assert len(list(Path("runs").rglob("last.pt"))) == 1
    refused(call("train", "resume=runs/one", "model.classes=2"), ["classes=2", "3 classes"])
