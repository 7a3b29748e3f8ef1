"""Three hundred wrong commands: each ends in one line that names what is wrong, exit status 2, and nothing written."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow.parquet import write_table

import models
from tests.commands import REPOSITORY, SHORT, process, refused

pytestmark = pytest.mark.slow

# A wrong command: its name, its arguments, and words that its line holds.
Mistake = tuple[str, list[str], list[str]]
NO_INTEGER = ("abc", "1.5", "[1,2]", "{a:1}", "''")
NO_NUMBER = ("abc", "[1,2]", "{a:1}", "nan")
NO_BOOL = ("perhaps", "[true]")
NO_TEXT = ("[a]", "{a:1}")


def values(name: str, keys: str, *wrong: tuple) -> Iterator[Mistake]:
    """Every wrong value of some keys of a command; the line names the key."""
    for key in keys.split():
        for value in (value for group in wrong for value in group):
            yield name, [f"{key}={value}"], [key.rpartition(".")[2]]


def written(name: str, said: dict[str, str]) -> Iterator[Mistake]:
    """Commands written out, with the words of each between bars."""
    for arguments, words in said.items():
        yield name, arguments.split(), words.split(" | ")


def in_training() -> Iterator[Mistake]:
    yield from values("train", "steps batch_size accumulate log_every", NO_INTEGER, ("0", "-1", "null"))
    yield from values("train", "evaluate_every save_every samples evaluate_images", ("0", "abc", "1.5"))
    yield from values("train", "seed warmup sample_every completed", ("-1", "abc", "1.5", "null"))
    yield from values("train", "ema", NO_NUMBER, ("1", "-0.1", "1.5", "null"))
    yield from values("train", "clip", NO_NUMBER, ("0", "-1"))
    yield from values("train", "bf16 cuda_graph", NO_BOOL, ("null",))
    yield from values("train", "decay device", NO_TEXT, ("linear", "cosin", "tpu", "null"))
    yield from values("train", "logger", NO_TEXT, ("tensorbord", "true", "null", "[none,3]", "[[wandb]]"))
    yield from values("train", "model.hidden model.layers model.head_features", NO_INTEGER, ("0", "-1", "null"))
    yield from values("train", "model.classes", ("abc", "-1", "3", "null"))
    yield from values("train", "model.dropout model.label_dropout", ("abc", "2", "-0.1", "null"))
    yield from values("train", "model.residual model.skip", ("abc", "3", "null"))
    yield from values("train", "model.head", ("sigmoid", "3", "null", "[softmax]"))
    for key, value in (
        ("base", "foo"),
        ("conditional", "foo"),
        ("doublings", "9"),
        ("train", "all"),
        ("copy_known", "3"),
    ):
        yield "train", ["model=multi_scale", f"model.{key}={value}"], [key]
    yield "train", ["model.head=logistic_mixture", "model.mixtures=0"], ["mixtures=0"]
    yield from values("train", "optimizer.lr optimizer.eps optimizer.weight_decay", ("fast", "-1", "null", "[1]"))
    yield from values("train", "optimizer.betas", ("0.9", "[1]", "[a,b]", "[0.9,2]"))
    for key, value in (("alpha", "x"), ("momentum", "-1")):
        yield "train", ["optimizer=rmsprop", f"optimizer.{key}={value}"], [key]
    for value in ("1", "-1", "x"):
        yield "train", ["optimizer=muon", f"optimizer.momentum={value}"], ["momentum=", value]
    said = {
        "model=foo": "foo | diag_bilstm | pixel_cnn",
        "stepz=3": "stepz",
        "model.hiden=3": "model.hiden",
        "+model.foo=3": "foo | hidden",
        "steps=abc": "steps=abc | Integer",
        "model.dropout=2": "dropout=2 | 0.95",
        "model.layers=0": "layers=0 | at least 1",
        "model._target_=os.system": "os.system | models.DiagBiLSTM",
        "model.hidden=1000000": "not enough memory",
        "optimizer=sgd": "sgd | adamw | muon | rmsprop",
        "optimizer.name=sgd": "sgd | adamw | muon",
        "optimizer.lr=fast": "optimizer.lr='fast' | a number of at least 0",
        "optimizer.betas=0.9": "optimizer.betas=0.9 | two numbers",
        "optimizer.momentum_=0.9": "momentum_",
        "logger=[trackio,wandbb]": "logger='wandbb' | none, wandb, trackio or tensorboard; did you mean wandb?",
        "logger=wandb,none": "logger",
        "decay=cosin": "decay='cosin' | cosine or constant; did you mean cosine?",
        "+foo=1": "KEY='foo' | steps",
        "+step=1": "KEY='step' | did you mean steps?",
        "--steps=10": "--steps=10: expected steps=10, without dashes",
        "--model.hidden 8": "--model.hidden: expected model.hidden=VALUE",
        "batch_size=3 accumulate=4": "batch_size=3 | at least 4",
        "--batch-size 8": "--batch-size: expected batch_size=VALUE",
        "--nonsense": "nonsense",
        "device=tpu": "tpu | auto, cpu, cuda, cuda:N or mps",
        "device=cuda:": "cuda:N",
        "device=cuda:0": "device='cuda:0' | finds no GPU",
        "device=mps": "GPU of Apple",
        "dataset=foo": "foo | digits | cifar10",
        "experiment=foo": "foo | mnist_diag_bilstm_7x16",
        "dataset=npy": "dataset.path",
        "dataset=image_folder": "dataset.path",
        "dataset=npy dataset.path=nothing.npy": "nothing.npy",
        "dataset=npy dataset.path=cut.npy": "cut.npy",
        "dataset=npy dataset.path=text.npy": "text.npy",
        "dataset=npy dataset.path=floats.npy": "floats.npy | float64",
        "dataset=npy dataset.path=flat.npy": "flat.npy | (20, 16)",
        "dataset=npy dataset.path=huge.npy": "huge.npy | 18446744073709551615",
        "dataset=npy dataset.path=far.npy": "far.npy | 10000000 | 65535",
        "dataset=npy dataset.path=either.npy": "dataset.channels | first | last",
        "dataset=npy dataset.path=high.npy dataset.levels=4": "high.npy | 7 | levels",
        "dataset=npy dataset.path=high.npy dataset.levels=1": "dataset.levels=1",
        "dataset=npy dataset.path=high.npy dataset.levels=x": "dataset.levels='x'",
        "dataset=npy dataset.path=high.npy dataset.val=2": "dataset.val=2",
        "dataset=npy dataset.path=high.npy dataset.val=0.9 dataset.test=0.9": "high.npy | val=0.9",
        "dataset=npy dataset.path=high.npy dataset.channels=middle": "dataset.channels='middle'",
        "dataset=npy dataset.path=high.npy dataset.labels=nothing.npy": "nothing.npy",
        "dataset=npy dataset.path=high.npy dataset.labels=flat.npy": "flat.npy | (20,)",
        "dataset=npy dataset.path=high.npy dataset.seed=-1": "dataset.seed=-1",
        "dataset=npy dataset.path=high.npy dataset.pat=1": "pat",
        "dataset=npy dataset.path=high.npy dataset.clips=3": "dataset.clips=3",
        "dataset=npy dataset.path=flat.npy dataset.clips=true": "flat.npy | (n t h w)",
        "model=video": "model='video' | digits has no clips | moving_digits",
        "dataset=moving_digits": "models.DiagBiLSTM | model=video",
        "model=video dataset=moving_digits model.past=-1": "past=-1 | at least 0",
        "model=video dataset=moving_digits model.net=foo": "net='foo' | row_lstm",
        "model=video dataset=moving_digits dataset.size=8": "dataset.size=8 | above 8",
        "model=video dataset=moving_digits dataset.source=foo": "dataset.source='foo' | digits or mnist",
        "dataset=image_folder dataset.path=nowhere": "nowhere",
        "dataset=image_folder dataset.path=folder.png": "folder.png | expected pictures",
        "dataset=image_folder dataset.path=pictures dataset.size=0": "dataset.size=0",
        "dataset=image_folder dataset.path=pictures dataset.size=[1,2,3]": "dataset.size",
        "dataset=image_folder dataset.path=pictures dataset.channels=2": "dataset.channels=2",
        "dataset=image_folder dataset.path=pictures dataset.labels=names": "dataset.labels='names' | folders",
        "dataset=image_folder dataset.path=pictures dataset.labels=[folders]": "dataset.labels",
        "dataset=image_folder dataset.path=pictures dataset.labels=folders": "pictures/0.png | a folder below pictures",
        "dataset=image_folder dataset.path=above dataset.labels=folders": "above | for each label | pictures alone",
        "dataset=image_folder dataset.path=pictures model.classes=auto": "model.classes='auto' | no labels",
        "dataset=npy dataset.path=high.npy model.classes=auto": "model.classes='auto' | no labels",
        "dataset=parquet": "dataset.path",
        "dataset=parquet dataset.path=nowhere": "nowhere | .parquet",
        "dataset=parquet dataset.path=pictures": "pictures | .parquet",
        "dataset=parquet dataset.path=text.npy": "text.npy | Parquet",
        "dataset=parquet dataset.path=cut.parquet": "cut.parquet | Parquet",
        "dataset=parquet dataset.path=rows.parquet": "rows.parquet | row 3 | expected a picture",
        "dataset=parquet dataset.path=rows.parquet dataset.image=img": "dataset.image='img' | image (binary)",
        "dataset=parquet dataset.path=rows.parquet dataset.image=score": "dataset.image='score' | image (binary)",
        "dataset=parquet dataset.path=rows.parquet dataset.image=[a]": "dataset.image",
        "dataset=parquet dataset.path=rows.parquet dataset.label=labels": "dataset.label='labels' | score (double)",
        "dataset=parquet dataset.path=rows.parquet dataset.label=score": "dataset.label='score' | score (double)",
        "dataset=parquet dataset.path=rows.parquet dataset.label=3": "dataset.label=3 | score (double)",
        "dataset=parquet dataset.path=rows.parquet dataset.size=x": "dataset.size='x'",
        "dataset=parquet dataset.path=rows.parquet dataset.channels=2": "dataset.channels=2",
        "dataset=parquet dataset.path=rows.parquet dataset.val=2": "dataset.val=2",
        "dataset=parquet dataset.path=rows.parquet dataset.test=0.9": "rows.parquet | test=0.9",
        "dataset=parquet dataset.path=rows.parquet dataset.seed=-1": "dataset.seed=-1",
        "dataset=parquet dataset.path=rows.parquet dataset.labels=label": "dataset.labels | label",
        "dataset=mnist dataset.binarize=yes": "binarize | stochastic",
        "dataset=mnist dataset.root=[a]": "dataset.root",
        "dataset.name=foo": "foo | digits",
        "resume=nowhere": "nowhere",
        "resume=folder.png": "folder.png",
        "init_from=nowhere": "nowhere",
        "init_from=folder.png": "folder.png",
        "init_from=pretrained/nothing": "pretrained/nothing",
        "init_from=run model.hidden=5": "hidden",
        "init_from=run dataset=mnist": "levels",
        "resume=run steps=": "steps",
        "resume=run ~steps": "~steps",
        "resume=run model.hidden=5": "last.pt | hidden",
        "resume=run optimizer=rmsprop": "optimizer.name | last.pt",
        "resume=run experiment=mnist_diag_bilstm_1x32": "experiment",
        "resume=run hydra.run.dir=elsewhere": "elsewhere",
        "hydra.run.dir=run": "run | resume=",
        "hydra.run.dir=file.txt/run": "file.txt",
        "steps": "steps",
        "=3": "=3",
        "model=[": "model=[",
        "'steps=3": "steps",
        "~model": "model",
        "model=pixel_cnn,row_lstm": "model",
        "hydra.foo=1": "hydra.foo",
        "--config-name=foo": "foo",
        "--config-dir=nowhere": "nowhere",
    }
    yield from written("train", said)


def in_sampling() -> Iterator[Mistake]:
    yield from values("sample", "n", NO_INTEGER, ("0", "-1", "1000000000", "9" * 30))
    yield from values("sample", "label", ("abc", "1.5", "3", "-1", "[1]"))
    yield from values("sample", "temperature", NO_NUMBER, ("-1", "null", "inf"))
    yield from values("sample", "guidance", NO_NUMBER, ("-1", "null", "inf", "2"))
    yield from values("sample", "columns batch_size", ("0", "-1", "abc", "1.5"))
    yield from values("sample", "seed", ("-1", "abc", "1.5", "null"))
    yield from values("sample", "method backend device", ("fast", "[a]", "3"))
    yield from values("sample", "bf16", NO_BOOL)
    for key, value in (("keep", "2"), ("keep", "-1"), ("keep", "abc"), ("completions", "0"), ("completions", "x")):
        yield "sample", ["complete=test", f"{key}={value}"], [key]
    said = {
        "n=1000000000": "from 1 to 1048576",
        "n=1000000000 npy=a.npy": "n=1000000000 | from 1 to 16777216",
        "+foo=1": "KEY='foo' | checkpoint",
        "nn=3": "nn",
        "--n=10": "--n=10: expected n=10, without dashes",
        "complete=tset": "complete='tset' | train, val or test | did you mean test?",
        "complete=nothing.npy": "complete='nothing.npy'",
        "complete=cut.npy": "cut.npy",
        "complete=floats.npy": "floats.npy",
        "complete=flat.npy": "flat.npy | (n, 1, 8, 8)",
        "complete=folder.png": "folder.png",
        "complete=test completions=1000000000": "completions=1000000000",
        "complete=test n=0": "n=0",
        "complete=test root=nowhere n=x": "n",
        "complete=test mask=nothing.npy": "nothing.npy",
        "complete=test mask=flat.npy": "flat.npy | (8, 8)",
        "complete=test mask=floats.npy": "floats.npy",
        "method=naive backend=triton": "backend",
        "backend=cuda": "backend='cuda' | triton, torch or cpu",
        "backend=cpu bf16=true": "backend='cpu' | torch with torch.bfloat16 on cpu",
        "out=nowhere/x.png": "nowhere",
        "out=samples.jpg": "samples.jpg | .png",
        "out=folder.png": "folder.png",
        "out=[a]": "out",
        "npy=images.txt": "images.txt | .npy",
        "npy=nowhere/a.npy": "nowhere",
        "npy=flat.npy": "flat.npy | expected no file",
        "npy=a.npy pngs=b": "pngs='b'",
        "pngs=file.txt": "file.txt",
        "pngs=drawn n=3": "samples.json | checkpoint",
        "npy=drawn.npy n=4": "drawn.npy.json | n=4",
    }
    yield from written("sample", said)


def in_both() -> Iterator[Mistake]:
    for name in ("sample", "evaluate"):
        for value in (
            "nothing.pt",
            "text.pt",
            "cut.pt",
            "damaged.pt",
            "pickle.pt",
            "other.pt",
            "empty.pt",
            "folder.png",
        ):
            yield name, [f"checkpoint={value}"], [value, "expected"]
        yield name, ["checkpoint=[a]"], ["checkpoint"]
        yield name, ["checkpoint="], ["checkpoint"]


def in_evaluation() -> Iterator[Mistake]:
    yield from values("evaluate", "batch_size", NO_INTEGER, ("0", "-1", "null"))
    yield from values("evaluate", "seed", ("-1", "abc", "1.5"))
    yield from values("evaluate", "split", ("dev", "tset", "[test]", "null"))
    yield from values("evaluate", "classify without_label", NO_BOOL, ("true",))
    yield from values("evaluate", "out", ("[a]",))
    for value in ("folder.png", "a.txt", "nowhere/a.json"):
        yield "evaluate", [f"out={value}"], [value.partition("/")[0]]
        yield "evaluate", [f"scores={value}"], [value.partition("/")[0]]
    for value in ("text.csv", "nowhere/maps"):
        yield "evaluate", [f"maps={value}"], [value.partition("/")[0], "expected a folder"]
        yield "evaluate", [f"details={value}"], [value.partition("/")[0], "expected a folder"]
    for value in ("folder.png", "a.txt", "nowhere/a.png"):
        yield "evaluate", [f"nearest={value}"], [value.partition("/")[0]]
    for key in ("images", "against"):
        yield from values("evaluate", key, ("tset", "[a]"))
        for value in ("flat.npy", "floats.npy", "empty.pt"):
            yield "evaluate", [f"{key}={value}"], [value]
    yield "evaluate", ["scores=a.csv", "split=dev"], ["split='dev'"]
    yield "evaluate", ["images=test", "labels=nothing.npy"], ["nothing.npy"]
    yield "evaluate", ["labels=flat.npy"], ["labels=", "images="]
    yield "evaluate", ["images=pictures", "maps=pictures"], ["maps=pictures", "another folder"]
    yield from values("evaluate", "device", ("tpu", "[cpu]"))
    for argument in ("+foo=1", "n=3", "--split=test", "sed=3"):
        yield "evaluate", [argument], [argument.lstrip("+-").partition("=")[0]]


def in_compression() -> Iterator[Mistake]:
    yield from values("compress", "n images_of_block", NO_INTEGER, ("0", "-1"))
    yield from values("compress", "seed", ("-1", "abc", "1.5", "null"))
    yield from values("compress", "info skip_damaged compare", NO_BOOL)
    said = {
        "": "images=None | .prnn",
        "images=test": "out=None | .prnn",
        "images=test text.prnn": "one of the two",
        "images=test out=a.zip": "a.zip | .prnn",
        "images=test out=nowhere/a.prnn": "nowhere",
        "images=test out=a.prnn weights=outside": "weights='outside' | inside",
        "images=test out=a.prnn images_of_block=70000": "images_of_block=70000",
        "images=tset out=a.prnn": "images='tset' | did you mean test?",
        "images=flat.npy out=a.prnn": "flat.npy | (n, 1, 8, 8)",
        "images=floats.npy out=a.prnn": "floats.npy",
        "images=test out=a.prnn checkpoint=nothing.pt": "nothing.pt",
        "info": "info=True | .prnn",
        "info nothing.prnn": "nothing.prnn",
        "info text.prnn": "text.prnn: expected compressed images",
        "text.prnn": "out=None | .npy",
        "text.prnn out=a.txt": "a.txt | .npy",
        "text.prnn out=a.npy": "text.prnn: expected compressed images",
        "nothing.prnn out=a.npy": "nothing.prnn",
        "text.prnn out=nowhere/a.npy": "nowhere",
    }
    yield from written("compress", said)


MISTAKES = [*in_training(), *in_sampling(), *in_both(), *in_evaluation(), *in_compression()]
GROUPS = 16


def test_there_are_three_hundred():
    assert len({(name, *arguments) for name, arguments, _ in MISTAKES}) >= 300


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    process("train.py", *SHORT, "model=pixel_cnn", f"hydra.run.dir={folder}", check=True)
    return folder


def make_files(run: Path) -> None:
    """Fill the current folder with what the wrong commands name."""
    good = (run / "best.pt").read_bytes()
    middle = len(good) // 2
    Path("run").mkdir()
    for path in run.glob("*.pt"):
        Path("run", path.name).write_bytes(path.read_bytes())
    Path("run/.lock").touch()
    Path("text.pt").write_text("no checkpoint at all")
    Path("empty.pt").write_bytes(b"")
    Path("cut.pt").write_bytes(good[:middle])
    Path("damaged.pt").write_bytes(good[:middle] + bytes(64 * [0x5A]) + good[middle + 64 :])
    torch.save({"weights": {}}, "other.pt")
    torch.save(models.PixelCNN, "pickle.pt")  # a class: only an unsafe load would take it
    Path("folder.png").mkdir()
    for name in ("samples.png", "file.txt", "a.npy.json", "text.npy", "text.prnn"):
        Path(name).write_text("kept")
    high = np.zeros((20, 4, 4), np.uint8)
    high[3, 2, 1] = 7
    np.save("high.npy", high)
    np.save("flat.npy", high.reshape(20, 16))
    np.save("floats.npy", high.astype(float))
    np.save("huge.npy", np.where(high, 2**64 - 1, high.astype(np.uint64)))
    np.save("far.npy", np.where(high, 10**7, high.astype(np.int64)))
    np.save("either.npy", np.zeros((20, 3, 3, 3), np.uint8))
    np.save("drawn.npy", np.zeros((3, 1, 8, 8), np.uint8))
    for place in (Path("drawn.npy.json"), Path("drawn/samples.json")):
        place.parent.mkdir(exist_ok=True)
        place.write_text('{"seed": 77, "n": 3}')
    Path("cut.npy").write_bytes(Path("high.npy").read_bytes()[:200])
    Path("pictures").mkdir()
    for k in range(12):
        Image.new("L", (8, 8), k).save(f"pictures/{k}.png")
    shutil.copytree("pictures", "above/pictures")
    rows = [path.read_bytes() for path in sorted(Path("pictures").iterdir())]
    table = pyarrow.table({"image": [*rows[:3], b"no picture", *rows[4:]], "score": [0.5] * len(rows)})
    write_table(table, "rows.parquet")
    Path("cut.parquet").write_bytes(Path("rows.parquet").read_bytes()[:-9])


def contents() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


@pytest.mark.parametrize("group", range(GROUPS))
def test_a_wrong_command_ends_in_one_line(call, run, group):
    make_files(run)
    before = contents()
    home = Path("cache").resolve()
    failed = []
    for name, arguments, words in MISTAKES[group::GROUPS]:
        given = list(arguments)
        if name != "train" and not any(argument.startswith("checkpoint") for argument in given):
            given.append("checkpoint=run")
        if {"dataset=npy", "dataset=image_folder", "dataset=parquet"} & {*given}:
            given.append(f"dataset.root={home}")
        result = call(name, *given)
        try:
            refused(result, words)
            assert "Traceback" not in result[2] and len(result[2]) < 700, "too long"
        except AssertionError as error:
            failed.append(f"{name}.py {' '.join(arguments)}: expected {words}, found {result}\n{error}")
        after = {path: text for path, text in contents().items() if "cache" not in path.parts}
        if after != before:
            failed.append(f"{name}.py {' '.join(arguments)}: {[*(after.items() ^ before.items())]} differ"[:500])
            break
    assert not failed, "\n\n".join(failed)


@pytest.mark.parametrize("name", ["sampling", "training", "kernels", "sweep", "cost", "compile", "figures", "gpu"])
def test_a_wrong_benchmark_ends_in_its_usage(name):
    line = [sys.executable, "-m", f"bench.{name}", "--nonsense"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("unrecognized arguments: --nonsense")
    assert "Traceback" not in done.stderr


def test_a_data_file_that_is_cut(call, tmp_path):
    (tmp_path / "mnist").mkdir()
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (tmp_path / "mnist" / f"{name}-ubyte.gz").write_bytes(b"\x1f\x8b\x08\x00cut")
    refused(call("train", "dataset=mnist", f"dataset.root={tmp_path}"), ["ubyte.gz"])


def test_output_without_permission(call, run, monkeypatch):
    """As root everything is writable, so the system's answer is made up."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(call("sample", f"checkpoint={run}"), ["samples.png", "no permission"])


def test_a_traceback_on_request(call, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ValueError, match="layers=0"):
        call("train", "model.layers=0")
