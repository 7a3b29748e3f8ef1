"""The commands on models with classes and on Multi-Scale, and how they complete images."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bench.video
import data
import evaluate
import models
from cli.output import labels_in_rows
from cli.runs import check_root
from data.given import read_images
from models.checkpoint import load, read
from models.likelihood import summarise
from tests.commands import SHORT, process, refused

CLASSES = [*SHORT, "model=pixel_cnn", "model.classes=10", "model.hidden=8", "steps=20"]

pytestmark = pytest.mark.slow  # commands, run to their end


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """The folder of a finished run of a class-conditional model."""
    folder = tmp_path_factory.mktemp("classes") / "run"
    process("train.py", *CLASSES, f"hydra.run.dir={folder}", check=True)
    return folder


@pytest.fixture(scope="module")
def multi_scale(tmp_path_factory) -> Path:
    """The folder of a finished run of a Multi-Scale model."""
    folder = tmp_path_factory.mktemp("multi_scale") / "run"
    process("train.py", *SHORT, "model=multi_scale", f"hydra.run.dir={folder}", check=True)
    return folder


def size_of(path: str) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


class TestClasses:
    def test_classification_is_bayes_rule(self, call, classes):
        status, out, err = call("evaluate", f"checkpoint={classes}", "classify=true", "split=val", "out=val.json")
        assert status == 0, err
        numbers = json.loads(Path("val.json").read_text())
        model, split = load(classes / "best.pt"), data.build({"name": "digits"}).val
        x, labels = split.batch(slice(None))
        with torch.no_grad():
            log_p = torch.stack([model.log_prob(x, torch.full((len(x),), k)) for k in range(10)], dim=1)
        right = int((log_p.argmax(1) == labels).sum())
        assert f"{right} of {len(x)} images" in out and numbers["right"] == right and numbers["images"] == len(x)
        own = -log_p.gather(1, labels[:, None]).double().mean().item()
        said = [float(number) for number in re.findall(r"([0-9.]+) ± [0-9.]+ nats", out)]
        marginal = -(log_p.double().logsumexp(1) - np.log(10)).mean().item()
        assert said == pytest.approx([own, marginal], abs=1e-3)
        assert [numbers["nats"], numbers["marginal_nats"]] == pytest.approx([own, marginal], abs=1e-3)
        assert numbers["command"].startswith("python evaluate.py checkpoint=") and "torch" in numbers

    def test_a_row_of_the_picture_is_a_class(self, call, classes):
        status, _, err = call("sample", f"checkpoint={classes}", "npy=all.npy")
        assert status == 0, err
        images = np.load("all.npy")
        assert images.shape == (60, 1, 8, 8) and size_of("samples.png") == (6 * 58, 10 * 58)
        call("sample", f"checkpoint={classes}", "n=60", "label=3", "npy=three.npy")
        three = np.load("three.npy")
        assert np.array_equal(three[18:24], images[18:24]) and not np.array_equal(three, images)
        call("sample", f"checkpoint={classes}", "n=5", "npy=few.npy")
        assert len(np.load("few.npy")) == 5

    def test_pictures_of_training_have_a_row_a_class(self, call):
        status, _, err = call("train", *CLASSES, "steps=2", "sample_every=2", "samples=20", "hydra.run.dir=run")
        assert status == 0, err
        assert size_of("run/samples/step_000002.png") == (2 * 58, 10 * 58)

    def test_labels_in_rows(self):
        label, columns = labels_in_rows(range(10), None)
        assert columns == 6 and label.tolist() == [k for k in range(10) for _ in range(6)]
        label, columns = labels_in_rows(range(1000), None)
        assert columns == 1 and label.tolist() == list(range(64))
        label, columns = labels_in_rows([5, 1, 4], 8)
        assert columns == 2 and label.tolist() == [5, 5, 1, 1, 4, 4, 5, 5]
        assert labels_in_rows([], 8) == (None, None)

    @pytest.mark.parametrize(
        ("name", "arguments", "words"),
        [
            ("sample", ["label=10"], ["10", "0 to 9"]),
            ("sample", ["label=-1"], ["-1", "0 to 9"]),
            ("sample", ["label=cat"], ["label='cat'", "0 to 9"]),
            ("evaluate", ["out=numbers.txt"], ["numbers.txt", ".json"]),
            ("train", ["model.classes=9"], ["classes=9", "10 classes"]),
            ("train", ["model.classes=many"], ["classes='many'", "integer"]),
            ("train", ["dataset=npy", "dataset.path=x.npy", "dataset.root=.", "model.classes=2"], ["no labels"]),
        ],
    )
    def test_mistakes(self, call, classes, name, arguments, words):
        np.save("x.npy", np.arange(20 * 16, dtype=np.uint8).reshape(20, 4, 4) % 5)
        refused(call(name, *arguments, *([f"checkpoint={classes}"] if name != "train" else [])), words)

    def test_a_model_without_classes(self, call, multi_scale):
        refused(call("sample", f"checkpoint={multi_scale}", "label=1"), ["label", "without classes"])
        refused(call("evaluate", f"checkpoint={multi_scale}", "classify=true"), ["classify", "without classes"])


class TestMultiScale:
    def test_both_parts_are_reported(self, call, multi_scale):
        summary = json.loads((multi_scale / "summary.json").read_text())
        base, conditional = summary["test_base_4x4_nats"], summary["test_conditional_8x8_nats"]
        assert base + conditional == pytest.approx(summary["test_nats"], rel=1e-6) and base > 0 < conditional
        status, out, err = call("evaluate", f"checkpoint={multi_scale}")
        assert status == 0, err
        assert f"base_4x4: {base:.4f}" in out and f"conditional_8x8: {conditional:.4f}" in out

    def test_only_the_base_is_trained(self, call):
        status, _, err = call("train", *SHORT, "model=multi_scale", "model.train=base", "ema=0", "hydra.run.dir=run")
        assert status == 0, err
        trained = load("run/last.pt")
        torch.manual_seed(0)
        untrained = models.build(read("run/last.pt")["model"])
        moved = {name for name, value in untrained.state_dict().items() if not value.equal(trained.state_dict()[name])}
        assert moved and all(name.startswith("all_nets.0.") for name in moved)

    def test_methods_agree(self, call, multi_scale):
        for method in ("cached", "naive"):
            assert call("sample", f"checkpoint={multi_scale}", "n=2", f"method={method}", f"npy={method}.npy")[0] == 0
        assert np.array_equal(np.load("cached.npy"), np.load("naive.npy"))


class TestCompletion:
    def test_of_a_split_keeps_the_upper_rows(self, call, multi_scale):
        arguments = ["complete=test", "keep=0.25", "n=3", "completions=4", "npy=x.npy"]
        status, _, err = call("sample", f"checkpoint={multi_scale}", *arguments)
        assert status == 0, err
        given = data.build({"name": "digits"}).test.images[:3]
        drawn = np.load("x.npy").reshape(3, 4, 1, 8, 8)
        assert np.array_equal(drawn[..., :2, :], np.broadcast_to(given[:, None, :, :2], (3, 4, 1, 2, 8)))
        assert (drawn[:, :1, :, 2:] != drawn[:, 1:, :, 2:]).any()
        with Image.open("samples.png") as file:
            picture = np.asarray(file)
        assert picture.shape == (3 * 58, (2 + 4) * 58)
        small = picture[1:57:7, 1:57:7], picture[1:57:7, 59:115:7], picture[1:57:7, 117:173:7]
        grey = np.round(given[0, 0] * (255 / 16)).astype(np.uint8)
        assert np.array_equal(small[0], grey) and np.array_equal(small[1][:2], grey[:2])
        assert np.unique(small[1][2:]).size == 1
        assert np.array_equal(small[2], np.round(drawn[0, 0, 0] * (255 / 16)).astype(np.uint8))

    def test_labels_come_from_the_split_or_the_command_line(self, call, classes):
        arguments = [f"checkpoint={classes}", "n=2", "completions=1", "keep=0"]
        assert call("sample", *arguments, "complete=val", "npy=own.npy")[0] == 0
        labels = data.build({"name": "digits"}).val.labels[:2]
        for label in set(labels.tolist()):
            assert call("sample", *arguments, "complete=val", f"label={label}", f"npy={label}.npy")[0] == 0
        for k, label in enumerate(labels):
            assert np.array_equal(np.load("own.npy")[k], np.load(f"{label}.npy")[k])
        np.save("x.npy", np.zeros((2, 8, 8), np.uint8))
        refused(call("sample", *arguments, "complete=x.npy"), ["label", "x.npy"])
        assert call("sample", *arguments, "complete=x.npy", "label=4")[0] == 0

    @pytest.mark.parametrize("shape", [(8, 8), (1, 8, 8), (2, 1, 8, 8)])
    def test_any_mask(self, call, multi_scale, shape):
        x = np.random.default_rng(0).integers(0, 17, (2, 8, 8))
        mask = np.random.default_rng(1).random(shape) < 0.5
        np.save("given.npy", x)
        np.save("mask.npy", mask)
        arguments = ["complete=given.npy", "mask=mask.npy", "n=2", "completions=3", "npy=out.npy"]
        status, _, err = call("sample", f"checkpoint={multi_scale}", *arguments)
        assert status == 0, err
        drawn = np.load("out.npy").reshape(2, 3, 8, 8)
        known = np.broadcast_to(mask.reshape(-1, 1, 8, 8), drawn.shape)
        assert np.array_equal(drawn[known], np.broadcast_to(x[:, None], drawn.shape)[known])
        assert not np.array_equal(drawn, np.broadcast_to(x[:, None], drawn.shape))

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["complete=nothing.npy"], ["nothing.npy"]),
            (["complete=nowhere"], ["nowhere"]),
            (["complete=wide.npy"], ["wide.npy", "(2, 9, 9)", "8, 8"]),
            (["complete=high.npy"], ["high.npy", "17", "0 to 16"]),
            (["complete=floats.npy"], ["floats.npy", "integers"]),
            (["complete=test", "keep=1.5"], ["keep=1.5", "from 0 to 1"]),
            (["complete=test", "completions=0"], ["completions=0"]),
            (["complete=test", "n=0"], ["n=0"]),
            (["complete=test", "mask=wide.npy"], ["wide.npy", "(8, 8)"]),
            (["complete=test", "mask=nothing.npy"], ["nothing.npy"]),
        ],
    )
    def test_mistakes(self, call, tmp_path, multi_scale, arguments, words):
        np.save("wide.npy", np.zeros((2, 9, 9), np.uint8))
        np.save("high.npy", np.full((2, 8, 8), 17))
        np.save("floats.npy", np.zeros((2, 8, 8)))
        (tmp_path / "samples.png").write_text("kept")
        refused(call("sample", f"checkpoint={multi_scale}", *arguments), words)
        assert (tmp_path / "samples.png").read_text() == "kept"


class TestGivenImages:
    @pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 4, 6, 3)])
    def test_colours_stand_before_or_after_the_sides(self, tmp_path, shape):
        x = np.random.default_rng(0).integers(0, 9, shape)
        np.save(tmp_path / "x.npy", x)
        out = read_images(tmp_path / "x.npy", (3, 4, 6), 9, n=2)
        assert np.array_equal(out, (x if shape[1] == 3 else x.transpose(0, 3, 1, 2))[:2]) and out.dtype == torch.int64

    def test_pictures_are_resized(self, tmp_path):
        for k in range(3):
            Image.new("RGB", (40, 20), (k, 100, 200)).save(tmp_path / f"{k}.png")
        out = read_images(tmp_path, (3, 4, 6), 256)
        assert out.shape == (3, 3, 4, 6) and out[:, 0, 0, 0].tolist() == [0, 1, 2] and (out[:, 2] == 200).all()
        assert read_images(tmp_path / "2.png", (1, 8, 8), 256).shape == (1, 1, 8, 8)

    def test_pictures_for_other_levels_are_refused(self, tmp_path):
        with pytest.raises(ValueError, match="256 levels"):
            read_images(tmp_path, (1, 8, 8), 17)

    def test_damage_is_named(self, tmp_path):
        (tmp_path / "a.png").write_text("no picture")
        with pytest.raises(ValueError, match=r"a\.png: expected a picture"):
            read_images(tmp_path, (3, 8, 8), 256)


def test_a_summary_in_words():
    text = evaluate.in_words(summarise(torch.tensor([1.0, 3.0]), (1, 1, 1)))
    assert text == "2.0000 ± 1.0000 nats, 2.8854 ± 1.4427 bits/dim"


CLIPS = [*SHORT, "model=video", "dataset=moving_digits", "dataset.frames=4", "dataset.train=40", "batch_size=16"]
CLIPS += ["dataset.val=3", "dataset.test=5"]


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """The folder of a finished run of a model of clips."""
    folder = tmp_path_factory.mktemp("video") / "run"
    process("train.py", *CLIPS, f"hydra.run.dir={folder}", check=True)
    return folder


class TestClips:
    def test_a_run_says_the_nats_of_each_frame_and_draws_clips_in_rows(self, video):
        summary = json.loads((video / "summary.json").read_text())
        frames = [summary[f"test_frame_{t}_nats"] for t in (1, 2, 3, 4)]
        assert sum(frames) == pytest.approx(summary["test_nats"])
        assert size_of(video / "samples/step_000012.png") == (4 * 50, 4 * 50)  # 4 clips; a frame is 16 · 3 + 2 high
        assert size_of(video / "completions/step_000012.png") == (4 * 50, 2 * 8 * 50)  # 2 clips in 8 rows each

    def test_clips_are_drawn_to_files_and_continued(self, call, video):
        status, out, err = call("sample", f"checkpoint={video}", "n=3", "npy=a.npy", "gif=a.gif", "out=a.png")
        assert status == 0 and "Video, 4×1×16×16, 2 levels" in out, err
        x = np.load("a.npy")
        assert x.shape == (3, 4, 1, 16, 16) and x.dtype == np.uint8 and size_of("a.png") == (200, 150)
        with Image.open("a.gif") as picture:
            assert picture.n_frames == 4 and picture.size == (100, 100)  # two by two
        asked = ["complete=a.npy", "n=1", "completions=2", "keep=0.5", "npy=b.npy", "gif=b.gif", "out=b.png"]
        status, _, err = call("sample", f"checkpoint={video}", *asked)
        assert status == 0, err
        drawn = np.load("b.npy")
        assert (drawn[:, :2] == x[:1, :2]).all() and (drawn[0] != drawn[1]).any() and size_of("b.png") == (200, 200)
        with Image.open("b.gif") as picture:
            assert picture.n_frames == 4 and picture.size == (4 * 50, 50)
        np.save("mask.npy", np.arange(4).reshape(4, 1, 1, 1) + np.zeros((1, 16, 16)) < 3)
        status, _, err = call("sample", f"checkpoint={video}", *asked[:3], "mask=mask.npy", "npy=c.npy")
        assert status == 0 and (np.load("c.npy")[:, :3] == x[:1, :3]).all(), err

    def test_the_folder_of_clips_is_that_of_their_source(self):
        made, mnist = ({"name": "moving_digits", "root": "nowhere", "source": source} for source in ("digits", "mnist"))
        check_root(made, "root", Path("best.pt"))  # which come with the project
        with pytest.raises(ValueError, match="expected data in nowhere/mnist"):
            check_root(mnist, "root", Path("best.pt"))

    def test_clips_are_measured_scored_and_compressed(self, call, video):
        model, split = load(video / "best.pt"), data.build(read(video / "best.pt")["config"]["dataset"]).test
        with torch.no_grad():
            nats = -model.log_prob(split.batch(slice(None))[0]).double()
        status, out, err = call("evaluate", f"checkpoint={video}", "details=d", "nearest=n.png", "out=t.json")
        assert status == 0 and "frame_4" in out and Path("d/by_frame.svg").exists(), err
        assert json.loads(Path("t.json").read_text())["nats"] == pytest.approx(nats.mean().item(), rel=1e-5)
        assert size_of("n.png") == (4 * 50, 10 * 6 * 50)
        np.save("own.npy", split.images[:, :, 0])
        status, _, err = call("evaluate", f"checkpoint={video}", "images=own.npy", "scores=s.csv", "maps=m")
        assert status == 0 and size_of("m/4.png") == (2 * 14 * 16, 4 * 14 * 16), err
        with open("s.csv") as file:
            assert [float(row["nats"]) for row in csv.DictReader(file)] == pytest.approx(nats.tolist(), rel=1e-4)
        status, out, err = call("compress", f"checkpoint={video}", "images=own.npy", "out=own.prnn", "compare=true")
        assert status == 0, err
        status, out, err = call("compress", "own.prnn", "info")
        assert status == 0 and "5 clips of 4×1×16×16" in out, err
        status, _, err = call("compress", f"checkpoint={video}", "own.prnn", "out=back.npy")
        assert status == 0 and np.array_equal(np.load("back.npy"), split.images), err

    def test_the_benchmark_tells_frames_apart_and_draws(self, tmp_path, video):
        bench.video.main(["--quick", "--device", "cpu", "--out", str(tmp_path), str(video)])
        row, pictures = json.loads((tmp_path / "video-cpu-quick.json").read_text())["rows"]
        summary = json.loads((video / "summary.json").read_text())
        assert row["past"] == 2 and row["frames"] == pytest.approx(
            [summary[f"test_frame_{t}_nats"] for t in (1, 2, 3, 4)], rel=1e-5
        )
        assert row["first_frame"] == pytest.approx(row["frames"][0]) and pictures["drawn"] == 16
        with Image.open(tmp_path / "video.gif") as picture:
            assert picture.n_frames == 4
        assert size_of(tmp_path / "video.png") == (200, 3 * 4 * 50)

    def test_the_benchmark_refuses_other_runs(self, tmp_path, multi_scale, capsys):
        with pytest.raises(SystemExit):
            bench.video.main(["--out", str(tmp_path), str(multi_scale)])
        assert "expected a run of model=video that has ended" in capsys.readouterr().err
