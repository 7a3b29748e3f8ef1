"""What the demo page computes, and the page itself, played with in a headless browser where there is one."""

import re
import shutil

import numpy as np
import pytest
import torch

import demo
from cli import demo as computed
from cli.output import grid
from models.base import NO_LABEL
from models.sampling import sample
from tests.cases import CASES, LABELS, build
from tests.commands import REPOSITORY, refused

MODEL = REPOSITORY / "pretrained/binary_mnist-diag_bilstm.safetensors"


@pytest.fixture(scope="module")
def digit(tmp_path_factory):
    """A picture of a digit that the model drew, as a file, and the digit."""
    path = tmp_path_factory.mktemp("digit") / "digit.png"
    x = sample(computed.model_of(MODEL), 1, seed=5).long()
    computed.enlarged(x[0].byte() * 255).save(path)
    return path, x


@pytest.mark.parametrize("alpha", [0, 255], ids=["transparent", "white"])
def test_ink_is_bright_and_paper_is_dark(alpha):
    sketch = np.zeros((280, 280, 4), np.uint8)
    sketch[..., :3], sketch[..., 3] = 255, alpha
    sketch[100:140, 50:200] = 0, 0, 0, 255
    x = computed.of_sketch(sketch, computed.model_of(MODEL))
    expected = torch.zeros(1, 1, 28, 28, dtype=torch.long)
    expected[..., 10:14, 5:20] = 1
    assert torch.equal(x, expected)
    assert not computed.of_sketch(None, computed.model_of(MODEL)).any()
    grey = computed.of_sketch(sketch, build(CASES["pixel_cnn"], levels=17, height=28, width=28))
    assert torch.equal(grey, 16 * expected)


def test_completions_keep_the_sketch_and_go_on(digit):
    model, (_, x) = computed.model_of(MODEL), digit
    ink = np.repeat(np.repeat(x[0, 0].numpy() * 255, 10, 0), 10, 1).astype(np.uint8)
    sketch = np.stack([0 * ink, 0 * ink, 0 * ink, ink], -1)
    answer = computed.complete(model, sketch, keep=0.5, seed=3)
    known = torch.zeros(16, 1, 28, 28, dtype=torch.bool)
    known[:, :, :14] = True
    expected = sample(model, 16, seed=3, known=(x.expand(16, -1, -1, -1), known)).long()
    assert np.array_equal(np.asarray(answer.shown), np.asarray(grid(expected, 2, 4)))
    low, high = map(int, re.match(r"16 completions of (\d+) to (\d+) bits", answer.text).groups())
    bits = -model.log_prob(expected) / np.log(2)
    assert low == round(bits.min().item()) and high == round(bits.max().item()) and answer.bits.mode == "RGB"


def test_labels_of_models_that_need_them_and_of_others():
    needs, free, none = build(CASES["pixel_cnn"], classes=3), build(CASES["pixel_cnn"], **LABELS), None
    assert computed.labels(build(CASES["pixel_cnn"]), none, 4) is None
    assert computed.labels(needs, none, 4).tolist() == [0, 1, 2, 0] and computed.labels(needs, 2, 2).tolist() == [2, 2]
    assert computed.labels(free, none, 2).tolist() == [NO_LABEL] * 2
    for model in (needs, free):  # a strength that the model has no use for is not taken for a mistake
        assert computed.complete(model, None, guidance=2.0, label=1).text.startswith("16 completions")


def test_a_picture_is_scored_and_compressed(digit):
    model, (path, x) = computed.model_of(MODEL), digit
    bits = -model.log_prob(x).item() / np.log(2)
    answer = computed.score(model, path)
    assert answer.text.startswith(f"{bits:.0f} bits") and answer.shown.size == answer.bits.size == (280, 280)
    pytest.importorskip("constriction")
    content, shown, text = computed.compressed(model, path)
    assert f"**{len(content)} bytes**" in text and f"says {bits / 8:.1f}" in text and "PNG:" in text
    assert bits / 8 < len(content) < bits / 8 + 80 and np.array_equal(np.asarray(shown), np.asarray(answer.shown))


def test_a_file_that_is_too_large_or_no_picture_is_refused(tmp_path):
    model, large, text = computed.model_of(MODEL), tmp_path / "large.png", tmp_path / "text.png"
    large.write_bytes(bytes(computed.LARGEST + 1))
    text.write_text("no picture")
    large_said, text_said = r"2,097,153 bytes.*at most 2,097,152", r"text\.png: expected a picture"
    for path, said in ((large, large_said), (text, text_said), (None, "expected a picture, found none")):
        for compute in (computed.score, computed.compressed):
            with pytest.raises(ValueError, match=said):
                compute(model, path)
            with pytest.raises(RuntimeError, match=said):
                computed.said(compute, RuntimeError)(model, path)


def test_what_is_offered():
    shelf = demo.shelf(None)
    assert next(iter(shelf)) == demo.FIRST and "digits-gated_pixel_cnn.classes" in shelf
    assert not any(name.startswith("cifar10") for name in shelf)  # of colours there is no sketch
    assert next(iter(demo.shelf("pretrained/digits-row_lstm"))) == "digits-row_lstm"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["port=0"], ["port=0", "from 1 to 65535"]),
        (["port=x"], ["port"]),
        (["open=maybe"], ["open"]),
        (["checkpoint=nothing.pt"], ["nothing.pt"]),
    ],
)
def test_mistakes(call, arguments, words):
    refused(call("demo", *arguments), words)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="Chromium is not installed")
def test_the_page_in_a_browser(tmp_path, digit):
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    from tests import playing

    with playing.served(tmp_path) as address, playing.browser() as chromium:
        said = playing.play(chromium.new_page(), address, digit[0])
    low, high = map(int, re.match(r"16 completions of (\d+) to (\d+) bits", said["complete"]).groups())
    assert 50 < low < high < 250  # of the stroke that was drawn, and no other
    cold = [int(bits) for bits in re.match(r"16 completions of (\d+) to (\d+) bits", said["cold"]).groups()]
    assert max(cold) < low
    assert "bits/dim" in said["score"] and "Decoded, it is the same image" in said["compress"]
