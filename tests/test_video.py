"""Clips: what a frame sees of those before it, a likelihood as a product over frames, frames drawn in turn.

What every model promises is in the other files: causality, normalization, cached and naive, for the cases of clips too.

Legend: b batch · n clips · t frames · c channel (colour) · h w rows, columns.
"""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

import models
from cli.moving import write_gif
from cli.output import PngFolder, grid, upper_rows
from data.digits import digits
from data.moving import bounced, moving_digits
from models import video
from models.compression import compress, decompressed, read_head
from models.sampling import noise, sample
from models.video import film
from tests.cases import CASES, MIXTURE, build, config, given, images

CASE = CASES["video"]
every_past = pytest.mark.parametrize("past", [0, 1, 2, 5])
every_net = pytest.mark.parametrize("net", ["pixel_cnn", "gated_pixel_cnn", "row_lstm", "diag_bilstm"])
FOUR = {"frames": 4, "hidden": 12, "levels": 5}


def of_past(model, x, t):
    """What the encoder is given for frame t of clips x (b t c h w), by its definition, where values are scaled."""
    b, _, _, h, w = x.shape
    slots = []
    for back in range(1, model.past + 1):
        if t - back >= 0:
            slots += [2 * x[:, t - back] / (model.levels - 1) - 1.0, torch.ones(b, 1, h, w)]
        else:
            slots += [torch.zeros(b, model.channels, h, w), torch.zeros(b, 1, h, w)]
    return torch.cat(slots, 1)


# -------------------------------------------------------------------------------------------------- what is seen


@every_net
@every_past
def test_a_frame_sees_the_last_frames_and_none_before(net, past):
    changed = torch.zeros(4, 4, dtype=torch.bool)  # (of, in)
    for seed in range(4):  # of one model alone a ReLU may be closed
        model = build(CASE, **FOUR, net=net, past=past, seed=seed)
        x = images(model, 1)
        before = model.conditionals(x)
        for t in range(4):
            other = x.clone()
            other[:, t] = (other[:, t] + 1) % 5
            moved = (model.conditionals(other) != before)[0].flatten(1).any(1)
            moved[t] = False  # a frame sees its own earlier pixels
            changed[t] |= moved
    expected = [[t < of <= t + past for of in range(4)] for t in range(4)]
    assert changed.tolist() == expected


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_layer_of_the_encoder_reaches_a_pixel_far_and_frames_are_seen_as_they_are(layers):
    model = build(CASE, encoder_layers=layers, encoder_hidden=16, past=1, height=11, width=11)
    x = torch.randn(1, 2, 11, 11)
    other = x.clone()
    other[0, 0, 5, 5] += 1
    maps, others = model.maps(x), model.maps(other)
    assert maps.shape[1] == model.net.map_features == 2 + 16 * layers and torch.equal(maps[:, :2], x)
    rows, columns = (maps != others)[0].any(0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (5 - layers, 5 + layers, 5 - layers, 5 + layers)


# ---------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("channels", [1, 3])
@every_past
def test_the_likelihood_is_a_product_over_the_frames(past, channels):
    model = build(CASE, **FOUR, past=past, channels=channels, classes=3)
    x, label = images(model, 3), given(model, 3)["label"]
    expected, nats = 0, []
    for t in range(4):
        cond = model.maps(of_past(model, x, t)) if past else None
        nats.append(-model.net.log_prob(x[:, t], label, cond))
        expected = expected - nats[-1]
    torch.testing.assert_close(model.log_prob(x, label), expected, rtol=1e-5, atol=1e-4)
    parts = model.parts(x, label)
    assert list(parts) == ["frame_1", "frame_2", "frame_3", "frame_4"]
    torch.testing.assert_close(torch.stack([*parts.values()]), torch.stack(nats), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(model.nats_at(x, label).sum((1, 2, 3)), -expected, rtol=1e-5, atol=1e-4)


def test_without_gradients_frames_are_computed_in_parts(monkeypatch):
    """So that a clip takes no more memory than so many images; the numbers are the same but for rounding."""
    model = build(CASE, **FOUR, channels=3, classes=3)
    x, label, seen = images(model, 5), given(model, 5)["label"], []
    expected = model.log_prob(x, label).detach()
    monkeypatch.setattr(video, "FRAMES_AT_ONCE", 7)
    with torch.no_grad():
        nats_at = model.net.nats_at
        model.net.nats_at = lambda x, *rest: seen.append(len(x)) or nats_at(x, *rest)
        torch.testing.assert_close(model.log_prob(x, label), expected, rtol=1e-6, atol=1e-5)
    assert seen == [7, 7, 6]


@every_net
@every_past
def test_probabilities_of_all_clips_of_two_frames_of_1x2_bits_sum_to_one(net, past):
    """And so do those of the second frame, given any first one."""
    model = build(CASE, net=net, past=past, levels=2, height=1, width=2)
    every_clip = torch.tensor(list(itertools.product(range(2), repeat=4))).view(16, 2, 1, 1, 2)
    with torch.no_grad():
        first, second = (-nats.double() for nats in model.parts(every_clip).values())
    assert (first + second).exp().sum().item() == pytest.approx(1, abs=1e-6)
    assert second.exp().view(4, 4).sum(1).tolist() == pytest.approx([1] * 4, abs=1e-6)
    assert (second.view(4, 4) == second.view(4, 4)[0]).all() == (past == 0)


def test_a_clip_of_one_frame_is_an_image():
    model = build(CASE, frames=1, past=0)
    x = images(model, 4)
    assert torch.equal(model.log_prob(x), model.net.log_prob(x[:, 0]))


# ------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("method", ["cached", "naive"])
@every_past
def test_frames_are_drawn_in_turn_with_noise_of_their_own(past, method):
    model, drawn = build(CASE, **FOUR, past=past, classes=3), []
    label = torch.arange(3)
    for t in range(4):
        so_far = torch.stack([*drawn, torch.zeros_like(drawn[0])], 1) if drawn else torch.zeros(3, 1, *model.net.shape)
        with torch.no_grad():
            cond = model.maps(of_past(model, so_far.long(), t)) if past else None
        uniforms = noise(8, range(3), model.net.shape, t)
        drawn.append(sample(model.net, 3, label=label, cond=cond, uniforms=uniforms, method=method))
    assert torch.equal(sample(model, 3, seed=8, label=label, method=method), torch.stack(drawn, 1))


@every_past
def test_given_frames_are_continued(past):
    """Frames that are given are kept, and those after them are drawn given them."""
    model = build(CASE, **FOUR, past=past)
    x = images(model, 3, seed=5)
    known = upper_rows(x, 0.5)
    assert known.flatten(2).all(2).tolist() == [[True, True, False, False]] * 3
    one, other = (sample(model, 3, known=(given, known), seed=2).long() for given in (x, (x + 1) % 5))
    assert torch.equal(one[:, :2], x[:, :2]) and torch.equal(other[:, :2], (x[:, :2] + 1) % 5)
    assert torch.equal(one[:, 2:], other[:, 2:]) == (past == 0)


def test_one_loop_draws_all_frames(monkeypatch):
    """The weights are laid out once, not once a frame."""
    made, kind = [], models.sampling.PixelLoop
    monkeypatch.setattr(models.sampling, "PixelLoop", lambda *args: made.append(1) or kind(*args))
    sample(build(CASE, **FOUR), 3, batch_size=2)
    assert len(made) == 2  # batches of two clips and of one


# --------------------------------------------------------------------------------------------------- compression


@pytest.mark.parametrize("extra", [{}, {"past": 0, **MIXTURE}, {"classes": 3, "label_dropout": 0.3}], ids=str)
def test_clips_are_compressed_without_loss(extra):
    pytest.importorskip("constriction")
    model = build(CASE, **{**FOUR, **extra})
    x, conditions = images(model, 5).to(torch.uint8), given(model, 5)
    data = compress(model, x, **conditions, images_of_block=2, model_inside=True)
    head, _ = read_head(data)
    assert head.shape == model.shape == (4, 1, 3, 4)
    assert torch.equal(decompressed(data).x, x)
    assert torch.equal(decompressed(data, model).x, x)


def test_a_damaged_number_of_frames_is_told():
    pytest.importorskip("constriction")
    model = build(CASE, **FOUR)
    x = images(model, 40)
    data = compress(model, x, images_of_block=2)
    at = 4 + 1 + 1 + 8 + 4 + 2 + 8 + 4  # behind the head and its checksum
    for damaged in (data[:at] + b"\xff" + data[at + 1 :], data[: at + 3]):
        with pytest.raises(ValueError, match="head is damaged"):
            read_head(damaged)
    found = decompressed(data[:at] + b"\xff" + data[at + 1 :], model, skip_damaged=True)
    assert torch.equal(found.x.long(), x) and len(found.damage) == 1


# -------------------------------------------------------------------------------------------------- construction


@every_net
def test_the_net_is_what_is_asked_for(net):
    model = build(CASE, net=net, frames=3, layers=3, past=4, encoder_layers=2)
    classes = {"pixel_cnn": "PixelCNN", "gated_pixel_cnn": "GatedPixelCNN"}
    classes |= {"row_lstm": "RowLSTM", "diag_bilstm": "DiagBiLSTM"}
    assert type(model.net).__name__ == classes[net] and model.net.body.layers == 3
    assert model.nets == 3 * [model.net] and model.shape == (3, 1, 3, 4)
    assert [conv.weight.shape[:2] for conv, _ in model.encoder] == [(8, 8), (8, 8)]
    assert [len(conv.weight) for conv, _ in build(CASE, net=net, encoder_hidden=5).encoder] == [5, 5, 5]


@pytest.mark.parametrize("wrong, named", [
    ({"frames": 0}, ["frames=0", "at least 1"]),
    ({"frames": 2.0}, ["frames=2.0", "integer"]),
    ({"past": -1}, ["past=-1", "at least 0"]),
    ({"encoder_layers": 0}, ["encoder_layers=0", "at least 1"]),
    ({"encoder_hidden": 0}, ["encoder_hidden=0", "at least 1"]),
    ({"net": "multi_scale"}, ["net='multi_scale'", "pixel_cnn, gated_pixel_cnn, row_lstm or diag_bilstm"]),
    ({"hidden": 0}, ["hidden=0", "at least 1"]),
    ({"label_dropout": 0.1}, ["label_dropout=0.1", "no classes"]),
    ({"map_features": 2}, ["'map_features'", "past"]),
], ids=str)  # fmt: skip
def test_a_wrong_argument_is_refused_with_its_name_and_what_is_allowed(wrong, named):
    with pytest.raises(ValueError) as error:
        models.build({**config(CASE), **wrong})
    message = str(error.value)
    assert all(text in message for text in named) and "\n" not in message, message


# ------------------------------------------------------------------------------------------------------ pictures


def test_clips_stand_in_rows():
    x = torch.arange(2 * 3).view(2, 3, 1, 1, 1) * torch.ones(1, 1, 1, 2, 2, dtype=torch.long)
    picture = np.asarray(grid(x, levels=6))
    one = np.asarray(grid(x.flatten(0, 1), levels=6, columns=3))
    assert np.array_equal(picture, one) and picture.shape[1] == 3 / 2 * picture.shape[0]


def test_a_film_has_its_frames_one_below_the_other(tmp_path):
    x = torch.randint(17, (2, 3, 1, 4, 5))
    assert film(x).shape == (2, 1, 12, 5) and torch.equal(film(x)[1, :, 4:8], x[1, 1])
    assert torch.equal(film(x[:, 0]), x[:, 0])
    PngFolder(tmp_path / "clips", 2, 17, {"n": 2}).put([0, 1], x)
    found = np.asarray(Image.open(tmp_path / "clips" / "000001.png"))
    assert np.array_equal(np.rint(found / 255 * 16), film(x)[1, 0])


def test_a_gif_has_the_frames_of_a_clip_in_their_time(tmp_path):
    x = torch.randint(2, (4, 5, 1, 8, 8))
    frames = [grid(frame, 2) for frame in x.unbind(1)]
    write_gif(tmp_path / "clip.gif", frames, milliseconds=120)
    with Image.open(tmp_path / "clip.gif") as found:
        assert found.n_frames == 5 and found.info["duration"] == 120
        for k, frame in enumerate(frames):
            found.seek(k)
            assert np.array_equal(np.asarray(found.convert("L")) > 200, np.asarray(frame) > 200)


# --------------------------------------------------------------------------------------------------------- data


def test_what_moves_turns_round_at_the_edges():
    places = bounced(np.array([1.0, 0.0, 3.0]), np.array([1.5, -1.0, 0.0]), 6, 4)
    assert np.allclose(places, [[1, 2.5, 4, 2.5, 1, 0.5], [0, 1, 2, 3, 4, 3], [3] * 6])


def test_moving_digits_are_digits_of_their_split_that_move():
    dataset = moving_digits(train=5, val=3, test=4, digits=1, frames=30, speed=0.15, seed=3, binarize="none")
    again = moving_digits(train=5, val=3, test=4, digits=1, frames=30, speed=0.15, seed=3, binarize="none")
    assert dataset.shape == {"channels": 1, "height": 16, "width": 16, "levels": 17, "frames": 30}
    for name, n in (("train", 5), ("val", 3), ("test", 4)):
        x = dataset.split(name).images
        assert x.shape == (n, 30, 1, 16, 16) and np.array_equal(x, again.split(name).images)
        known = {image.tobytes() for image in digits().split(name).images}
        for clip in x:
            corners = []
            for frame in clip[:, 0]:
                windows = np.lib.stride_tricks.sliding_window_view(frame, (8, 8))
                inside = [
                    (i, j)
                    for i in range(9)
                    for j in range(9)
                    if windows[i, j].tobytes() in known and windows[i, j].sum() == frame.sum()
                ]
                assert inside, "no digit of the split is in the frame"
                corners.append(inside[0])
            steps = np.abs(np.diff(np.array(corners), axis=0))
            assert steps.max() <= 2 and steps.any()  # 0.15 of 8 pixels, and rounding


def test_two_digits_may_cross():
    grey, bits = (moving_digits(train=20, val=1, test=1, binarize=b) for b in ("none", "threshold"))
    x, sums = grey.train.images, grey.train.images.astype(int).sum((2, 3, 4))
    assert (grey.levels, bits.levels) == (17, 2) and sums.max() > sums.min() and x.max() <= 16
    assert np.array_equal(bits.train.images, x >= 8)
    assert not np.array_equal(x[0], moving_digits(train=20, val=1, test=1, seed=1, binarize="none").train.images[0])


@pytest.mark.parametrize("wrong, named", [
    ({"source": "letters"}, "digits or mnist"),
    ({"binarize": "stochastic"}, "threshold or none"),
    ({"frames": 0}, "dataset.frames=0"),
    ({"size": 8}, "above 8"),
    ({"size": "16"}, "dataset.size='16'"),
    ({"speed": 2.0}, "dataset.speed=2.0"),
    ({"digits": 0}, "dataset.digits=0"),
    ({"test": 0}, "dataset.test=0"),
    ({"seed": -1}, "dataset.seed=-1"),
], ids=str)  # fmt: skip
def test_wrong_options_of_moving_digits_are_told(wrong, named):
    with pytest.raises(ValueError, match=named):
        moving_digits(**wrong)
