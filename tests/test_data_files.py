"""What `data` promises about files that users bring: .npy arrays, folders of pictures, ImageNet's batches."""

import gzip
import os
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data
from data import arrays, cache, cifar, folder, idx, imagenet
from data.given import read_images


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def mapped(array: np.ndarray) -> bool:
    """Whether the array, or what it is a view of, is a file."""
    return isinstance(array, np.memmap) and array.filename is not None


def everything(dataset: data.Dataset) -> np.ndarray:
    return np.concatenate([dataset.split(name).images for name in ("train", "val", "test")])


# ------------------------------------------------------------------------------------------------------ store


def test_store_writes_what_numpy_reads(tmp_path):
    blocks = [np.arange(12).reshape(2, 3, 2), np.arange(6).reshape(1, 3, 2)]
    cache.store(tmp_path / "a.npy", (block for block in blocks))
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.concatenate(blocks))
    assert mapped(cache.load(tmp_path / "a.npy", (3, 2), np.int64))


def test_store_that_fails_midway_leaves_nothing(tmp_path):
    def blocks():
        yield np.zeros((1000, 10), np.uint8)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cache.store(tmp_path / "a.npy", blocks())
    assert list(tmp_path.iterdir()) == []


def test_damaged_conversion_is_named(tmp_path):
    cache.store(tmp_path / "a.npy", [np.zeros((1000, 10), np.uint8)])
    os.truncate(tmp_path / "a.npy", 5000)
    with pytest.raises(ValueError, match=r"a\.npy: damaged .*delete it") as error:
        cache.load(tmp_path / "a.npy", (10,), np.uint8)
    one_line(error)


@pytest.mark.parametrize(
    ("array", "rest"), [(np.zeros((3, 4), np.uint8), (5,)), (np.zeros(3, np.uint8), (4,)), (np.zeros((3, 4)), (4,))]
)
def test_another_array_in_the_place_of_a_conversion_is_named(tmp_path, array, rest):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=r"a\.npy: damaged .an array .*delete it"):
        cache.load(tmp_path / "a.npy", rest, np.uint8)


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    np.save(tmp_path / "x.npy", np.zeros((30, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"file/npy: expected a folder to write to .*dataset\.root") as error:
        data.build({"name": "npy", "path": tmp_path / "x.npy", "root": tmp_path / "file"})
    one_line(error)


def test_without_a_root_the_home_cache_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder(None, "mnist") == tmp_path / ".cache" / "pixelrnn" / "mnist"
    assert cache.folder("~/data", "mnist") == tmp_path / "data" / "mnist"


# -------------------------------------------------------------------------------------------------------- npy


def save(tmp_path: Path, array: np.ndarray) -> dict:
    """Write the array and return the config that reads it."""
    np.save(tmp_path / "images.npy", array)
    return {"name": "npy", "path": str(tmp_path / "images.npy"), "root": str(tmp_path / "cache")}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, ">i8", np.uint16])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_npy_keeps_every_image_in_c_h_w(tmp_path, dtype, channels):
    shape = (50, 4, 5) if channels is None else (50, 4, 5, channels)
    raw = np.random.RandomState(0).randint(0, 7, shape).astype(dtype)
    raw[0], raw.flat[-1] = 0, 6
    npy = data.build(save(tmp_path, raw))
    assert npy.shape == {"channels": channels or 1, "height": 4, "width": 5, "levels": 7}
    assert [len(npy.split(name)) for name in ("train", "val", "test")] == [40, 5, 5]
    want = np.moveaxis(raw.reshape(50, 4, 5, -1), 3, 1).astype(np.uint8)
    got = everything(npy)
    assert got.dtype == np.uint8 and all(mapped(npy.split(name).images) for name in ("train", "val", "test"))
    assert sorted(image.tobytes() for image in got) == sorted(image.tobytes() for image in want)
    assert not np.array_equal(got, want), "files are often sorted by class: the split has to be random"


@pytest.mark.parametrize(
    ("shape", "channels", "expected"),
    [
        ((3, 8, 9), None, (3, 8, 9)),
        ((1, 8, 9), None, (1, 8, 9)),
        ((8, 9, 3), None, (3, 8, 9)),
        ((4, 5, 3), None, (3, 4, 5)),
        ((16, 8, 9), "first", (16, 8, 9)),
        ((8, 9, 16), "last", (16, 8, 9)),
        ((3, 3, 3), "first", (3, 3, 3)),
    ],
)
def test_npy_in_either_order_of_axes(tmp_path, shape, channels, expected):
    raw = np.random.RandomState(0).randint(0, 7, (20, *shape))
    npy = data.build({**save(tmp_path, raw), "channels": channels})
    want = raw if shape == expected else np.moveaxis(raw, 3, 1)
    assert npy.train.images.shape[1:] == expected
    assert sorted(x.tobytes() for x in everything(npy)) == sorted(x.astype(np.uint8).tobytes() for x in want)


def test_npy_of_one_shape_and_two_orders_is_converted_twice(tmp_path):
    raw = np.random.RandomState(0).randint(0, 7, (20, 3, 3, 3))
    first, last = (data.build({**save(tmp_path, raw), "channels": channels}) for channels in ("first", "last"))
    assert not np.array_equal(everything(first), everything(last))


def test_npy_in_many_blocks_is_the_same(tmp_path, monkeypatch):
    config = save(tmp_path, np.random.RandomState(0).randint(0, 9, (50, 4, 5)))
    whole = everything(data.build(config))
    monkeypatch.setattr(arrays, "BLOCK", 70)
    assert np.array_equal(everything(data.build({**config, "root": str(tmp_path / "other")})), whole)


def test_npy_with_many_levels_is_int64(tmp_path):
    npy = data.build(save(tmp_path, np.arange(40 * 9, dtype=np.uint16).reshape(40, 3, 3)))
    assert npy.levels == 360 and npy.train.images.dtype == np.int64
    assert data.build({**save(tmp_path, np.zeros((9, 2, 2), np.uint8)), "levels": 512}).train.images.dtype == np.int64


def test_npy_split_depends_on_the_seed_alone(tmp_path):
    config = save(tmp_path, np.random.RandomState(0).randint(0, 256, (50, 4, 5), np.uint8))
    first, again, other = (data.build({**config, "seed": seed}) for seed in (0, 0, 1))
    assert np.array_equal(first.test.images, again.test.images)
    assert not np.array_equal(first.test.images, other.test.images)
    wider = data.build({**config, "val": 0.3})
    assert len(wider.val) == 15 and np.array_equal(first.test.images, wider.test.images)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((20, 5, 6, 7), {"clips": True}),  # (n t h w)
        ((20, 5, 3, 6, 7), {}),
        ((20, 5, 6, 7, 3), {}),
        ((20, 5, 2, 6, 2), {"channels": "last"}),
    ],
    ids=str,
)
def test_npy_with_time_has_clips(tmp_path, shape, options):
    raw = np.random.RandomState(0).randint(0, 7, shape)
    npy = data.build({**save(tmp_path, raw), **options, "levels": 9})
    expected = raw[:, :, None] if len(shape) == 4 else raw if shape[2] == 3 else np.moveaxis(raw, -1, 2)
    (_, t, c, h, w), order = expected.shape, np.random.RandomState(0).permutation(20)
    assert npy.shape == {"channels": c, "height": h, "width": w, "levels": 9, "frames": t}
    assert np.array_equal(everything(npy), expected[order])
    x, _ = npy.train.batch(slice(0, 2))
    assert x.shape == (2, t, c, h, w)


def test_npy_labels_follow_their_images(tmp_path):
    config = save(tmp_path, np.arange(50, dtype=np.uint8).repeat(4).reshape(50, 2, 2))
    np.save(tmp_path / "labels.npy", np.arange(50, dtype=np.int16) // 10)
    npy = data.build({**config, "labels": str(tmp_path / "labels.npy")})
    assert npy.classes == 5 and npy.train.labels.dtype == np.int64
    for name in ("train", "val", "test"):
        part = npy.split(name)
        assert np.array_equal(part.labels, part.images[:, 0, 0, 0] // 10)


def test_npy_is_converted_once_and_anew_when_the_file_changes(tmp_path, monkeypatch):
    config = save(tmp_path, np.ones((30, 2, 2), np.uint8))
    data.build(config)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "store", lambda *_: pytest.fail("converted a second time"))
        assert data.build(config).levels == 2
    assert data.build(save(tmp_path, np.full((31, 2, 2), 3, np.uint8))).levels == 4


@pytest.mark.parametrize(
    ("raw", "options", "words"),
    [
        (np.full((30, 2, 2), 4), {"levels": 4}, ["from 0 to 3", "levels=4", "found 4"]),
        (np.full((30, 2, 2), -3), {}, ["from 0 to 65535", "dataset.levels", "found -3"]),
        (np.zeros((30, 2, 2)), {}, ["integer", "float64"]),
        (np.zeros((30, 4), int), {}, ["(n h w)", "(n c h w)", "(n h w c)", "(30, 4)"]),
        (np.zeros((30, 3, 3, 3), int), {}, ["dataset.channels=None", "first, 3 colours of 3×3, or last", "3 × 3 × 3"]),
        (np.zeros((30, 8, 9, 16), int), {}, ["dataset.channels=None", "8 colours of 9×16", "16 colours of 8×9"]),
        (np.zeros((30, 4), int), {"clips": True}, ["(n t h w)", "(n t c h w)", "(n t h w c)", "(30, 4)"]),
        (np.zeros((30, 3, 3), int), {"clips": True}, ["(n t h w)", "(30, 3, 3)"]),
        (np.zeros((30, 2, 3, 3, 3), int), {}, ["dataset.channels=None", "first, 3 colours of 3×3, or last"]),
        (np.zeros((30, 3, 3), int), {"clips": 3}, ["dataset.clips=3"]),
        (np.zeros((30, 3, 8, 8), int), {"channels": "middle"}, ["dataset.channels='middle'", "first or last"]),
        (np.zeros((30, 0, 4), int), {}, ["(30, 0, 4)"]),
        (np.zeros((2, 2, 2), int), {}, ["found 2", "val=0.1"]),
        (np.zeros((30, 2, 2), int), {"val": 1.5}, ["dataset.val", "1.5", "between 0 and 1"]),
        (np.zeros((30, 2, 2), int), {"val": 0.5, "test": 0.5}, ["found 30", "val=0.5", "test=0.5"]),
        (np.array([{}] * 30, object), {}, ["images.npy"]),
    ],
)
def test_bad_npy_is_named(tmp_path, raw, options, words):
    with pytest.raises(ValueError) as error:
        data.build({**save(tmp_path, raw), **options})
    assert all(word in one_line(error) for word in words)
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_an_npz_in_place_of_npy_is_named(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.zeros((30, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"images\.npz: expected a whole \.npy file") as error:
        data.build({"name": "npy", "path": tmp_path / "images.npz"})
    one_line(error)


def test_truncated_or_missing_npy_is_named(tmp_path):
    config = save(tmp_path, np.zeros((30, 2, 2), np.uint8))
    os.truncate(config["path"], 200)
    with pytest.raises(ValueError, match=r"images\.npy: expected a whole") as error:
        data.build(config)
    one_line(error)
    with pytest.raises(FileNotFoundError, match=r"dataset\.path=.*none\.npy: expected a \.npy file"):
        data.build({**config, "path": str(tmp_path / "none.npy")})


@pytest.mark.parametrize("labels", [np.zeros(29, int), np.full(30, -1), np.zeros((30, 1), int)])
def test_bad_npy_labels_are_named(tmp_path, labels):
    np.save(tmp_path / "labels.npy", labels)
    config = save(tmp_path, np.zeros((30, 2, 2), np.uint8))
    with pytest.raises(ValueError, match=r"labels\.npy: expected .*labels") as error:
        data.build({**config, "labels": str(tmp_path / "labels.npy")})
    one_line(error)


# ----------------------------------------------------------------------------------------- folder of pictures


@pytest.fixture
def pictures(tmp_path):
    """20 plain pictures of levels 0, 10, … 190, landscape, in two folders; and the config that reads them."""
    (tmp_path / "pictures" / "deeper").mkdir(parents=True)
    for k in range(20):
        name = f"deeper/{k}.JPEG" if k % 2 else f"{k}.png"
        Image.new("RGB", (12, 8), (10 * k,) * 3).save(tmp_path / "pictures" / name)
    (tmp_path / "pictures" / "notes.txt").write_text("not a picture, and not spoken of")
    return {
        "name": "image_folder",
        "path": str(tmp_path / "pictures"),
        "size": 4,
        "root": str(tmp_path / "cache"),
    }


@pytest.mark.parametrize(("size", "channels"), [(4, 3), ([2, 6], 1), ((5, 3), 3)])
def test_image_folder_finds_all_and_resizes(pictures, capsys, size, channels):
    pictures |= {"size": size, "channels": channels}
    dataset = data.build(pictures)
    height, width = (size, size) if isinstance(size, int) else size
    assert dataset.shape == {"channels": channels, "height": height, "width": width, "levels": 256}
    assert dataset.classes is None and mapped(dataset.train.images)
    assert [len(dataset.split(name)) for name in ("train", "val", "test")] == [16, 2, 2]
    values = np.sort(everything(dataset)[:, 0, 0, 0].astype(int))
    assert np.abs(values - np.arange(0, 200, 10)).max() <= 2, "JPEG rounds"
    assert capsys.readouterr().err == ""


def test_picture_is_cropped_at_its_centre_not_squeezed(tmp_path):
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = [200, 100, 50]
    Image.fromarray(image).save(tmp_path / "a.png")
    picture = folder.read_picture(tmp_path / "a.png", 8, 8, 3)
    assert np.array_equal(picture, np.broadcast_to(np.array([200, 100, 50])[:, None, None], (3, 8, 8)))
    assert folder.read_picture(tmp_path / "a.png", 4, 4, 1).shape == (1, 4, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_of_picture_is_read(tmp_path, mode):
    grey = Image.new("L", (6, 6), 255)
    picture = (
        Image.fromarray(np.full((6, 6), 65535, np.uint16)) if mode == "I;16" else grey.convert("RGB").convert(mode)
    )
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(path, **({"transparency": b"\0\1\2"} if mode == "P" else {}))
    for channels in (1, 3):
        assert folder.read_picture(path, 3, 3, channels).min() == 255


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((6, 6), 0x4080, np.uint16)).save(tmp_path / "a.png")
    assert np.array_equal(folder.read_picture(tmp_path / "a.png", 3, 3, 1), np.full((1, 3, 3), 0x40))


def test_unreadable_pictures_are_named_and_skipped(pictures, capsys):
    path = Path(pictures["path"])
    (path / "bad.png").write_bytes(b"not a picture")
    content = (path / "0.png").read_bytes()
    (path / "cut.png").write_bytes(content[: len(content) // 2])
    Image.new("F", (4, 4)).save(path / "float.tiff")
    assert len(everything(data.build(pictures))) == 20
    lines = capsys.readouterr().err.splitlines()
    assert sorted(Path(line.split(": skipped")[0]).name for line in lines) == [
        "bad.png",
        "cut.png",
        "float.tiff",
    ]


def test_image_folder_is_converted_once_and_anew_when_it_changes(pictures, monkeypatch):
    first = data.build(pictures)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "store", lambda *_: pytest.fail("converted a second time"))
        assert np.array_equal(everything(data.build(pictures)), everything(first))
    changes = [
        lambda: Image.new("RGB", (9, 9), (250, 0, 0)).save(Path(pictures["path"]) / "new.png"),
        lambda: os.utime(Path(pictures["path"]) / "0.png", (1, 1)),
        lambda: pictures.update(channels=1),
        lambda: pictures.update(size=5),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        data.build(pictures)
        assert len(list((Path(pictures["root"]) / "image_folder").glob("*.npy"))) == count


def test_image_folder_without_pictures_is_named(tmp_path, pictures, capsys):
    (tmp_path / "empty").mkdir()
    cases = [
        ("empty", FileNotFoundError, "expected pictures .*found none"),
        ("none", FileNotFoundError, "expected a folder, found none"),
    ]
    (tmp_path / "bad").mkdir()
    for k in range(5):
        (tmp_path / "bad" / f"{k}.png").write_bytes(b"not a picture")
    for name, kind, words in [*cases, ("bad", ValueError, "that can be read, found none in 5 files")]:
        with pytest.raises(kind, match=words) as error:
            data.build({**pictures, "path": str(tmp_path / name)})
        assert name in one_line(error)
    assert not list((tmp_path / "cache").rglob("*.npy"))


# --------------------------------------------------------------------------------------------------- ImageNet


@pytest.fixture(params=[32, 64])
def batches(tmp_path, monkeypatch, request):
    """A little ImageNet: ten batches of 3 images and 4 for test; an image's first pixel is its number."""
    monkeypatch.setattr(imagenet, "HELD_OUT", 5)
    size, home = request.param, tmp_path / f"imagenet{request.param}"
    home.mkdir()
    rows = np.random.RandomState(0).randint(0, 256, (34, 3 * size**2)).astype(np.uint8)
    rows[:, 0] = np.arange(34)
    names = [*imagenet.PARTS["train"], *imagenet.PARTS["test"]]
    for name, part in zip(names, np.split(np.arange(34), range(3, 31, 3)), strict=True):
        np.savez(home / name, data=rows[part], labels=part * 30 + 1, mean=rows[0].astype(float))
    return {"name": home.name, "root": tmp_path}, rows.reshape(34, 3, size, size)


def test_imagenet_is_mapped_and_val_is_the_end_of_train(batches):
    config, images = batches
    dataset = data.build(config)
    size = images.shape[-1]
    assert dataset.shape == {"channels": 3, "height": size, "width": size, "levels": 256}
    assert dataset.classes == 1000
    for part, rows in (
        (dataset.train, slice(0, 25)),
        (dataset.val, slice(25, 30)),
        (dataset.test, slice(30, 34)),
    ):
        assert mapped(part.images) and np.array_equal(part.images, images[rows])
        assert np.array_equal(part.labels, np.arange(34)[rows] * 30) and part.labels.dtype == np.int64
    assert np.shares_memory(dataset.train.images.base, dataset.val.images.base)
    x, labels = dataset.train.batch(np.array([7, 2]))
    assert x[:, 0, 0, 0].tolist() == [7, 2] and labels.tolist() == [210, 60]


def test_imagenet_batches_are_not_needed_after_the_conversion(batches):
    config, images = batches
    data.build(config)
    for path in (config["root"] / config["name"]).glob("*.npz"):
        path.unlink()
    assert np.array_equal(everything(data.build(config)), images)


def test_imagenet_crash_midway_starts_anew(batches, monkeypatch):
    config, images = batches
    home = config["root"] / config["name"]
    (home / "train_data_batch_9.npz").rename(home / "aside")
    (home / "train_data_batch_9.npz").write_bytes((home / "aside").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"train_data_batch_9\.npz"):
        data.build(config)
    assert not list(home.glob("*.npy")) and not list(home.glob(".*.tmp"))
    (home / "aside").replace(home / "train_data_batch_9.npz")
    assert np.array_equal(everything(data.build(config)), images)


def test_missing_imagenet_batches_are_listed_with_their_source(batches):
    config, _ = batches
    home = config["root"] / config["name"]
    (home / "train_data_batch_4.npz").unlink()
    (home / "val_data.npz").unlink()
    with pytest.raises(FileNotFoundError) as error:
        data.build(config)
    text = one_line(error)
    assert f"put train_data_batch_4.npz, val_data.npz into {home}" in text
    assert imagenet.SITE in text and "login" in text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"data": np.zeros((3, 100), np.uint8)}, "found .3, 100. uint8"),
        ({"data": np.zeros((3, 3072), np.float32)}, "float32"),
        ({"labels": np.arange(1, 3)}, r"and \(2,\)"),
        ({"labels": np.array([0, 1, 2])}, "from 1 to 1000"),
        ({"labels": np.array([1, 2, 1001])}, "from 1 to 1000"),
        (
            {"labels": np.array([1, 2, 3], object)},
            "n integers as labels, .* object",
        ),
        ({"labels": None}, "expected an npz file with arrays data and labels"),
    ],
)
def test_bad_imagenet_batch_is_named(tmp_path, change, expected):
    content = {"data": np.zeros((3, 3072), np.uint8), "labels": np.array([1, 2, 3])} | change
    path = tmp_path / "train_data_batch_1.npz"
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    with pytest.raises(ValueError, match=expected) as error:
        imagenet.read_batch(path, 32)
    assert path.name in one_line(error)


def test_a_pickle_in_place_of_a_batch_is_refused(tmp_path):
    path = tmp_path / "val_data.npz"
    path.write_bytes(pickle.dumps({"data": [1], "labels": [1]}))
    with pytest.raises(ValueError, match=r"val_data\.npz: expected an npz file") as error:
        imagenet.read_batch(path, 32)
    one_line(error)


# -------------------------------------------------------------------------------- claims beyond what a file can hold


def npy_with_header(text: str) -> bytes:
    """A .npy file of nothing but this header."""
    head = text.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


HUGE = "{'descr': '|u1', 'fortran_order': False, 'shape': (%s, 3072), }"


@pytest.mark.parametrize(
    "header",
    [
        HUGE % "1800000000",  # 5 TB
        HUGE % ("9" * 40),
        HUGE % "-3",
        "{'descr': '<U99999999', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (3, 3072), ",
        "(" * 90,
        "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (3,), }",
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_a_header_that_lies_is_refused(tmp_path, header, kind):
    path = tmp_path / f"claims.{kind}"
    if kind == "npy":
        path.write_bytes(npy_with_header(header))
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data", "labels"):
                archive.writestr(f"{name}.npy", npy_with_header(header))
    with pytest.raises(ValueError, match=rf"claims\.{kind}: expected") as error:
        arrays.open_integers(path) if kind == "npy" else imagenet.read_batch(path, 32)
    one_line(error)


def test_compressed_files_are_unpacked_no_further_than_can_be_right(tmp_path):
    """Zeros without end in a little file, of which no more than the expected bytes are made."""
    bomb = gzip.compress(bytes(1 << 26), compresslevel=9)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(struct.pack(">HBB2I", 0, 8, 2, 3, 5)) + 8 * bomb)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.gz: damaged: expected 27 bytes, found more"):
        idx.read_idx(path, (3, 5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 22


def test_an_archive_of_zeros_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar, "COUNT", 4)
    (tmp_path / "cifar10").mkdir()
    path = tmp_path / "cifar10" / cifar.ARCHIVE
    path.write_bytes(gzip.compress(bytes(1 << 26), compresslevel=9))
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz: damaged .more than .* bytes unpacked"):
        data.build({"name": "cifar10", "root": tmp_path})


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path):
    Image.new("L", (9, 9)).save(tmp_path / "large.png")
    content = (tmp_path / "large.png").read_bytes()
    header = b"IHDR" + struct.pack(">II", 13000, 13000) + content[24:29]
    (tmp_path / "large.png").write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    with pytest.raises(ValueError, match=r"large\.png: expected a picture.*169000000 pixels"):
        read_images(tmp_path / "large.png", (1, 8, 8), 256)


@pytest.mark.parametrize("value", [2**64 - 1, 10**7])
def test_one_large_value_asks_for_no_model_of_as_many_levels(tmp_path, value):
    raw = np.zeros((30, 2, 2), np.uint64)
    raw[3, 1, 1] = value
    with pytest.raises(ValueError, match=rf"images\.npy: expected values from 0 to 65535 .*found {value}"):
        data.build(save(tmp_path, raw))
    with pytest.raises(ValueError, match=rf"images\.npy: expected values from 0 to 16, found 0 to {value}"):
        read_images(tmp_path / "images.npy", (1, 2, 2), 17)
