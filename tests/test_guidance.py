"""Labels that are left out in training, models that need none, and guidance away from images without a label."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from models.base import NO_LABEL
from models.compression import compress, decompress
from models.dropout import drop_labels, masks_of
from models.sampling import sample
from models.scores import scores
from tests.cases import CASES, LABELS, assert_methods_agree, build, every, given, images, independent, noises
from tests.commands import SHORT, process, refused

every_free = every(lambda case: "label_dropout" in case.extra)


@every_free
@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_images_are_drawn_as_the_definition_says(case, guidance):
    """From logits without the label, and so often the way from there to those with it."""
    model = build(case, levels=5)
    drawn = assert_methods_agree(model, n=5, guidance=guidance, batch_size=2)
    assert torch.equal(drawn.long(), independent(model, noises(model, 0, 5), guidance=guidance))
    unguided = sample(model, 5, **given(model, 5))
    assert not torch.equal(drawn, unguided) and torch.equal(sample(model, 5, guidance=1.0, **given(model, 5)), unguided)


@every_free
def test_guided_images_keep_what_is_known(case):
    model = build(case, levels=5)
    x = images(model, 4)
    known = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    drawn = assert_methods_agree(model, n=4, guidance=1.7, known=(x, known), temperature=0.8).long()
    assert torch.equal(drawn[known], x[known])
    assert torch.equal(drawn, independent(model, noises(model, 0, 4), 0.8, x, known, 1.7))


@every_free
def test_no_label_is_none(case):
    """Of all images or of one: what a model says of it is what it says where no label is given."""
    model, b = build(case, levels=5), 3
    x, conditions = images(model, b), given(model, b)
    of_labels, free = conditions.pop("label"), model.log_prob(x, **{**conditions, "label": None})
    assert torch.equal(model.log_prob(x, label=torch.full((b,), NO_LABEL), **conditions), free)
    mixed = torch.where(torch.arange(b) == 1, NO_LABEL, (of_labels + 1) % 3)
    alike = model.log_prob(x, label=mixed, **conditions) == free
    assert alike.tolist() == [False, True, False]
    assert torch.equal(sample(model, b, **conditions), sample(model, b, guidance=0.0, label=[0, 1, 2], **conditions))
    found = scores(model, x, None, conditions.get("cond")).nats
    torch.testing.assert_close(found, -free.double(), rtol=1e-6, atol=0)


@every_free
def test_images_without_a_label_are_compressed(case):
    pytest.importorskip("constriction")
    model = build(case, levels=5)
    x, conditions = images(model, 4), given(model, 4)
    assert conditions["label"].tolist() == [0, 1, 2, NO_LABEL]
    cond = conditions.get("cond")
    for label in (conditions["label"], None):
        assert torch.equal(decompress(model, compress(model, x, label, cond), cond).long(), x)


def test_labels_are_left_out_in_training_only():
    model, x, label = build(CASES["pixel_cnn"], **LABELS), torch.zeros(400, 1, 3, 4).long(), torch.full((400,), 2)
    with torch.no_grad():
        told, free = model(x[:1], label[:1]), model(x[:1], None)
        assert (model(x, label) - told).abs().max() < 1e-4
        torch.manual_seed(0)
        nats = model.train()(x, label)
    left_out = (nats - free).abs() < 1e-4
    assert ((nats - told).abs() < 1e-4).equal(~left_out) and 0.22 < left_out.float().mean() < 0.38


def test_which_labels_are_left_out_depends_on_the_image_not_on_its_part():
    keys, label = torch.arange(80).view(40, 2), torch.arange(40)
    with masks_of(keys):
        whole = drop_labels(label, 0.3, NO_LABEL)
    for some in (slice(0, 13), slice(13, 40)):
        with masks_of(keys[some]):
            assert torch.equal(drop_labels(label[some], 0.3, NO_LABEL), whole[some])
    assert 0 < (whole == NO_LABEL).sum() < 40 and ((whole == label) | (whole == NO_LABEL)).all()


@pytest.mark.parametrize("name", ["pixel_cnn", "multi_scale"])
def test_mistakes(name):
    needs, free = build(CASES[name], classes=3), build(CASES[name], **LABELS)
    x = images(free, 2)
    assert "label_dropout" in free.config and "label_dropout" not in needs.config  # nor in any older model's
    for wrong, said in (
        (lambda: build(CASES[name], label_dropout=0.1), "label_dropout=0.1: expected 0, as the model has no classes"),
        (lambda: build(CASES[name], classes=3, label_dropout=1.0), "label_dropout=1.0: expected a number from 0"),
        (lambda: needs.log_prob(x), "label: expected one of 3 classes"),
        (lambda: needs.log_prob(x, torch.tensor([0, NO_LABEL])), "from 0 to 2, found -1 to 0"),
        (lambda: free.log_prob(x, torch.tensor([0, -2])), "from 0 to 2, or -1 for none, found -2 to 0"),
        (lambda: free.log_prob(x, torch.tensor([0, 3])), "or -1 for none, found 0 to 3"),
        (lambda: sample(needs, 2, label=1, guidance=2.0), "guidance=2.0: expected 1, as the model was trained without"),
        (lambda: sample(free, 2, guidance=2.0), "guidance=2.0: expected 1 without labels"),
        (lambda: sample(free, 2, label=1, guidance=-1.0), "guidance=-1.0: expected a number of at least 0"),
        (lambda: sample(free, 2, label=[1]), r"label: expected integers \(2,\), found \(1,\)"),
    ):
        with pytest.raises(ValueError, match=said):
            wrong()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run of a model that needs no label."""
    folder = tmp_path_factory.mktemp("guidance") / "run"
    model = ["model=pixel_cnn", "model.classes=auto", "model.label_dropout=0.1", "model.hidden=8", "steps=20"]
    process("train.py", *SHORT, *model, f"hydra.run.dir={folder}", check=True)
    return folder


@pytest.mark.slow
class TestCommands:
    def test_sample(self, call, run):
        for name, arguments in (
            ("one", ["n=4", "label=3", "guidance=1.5"]),
            ("some", ["n=8", "label=[3,8]", "guidance=1.5"]),
            ("none", ["n=4", "label=none"]),
            ("away", ["n=4", "label=3", "guidance=0"]),
            ("lower", ["n=2", "complete=test", "label=[3,8]", "completions=2"]),
        ):
            status, _, err = call("sample", f"checkpoint={run}", *arguments, f"npy={name}.npy")
            assert status == 0, err
        one, some, none, away, lower = (np.load(f"{x}.npy") for x in ("one", "some", "none", "away", "lower"))
        assert np.array_equal(one, some[:4]) and np.array_equal(none, away) and not np.array_equal(none, one)
        assert len(lower) == 4

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["label=[]"], ["label=[]", "0 to 9", "or none"]),
            (["label=[3,10]"], ["label=[3, 10]", "0 to 9"]),
            (["label=no"], ["label='no'", "or none"]),
            (["label=-1"], ["label=-1", "or none"]),
            (["label=none", "guidance=x"], ["guidance"]),
            (["guidance=-1"], ["guidance=-1", "at least 0"]),
            (["complete=test", "label=[1,2,3]"], ["label=[1, 2, 3]", "8 images"]),
        ],
    )
    def test_mistakes(self, call, run, arguments, words):
        refused(call("sample", f"checkpoint={run}", *arguments), words)

    def test_evaluate(self, call, run):
        found = {}
        for name, arguments in (
            ("told", []),
            ("free", ["without_label=true"]),
            ("singly", ["images=test", "without_label=true"]),
        ):
            status, out, err = call("evaluate", f"checkpoint={run}", *arguments, f"out={name}.json")
            assert status == 0 and f"given {'the' if name == 'told' else 'no'} label" in out, out + err
            found[name] = json.loads(Path(f"{name}.json").read_text())["nats"]
        assert found["free"] == pytest.approx(found["singly"], rel=1e-6) and found["free"] != found["told"]

    def test_a_model_that_needs_labels_cannot_do_without(self, call):
        checkpoint = "checkpoint=pretrained/digits-row_lstm"
        refused(call("evaluate", checkpoint, "without_label=true"), ["without_label", "without label_dropout"])
        refused(call("sample", checkpoint, "guidance=2"), ["guidance=2", "without label_dropout"])
        refused(call("sample", checkpoint, "label=none"), ["label='none'", "without classes"])
