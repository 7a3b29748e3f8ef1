"""Damaged files for everything that reads one: `python -m tests.damage N` reads N, half of them damaged in depth.

In depth is within what a checksum or a compressed stream guards: the file is taken apart, a part of it is damaged, and
it is put together again, so that the damage is met by what reads that part. Each file ends in one of three ways:

    loaded     the damage does no harm, or cannot be told from other data
    refused    one line that names the file
    failed     anything else: another error, 10 seconds, more than 2 GB

Exit status 1 if one failed; it is kept in the folder that is printed.
"""

import contextlib
import gzip
import io
import itertools
import json
import os
import resource
import signal
import struct
import sys
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pyarrow
import safetensors.torch
import torch
from PIL import Image
from pyarrow.parquet import write_table

import data
from checks import shortened
from cli import command
from cli.loggers import Records, ids_of
from cli.output import NpyFile, PngFolder
from data import amat, cache, cifar, idx, imagenet
from data.given import read_images
from models import exported
from models.checkpoint import load
from sample import known_of
from tests.commands import COMMANDS, REPOSITORY, SHORT

SECONDS, BYTES = 10, 2 << 30

# ----------------------------------------------------------------------------------------------------------- mutations


def damaged(content: bytes, random: Random) -> bytes:
    """A file's bytes with one to three kinds of damage."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        content = random.choice(DAMAGE)(bytearray(content), random)
    return bytes(content)


def span(content: bytearray, random: Random) -> slice:
    """A part of the content, short more often than long, and near its beginning more often than not."""
    reach = random.choice((64, 512, len(content) + 1))
    start = random.randrange(min(reach, len(content) + 1))
    return slice(start, start + random.choice((1, 1, 2, 4, 8, 64, 1024)))


def cut(content: bytearray, random: Random) -> bytearray:
    return content[: random.randrange(len(content) + 1)]


def flip(content: bytearray, random: Random) -> bytearray:
    for _ in range(random.choice((1, 1, 4, 32))):
        if content:
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    return content


def overwrite(content: bytearray, random: Random) -> bytearray:
    part = span(content, random)
    size = len(content[part])
    content[part] = random.choice((bytes(size), b"\xff" * size, random.randbytes(size), b"9" * size, b"\x7f" * size))
    return content


def delete(content: bytearray, random: Random) -> bytearray:
    del content[span(content, random)]
    return content


def insert(content: bytearray, random: Random) -> bytearray:
    at = span(content, random).start
    content[at:at] = random.choice(
        (random.randbytes(16), b"-", b"9" * 20, b"[" * 2000, bytes(4096), b"\n", b"{}", b"(")
    )
    return content


def repeat(content: bytearray, random: Random) -> bytearray:
    part = span(content, random)
    content[part.start : part.start] = content[part] * random.choice((1, 2, 100))
    return content


def other_number(content: bytearray, random: Random) -> bytearray:
    """Another number in the place of digits, or of bytes that hold one."""
    digits = [k for k, byte in enumerate(content[:4096]) if chr(byte).isdigit()]
    if digits and random.random() < 0.7:
        at = random.choice(digits)
        content[at : at + 1] = random.choice((b"0", b"-1", b"99999999", b"18446744073709551615", b"1e9", b"9" * 400))
    elif len(content) >= 8:
        size, at = random.choice((2, 4, 8)), random.randrange(min(len(content) - 7, 512))
        content[at : at + size] = random.choice((b"\xff", b"\x7f", b"\0")) * size
    return content


DAMAGE = (cut, flip, overwrite, delete, insert, repeat, other_number)


# --------------------------------------------------------------------------------------------------------------- depth


def in_gzip(content: bytes, random: Random) -> bytes:
    return gzip.compress(damaged(gzip.decompress(content), random), compresslevel=1)


def in_zip(content: bytes, random: Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(record, archive.read(record)) for record in archive.infolist()]
    small = [k for k, (_, inside) in enumerate(records) if len(inside) < 100_000]
    chosen, out = random.choice(small), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for k, (record, inside) in enumerate(records):
            archive.writestr(record, damaged(inside, random) if k == chosen else inside, record.compress_type)
    return out.getvalue()


def in_png(content: bytes, random: Random) -> bytes:
    at, chunks = 8, []
    while at < len(content):
        (size,) = struct.unpack(">I", content[at : at + 4])
        chunks.append((content[at + 4 : at + 8], content[at + 8 : at + 8 + size]))
        at += 12 + size
    k = random.randrange(len(chunks))
    chunks[k] = (chunks[k][0], damaged(chunks[k][1], random))
    parts = [(len(inside), kind + inside) for kind, inside in chunks]
    return content[:8] + b"".join(
        struct.pack(">I", n) + chunk + struct.pack(">I", zlib.crc32(chunk)) for n, chunk in parts
    )


def in_safetensors(content: bytes, random: Random) -> bytes:
    """A text of the header damaged, and a checksum that is right."""
    weights = safetensors.torch.load(content)
    texts = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    del texts["sha256"]
    name = random.choice(sorted(texts))
    texts[name] = damaged(texts[name].encode(), random).decode("utf-8", "replace")
    return safetensors.torch.save(weights, {**texts, "sha256": exported.checksum(texts, weights)})


def in_parquet(content: bytes, random: Random) -> bytes:
    """Damage what is written at the end of a Parquet file about its rows and columns."""
    (size,) = struct.unpack("<I", content[-8:-4])
    rows, about = content[: -8 - size], damaged(content[-8 - size : -8], random)
    return rows + about + struct.pack("<I", len(about)) + content[-4:]


DEPTH = {".gz": in_gzip, ".pt": in_zip, ".npz": in_zip, ".png": in_png}
DEPTH |= {".safetensors": in_safetensors, ".parquet": in_parquet}


# ------------------------------------------------------------------------------------------------------------- readers


class Reader(NamedTuple):
    """A whole file, and what reads it."""

    file: Path
    read: Callable[[], object]


def build(name: str, root: Path, **options) -> Callable[[], object]:
    """What loads a data set and fetches from each of its parts."""

    def read() -> None:
        dataset = data.build({"name": name, "root": root, **options})
        assert len(dataset.shape) == 4
        for split in ("train", "val", "test"):
            dataset.split(split).batch(slice(0, 4))

    return read


def run_command(name: str, *arguments: str) -> None:
    """Run a command in this process; ValueError with what it printed as its error."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [f"{name}.py", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command.run(name, *COMMANDS[name])
    except SystemExit as end:
        assert end.code in (0, 2), (end.code, err.getvalue())
        if end.code == 2:
            raise ValueError(err.getvalue().strip()) from None
    finally:
        sys.argv = before


def readers(folder: Path) -> dict[str, Reader]:
    """Write a small file of each kind, and say how each is read."""
    found, numbers = {}, np.random.RandomState(0)
    idx.COUNTS, idx.SIDES, idx.HELD_OUT = {"train": 40, "t10k": 12}, (5, 4), 8
    cifar.COUNT, cifar.HELD_OUT = 4, 5
    amat.COUNTS = {"train": 3, "valid": 2, "test": 2}
    imagenet.HELD_OUT = 5

    root = folder / "mnist"
    root.mkdir()
    for prefix, n in idx.COUNTS.items():
        for kind, array in (("images-idx3", numbers.bytes(20 * n)), ("labels-idx1", bytes(k % 10 for k in range(n)))):
            axes = (n, *idx.SIDES) if kind == "images-idx3" else (n,)
            header = struct.pack(f">HBB{len(axes)}I", 0, 8, len(axes), *axes)
            path = root / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array))
            found[f"mnist {kind} {prefix}"] = Reader(path, build("mnist", folder))

    root = folder / "cifar10"
    (root / cifar.FOLDER).mkdir(parents=True)
    inside = bytes(numbers.randint(0, 10, 4 * cifar.RECORD, np.uint8))
    with tarfile.open(root / cifar.ARCHIVE, "w:gz") as tar:
        for name in (*cifar.TRAIN, cifar.TEST):
            member = tarfile.TarInfo(f"{cifar.FOLDER}/{name}")
            member.size = len(inside)
            tar.addfile(member, io.BytesIO(inside))
            (root / cifar.FOLDER / name).write_bytes(inside)
    found["cifar10"] = Reader(root / cifar.FOLDER / cifar.TEST, build("cifar10", folder))

    def from_archive() -> None:
        for path in (root / cifar.FOLDER).glob("*.bin"):
            path.unlink()
        try:
            build("cifar10", folder)()
        finally:
            for name in (*cifar.TRAIN, cifar.TEST):
                (root / cifar.FOLDER / name).write_bytes(inside)

    found["cifar10 archive"] = Reader(root / cifar.ARCHIVE, from_archive)

    path = folder / "binary_mnist"
    path.mkdir()
    for name, n in amat.COUNTS.items():
        rows = numbers.randint(0, 2, (n, 784))
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (path / f"binarized_mnist_{name}.amat").write_text(text)
    found["amat"] = Reader(path / "binarized_mnist_valid.amat", build("binary_mnist", folder))

    path = folder / "batch.npz"
    np.savez_compressed(path, data=numbers.randint(0, 256, (4, 3072), np.uint8), labels=np.arange(1, 5))
    found["npz"] = Reader(path, lambda path=path: imagenet.read_batch(path, 32))

    images, labels = folder / "images.npy", folder / "labels.npy"
    np.save(images, numbers.randint(0, 17, (30, 1, 8, 8), np.uint8))
    np.save(labels, numbers.randint(0, 5, 30))
    npy = {"path": str(images), "labels": str(labels)}
    found["npy"] = Reader(images, build("npy", folder, **npy))
    found["npy labels"] = Reader(labels, build("npy", folder, **npy))
    found["npy to complete"] = Reader(images, lambda: read_images(images, (1, 8, 8), 17, 8))
    mask = folder / "mask.npy"
    np.save(mask, numbers.randint(0, 2, (8, 8)))
    options, model = type("", (), {"mask": mask, "keep": 0.5}), type("", (), {"shape": (1, 8, 8), "height": 8})
    found["mask"] = Reader(mask, lambda: known_of(options, model, torch.zeros(2, 1, 8, 8)))
    build("npy", folder, **npy)()
    converted = next((folder / "npy").glob("*.npy"))
    found["converted"] = Reader(converted, lambda: cache.load(converted, (1, 8, 8), np.uint8, np.int64))

    pictures = folder / "pictures"
    pictures.mkdir()
    noise = Image.fromarray(numbers.randint(0, 256, (24, 20, 3), np.uint8))
    for kind in ("png", "jpg", "gif", "bmp", "tif", "webp", "ppm"):
        path = pictures / f"noise.{kind}"
        noise.save(path)
        found[f"picture {kind}"] = Reader(path, lambda path=path: read_images(path, (3, 8, 8), 256))
    grey = folder / "folder"
    grey.mkdir()
    for k in range(6):
        noise.rotate(k).save(grey / f"{k}.png")
    found["folder of pictures"] = Reader(grey / "3.png", build("image_folder", folder, path=str(grey), size=8))

    path = folder / "rows.parquet"
    rows = [{"bytes": (grey / f"{k}.png").read_bytes(), "path": f"{k}.png"} for k in range(6)]
    write_table(pyarrow.table({"image": rows, "label": ["a", "b", "a"] * 2}), path, row_group_size=4)
    found["parquet"] = Reader(path, build("parquet", folder, path=str(path), label="label", size=8))

    what = {"n": 5, "seed": 0, "checkpoint": "0" * 64}
    drawn = folder / "drawn.npy"
    sink = NpyFile(drawn, 5, (1, 8, 8), np.dtype(np.uint8), what)
    sink.put([0, 1], torch.zeros(2, 1, 8, 8, dtype=torch.uint8))

    def go_on() -> None:
        sink = NpyFile(drawn, 5, (1, 8, 8), np.dtype(np.uint8), what)
        assert all(0 <= k < 5 for k in sink.missing())

    for suffix in ("part", "done", "json"):
        found[f"drawn {suffix}"] = Reader(folder / f"drawn.npy.{suffix}", go_on)
    PngFolder(folder / "pngs", 5, 17, what)
    found["samples.json"] = Reader(folder / "pngs/samples.json", lambda: PngFolder(folder / "pngs", 5, 17, what))

    for name in ("pixel_cnn-softmax", "diag_bilstm-logistic_mixture-classes", "multi_scale-softmax"):
        path = folder / f"{name}.pt"
        path.write_bytes((REPOSITORY / f"tests/checkpoints/{name}.pt").read_bytes())
        found[f"checkpoint {name}"] = Reader(path, lambda path=path: load(path))
        given = folder / f"{name}.safetensors"
        exported.write(given, torch.load(path)["model"], load(path).state_dict(), None)
        found[f"exported {name}"] = Reader(given, lambda path=given: load(path))
    run = folder / "run"
    run_command("train", *SHORT, "model=pixel_cnn", "steps=2", f"hydra.run.dir={run}", "evaluate_images=8")

    def go_on_with_records() -> None:
        with Records(run) as records:
            records.open([], {}, 2)

    found["metrics.jsonl"] = Reader(run / "metrics.jsonl", go_on_with_records)
    (run / "loggers.json").write_text('{"wandb": "1a2b3c4d", "trackio": "0123456789abcdef"}\n')
    found["loggers.json"] = Reader(run / "loggers.json", lambda: ids_of(run))
    resume = [f"resume={run}", "steps=2", "evaluate_images=8", "sample_every=0"]
    found["resume"] = Reader(run / "last.pt", lambda: run_command("train", *resume))
    draw = [f"checkpoint={run}", "n=2", f"out={run}/drawn.png"]
    found["sample"] = Reader(run / "best.pt", lambda: run_command("sample", *draw))
    return found


# ------------------------------------------------------------------------------------------------------------- reading


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """Let this process take 2 GB more than it has, and what is inside 10 seconds."""

    def late(*_) -> None:
        raise TimeoutError(f"{SECONDS} s")

    (pages, *_), unlimited = map(int, Path("/proc/self/statm").read_text().split()), resource.RLIM_INFINITY
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, unlimited))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (unlimited, unlimited))


def outcome(reader: Reader) -> tuple[str, str]:
    """How a reader's file ends, and in what words."""
    err = io.StringIO()
    try:
        with limits(), warnings.catch_warnings(), contextlib.redirect_stderr(err):
            warnings.simplefilter("ignore")
            reader.read()
    except (ValueError, OSError) as error:
        text = command.one_line(error) if isinstance(error, OSError) else str(error)
        right = "\n" not in text and reader.file.name.split(".")[0] in text and not isinstance(error, TimeoutError)
        return "refused" if right else "failed", f"{type(error).__name__}: {text}"
    except BaseException as error:
        return "failed", f"{type(error).__name__}: {shortened(str(error))}"
    return "loaded", err.getvalue()


def attack(folder: Path, n: int, seed: int) -> dict[str, Counter]:
    """Read n damaged files; those that fail are kept in `folder`/failed. Returns how many ended how, by reader."""
    work, kept = folder / "work", folder / "failed"
    work.mkdir()
    kept.mkdir()
    random, found = Random(seed), readers(work)
    counts = {name: Counter() for name in found}
    wholes = {name: reader.file.read_bytes() for name, reader in found.items()}
    for k, name in zip(range(n), itertools.cycle(found)):  # as many of each
        reader, whole = found[name], wholes[name]
        deep = DEPTH.get(reader.file.suffix)
        content = (deep if deep and random.random() < 0.7 else damaged)(whole, random)
        around = {path: path.read_bytes() for path in reader.file.parent.iterdir() if path.is_file()}
        reader.file.write_bytes(content)
        (folder / "now").write_text(f"{name}: {k}\n")  # what a process that dies was at
        how, words = outcome(reader)
        counts[name][how] += 1
        if how == "failed":
            (kept / f"{k}{reader.file.suffix}").write_bytes(content)
            print(f"{name}, file {k}: {words}", flush=True)
        for path in reader.file.parent.iterdir():
            if path.is_file() and path not in around:
                path.unlink()
        for path, before in around.items():
            if path != reader.file:
                path.write_bytes(before)
        reader.file.write_bytes(whole)
    return counts


def main(argv: list[str]) -> int:
    n, seed = int(argv[0]), int(argv[1]) if argv[1:] else 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="damage"))
    os.chdir(folder)
    counts = attack(folder, n, seed)
    total = sum(counts.values(), Counter())
    print(json.dumps({name: dict(count) for name, count in counts.items()}, indent=1))
    print(
        f"{folder}: {total['loaded']} loaded, {total['refused']} refused, {total['failed']} failed of {n}, seed {seed}"
    )
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
