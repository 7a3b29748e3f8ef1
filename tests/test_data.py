"""What `data` promises about batches, options, and the data sets of fixed files: digits, MNISTs, CIFAR-10."""

import gzip
import hashlib
import inspect
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import data
from data import amat, cifar, download, idx
from tests.stored import cifar10_test, stored_sets

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test here may touch the network: asking for an address is a failure."""

    def refuse(request, **options):
        raise AssertionError(f"asked for {request.full_url}")

    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)


def one_line(error) -> str:
    text = str(error.value)
    assert text and "\n" not in text
    return text


def sha(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------- files to read


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))


@pytest.fixture
def mnist_root(tmp_path, monkeypatch):
    """A little MNIST: 40 + 12 images of 5×4 whose every pixel is a ramp from 0 to 255."""
    monkeypatch.setattr(idx, "COUNTS", {"train": 40, "t10k": 12})
    monkeypatch.setattr(idx, "SIDES", (5, 4))
    monkeypatch.setattr(idx, "HELD_OUT", 8)
    for name in ("mnist", "fashion_mnist"):
        (tmp_path / name).mkdir()
        for prefix, n in idx.COUNTS.items():
            images = np.linspace(0, 255, n * 20).astype(np.uint8).reshape(n, 5, 4)
            write_idx(tmp_path / name / f"{prefix}-images-idx3-ubyte.gz", images)
            write_idx(tmp_path / name / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


@pytest.fixture
def cifar_root(tmp_path, monkeypatch):
    """A little CIFAR-10: six files of 4 records; first pixel: the image's number, label: that mod 10."""
    monkeypatch.setattr(cifar, "COUNT", 4)
    monkeypatch.setattr(cifar, "HELD_OUT", 5)
    folder = tmp_path / "cifar10" / cifar.FOLDER
    folder.mkdir(parents=True)
    records = np.random.RandomState(0).randint(0, 256, (24, cifar.RECORD)).astype(np.uint8)
    records[:, 1] = np.arange(24)
    records[:, 0] = np.arange(24) % 10
    for k, name in enumerate((*cifar.TRAIN, cifar.TEST)):
        (folder / name).write_bytes(records[4 * k : 4 * k + 4].tobytes())
    return tmp_path


@pytest.fixture
def amat_root(tmp_path, monkeypatch):
    """A little binary MNIST: 3 + 2 + 2 images."""
    monkeypatch.setattr(amat, "COUNTS", {"train": 3, "valid": 2, "test": 2})
    (tmp_path / "binary_mnist").mkdir()
    bits = np.random.RandomState(0).randint(0, 2, (7, 784))
    for name, rows in (("train", bits[:3]), ("valid", bits[3:5]), ("test", bits[5:])):
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (tmp_path / "binary_mnist" / f"binarized_mnist_{name}.amat").write_text(text)
    return tmp_path, bits.reshape(7, 1, 28, 28)


# ---------------------------------------------------------------------------------------------------- digits


def test_digits_are_the_frozen_1797():
    digits = data.build({"name": "digits"})
    assert digits.shape == {"channels": 1, "height": 8, "width": 8, "levels": 17}
    assert digits.classes == 10
    parts = [digits.split(name) for name in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1297, 140, 360]
    assert all(part.images.dtype == np.uint8 and part.labels.dtype == np.int64 for part in parts)
    assert max(part.images.max() for part in parts) == 16
    assert [sha(part.images, part.labels) for part in parts] == [
        "f144449d322f7b02",
        "dfabab43f3236c16",
        "68780132faf1ab8e",
    ]


def test_digits_split_is_stratified():
    digits = data.build({"name": "digits"})
    counts = np.stack([np.bincount(digits.split(name).labels) for name in ("train", "val", "test")])
    exact = counts.sum(0) * np.array([[1297], [140], [360]]) / 1797
    assert np.abs(counts - exact).max() < 1.5


# ---------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    "index", [np.array([5, 0, 5]), torch.tensor([5, 0, 5]), slice(2, 5)], ids=["numpy", "torch", "slice"]
)
def test_batch_selects_in_order_and_owns_its_memory(index):
    train = data.build({"name": "digits"}).train
    before = train.images.copy()
    x, labels = train.batch(index)
    rows = index if isinstance(index, slice) else [5, 0, 5]
    assert x.dtype == torch.uint8 and x.shape == (3, 1, 8, 8) and labels.dtype == torch.int64
    assert np.array_equal(x.numpy(), before[rows]) and np.array_equal(labels.numpy(), train.labels[rows])
    x.fill_(9)
    labels.fill_(9)
    assert np.array_equal(train.images, before) and train.labels.max() == 9 and train.labels.min() == 0


def test_batch_without_labels_and_with_wide_values():
    split = data.Split(np.full((2, 1, 1, 1), 70_000, np.int64), None)
    x, labels = split.batch(slice(None))
    assert x.dtype == torch.int64 and x.max() == 70_000 and labels is None


def test_split_name_is_checked():
    with pytest.raises(ValueError, match="split='valid': expected train, val or test") as error:
        data.build({"name": "digits"}).split("valid")
    one_line(error)


# ---------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, ["dataset.name", "None", "digits", "image_folder"]),
        ({"name": "minst"}, ["'minst'", "mnist", "cifar10"]),
        ({"name": ["mnist"]}, ["['mnist']"]),
        ({"name": "digits", "binarize": "none"}, ["dataset.binarize", "digits", "root"]),
        ({"name": "mnist", "binarise": "none"}, ["dataset.binarise", "mnist", "binarize"]),
        ({"name": "mnist", "binarize": "random"}, ["'random'", "none, threshold or stochastic"]),
        ({"name": "mnist", "root": 3}, ["dataset.root", "3"]),
        ({"name": "npy"}, ["dataset.path", "npy"]),
        ({"name": "npy", "path": "???"}, ["dataset.path", "'???'"]),
        ({"name": "npy", "path": "x.npy", "levels": 1}, ["dataset.levels", "1", "2"]),
        ({"name": "npy", "path": "x.npy", "levels": "many"}, ["dataset.levels", "'many'"]),
        ({"name": "npy", "path": "x.npy", "seed": -1}, ["dataset.seed", "-1"]),
        ({"name": "image_folder", "path": "x", "channels": 2}, ["dataset.channels", "2", "3", "1"]),
        ({"name": "image_folder", "path": "x", "size": [1, 2, 3]}, ["dataset.size", "[1, 2, 3]"]),
        ({"name": "image_folder", "path": "x", "size": 0}, ["dataset.size", "0"]),
    ],
)
def test_bad_options_are_named_with_what_is_allowed(config, words):
    with pytest.raises(ValueError) as error:
        data.build(config)
    assert all(word in one_line(error) for word in words)


@pytest.mark.parametrize("name", sorted(data.LOADERS))
def test_every_data_set_has_a_config_with_all_its_options(name):
    config = OmegaConf.load(REPO / "conf" / "dataset" / f"{name}.yaml")
    config = config.get("dataset", config)  # where the file asks for more than the data, its keys are global
    parameters = inspect.signature(data.LOADERS[name]).parameters
    assert config.name == name
    assert set(config) == {"name", *parameters}
    for key, parameter in parameters.items():
        assert OmegaConf.is_missing(config, key) if key == "path" else config[key] == parameter.default


def test_hydra_config_with_missing_path_is_one_line():
    with pytest.raises(ValueError, match=r"dataset\.path=None: expected FILE\.npy") as error:
        data.build(OmegaConf.load(REPO / "conf" / "dataset" / "npy.yaml"))
    one_line(error)


# ------------------------------------------------------------------------------------------------------ MNIST


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_mnist_splits(mnist_root, name):
    mnist = data.build({"name": name, "root": str(mnist_root)})
    assert mnist.shape == {"channels": 1, "height": 5, "width": 4, "levels": 256}
    assert (len(mnist.train), len(mnist.val), len(mnist.test), mnist.classes) == (32, 8, 12, 10)
    held = np.concatenate([mnist.val.images, mnist.train.images])[:, 0, 0, 0]
    assert len(set(held.tolist())) == 40, "train and val share images, or some are lost"
    assert np.array_equal(mnist.test.labels, np.arange(12) % 10)
    again = data.build({"name": name, "root": mnist_root})
    assert np.array_equal(mnist.val.images, again.val.images)


def test_held_out_rows_are_frozen():
    _, val = data.splits.hold_out(np.arange(60_000), None, 10_000)
    assert val.images[:3].tolist() == [21315, 17790, 23348]
    assert sha(val.images) == "a96e1921f33908a8"


def test_threshold_binarizes_at_128(mnist_root):
    plain = data.build({"name": "mnist", "root": mnist_root})
    mnist = data.build({"name": "mnist", "root": mnist_root, "binarize": "threshold"})
    assert mnist.levels == 2 and mnist.test.images.dtype == np.uint8
    assert np.array_equal(mnist.val.images, plain.val.images > 127)


def test_stochastic_is_redrawn_with_the_right_probability(mnist_root):
    mnist = data.build({"name": "mnist", "root": mnist_root, "binarize": "stochastic"})
    assert mnist.levels == 2
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([mnist.test.batch(slice(None), generator)[0] for _ in range(2000)])
    assert draws.dtype == torch.uint8 and draws.max() == 1
    grey = torch.from_numpy(mnist.test.images / 255)
    mean = draws.double().mean(0)
    assert (mean - grey).abs().max() < 5 * (0.25 / 2000) ** 0.5
    assert (mean[grey == 0] == 0).all() and (mean[grey == 1] == 1).all()
    assert not torch.equal(draws[0], draws[1])
    again = mnist.test.batch(slice(None), torch.Generator().manual_seed(0))[0]
    assert torch.equal(draws[0], again)


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-6] ^= 1  # of the checksum
    path.write_bytes(bytes(content))


def _rewrite(change):
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


@pytest.mark.parametrize(
    ("file", "damage", "expected"),
    [
        (IMAGES, _cut, "damaged gzip"),
        (IMAGES, _flip, "damaged gzip"),
        (IMAGES, lambda path: path.write_bytes(b"<html>no such page</html>"), "damaged gzip"),
        (IMAGES, _rewrite(lambda raw: raw[:-1]), "expected 816 bytes, found 815"),
        (IMAGES, _rewrite(lambda raw: raw + b"0"), "expected 816 bytes, found more"),
        (IMAGES, _rewrite(lambda raw: b""), "expected an IDX file"),
        (IMAGES, _rewrite(lambda raw: b"\0\0\x0d\3" + raw[4:]), "expected an IDX file"),
        (
            IMAGES,
            lambda path: write_idx(path, np.zeros((39, 5, 4), np.uint8)),
            r"\(40, 5, 4\), found \(39, 5, 4\)",
        ),
        (LABELS, lambda path: write_idx(path, np.zeros(11, np.uint8)), r"\(12,\), found \(11,\)"),
        (LABELS, lambda path: write_idx(path, np.full(12, 10, np.uint8)), "labels in 0..9, found 10"),
    ],
)
def test_damaged_idx_is_named(mnist_root, file, damage, expected):
    damage(mnist_root / "mnist" / file)
    with pytest.raises(ValueError, match=expected) as error:
        data.build({"name": "mnist", "root": mnist_root})
    assert file in one_line(error)


# ----------------------------------------------------------------------------------------------- binary MNIST


def test_amat_values_and_splits(amat_root):
    root, bits = amat_root
    binary = data.build({"name": "binary_mnist", "root": root})
    assert (binary.levels, binary.classes, binary.train.labels) == (2, None, None)
    for part, rows in ((binary.train, bits[:3]), (binary.val, bits[3:5]), (binary.test, bits[5:])):
        assert part.images.dtype == np.uint8 and np.array_equal(part.images, rows)


def test_amat_with_other_white_space_reads_the_same(amat_root):
    root, bits = amat_root
    path = root / "binary_mnist" / "binarized_mnist_train.amat"
    path.write_bytes(path.read_bytes().replace(b"\n", b" \r\n").rstrip())
    assert np.array_equal(data.build({"name": "binary_mnist", "root": root}).train.images, bits[:3])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda text: text[:-2], "expected 2,352 values 0 or 1 .*found 2,351"),
        (lambda text: text + b"1\n", "found 2,353"),
        (lambda text: b"2" + text[1:], "found the character '2'"),
        (lambda text: b"-" + text[1:], "found the character '-'"),
        (lambda text: b"00 " + text[4:] + b"\n", "no space between"),
        (lambda text: b"", "found 0"),
    ],
)
def test_damaged_amat_is_named(amat_root, damage, expected):
    root, _ = amat_root
    path = root / "binary_mnist" / "binarized_mnist_train.amat"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=expected) as error:
        data.build({"name": "binary_mnist", "root": root})
    assert path.name in one_line(error)


# -------------------------------------------------------------------------------------------------- CIFAR-10


def test_cifar_records(cifar_root):
    cifar10 = data.build({"name": "cifar10", "root": cifar_root})
    assert cifar10.shape == {"channels": 3, "height": 32, "width": 32, "levels": 256}
    assert (len(cifar10.train), len(cifar10.val), len(cifar10.test), cifar10.classes) == (15, 5, 4, 10)
    numbers = np.concatenate([part.images[:, 0, 0, 0] for part in (cifar10.train, cifar10.val, cifar10.test)])
    labels = np.concatenate([part.labels for part in (cifar10.train, cifar10.val, cifar10.test)])
    assert sorted(numbers) == list(range(24)) and np.array_equal(labels, numbers % 10)
    record = (cifar_root / "cifar10" / cifar.FOLDER / cifar.TEST).read_bytes()[1 : cifar.RECORD]
    assert cifar10.test.images[0].tobytes() == record, "pixels are not (c h w)"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda raw: raw[:-1], "expected 12,292 bytes .*found 12,291"),
        (lambda raw: raw + raw, "found 24,584"),
        (lambda raw: b"\x0a" + raw[1:], "labels in 0..9, found 10"),
    ],
)
def test_damaged_cifar_is_named(cifar_root, damage, expected):
    path = cifar_root / "cifar10" / cifar.FOLDER / "data_batch_3.bin"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=expected) as error:
        data.build({"name": "cifar10", "root": cifar_root})
    assert path.name in one_line(error)


def _pack(root: Path, names) -> Path:
    """Move the files into an archive, as the site has it, with members that must not be followed."""
    home = root / "cifar10"
    with tarfile.open(home / cifar.ARCHIVE, "w:gz") as tar:
        for name in names:
            tar.add(home / cifar.FOLDER / name, f"{cifar.FOLDER}/{name}")
            (home / cifar.FOLDER / name).unlink()
        evil = tarfile.TarInfo("../evil.bin")
        tar.addfile(evil)
        link = tarfile.TarInfo(f"{cifar.FOLDER}/readme.html")
        link.type, link.linkname = tarfile.SYMTYPE, "../evil.bin"
        tar.addfile(link)
    return home / cifar.ARCHIVE


def test_cifar_takes_only_its_files_from_the_archive(cifar_root):
    before = data.build({"name": "cifar10", "root": cifar_root})
    _pack(cifar_root, (*cifar.TRAIN, cifar.TEST))
    after = data.build({"name": "cifar10", "root": cifar_root})
    assert np.array_equal(before.train.images, after.train.images)
    folder = cifar_root / "cifar10" / cifar.FOLDER
    assert {path.name for path in folder.iterdir()} - {".lock"} == {*cifar.TRAIN, cifar.TEST}
    assert not (cifar_root / "evil.bin").exists()


@pytest.mark.parametrize("damage", ["cut", "missing member"])
def test_damaged_cifar_archive_is_named(cifar_root, damage):
    archive = _pack(cifar_root, (*cifar.TRAIN, cifar.TEST) if damage == "cut" else cifar.TRAIN)
    if damage == "cut":
        archive.write_bytes(archive.read_bytes()[:20_000])
    else:
        (archive.parent / cifar.FOLDER / cifar.TEST).unlink()
    with pytest.raises(ValueError, match=r"cifar-10-binary\.tar\.gz: damaged") as error:
        data.build({"name": "cifar10", "root": cifar_root})
    one_line(error)


# ------------------------------------------------------------------------------------------------ real images


def test_real_binary_mnist_has_its_published_files_and_known_entropy(tmp_path):
    stored = stored_sets()
    folder = tmp_path / "binary_mnist"
    folder.mkdir()
    stored.binary_mnist(folder)
    assert all(download.matches(folder / name, digest) for name, digest in amat.FILES.items())
    binary = data.build({"name": "binary_mnist", "root": tmp_path})
    assert [len(part) for part in (binary.train, binary.val, binary.test)] == [50_000, 10_000, 10_000]
    p = (binary.train.images.sum(0) + 1) / 50_002
    on = binary.test.images.mean(0)
    nats = -(on * np.log(p) + (1 - on) * np.log(1 - p)).sum()
    assert nats == pytest.approx(205.8, abs=0.1), "the best factorised Bernoulli model"


def test_real_cifar10_test_images_have_the_known_entropy(tmp_path, monkeypatch):
    stored = stored_sets()
    monkeypatch.setattr(cifar, "COUNT", 1000)  # the first thousand test images stand in for each file
    folder = tmp_path / "cifar10" / cifar.FOLDER
    folder.mkdir(parents=True)
    images = cifar10_test(stored).reshape(-1, 3072)
    labels = np.load(stored.check("cifar10/test_labels.npy")).astype(np.uint8)[:1000]
    for name in (*cifar.TRAIN, cifar.TEST):
        (folder / name).write_bytes(np.concatenate([labels[:, None], images], 1).tobytes())
    monkeypatch.setattr(cifar, "HELD_OUT", 500)
    test = data.build({"name": "cifar10", "root": tmp_path}).test
    share = np.bincount(test.images.ravel(), minlength=256) / test.images.size
    assert -(share * np.log2(share)).sum() == pytest.approx(7.912, abs=0.02), "a global histogram's bits/dim"
    right = np.abs(np.diff(test.images.astype(int), axis=3)).mean()
    assert right < 15, "neighbouring pixels are not alike: the layout is wrong"
