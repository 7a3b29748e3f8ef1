"""What `data` promises about Parquet files: which columns it takes, which files are which part, and what it refuses."""

import importlib
import os
import re
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

import data
from data import cache
from tests.test_data_labels import COLOURS, encoded, labels_of

MODULE = importlib.import_module("data.parquet")  # `data.parquet` is the function
N = 30
LABELS = [k % 3 for k in range(N)]
PICTURES = [encoded(COLOURS[label], k) for k, label in enumerate(LABELS)]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])  # of Hugging Face
STRUCTS = pa.array([{"bytes": content, "path": f"{k}.png"} for k, content in enumerate(PICTURES)], IMAGE)


def save(path: Path, columns: dict, **options) -> dict:
    """Write a file and return the config that reads it."""
    path.parent.mkdir(exist_ok=True)
    write_table(pa.table(columns), path, **options)
    return {"name": "parquet", "path": str(path), "size": 3, "root": str(path.parent / "cache")}


@pytest.mark.parametrize(
    ("columns", "options"),
    [
        ({"image": STRUCTS, "label": LABELS}, {}),
        ({"img": pa.array(PICTURES), "label": LABELS}, {}),
        ({"img": pa.array(PICTURES, pa.large_binary()), "label": pa.array(LABELS, pa.uint8())}, {}),
        ({"a": STRUCTS, "b": pa.array(PICTURES[::-1]), "label": LABELS}, {"image": "a"}),
        ({"a.b": STRUCTS, "of.it": LABELS}, {"label": "of.it"}),
        ({"image": STRUCTS, "label": [COLOURS[label] for label in LABELS]}, {}),
        ({"image": STRUCTS, "label": pa.DictionaryArray.from_arrays(pa.array(LABELS, pa.uint8()), COLOURS)}, {}),
    ],
    ids=["structs", "bytes", "other types", "two", "dots", "texts", "categories"],
)
@pytest.mark.parametrize("form", [{}, {"row_group_size": 7, "compression": "zstd", "use_dictionary": False}], ids=len)
def test_columns_of_many_types(tmp_path, columns, options, form):
    config = save(tmp_path / "a.parquet", columns, **form)
    dataset = data.build({**config, "label": "label", **options})
    assert [len(dataset.split(name)) for name in ("train", "val", "test")] == [24, 3, 3]
    assert dataset.classes == 3 and dataset.names == (COLOURS if "blue" in str([*columns.values()][-1]) else None)
    for name in ("train", "val", "test"):
        assert np.array_equal(dataset.split(name).labels, labels_of(dataset.split(name).images))


@pytest.mark.parametrize(
    ("labels", "classes", "names", "expected"),
    [
        ([5, 2, 2], 6, None, [5, 2, 2]),
        ([True, False, False], 2, ("False", "True"), [1, 0, 0]),
        (["z", "Ä", "a"], 3, ("a", "z", "Ä"), [1, 2, 0]),
    ],
)
def test_labels_and_their_names(tmp_path, labels, classes, names, expected):
    config = {**save(tmp_path / "a.parquet", {"image": STRUCTS, "label": labels * 10}), "label": "label"}
    dataset = data.build(config)
    assert (dataset.classes, dataset.names) == (classes, names)
    for name in ("train", "val", "test"):
        split = dataset.split(name)
        assert split.labels.tolist() == [expected[label] for label in labels_of(split.images)]


def numbers_of(images: np.ndarray) -> set[int]:
    """Which of PICTURES images (n 3 h w) are."""
    return {255 - number for number in images[:, :, 0, 0].max(1).tolist()}


@pytest.mark.parametrize(
    ("files", "train", "val", "test"),
    [
        ({"train-0": 20, "test-0": 25, "validation-0": 30}, range(20), range(25, 30), range(20, 25)),
        ({"train-0-of-2": 6, "train-1-of-2": 20, "test": 30}, 18, 2, range(20, 30)),
        ({"train": 20, "validation": 30}, 18, range(20, 30), 2),
        ({"b": 20, "a": 30}, 24, 3, 3),
    ],
    ids=["all", "no validation", "no test", "none"],
)
def test_files_named_as_parts_are_these_parts(tmp_path, files, train, val, test):
    """The rest is cut by fractions, off the training part."""
    start, expected = 0, dict(train=train, val=val, test=test)
    for name, stop in files.items():
        columns = {"image": STRUCTS[start:stop], "label": LABELS[start:stop]}
        save(tmp_path / f"{name}.parquet", columns)
        start = stop
    config = {"name": "parquet", "path": str(tmp_path), "size": 3, "root": str(tmp_path), "label": "label"}
    dataset, seen = data.build(config), set()
    for name, rows in expected.items():
        split = dataset.split(name)
        found = numbers_of(split.images)
        assert len(found) == len(split) and not found & seen
        assert found == {*rows} if isinstance(rows, range) else len(found) == rows
        assert np.array_equal(split.labels, labels_of(split.images))
        seen |= found
    assert seen == {*range(N)}
    other = data.build({**config, "val": 0.3})
    assert numbers_of(other.val.images) == ({*val} if isinstance(val, range) else numbers_of(other.val.images))
    assert len(list(tmp_path.rglob("*.npy"))) == 1, "other fractions need no other conversion"


def test_files_under_other_names_are_other_parts(tmp_path):
    """A folder of links, as a download to Hugging Face's own cache is."""
    for name, rows in {"a": slice(15), "b": slice(15, N)}.items():
        save(tmp_path / f"blobs/{name}", {"image": STRUCTS[rows], "label": LABELS[rows]})
    for names in (("train-0", "train-1"), ("train-0", "test-0"), ("test-0", "train-0")):
        folder = tmp_path / "-".join(names)
        folder.mkdir()
        for name, blob in zip(names, ("a", "b"), strict=True):
            (folder / f"{name}.parquet").symlink_to(tmp_path / "blobs" / blob)
        config = {"name": "parquet", "path": str(folder), "size": 3, "root": str(tmp_path), "label": "label"}
        for split in (data.build(config).train, data.build(config).test):
            assert np.array_equal(split.labels, labels_of(split.images))


def test_it_is_converted_once_and_anew_when_a_file_changes(tmp_path, monkeypatch):
    config = save(tmp_path / "a.parquet", {"image": STRUCTS, "other": pa.array(PICTURES[::-1])})
    config["image"] = "image"
    first = data.build(config)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "store", lambda *_: pytest.fail("converted a second time"))
        assert np.array_equal(data.build(config).train.images, first.train.images)
    changes = [
        lambda: os.utime(config["path"], (1, 1)),
        lambda: config.update(image="other"),
        lambda: config.update(channels=1),
        lambda: config.update(seed=1),
    ]
    for count, change in enumerate(changes, start=2):
        change()
        data.build(config)
        assert len(list((tmp_path / "cache/parquet").glob("*.npy"))) == count


def test_a_conversion_that_lost_rows_is_named(tmp_path):
    config = save(tmp_path / "a.parquet", {"image": STRUCTS})
    data.build(config)
    (path,) = (tmp_path / "cache").rglob("*.npy")
    np.save(path, np.zeros((N - 1, 3, 3, 3), np.uint8))
    with pytest.raises(ValueError, match=rf"{path.name}: damaged .an array .29, 3, 3, 3"):
        data.build(config)


@pytest.mark.parametrize(
    ("contents", "form"),
    [
        ([bytes(1 << 18)] * 100, {}),
        ([bytes([k]) * (1 << 18) for k in range(100)], {"compression": "none", "write_batch_size": 1}),
    ],
    ids=["one many times", "many"],
)
def test_a_row_is_in_memory_at_a_time(tmp_path, monkeypatch, contents, form):
    """Of 25 MB in one group of rows."""
    taken = []

    def watched(file, *shape):
        taken.append(pa.default_memory_pool().bytes_allocated())
        return np.zeros((3, 3, 3), np.uint8)

    monkeypatch.setattr(MODULE, "read_picture", watched)
    config = save(tmp_path / "a.parquet", {"image": contents}, **form)
    before = pa.default_memory_pool().bytes_allocated()
    data.build(config)
    assert len(taken) == 100 and max(taken) - before < 1 << 23


def test_a_file_that_claims_to_be_packed_beyond_belief_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(MODULE, "SMALL", 1 << 19)
    config = save(tmp_path / "a.parquet", {"image": [bytes(1 << 20), *PICTURES]}, compression="zstd")
    with pytest.raises(ValueError, match=r"a\.parquet: expected a whole .*31 rows, 1,0\d\d,\d+ bytes unpacked, in"):
        data.build(config)


WITH_ROW_7 = {
    "no picture": [*PICTURES[:7], b"no picture", *PICTURES[8:]],
    "cut": [*PICTURES[:7], PICTURES[7][:50], *PICTURES[8:]],
    "bomb": [*PICTURES[:7], b"P5 20000 20000 255 " + PICTURES[7], *PICTURES[8:]],
    "none": [*PICTURES[:7], None, *PICTURES[8:]],
}
SCORES = [label / 2 for label in LABELS]
REFUSED = {
    **{
        kind: ({"image": rows}, {}, ["a.parquet: row 7: expected a picture, found none"])
        for kind, rows in WITH_ROW_7.items()
    },
    "another kind of picture": (
        {"image": [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"] * 5},
        {},
        ["a.parquet: row 0: expected a picture, found none that can be read (none of BMP, GIF, JPEG"],
    ),
    "a struct of none": (
        {"image": pa.array([*STRUCTS.to_pylist()[:9], None, *STRUCTS.to_pylist()[10:]], IMAGE)},
        {},
        ["a.parquet: row 9: expected a picture, found none"],
    ),
    "two columns": (
        {"a": STRUCTS, "b": PICTURES},
        {},
        ["dataset.image=None: expected the name of a column", "a (struct<bytes", "b (binary)"],
    ),
    "no column": ({"label": LABELS}, {}, ["dataset.image=None", "label (int64)"]),
    "a column not there": ({"image": STRUCTS}, {"image": "img"}, ["dataset.image='img'", "a.parquet", "image (struct"]),
    "another column": ({"image": STRUCTS, "label": LABELS}, {"image": "label"}, ["dataset.image='label'"]),
    "no label": ({"image": STRUCTS}, {"label": "label"}, ["dataset.label='label'", "integers, texts"]),
    "pictures as labels": ({"image": STRUCTS}, {"label": "image"}, ["dataset.label='image'"]),
    "numbers": ({"image": STRUCTS, "label": SCORES}, {"label": "label"}, ["dataset.label='label'", "label (double)"]),
    "a missing label": (
        {"image": STRUCTS, "label": [*LABELS[:-1], None]},
        {"label": "label"},
        ["a.parquet: row 29: expected a label, found none"],
    ),
    "a missing text": (
        {"image": STRUCTS, "label": ["a"] * 11 + [None] + ["b"] * 18},
        {"label": "label"},
        ["a.parquet: row 11: expected a label, found none"],
    ),
    "a negative label": (
        {"image": STRUCTS, "label": [*LABELS[:4], -1, *LABELS[5:]]},
        {"label": "label"},
        ["a.parquet: row 4: expected labels from 0 to 65535, found -1"],
    ),
    "a huge label": (
        {"image": STRUCTS, "label": pa.array([*LABELS[:-1], 2**64 - 1], pa.uint64())},
        {"label": "label"},
        ["row 29", "65535", f"{2**64 - 1}"],
    ),
    "no rows": ({"image": STRUCTS[:0]}, {}, ["expected pictures in each part", "'train': 0"]),
    "few rows": ({"image": STRUCTS[:2]}, {}, ["found 2", "val=0.1"]),
    "more rows than bytes": ({"image": PICTURES[:1] * 100_000}, {}, ["a.parquet: expected a whole", "100,000 rows"]),
}


@pytest.mark.parametrize(("columns", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named_and_nothing_is_written(tmp_path, columns, options, words):
    config = save(tmp_path / "a.parquet", columns)
    with pytest.raises(ValueError) as error:
        data.build({**config, **options})
    text = str(error.value)
    assert all(word in text for word in words) and "\n" not in text
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock"]


@pytest.mark.parametrize("at", ["head", "rows", "tail"])
def test_a_damaged_file_is_named(tmp_path, at):
    config = {**save(tmp_path / "a.parquet", {"image": STRUCTS, "label": LABELS}), "label": "label"}
    content = bytearray(Path(config["path"]).read_bytes())
    place = {"head": 4, "rows": content.index(b"IHDR") - 40, "tail": len(content) - 40}[at]
    content[place : place + 40] = b"\xff" * 40
    Path(config["path"]).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: (row \d+: )?expected a (whole|picture)") as error:
        data.build(config)
    assert "\n" not in str(error.value)


def test_files_that_do_not_fit_together_are_named(tmp_path):
    one, other = {"image": STRUCTS, "label": LABELS}, {"image": STRUCTS, "label": ["a"] * N}
    none = {"image": STRUCTS[:0], "label": pa.array([], pa.int64())}
    cases = {
        "types": ({"a": one, "b": other}, r"b\.parquet: expected labels of one type"),
        "columns": ({"a": one, "b": {"img": STRUCTS, "label": LABELS}}, r"dataset\.image='image': .*b\.parquet"),
        "names": ({"train-0": one, "valid-0": one}, r"valid-0\.parquet: expected a name that begins with train"),
        "no train": ({"test-0": one}, r"test-0\.parquet: expected train"),
        "no rows": ({"train-0": one, "test-0": none}, r"'test': 0"),
    }
    for case, (files, words) in cases.items():
        for name, columns in files.items():
            config = save(tmp_path / case / f"{name}.parquet", columns)
        with pytest.raises(ValueError, match=words):
            data.build({**config, "path": str(tmp_path / case), "label": "label"})


def test_where_no_file_is_one_is_asked_for(tmp_path):
    for path in (tmp_path, tmp_path / "none.parquet"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"dataset.path={path}: expected a .parquet file")):
            data.build({"name": "parquet", "path": str(path)})


def test_without_pyarrow_one_line_says_how_to_install_it(tmp_path, monkeypatch):
    config = save(tmp_path / "a.parquet", {"image": STRUCTS})
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match=r"dataset=parquet: expected pyarrow.*pip install -e '\.\[parquet\]'$"):
        data.build(config)
