"""What each logger holds of a run: the same as metrics.jsonl and the pictures, also after the run was cut short."""

import importlib.util
import io
import json
import os
import sqlite3
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train
from cli import command, loggers
from cli.loggers import Records, place_of, tagged
from tests.commands import COMMANDS, SHORT, refused

LINE = [*SHORT, "model=pixel_cnn", "sample_every=6", "completed=2", "evaluate_images=20"]
missing = [name for name in loggers.LOGGERS if not importlib.util.find_spec(name)]
needs_loggers = pytest.mark.skipif(bool(missing), reason=f"{missing} not installed: pip install -e '.[log]'")


def typed(*arguments: str) -> int:
    """Type python train.py; return its exit status."""
    sys.argv = ["train.py", *arguments]
    try:
        command.run("train", *COMMANDS["train"])
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Iterator[Path]:
    """The folder of a run that was cut short with lines of step 12, after its checkpoint of step 10, and went on."""
    place, draw = tmp_path_factory.mktemp("logged"), train.draw

    def cut_short(run, *arguments) -> None:
        if run.step == 12:
            raise KeyboardInterrupt
        draw(run, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "argv", [])
        for name, value in {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        for name, value in {"TRACKIO_DIR": str(place / "trackio"), "HF_HUB_OFFLINE": "1"}.items():
            patch.setenv(name, value)
        with pytest.MonkeyPatch.context() as once:
            once.setattr(train, "draw", cut_short)
            assert typed(*LINE, "logger=[tensorboard,wandb,trackio]", "hydra.run.dir=run") == 130
        assert typed("resume=run") == 0
        yield place / "run"
        import wandb

        wandb.teardown()


def picture(file: str | Path | io.BytesIO) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image.convert("L"))


class Held:
    """What a logger holds: numbers by name, pictures (h w) by name and step, the config as text."""

    def __init__(self):
        self.numbers: dict[str, list[tuple[int, float]]] = {}
        self.pictures: dict[tuple[str, int], np.ndarray] = {}
        self.config = ""

    def add(self, step: int, name: str, value: float) -> None:
        self.numbers.setdefault(name, []).append((step, value))


def in_tensorboard(folder: Path) -> Held:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    held, files = Held(), EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()
    held.numbers = {name: [(x.step, x.value) for x in files.Scalars(name)] for name in files.Tags()["scalars"]}
    for name in files.Tags()["images"]:
        for shown in files.Images(name):
            held.pictures[name, shown.step] = picture(io.BytesIO(shown.encoded_image_string))
    held.config = str(files.Tensors("config/text_summary")[-1].tensor_proto.string_val)
    return held


def records_in(path: Path) -> Iterator:
    """Read a .wandb file: after 7 bytes, in blocks of 32 KB, parts of records, each with checksum, size and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    text, at, whole = path.read_bytes(), 7, b""
    while at < len(text):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", text, at)
        whole, at = whole + text[at + 7 : at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def in_wandb(folder: Path) -> Held:
    held, run = Held(), folder / "wandb/latest-run"
    (file,) = run.glob("*.wandb")
    for record in records_in(file):
        if record.HasField("run"):
            assert (record.run.project, record.run.display_name) == ("pixelrnn", f"{folder.parent.name}/run")
            held.config = str(record.run.config)
        row = {tuple(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if name[1:] == ("path",):
                held.pictures[name[0], row["_step",]] = picture(run / "files" / value)
            elif len(name) == 1 and not name[0].startswith("_"):
                held.add(row["_step",], name[0], value)
        for item in record.summary.update:
            if item.key.startswith("test/"):
                held.add(12, item.key, json.loads(item.value_json))
    ids = {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")}
    assert ids == {json.loads((folder / "loggers.json").read_text())["wandb"]}
    return held


def in_trackio(folder: Path) -> Held:
    import trackio

    held, place = Held(), Path(os.environ["TRACKIO_DIR"])
    (run,) = trackio.Api().runs("pixelrnn")
    held.config = str(run.config)
    database = sqlite3.connect(place / "pixelrnn.db")
    for step, row in database.execute("select step, metrics from metrics order by step").fetchall():
        for name, value in json.loads(row).items():
            if isinstance(value, dict):
                held.pictures[name, step] = picture(place / "media" / value["file_path"])
            else:
                held.add(step, name, value)
    database.close()
    return held


def recorded(folder: Path) -> Held:
    """What the run's own files say that a logger holds."""
    held, said = Held(), json.loads((folder / "summary.json").read_text())
    for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
        step = row.pop("step")
        for name, value in tagged(row).items():
            held.add(step, name, value)
    for name in ("nats", "bits_per_dim", "nats_standard_error", "bits_per_dim_standard_error"):
        held.add(12, f"test/{name}", said[f"test_{name}"])
    for name in ("samples", "completions"):
        for step in (6, 12):
            held.pictures[name, step] = picture(folder / name / f"step_{step:06d}.png")
    return held


@needs_loggers
def test_each_logger_holds_the_record_and_each_step_once(logged):
    expected = recorded(logged)
    assert [step for step, _ in expected.numbers["nats/val"]] == [6, 12]
    for read in (in_tensorboard, in_wandb, in_trackio):
        held = read(logged)
        assert held.numbers.keys() == expected.numbers.keys(), read
        for name, points in expected.numbers.items():
            assert [step for step, _ in held.numbers[name]] == [step for step, _ in points], (read, name)
            assert [x for _, x in held.numbers[name]] == pytest.approx([x for _, x in points], rel=1e-6), (read, name)
        assert held.pictures.keys() == expected.pictures.keys(), read
        assert all(np.array_equal(held.pictures[key], shown) for key, shown in expected.pictures.items()), read
        assert "head_features" in held.config, read


@needs_loggers
def test_numbers_of_an_end_that_came_twice_are_there_once(tmp_path):
    """The run was killed after it gave them to TensorBoard, before it wrote summary.json."""
    for _ in range(2):
        with Records(tmp_path) as records:
            records.open(["tensorboard"], {}, 3)
            records.final(3, {"test_nats": 2.0})
    assert in_tensorboard(tmp_path).numbers == {"test/nats": [(3, 2.0)]}


class Failing:
    """A logger that fails in one of its methods."""

    module, first, where = "json", 0, ""

    def __init__(self, *_):
        self.do("begin")

    def do(self, name: str, *_) -> None:
        if name == self.where:
            raise RuntimeError(f"cannot {name}")

    def __getattr__(self, name: str):
        return lambda *given: self.do(name, *given)


def test_loggers_that_fail_are_left_out_and_said(call, monkeypatch):
    places = ("scalars", "picture", "final", "close")
    monkeypatch.setattr(loggers, "LOGGERS", {where: type(where, (Failing,), {"where": where}) for where in places})
    status, _, err = call("train", *LINE, "steps=2", "sample_every=2", f"logger=[{','.join(places)}]")
    assert status == 0 and list(Path("runs").rglob("summary.json"))
    said = [f"logger={where} failed (cannot {where}); the run goes on without it" for where in places]
    assert err.splitlines() == said


def test_a_logger_that_cannot_begin_ends_in_one_line_and_nothing_is_written(call, monkeypatch, tmp_path):
    monkeypatch.setitem(loggers.LOGGERS, "wandb", type("wandb", (Failing,), {"where": "begin"}))
    refused(call("train", *LINE, "logger=wandb"), ["logger='wandb'", "cannot begin"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_logger_that_is_not_installed_ends_in_one_line_and_nothing_is_written(call, monkeypatch, tmp_path, name):
    for module in (name, loggers.LOGGERS[name].module):
        monkeypatch.setitem(sys.modules, module, None)
    refused(call("train", *LINE, f"logger={name}"), [f"logger='{name}': expected {name}", "pip install -e '.[log]'"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_numbers_are_grouped_by_name():
    names = tagged(dict.fromkeys(["train_nats", "val_bits_per_dim", "test_nats", "lr", "images_per_second"], 0.0))
    assert [*names] == ["nats/train", "bits_per_dim/val", "test/nats", "learning_rate", "images_per_second"]


def test_a_sweep_is_a_group():
    assert place_of(Path("runs/sweeps/2026/0-seed=0")) == {
        "project": "pixelrnn",
        "name": "2026/0-seed=0",
        "group": "2026",
    }
    assert place_of(Path("runs/diag_bilstm/2026-s0"))["group"] is None
