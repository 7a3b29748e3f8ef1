"""Compression: what comes back is what went in, the size is the likelihood, and damage costs a block."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pixelrnn
from kernels.integer_probabilities import TOTAL, integer_probabilities
from models.compression import compress, decompress, decompressed, file, read_head
from models.sampling import sample
from tests.cases import CASES, build, every, given, images
from tests.commands import SHORT, refused

SMALL = dict(channels=1, levels=4, height=4, width=4)


def model_of(name: str = "pixel_cnn", **arguments):
    return build(CASES[name], **SMALL | arguments)


def labels_and_maps(model, b: int) -> tuple:
    about = given(model, b)
    return about.get("label"), about.get("cond")


# ------------------------------------------------------------------------------------------------------ probabilities


@pytest.mark.parametrize("levels", [2, 17, 256, 1000])
def test_integers_are_the_probabilities(levels):
    logits = 4 * torch.randn(21, levels, generator=torch.Generator().manual_seed(0))
    logits[3], logits[4] = -100.0, 0.0
    logits[3, levels // 2] = 100.0
    found = integer_probabilities(logits).double()
    assert found.min() >= 0 and (found.sum(1) == TOTAL - levels).all() and (found == found.round()).all()
    wanted = logits.double().softmax(1)
    assert ((found + 1) / TOTAL - wanted).abs().max() < 2e-7 * levels
    cost = (wanted * (wanted.clamp(min=1e-300) / ((found + 1) / TOTAL)).log2()).sum(1)
    assert cost.max() < 1e-4  # bits that a sub-pixel loses
    for b in (1, 5, 16):
        assert torch.equal(integer_probabilities(logits[:b]), found[:b].float())


# ------------------------------------------------------------------------------------------------------------ lossless


@every()
@pytest.mark.parametrize(("channels", "levels"), [(1, 2), (3, 5)])
def test_images_come_back_and_their_size_is_the_likelihood(case, channels, levels):
    model = build(case, channels=channels, levels=levels, height=4, width=6)
    label, cond = labels_and_maps(model, 37)
    x = sample(model, 37, label=label, cond=cond)  # likely ones: no value costs more than 24 bits
    data = compress(model, x, label, cond, images_of_block=16)
    back = decompress(model, data, cond)
    assert torch.equal(back, x) and back.dtype == torch.uint8
    with torch.no_grad():
        bits = -model.log_prob(x.long(), label, cond).sum().item() / math.log(2)
    bits += len(x) * math.log2(model.classes or 1)
    head, _ = read_head(data)
    assert head.blocks == 3 and bits / 8 - 12 < len(data) < 1.001 * bits / 8 + 64 * head.blocks


def test_many_levels_and_an_image_of_one_pixel():
    model = model_of(levels=700, height=1, width=1)
    x = torch.arange(700).view(-1, 1, 1, 1)
    back = decompress(model, compress(model, x))
    assert torch.equal(back, x) and back.dtype == torch.int64


def test_other_threads_and_another_cpu_decode(monkeypatch):
    model, threads = model_of("diag_bilstm", channels=3, levels=4), torch.get_num_threads()
    x = images(model, 40)
    files = []
    try:
        for name, count in (("", 2), ("generic", 1)):
            monkeypatch.setenv("PIXELRNN_CPU", name)
            torch.set_num_threads(count)
            files.append(compress(model, x, images_of_block=8))
            assert torch.equal(decompress(model, files[0]), x.to(torch.uint8))
    finally:
        torch.set_num_threads(threads)
    assert files[0] == files[1]


def test_a_model_in_training_of_other_numbers_and_its_copy_inside():
    model = model_of().double().train()
    x = images(model, 9)
    data = compress(model, x, model_inside=True)
    assert model.training and model.stem.weight.dtype == torch.float64
    assert torch.equal(pixelrnn.decompress(None, data), x.to(torch.uint8))
    assert torch.equal(pixelrnn.decompress(model, data), x.to(torch.uint8))


def test_what_is_no_image_of_the_model_is_refused():
    model = model_of()
    for wrong in (torch.zeros(2, 1, 4, 5, dtype=torch.long), torch.full((2, 1, 4, 4), 4), torch.zeros(2, 1, 4, 4)):
        with pytest.raises(ValueError, match="x: expected"):
            compress(model, wrong)
    with pytest.raises(ValueError, match="images=0"):
        compress(model, images(model, 0))
    with pytest.raises(ValueError, match="label"):
        compress(model_of("pixel_cnn-mixture-given"), images(model, 2))


# -------------------------------------------------------------------------------------------------------------- damage


def damaged(data: bytes, how: str, at: int, rng: random.Random) -> bytes:
    d = bytearray(data)
    some = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    if how == "bit":
        d[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del d[at:]
    elif how == "lost":
        del d[at : at + len(some)]
    elif how == "more":
        d[at:at] = some
    else:
        d[at : at + len(some)] = some
    return bytes(d)


def test_every_damaged_file_ends_in_an_error_that_names_the_block():
    model, rng = model_of(), random.Random(0)
    x = images(model, 60)
    data = compress(model, x, images_of_block=16)
    starts = [at for at, _ in file.heads_in(data)]
    assert len(starts) == 4
    for k in range(2000):
        how, at = rng.choice(("bit", "cut", "lost", "more", "other")), rng.randrange(len(data))
        changed = damaged(data, how, at, rng)
        if changed == data:
            continue
        with pytest.raises(ValueError) as error:
            list(file_of(changed, model))
        said, block = str(error.value), sum(start <= at for start in starts) - 1
        assert "\n" not in said
        if block < 0:
            assert "head" in said or "version" in said or "expected" in said
        elif at != starts[block]:  # at the very beginning something may be added before
            assert f"block {block}" in said or f"blocks {block}" in said or "the last block" in said, (how, at, said)
        if k < 100:
            rescued = decompressed(changed, model, skip_damaged=True) if any(file.heads_in(changed)) else None
            if rescued is not None:
                assert torch.equal(rescued.x, x[rescued.numbers].to(torch.uint8)) and rescued.damage
                assert len(rescued.x) >= (28 if how in ("bit", "more") else 0)


def file_of(data: bytes, model):
    """What decoding reads before it decodes."""
    from models.compression import opened

    head, at, *_ = opened(data, model)
    for block in file.read_blocks(data, at, head):
        if isinstance(block, str):
            raise ValueError(block)
        yield block


def test_skip_damaged_gives_the_rest_and_says_what_is_lost():
    model = model_of()
    x = images(model, 60)
    data = compress(model, x, images_of_block=16)
    starts = [at for at, _ in file.heads_in(data)]
    for part, lost in (([], []), ([1], [1]), ([0, 3], [0, 3]), ([0, 1, 2, 3], [0, 1, 2, 3])):
        changed = bytearray(data)
        for block in part:
            changed[starts[block] + 30] ^= 1
        x_left, numbers, damage = decompressed(bytes(changed), model, skip_damaged=True)
        assert numbers == [k for k in range(60) if k // 16 not in lost]
        assert torch.equal(x_left, x[numbers].to(torch.uint8)) and len(damage) == len(lost)
        assert all(f"block {block} of 4" in text for block, text in zip(lost, damage, strict=True))
    without_head = bytes([*data[:5], data[5] ^ 1, *data[6:]])
    x_left, numbers, damage = decompressed(without_head, model, skip_damaged=True)
    assert torch.equal(x_left, x.to(torch.uint8)) and "head" in damage[0]


def test_another_model_another_version_and_other_files_are_refused():
    model, other = model_of(), build(CASES["pixel_cnn"], seed=1, **SMALL)
    data = compress(model, images(model, 3))
    with pytest.raises(ValueError, match=r"expected the model [0-9a-f]{16}, which it was coded with, found"):
        decompress(other, data)
    with pytest.raises(ValueError, match="there is none inside"):
        decompress(None, data)
    later = file.with_checksum(data[:4] + bytes([2]) + data[5 : file.HEAD.size]) + data[file.HEAD.size + 4 :]
    with pytest.raises(ValueError, match="expected a file of version 1, found 2"):
        decompress(model, later)
    for text in (b"", b"PK", Path(__file__).read_bytes(), bytes(1000)):
        with pytest.raises(ValueError, match="expected compressed images"):
            decompress(model, text)
    # without a head nothing says that it is another model: but its images have other checksums
    assert len(decompressed(bytes([*data[:5], data[5] ^ 1, *data[6:]]), other, skip_damaged=True).x) == 0
    inside = compress(model, images(model, 3), model_inside=True)
    for at in (60, 400, len(inside) // 2):
        changed = bytearray(inside)
        changed[at] ^= 1
        with pytest.raises(ValueError, match=r"the model inside: expected|the model is damaged"):
            decompress(None, bytes(changed))


# ------------------------------------------------------------------------------------------------------------- command


def test_the_command_compresses_a_split_a_file_and_pictures(call, tmp_path):
    root = f"dataset.root={tmp_path}"
    assert call("train", *SHORT, "model=row_lstm", "model.classes=auto", "hydra.run.dir=runs/a", root)[0] == 0
    status, said, _ = call("compress", "images=test", "out=test.prnn", "images_of_block=100")
    assert status == 0 and "log_prob" in said
    for name in ("PNG, each image", "PNG, side by side", "WebP, side by side", "JPEG XL, side by side", "LZMA"):
        assert name in said
    assert call("compress", "test.prnn", "out=back.npy")[0] == 0
    split = pixelrnn.dataset({"name": "digits"}).test
    assert np.array_equal(np.load("back.npy"), split.images)
    status, said, _ = call("compress", "info", "test.prnn")
    assert status == 0 and "360 images of 1×8×8, 17 levels" in said and "4 blocks of 100" in said

    refused(call("compress", "images=back.npy", "out=other.prnn"), ["labels", ".npy file"])
    np.save("labels.npy", split.labels)
    np.save("few.npy", split.images[:50])
    arguments = "images=few.npy", "labels=labels.npy", "compare=false", "weights=inside", "out=few.prnn"
    assert call("compress", *arguments)[0] == 0
    Path("runs").rename("gone")
    assert call("compress", "few.prnn", "out=pictures")[0] == 0
    with Image.open("pictures/000000.png") as picture:
        assert len(list(Path("pictures").glob("*.png"))) == 50 and picture.size == (8, 8)

    whole = Path("test.prnn").read_bytes()
    Path("test.prnn").write_bytes(whole[:-5])
    refused(call("compress", "test.prnn", "out=b.npy", "checkpoint=gone/a"), ["test.prnn: block 3 of 4: expected"])
    status, said, _ = call("compress", "test.prnn", "out=b.npy", "checkpoint=gone/a", "skip_damaged=true")
    assert status == 0 and "300 images of 360" in said and np.array_equal(np.load("b.npy"), split.images[:300])
