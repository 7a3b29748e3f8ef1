"""The moving picture of how images are drawn: a pixel appears when the sampler draws it, and the end is the image."""

import numpy as np
import pytest
import torch
from PIL import Image

from cli.moving import halfway, order_of
from cli.output import UNKNOWN, bytes_of, grid
from tests.cases import CASES, build, images, order
from tests.commands import refused


def frames(path: str) -> list[np.ndarray]:
    with Image.open(path) as file:
        return [np.asarray(file.convert("RGB")) for _ in map(file.seek, range(file.n_frames))]


@pytest.mark.parametrize("name", ["row_lstm", "multi_scale"])
def test_pixels_appear_in_the_order_of_drawing(name):
    model = build(CASES[name], height=8, width=4, **({"doublings": 2} if name == "multi_scale" else {}))
    x, (number, strides), (_, h, w) = images(model, 2), order_of(model), model.shape
    for drawn in range(h * w + 1):
        shown, there = halfway(x, number, strides, drawn), torch.zeros(h * w, dtype=torch.bool)
        there[order(model)[:drawn]] = True
        there = there.view(h, w)
        assert torch.equal(shown[:, :, there], x[:, :, there])
        for i, j in (~there).nonzero().tolist():
            # the smallest square around it whose corner is drawn has the corner's colour
            corners = [(i // k * k, j // k * k) for k in reversed(strides)]
            corner = next((corner for corner in corners if there[corner]), None)
            expected = torch.full_like(x[:, :, i, j], UNKNOWN) if corner is None else x[:, :, corner[0], corner[1]]
            assert torch.equal(shown[:, :, i, j], expected)


def test_the_paper_s_form_shows_the_largest_image_alone():
    model = build(CASES["multi_scale"], copy_known=False)
    assert order_of(model)[1] == [1] and order_of(model)[0].flatten().tolist() == list(range(16))


@pytest.mark.parametrize("levels", [2, 17, 1000])
def test_unknown_is_grey(levels):
    x = torch.tensor([0, UNKNOWN, levels - 1]).view(1, 1, 1, 3)
    assert bytes_of(x, levels).flatten().tolist() == [0, 128, 255]


@pytest.mark.slow
class TestCommand:
    def test_the_last_frame_is_the_picture(self, call):
        checkpoint = "checkpoint=pretrained/digits-multi_scale"
        status, out, err = call("sample", checkpoint, "n=9", "gif=a.gif", "npy=a.npy")
        assert status == 0 and "samples.png, a.gif, a.npy" in out, err
        found, x = frames("a.gif"), torch.from_numpy(np.load("a.npy"))
        assert 20 < len(found) <= 61 and (found[0] == 128).mean() > 0.9
        assert np.array_equal(found[-1][..., 0], np.asarray(grid(x, 17)))
        with Image.open("a.gif") as file:
            assert file.info["loop"] == 0  # again and again

    def test_completions_begin_with_what_is_known(self, call):
        arguments = ["checkpoint=pretrained/digits-diag_bilstm", "complete=test", "n=3", "completions=30"]
        status, _, err = call("sample", *arguments, "gif=a.gif")
        assert status == 0, err
        first, last = frames("a.gif")[0], frames("a.gif")[-1]
        assert first.shape == (2 * 58, 32 * 58, 3)  # whole rows of the first 64
        with Image.open("samples.png") as file:
            assert np.array_equal(last[..., 0], np.asarray(file)[: 2 * 58])
        assert np.array_equal(first[:29], last[:29]) and (first[30:57, 60:115] == 128).all()

    @pytest.mark.parametrize("value", ["a.png", "nowhere/a.gif", "[a]"])
    def test_mistakes(self, call, value):
        refused(call("sample", "checkpoint=pretrained/digits-diag_bilstm", f"gif={value}"), [value.partition("/")[0]])
