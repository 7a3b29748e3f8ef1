"""The models that come with the project."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench.pretrained import RESULTS, card, drawn, stages, training_of
from cli.runs import FIRST, PRETRAINED
from models.checkpoint import read, rebuild
from models.scores import scores
from tests.commands import refused
from tests.stored import first_test_images

NAMES = sorted(path.name for path in PRETRAINED.glob("*.safetensors"))


@pytest.mark.slow
def test_without_a_run_a_pretrained_model_is_taken_and_it_is_said(call):
    status, out, err = call("sample", "n=4")
    assert status == 0, err
    assert "no trained model yet" in out and FIRST in out
    with Image.open("samples.png") as picture:
        assert picture.size == (2 * 58, 2 * 58)
    status, out, err = call("evaluate", "out=numbers.json")
    assert status == 0 and "no trained model yet" in out
    assert json.loads(Path("numbers.json").read_text())["images"] == 360


def test_they_have_short_names_in_any_folder(call):
    for name in ("pretrained/digits-diag_bilstm", f"pretrained/{FIRST}"):
        status, out, err = call("sample", f"checkpoint={name}", "n=1")
        assert status == 0, err
        assert str(PRETRAINED / FIRST) in out and "no trained model yet" not in out
    refused(call("sample", "checkpoint=pretrained/nothing"), ["pretrained/nothing", "expected"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name.removesuffix(".safetensors") for name in NAMES])
def test_their_numbers_repeat(name, tmp_path):
    """Of the first images of the test split; `python -m bench.pretrained` repeats those of all."""
    path, said = PRETRAINED / f"{name}.safetensors", json.loads((RESULTS / f"{name}.json").read_text())
    checkpoint = read(path)
    model, first = rebuild(checkpoint, path).eval(), said["first"]
    x = first_test_images(dict(checkpoint["config"]["dataset"]), first["images"], tmp_path)
    label = None if not model.classes else torch.tensor(first["labels"])
    assert scores(model, x, label).nats.mean().item() == pytest.approx(first["nats"], rel=1e-5)
    assert f"{said['test']['bits_per_dim']:.4f}" in (PRETRAINED / f"{name}.md").read_text()


def test_a_card_names_the_trainings_that_a_model_began_with(tmp_path):
    name = FIRST.removesuffix(".safetensors")
    of = json.loads((RESULTS / f"{name}.json").read_text())
    commands, begun = [of["training"]["command"]], f"pretrained/{name}"
    for folder in (tmp_path / "one", tmp_path / "two"):
        commands.append(f"python train.py model=diag_bilstm init_from={begun} steps=7")
        summary = {"command": commands[-1], "device": "a CPU", "cores": 2, "best_step": 5, "date": "2026-11-30T12:00"}
        folder.mkdir()
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text('{"step": 5, "val_bits_per_dim": 1.5}\n')
        begun = folder
    of["training"] = training_of(folder)
    text = card(name, of)
    assert "```\n" + "\n".join(commands) + "\n```" in text
    assert text.count("| began with |") == 2
    first, *further = [stage["validation"] for stage in stages(of["training"])]
    assert len(first) > 1 and further == 2 * [[(5, 1.5)]]
    picture = drawn(name, of["training"])
    assert all(f">{words}</text>" in picture for words in ("training 1", "training 2", name))


def test_they_are_small_and_each_is_in_the_list():
    assert sum((PRETRAINED / name).stat().st_size for name in NAMES) < 12e6
    listed = re.findall(r"^\| \[`([\w.-]+)`\]", (PRETRAINED / "README.md").read_text(), re.MULTILINE)
    assert sorted(f"{name}.safetensors" for name in listed) == NAMES
