"""Nothing silently wrong: what a resumed run takes from its checkpoint, what damaged and hostile ones end in, several
processes in one place, files that are there already."""

import copy
import json
import os
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from cli import progress
from cli.report import row_of
from cli.runs import choices, held, resumed
from models.checkpoint import load, read
from tests.commands import REPOSITORY, SHORT, Started, process, refused

pytestmark = pytest.mark.slow  # commands, run to their end


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> Path:
    """The folder of a tiny finished run, not to be changed."""
    folder = tmp_path_factory.mktemp("ended") / "run"
    process("train.py", *SHORT, "model=pixel_cnn", f"hydra.run.dir={folder}", check=True)
    return folder


@pytest.fixture
def run(ended, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(ended, tmp_path / "copied")


def change(path: Path, **values) -> None:
    """Write a checkpoint again with other values at some of its keys; a function is called with the old one."""
    checkpoint = torch.load(path, weights_only=True)
    for key, value in values.items():
        checkpoint[key] = value(checkpoint[key]) if callable(value) else value
    torch.save(checkpoint, path)


def with_values(**values):
    """A function that changes some keys of a dict."""
    return lambda before: {**before, **values}


class TestTheRunsOwnConfig:
    def test_a_default_that_changed_since_does_not_change_the_run(self, call, run):
        change(
            run / "last.pt",
            config=lambda config: {**config, "clip": 0.25, "optimizer": {**config["optimizer"], "eps": 1e-5}},
        )
        status, out, err = call("train", f"resume={run}", "steps=14")
        assert status == 0, err
        after = read(run / "last.pt")
        assert after["config"]["clip"] == 0.25 and after["config"]["optimizer"]["eps"] == 1e-5
        assert after["optimizer"]["param_groups"][0]["eps"] == 1e-5
        assert [line for line in out.splitlines() if "(was" in line] == ["this run goes on with steps=14 (was 12)"]

    def test_a_key_that_did_not_exist_then_is_todays(self, call, run):
        change(run / "last.pt", config=lambda config: {k: v for k, v in config.items() if k != "cuda_graph"})
        status, out, err = call("train", f"resume={run}", "steps=14")
        assert status == 0, err
        assert read(run / "last.pt")["config"]["cuda_graph"] is True and "cuda_graph=True (was None)" in out

    def test_arguments_of_the_command_win(self, call, run):
        status, out, err = call("train", f"resume={run}", "steps=14", "optimizer.weight_decay=0.125", "batch_size=64")
        assert status == 0, err
        after = read(run / "last.pt")
        assert after["optimizer"]["param_groups"][0]["weight_decay"] == 0.125
        assert after["config"]["batch_size"] == 64 and "batch_size=64 (was 256)" in out
        assert {"model=pixel_cnn", "steps=14", "batch_size=64", "model.hidden=4"} <= {*after["overrides"]}
        assert not {"steps=12", "batch_size=256"} & {*after["overrides"]}

    def test_a_config_from_another_folder_is_not_needed_again(self, call, tmp_path):
        (tmp_path / "mine/model").mkdir(parents=True)
        text = (Path(train.__file__).parent / "conf/model/pixel_cnn.yaml").read_text()
        (tmp_path / "mine/model/my_cnn.yaml").write_text(text)
        status, _, err = call(
            "train", "--config-dir", str(tmp_path / "mine"), *SHORT, "model=my_cnn", "hydra.run.dir=run"
        )
        assert status == 0, err
        status, out, err = call("train", "resume=run", "steps=14")
        assert status == 0 and "PixelCNN" in out and "steps 12 to 14" in out, err

    @pytest.mark.parametrize("argument", ["~optimizer.lr", "experiment=mnist_diag_bilstm_1x32"])
    def test_only_single_keys_change(self, call, run, argument):
        refused(call("train", f"resume={run}", argument), [argument, "expected KEY=VALUE"])

    def test_of_another_optimizer_is_refused(self, call, run):
        refused(call("train", f"resume={run}", "optimizer=rmsprop"), ["optimizer.name='rmsprop'", "adamw", "last.pt"])

    def test_auto_after_a_run_that_has_ended_begins_none(self, call):
        arguments = [*SHORT, "model=pixel_cnn", "resume=auto"]
        assert call("train", *arguments)[0] == 0
        status, _, err = call("train", *arguments)
        assert status == 0 and "this run has ended" in err and len(list(Path("runs").rglob("last.pt"))) == 1


def test_nothing_of_a_checkpoint_but_choices_reaches_hydra(run):
    hostile = [
        "+hydra.callbacks.x._target_=torch.load",
        "hydra.run.dir=/",
        "-m",
        "--config-dir=/",
        "model._target_=os.system",
    ]
    hostile += [
        "+a=1",
        "~model",
        "model=../../x",
        "model=[a,b]",
        "dataset=digits,mnist",
        "steps=${oc.env:HOME}",
        "seed=1,2",
    ]
    change(run / "last.pt", overrides=[*hostile, "model=pixel_cnn", "dataset=digits"])
    assert resumed([f"resume={run}", "dataset=mnist"]) == [
        "model=pixel_cnn",
        f"resume={run}",
        "dataset=mnist",
        f"hydra.run.dir='{run}'",
    ]
    assert choices(["optimizer=rmsprop", "optimizer=none"], []) == ["optimizer=rmsprop"]


def test_a_run_stopped_where_it_would_validate_validates_when_it_goes_on(call, monkeypatch):
    take_step, arguments = train.Training.take_step, [*SHORT, "model=pixel_cnn", "evaluate_every=4"]

    def signalled(self, *batch):
        nats = take_step(self, *batch)
        if self.step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return nats

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "take_step", signalled)
        status, _, err = call("train", *arguments, "hydra.run.dir=run")
    assert status == 128 + signal.SIGTERM and "stopped at step 8" in err
    for command in (["resume=run"], [*arguments, "hydra.run.dir=whole"]):
        status, _, err = call("train", *command)
        assert status == 0, err
    lines = [Path(name, "metrics.jsonl").read_text().splitlines() for name in ("run", "whole")]
    stopped, whole = ([json.loads(line) for line in text if "val_nats" in line] for text in lines)
    assert [line["step"] for line in whole] == [4, 8, 12] and stopped == whole


class TestNumbersThatAreNone:
    @pytest.mark.parametrize("step", [5, 10])
    def test_are_not_saved(self, call, monkeypatch, step):
        """One weight becomes infinite in a step whose checkpoint is written; its loss was finite."""
        take_step = train.Training.take_step

        def broken(self, *batch):
            nats = take_step(self, *batch)
            if self.step == step:
                with torch.no_grad():
                    next(self.model.parameters()).view(-1)[0] = float("inf")
            return nats

        monkeypatch.setattr(train.Training, "take_step", broken)
        status, _, err = call("train", *SHORT, "ema=0", "evaluate_every=100", "hydra.run.dir=run")
        assert status == 1 and f"a weight is inf after step {step}" in err and len(err.splitlines()) == 1
        last = Path("run/last.pt")
        assert "no checkpoint" in err if step == 5 else str(last) in err
        assert last.exists() == (step == 10)
        if step == 10:
            assert read(last)["step"] == 5 and all(x.isfinite().all() for x in read(last)["weights"].values())

    @pytest.mark.parametrize("command", ["sample", "evaluate"])
    def test_are_not_drawn_from(self, call, run, command):
        def spoil(weights):
            name, first = next((name, x) for name, x in weights.items() if "weight" in name)
            return {**weights, name: torch.full_like(first, float("nan"))}

        change(run / "best.pt", ema=spoil)
        refused(call(command, f"checkpoint={run}"), [str(run / "best.pt"), "expected finite weights"])


def test_a_cut_last_checkpoint_names_the_best_one(call, run):
    last, best = run / "last.pt", run / "best.pt"
    last.write_bytes(last.read_bytes()[:2000])
    refused(call("train", f"resume={run}"), [str(last), f"{best} of step 12 is whole"])
    best.write_bytes(b"")
    _, _, err = call("train", f"resume={run}")
    assert str(best) not in err and str(last) in err


def test_lines_of_metrics_that_are_no_records_are_left_out(call, run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(["3", "[1]", '"step"', "{}", '{"step": "4"}', "null", *lines, '{"step": 99}', '{"step"']))
    assert [row_of(line, 9) for line in ('{"step": 9}', '{"step": 10}', "9", "{")] == [{"step": 9}, None, None, None]
    status, _, err = call("train", f"resume={run}", "steps=14")
    assert status == 0, err
    assert path.read_text().splitlines()[: len(lines)] == lines
    assert all(isinstance(json.loads(line)["step"], int) for line in path.read_text().splitlines())


WRONG = {  # a key of a checkpoint → values that are none of it
    "format": ["pixelrnn-0", 1],
    "model": [None, [], {}, {"_target_": "os.system"}, {"_target_": "models.PixelCNN"}],
    "weights": [None, {}, {"a": 1}, {1: torch.zeros(1)}],
    "ema": [{}, 3, {"a": torch.zeros(1)}],
    "config": [None, {}, {"dataset": 1}],
}
OF_A_RUN = {
    "weights": [{"a": torch.zeros(1)}],
    "config": [{"dataset": {"name": "digits"}, "shell": "x"}, {"dataset": {"name": "${oc.env:HOME}"}}],
    "overrides": [None, "x", [1]],
    "optimizer": [None, {}, {"state": {}, "param_groups": []}, {"state": {0: 1}, "param_groups": [{"params": [0]}]}],
    "step": [None, -1, 1.5, "3", True],
    "seconds": [None, "3", float("nan")],
    "best_val": [None, 3, {"nats": "x"}],
    "random": [None, {}, {"torch": 1, "cuda": [], "data": torch.zeros(3)}],
}


def cases(wrong: dict) -> list:
    return [
        pytest.param(key, value, id=f"{key}-{k}") for key, values in wrong.items() for k, value in enumerate(values)
    ]


@pytest.mark.parametrize(("key", "value"), cases(WRONG))
def test_a_checkpoint_with_wrong_contents_is_refused(run, key, value):
    path = run / "best.pt"
    change(path, **{key: value})
    with pytest.raises(ValueError, match="expected") as error:
        load(path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(("key", "value"), [*cases(WRONG), *cases(OF_A_RUN)])
def test_a_run_with_wrong_contents_is_not_continued(call, run, key, value):
    path = run / "last.pt"
    change(path, **{key: value})
    before = path.read_bytes()
    refused(call("train", f"resume={run}", "steps=14"), [str(path), "expected"])
    assert path.read_bytes() == before and (run / "summary.json").exists()


@pytest.mark.parametrize(
    "values",
    [
        {"layers": 10**6},
        {"hidden": 10**5},
        {"head_features": 10**8},
        {"levels": 10**9},
        {"classes": 10**9},
        {"doublings": 10**9},
    ],
    ids=str,
)
def test_a_model_larger_than_its_file_is_refused_at_once(run, values):
    change(run / "best.pt", model=with_values(**values))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"best\.pt: expected the config of a model, found"):
        load(run / "best.pt")
    assert time.perf_counter() - start < 5


class Runs:
    """What pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def laughs(depth: int = 40) -> list:
    """Lists of a list twice, and so on: little to write, and as long as all memory to print."""
    inner = []
    for _ in range(depth):
        inner = [inner, inner]
    return inner


def spread(numbers: int) -> torch.Tensor:
    """A tensor of many numbers that are all the same one in memory."""
    return torch.zeros(1).expand(numbers)


class TestAHostileCheckpoint:
    """Nothing of it runs, nothing is written, and no memory is taken that it does not fill itself."""

    @pytest.mark.parametrize("key", ["model", "weights", "config", "overrides", "optimizer", "more"])
    @pytest.mark.parametrize(
        "value",
        [
            Runs(os.system, "touch ran"),
            Runs(exec, "open('ran', 'w')"),
            Runs(bytearray, 10**12),
            Runs(torch.FloatTensor, 10**12),
            Runs(torch.FloatStorage, 10**12),
            Runs(torch.nn.parameter.Parameter, spread(1)),
            laughs(),
            [[] for _ in range(10**6)],
            10**5000,
            {"weight": spread(10**12)},
        ],
        ids=lambda value: getattr(value, "call", [type(value)])[0].__name__,
    )
    def test_with_what_runs_or_grows(self, call, run, key, value):
        path = run / "last.pt"
        checkpoint = torch.load(path, weights_only=True)
        checkpoint[key] = value
        torch.save(checkpoint, path)
        before = {file: file.read_bytes() for file in Path.cwd().rglob("*") if file.is_file()}
        start = time.perf_counter()
        for name, *arguments in (["sample", f"checkpoint={path}", "n=1"], ["train", f"resume={run}", "steps=14"]):
            refused(call(name, *arguments), [str(path), "expected"])
        assert time.perf_counter() - start < 20
        assert {file: file.read_bytes() for file in Path.cwd().rglob("*") if file.is_file()} == before

    def test_with_records_that_climb_out_of_folders(self, call, run):
        path = run / "best.pt"
        with zipfile.ZipFile(path, "a") as archive:
            for name in ("../../out", "/out", "..\\out"):
                archive.writestr(name, "written")
        call("sample", f"checkpoint={path}", "n=1")
        assert not [file for file in Path.cwd().parent.rglob("out") if file.is_file()]

    def test_with_its_description_in_capital_letters(self, run, tmp_path):
        """By which torch finds it too."""
        path = tmp_path / "capital.pt"
        change(run / "best.pt", more=Runs(bytearray, 10**12))
        with zipfile.ZipFile(run / "best.pt") as source, zipfile.ZipFile(path, "w") as out:
            for record in source.infolist():
                out.writestr(record.filename.replace("data.pkl", "DATA.PKL"), source.read(record))
        with pytest.raises(ValueError, match=r"capital\.pt: expected a whole checkpoint, found __?builtin"):
            read(path)

    def test_with_records_that_share_their_bytes(self, run):
        """An archive whose directory names one record a hundred times."""
        path = run / "best.pt"
        with zipfile.ZipFile(path, "a") as archive:
            largest = max(archive.infolist(), key=lambda record: record.file_size)
            for k in range(100):
                again = copy.copy(largest)
                again.filename = f"{largest.filename}{k}"
                archive.filelist.append(again)
                archive.NameToInfo[again.filename] = again
            archive.writestr("last", "")
        with pytest.raises(ValueError, match=r"best\.pt: expected a whole checkpoint, found "):
            read(path)

    def test_whose_data_would_be_put_anywhere(self, call, run, tmp_path):
        """Only this command's own arguments make a folder for data."""
        place, images = tmp_path / "anywhere", tmp_path / "images.npy"
        np.save(images, np.zeros((30, 1, 8, 8), np.uint8))
        for name in ("last.pt", "best.pt"):
            npy = {"name": "npy", "path": str(images), "root": str(place), "levels": 17}
            change(run / name, config=with_values(dataset=npy))
        words = [f"expected data in {place}/npy, found no such folder"]
        refused(call("train", f"resume={run}", "steps=14"), [*words, "dataset.root=FOLDER"])
        refused(call("evaluate", f"checkpoint={run}"), [*words, "root=FOLDER"])
        refused(call("sample", f"checkpoint={run}", "complete=test"), [*words, "root=FOLDER"])
        assert not place.exists()
        for name, *arguments in (["evaluate", f"checkpoint={run}"], ["train", f"resume={run}", "steps=14"]):
            option = "root" if name == "evaluate" else "dataset.root"
            status, _, err = call(name, *arguments, f"{option}={tmp_path / 'mine'}")
            assert status == 0, err


def test_a_compressed_record_is_refused(run, tmp_path):
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(run / "best.pt") as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as out:
        for record in source.infolist():
            out.writestr(copy.copy(record).filename, source.read(record))
    with pytest.raises(ValueError, match=r"packed\.pt: expected a whole checkpoint, found a compressed record"):
        read(packed)


class TestSeveralProcesses:
    def test_one_folder_is_of_one_run(self, call, ended):
        """While this process holds it; the files of the one that trains there stay as they are."""
        folder = shutil.copytree(ended, Path("run"))
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        with held(folder):
            refused(call("train", *SHORT, "hydra.run.dir=run"), ["run", "another one that trains there"])
            refused(call("train", "resume=run", "steps=14"), ["run", "another one that trains there"])
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        status, _, err = call("train", "resume=run", "steps=14")
        assert status == 0, err

    def test_what_a_killed_one_left_half_written_is_cleared_away(self, call, run):
        (run / ".last.pt.123.tmp").write_bytes(b"half")
        assert call("train", f"resume={run}", "steps=14")[0] == 0
        assert not list(run.glob("*.tmp"))

    def test_processes_of_one_draw_share_its_places(self, tmp_path, ended):
        arguments = f"checkpoint={ended}", "n=12", "npy=a.npy", "batch_size=2"
        line = [str(REPOSITORY / "sample.py"), *arguments]
        ranks = [Started(line, tmp_path, RANK=str(k), WORLD_SIZE="4") for k in range(4)]
        for one in ranks:
            out, err = one.communicate(timeout=120)
            assert one.returncode == 0, (out, err)
        assert np.load(tmp_path / "a.npy").shape == (12, 1, 8, 8) and (tmp_path / "samples.png").exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.npy.json", "samples.png"]


class TestFinishedImages:
    def test_are_not_drawn_again(self, call, ended):
        arguments = f"checkpoint={ended}", "n=3", "npy=a.npy"
        assert call("sample", *arguments)[0] == 0
        before = Path("a.npy").stat()
        status, out, err = call("sample", *arguments)
        assert status == 0 and "nothing was left to draw" in out, err
        assert Path("a.npy").stat().st_mtime_ns == before.st_mtime_ns

    @pytest.mark.parametrize(
        "argument", ["seed=1", "temperature=-1", "temperature=0.5", "label=3", "n=4", "batch_size=0"]
    )
    def test_and_what_describes_them_stay_where_others_are_asked_for(self, call, ended, argument):
        assert call("sample", f"checkpoint={ended}", "n=3", "npy=a.npy")[0] == 0
        before = {path.name: path.read_bytes() for path in Path.cwd().iterdir()}
        refused(call("sample", f"checkpoint={ended}", "n=3", "npy=a.npy", argument), [argument.partition("=")[0]])
        assert {path.name: path.read_bytes() for path in Path.cwd().iterdir()} == before
        assert call("sample", f"checkpoint={ended}", "n=3", "npy=a.npy")[0] == 0

    def test_a_file_of_unknown_origin_is_kept(self, call, ended):
        np.save("a.npy", np.zeros(3))
        refused(call("sample", f"checkpoint={ended}", "n=3", "npy=a.npy"), ["a.npy", "expected no file there"])


def test_evaluation_says_how_far_it_is_and_may_be_of_fewer_images(call, monkeypatch):
    monkeypatch.setattr(progress.Bar.__init__, "__defaults__", (0, 0.0))  # a line at each chance
    status, out, err = call("train", *SHORT, "model=pixel_cnn", "evaluate_images=100", "hydra.run.dir=run")
    assert status == 0, err
    assert "validation 64/100" in out and "test 100/100" in out
    assert json.loads(Path("run/summary.json").read_text())["test_images"] == 100
    status, out, err = call("evaluate", "checkpoint=run")
    assert status == 0 and "evaluate 360/360" in out, err
    assert "digits, 1,297 images of 1×8×8, 17 levels" in call("train", "resume=run", "steps=13")[1]
