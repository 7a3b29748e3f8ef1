"""The commands as people type them: what they write, that killed runs resume bit for bit, and how mistakes end."""

import contextlib
import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import kernels
import models
import sample
import train
from cli.output import grid
from data.order import EpochOrder
from models.base import LATER
from models.checkpoint import find, load, read
from tests.commands import COMMANDS, REPOSITORY, SHORT, TINY, Started, composed, process

LONG = [*TINY, "steps=120", "save_every=7", "evaluate_every=20", "log_every=10", "sample_every=0"]

pytestmark = pytest.mark.slow  # commands, run to their end


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a tiny finished run."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    process("train.py", *SHORT, f"hydra.run.dir={folder}", check=True)
    return folder


def test_code_is_this_repositorys():
    assert Path(kernels.__file__).is_relative_to(REPOSITORY)


class TestTraining:
    def test_writes_a_complete_run(self, trained):
        files = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
        assert {"last.pt", "best.pt", "metrics.jsonl", "summary.json", "samples/step_000012.png"} <= files
        assert {".hydra/config.yaml", ".hydra/overrides.yaml", "completions/step_000012.png"} <= files
        assert not any(name.startswith(("events.", "wandb", "loggers")) for name in files)  # none was asked for
        assert not any(name.endswith(".tmp") for name in files)
        summary = json.loads((trained / "summary.json").read_text())
        model = load(trained / "best.pt")
        assert summary["parameters"] == sum(p.numel() for p in model.parameters())
        assert summary["test_bits_per_dim"] == pytest.approx(summary["test_nats"] / np.log(2) / 64)
        assert summary["steps"] == 12 and summary["images_per_second"] > 0
        rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "val_nats" in row] == [6, 12]
        assert rows[0]["train_nats"] > rows[-2]["train_nats"]  # it learns

    def test_a_checkpoint_needs_nothing_else_to_rebuild_its_model(self, trained):
        checkpoint = torch.load(trained / "last.pt", weights_only=True)
        assert checkpoint["step"] == 12
        assert models.build(checkpoint["model"]).shape == (1, 8, 8)
        assert checkpoint["config"]["dataset"]["name"] == "digits"

    def test_averaged_weights_are_evaluated(self, trained):
        checkpoint = read(trained / "last.pt")
        state = load(trained / "last.pt").state_dict()
        assert all(torch.equal(state[name], value) for name, value in checkpoint["ema"].items())
        assert any(not torch.equal(state[name], value) for name, value in checkpoint["weights"].items())

    def test_evaluate_repeats_the_summary(self, call, trained):
        summary = json.loads((trained / "summary.json").read_text())
        status, out, _ = call("evaluate", f"checkpoint={trained}")
        assert status == 0
        assert f"{summary['test_nats']:.4f} ± {summary['test_nats_standard_error']:.4f} nats" in out
        assert f"{summary['test_bits_per_dim']:.4f} ±" in out

    def test_begins_with_a_trained_model_s_averaged_weights(self, call, trained):
        status, _, err = call("train", *SHORT, f"init_from={trained}", "optimizer.lr=0", "hydra.run.dir=tuned")
        assert status == 0, err
        mine, theirs = read("tuned/last.pt"), read(trained / "best.pt")
        for name, weight in theirs["ema"].items():
            assert torch.equal(mine["weights"][name], weight)
            torch.testing.assert_close(mine["ema"][name], weight)  # averages of the same numbers
        assert mine["best_val"] == pytest.approx(theirs["best_val"], rel=1e-4)

    def test_what_it_began_with_is_not_asked_for_again(self, call, trained):
        """The run that is continued has its own weights."""
        copied = shutil.copytree(trained, "copied")
        assert call("train", *SHORT, f"init_from={copied}", "hydra.run.dir=tuned")[0] == 0
        shutil.rmtree(copied)
        status, out, err = call("train", "resume=tuned", "steps=18")
        assert status == 0 and "steps 12 to 18" in out, err

    def test_of_a_trained_model_of_another_size(self, call, trained):
        status, _, err = call("train", *SHORT, f"init_from={trained}", "model.hidden=5")
        assert status == 2 and "expected this run's model {'hidden': 5}, found {'hidden'" in err

    def test_sweep_runs_every_combination(self, call):
        arguments = [
            *TINY,
            "steps=1",
            "sample_every=0",
            "model=pixel_cnn,diag_bilstm",
            "optimizer=rmsprop,adamw",
        ]
        status, _, err = call("train", "-m", *arguments)
        assert status == 0, err
        summaries = sorted(Path("runs/sweeps").rglob("summary.json"))
        assert len(summaries) == 4
        targets = [read(path.parent / "last.pt")["model"]["_target_"] for path in summaries]
        assert sorted(targets) == sorted(2 * ["models.PixelCNN", "models.DiagBiLSTM"])

    def test_diverged_run_names_the_last_good_checkpoint(self, call):
        status, _, err = call("train", *SHORT, "steps=40", "optimizer=rmsprop", "optimizer.lr=1e30", "clip=null")
        assert status == 1
        assert "the loss is" in err and ("good checkpoint" in err or "no checkpoint" in err)
        assert len(err.splitlines()) == 1

    def test_schedule_rises_then_falls_to_zero(self):
        factors = [train.learning_rate_factor(step, 100, 10, "cosine") for step in range(100)]
        assert factors[0] == pytest.approx(1 / 11) and max(factors) == factors[10] == 1.0
        assert factors[10:] == sorted(factors[10:], reverse=True) and 0 < factors[-1] < 1e-3
        assert train.learning_rate_factor(99, 100, 10, "constant") == 1.0

    @pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 10), (3, 8)])
    def test_an_epoch_shows_no_image_twice(self, n, batch_size):
        order = EpochOrder(n, batch_size, seed=1)
        steps = n // min(n, batch_size)
        epochs = [torch.cat([order.batch(e * steps + k) for k in range(steps)]) for e in range(2)]
        assert all(len(epoch.unique()) == len(epoch) for epoch in epochs)
        assert n < 4 or not torch.equal(*epochs)
        assert torch.equal(EpochOrder(n, batch_size, seed=1).batch(steps), order.batch(steps))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict:
    """The last checkpoint of a run of LONG that nothing stopped."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    process("train.py", *LONG, f"hydra.run.dir={folder}", check=True)
    return read(folder / "last.pt")


class TestResume:
    """A run that was stopped in any way ends with the weights of one that was not, bit for bit."""

    def same(self, checkpoint: dict, other: dict) -> None:
        for part in ("weights", "ema", "optimizer", "random"):
            torch.testing.assert_close(checkpoint[part], other[part], rtol=0, atol=0)
        assert checkpoint["step"] == other["step"]
        assert checkpoint["best_val"] == other["best_val"]

    def start(self, cwd: Path) -> tuple[Started, Path]:
        """Start a run and wait until it has written a checkpoint."""
        run = Started([str(REPOSITORY / "train.py"), *LONG], cwd)
        until = time.monotonic() + 60
        while not list(cwd.rglob("last.pt")):
            assert run.poll() is None and time.monotonic() < until, run.communicate()
            time.sleep(0.01)
        return run, next(cwd.rglob("last.pt"))

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_after_a_signal(self, tmp_path, uninterrupted, number):
        run, last = self.start(tmp_path)
        run.send_signal(number)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 128 + number, (out, err)
        step = read(last)["step"]
        assert 0 < step < 120
        assert f"stopped at step {step}" in err and "resume=" in err and "Traceback" not in err
        again = process("train.py", *LONG, "resume=auto", cwd=tmp_path, check=True)
        assert f"steps {step} to 120" in again.stdout
        assert list(tmp_path.rglob("last.pt")) == [last]
        self.same(read(last), uninterrupted)
        rows = [json.loads(line)["step"] for line in (last.parent / "metrics.jsonl").read_text().splitlines()]
        assert rows == sorted(rows) and len(rows) == len(set(rows)) + 6  # 6 evaluations share a step with a log line

    def test_more_steps_for_a_finished_run(self, call):
        status, _, err = call("train", *SHORT, "decay=constant", "hydra.run.dir=one")
        assert status == 0, err
        status, out, err = call("train", "resume=one", "steps=18")
        assert status == 0, err
        assert "steps 12 to 18" in out and read("one/last.pt")["step"] == 18
        assert json.loads(Path("one/summary.json").read_text())["steps"] == 18
        call("train", *SHORT, "decay=constant", "steps=18", "hydra.run.dir=whole")
        torch.testing.assert_close(read("one/last.pt")["weights"], read("whole/last.pt")["weights"], rtol=0, atol=0)

    def test_auto_starts_a_new_run_where_nothing_fits(self, call, trained):
        status, out, err = call("train", *SHORT, "resume=auto")
        assert status == 0 and "steps 0 to 12" in out, err

    def test_auto_passes_over_a_damaged_run_and_says_so(self, call, trained):
        Path("runs/x").mkdir(parents=True)
        Path("runs/x/last.pt").write_bytes(b"damaged")
        status, out, err = call("train", *SHORT, "resume=auto")
        assert status == 0 and "steps 0 to 12" in out and "runs/x/last.pt" in err

    def test_of_another_folder_is_refused(self, call, trained):
        status, _, err = call("train", f"resume={trained}", "hydra.run.dir=elsewhere")
        assert status == 2 and str(trained) in err and "elsewhere" in err

    def test_of_another_model_is_refused(self, call, trained):
        before = (trained / "last.pt").read_bytes()
        status, _, err = call("train", f"resume={trained}", "model.hidden=5", "steps=20")
        assert status == 2 and "expected this run's model" in err
        assert (trained / "last.pt").read_bytes() == before and (trained / "summary.json").exists()

    def test_of_a_run_that_is_older_than_some_of_a_model_s_keys(self, call):
        assert call("train", *SHORT, "steps=6", "hydra.run.dir=run")[0] == 0
        checkpoint = torch.load("run/last.pt", weights_only=True)
        for name in LATER:
            del checkpoint["model"][name]
        torch.save(checkpoint, "run/last.pt")
        status, out, err = call("train", "resume=run", "steps=12")
        assert status == 0 and "steps 6 to 12" in out, err

    def test_a_run_is_not_overwritten(self, call, trained):
        before = (trained / "last.pt").read_bytes()
        status, _, err = call("train", *SHORT, f"hydra.run.dir={trained}")
        assert status == 2 and "resume=" in err
        assert (trained / "last.pt").read_bytes() == before


class TestSampling:
    def test_writes_a_picture_and_the_images(self, call, trained):
        status, out, err = call("sample", f"checkpoint={trained}", "n=5", "npy=images.npy", "columns=3")
        assert status == 0, err
        assert "samples.png" in out and "images/s" in out
        images = np.load("images.npy")
        assert images.shape == (5, 1, 8, 8) and images.dtype == np.uint8 and images.max() < 17
        picture = Image.open("samples.png")
        assert picture.size == (3 * (8 * 7 + 2), 2 * (8 * 7 + 2)) and picture.mode == "L"
        corner = np.asarray(picture)[1:57:7, 1:57:7]
        assert np.array_equal(corner, np.round(images[0, 0] * (255 / 16)).astype(np.uint8))

    def test_newest_run_is_the_default(self, call, trained, tmp_path):
        for age, name in ((100, "old"), (0, "new")):
            folder = tmp_path / "runs" / "x" / name
            folder.mkdir(parents=True)
            for file in ("best.pt", "last.pt"):
                (folder / file).write_bytes((trained / file).read_bytes())
                os.utime(folder / file, (time.time() - age,) * 2)
        assert find(None) == Path("runs/x/new/best.pt")
        status, out, err = call("sample", "n=2")
        assert status == 0 and "runs/x/new/best.pt" in out, err

    def test_methods_agree(self, call, trained):
        for method in ("cached", "naive"):
            call("sample", f"checkpoint={trained}", "n=2", f"method={method}", f"npy={method}.npy")
        assert np.array_equal(np.load("cached.npy"), np.load("naive.npy"))
        status, _, err = call("sample", f"checkpoint={trained}", "n=2", "bf16=true", "npy=bf16.npy")
        assert status == 0 and np.load("bf16.npy").shape == np.load("naive.npy").shape, err
        status, _, err = call("sample", f"checkpoint={trained}", "bf16=perhaps")
        assert status != 0 and "bf16" in err

    @pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB")])
    def test_grid_of_any_colours(self, channels, mode):
        picture = grid(torch.full((3, channels, 4, 5), 2), levels=3)
        assert picture.mode == mode and np.asarray(picture).max() == 255


class TestManyImages:
    """Written as they come, continued when cut short, cut among processes: the same images each time."""

    @pytest.fixture
    def whole(self, call, trained):
        """What one process draws at once: (n c h w)."""
        status, _, err = call("sample", f"checkpoint={trained}", "n=7", "seed=3", "npy=whole.npy")
        assert status == 0, err
        assert sorted(p.name for p in Path.cwd().glob("whole*")) == ["whole.npy", "whole.npy.json"]
        said = json.loads(Path("whole.npy.json").read_text())
        assert said["seed"] == 3 and said["n"] == 7 and len(said["checkpoint"]) == 64 and said["versions"]["torch"]
        return np.load("whole.npy")

    def cut_short(self, call, monkeypatch, after: int, *arguments: str) -> None:
        """Run a command that is killed in the middle of a batch after so many whole ones."""

        def failing(*given, **keywords):
            yield from itertools.islice(draw(*given, **keywords), after)
            raise KeyboardInterrupt

        draw = sample.batches
        with monkeypatch.context() as patch:
            patch.setattr(sample, "batches", failing)
            with contextlib.suppress(KeyboardInterrupt):
                call("sample", *arguments)

    @pytest.mark.parametrize("batch_size", [1, 3, 64])
    def test_a_run_cut_short_is_continued(self, call, trained, whole, monkeypatch, batch_size):
        arguments = f"checkpoint={trained}", "n=7", "seed=3", "npy=cut.npy"
        self.cut_short(call, monkeypatch, 2, *arguments, "batch_size=2")
        assert not Path("cut.npy").exists() and np.fromfile("cut.npy.done", np.uint8).tolist() == 4 * [1] + 3 * [0]
        status, out, err = call("sample", *arguments, f"batch_size={batch_size}")
        assert status == 0 and "3 images in" in out, err
        assert np.array_equal(np.load("cut.npy"), whole) and not Path("cut.npy.done").exists()

    def test_other_images_are_not_mixed_in(self, call, trained, monkeypatch):
        arguments = f"checkpoint={trained}", "n=7", "npy=cut.npy", "batch_size=2"
        self.cut_short(call, monkeypatch, 1, *arguments, "seed=3")
        before = {path.name: path.read_bytes() for path in Path.cwd().glob("cut*")}
        for other, words in (("seed=4", "seed=3"), ("temperature=0.5", "temperature=1.0"), ("n=8", "n=7")):
            status, _, err = call("sample", *[a for a in arguments if a[:2] != "n="], "seed=3", "n=7", other)
            assert status == 2 and words in err and len(err.splitlines()) == 1, err
        assert {path.name: path.read_bytes() for path in Path.cwd().glob("cut*")} == before

    def test_a_damaged_part_is_named(self, call, trained, monkeypatch):
        arguments = f"checkpoint={trained}", "n=7", "npy=cut.npy", "batch_size=2"
        self.cut_short(call, monkeypatch, 1, *arguments)
        Path("cut.npy.part").write_bytes(b"no array")
        status, _, err = call("sample", *arguments)
        assert status == 2 and "cut.npy.part: expected" in err and "damage" in err and len(err.splitlines()) == 1

    @pytest.mark.parametrize("world", [2, 3])
    def test_processes_share_the_images(self, call, trained, whole, monkeypatch, world):
        for rank in range(world):
            monkeypatch.setenv("RANK", str(rank))
            monkeypatch.setenv("WORLD_SIZE", str(world))
            assert Path("shared.npy").exists() is False
            status, out, err = call(
                "sample", f"checkpoint={trained}", "n=7", "seed=3", "npy=shared.npy", "batch_size=2"
            )
            assert status == 0, err
            assert ("not whole yet" in out) == (rank < world - 1)
        assert np.array_equal(np.load("shared.npy"), whole)

    def test_processes_need_one_place(self, call, trained, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        status, _, err = call("sample", f"checkpoint={trained}", "n=2")
        assert status == 2 and "expected npy=FILE.npy or pngs=FOLDER" in err

    def test_one_png_an_image(self, call, trained, whole, monkeypatch):
        arguments = f"checkpoint={trained}", "n=7", "seed=3", "pngs=images", "batch_size=2"
        self.cut_short(call, monkeypatch, 1, *arguments)
        assert sorted(p.name for p in Path("images").iterdir()) == ["000000.png", "000001.png", "samples.json"]
        status, out, err = call("sample", *arguments)
        assert status == 0 and "5 images in" in out, err
        for k, image in enumerate(whole):
            shown = np.asarray(Image.open(f"images/{k:06d}.png"))
            assert np.array_equal(shown, np.round(image[0] * (255 / 16)).astype(np.uint8))
        status, _, err = call("sample", *arguments[:2], "seed=4", *arguments[3:])
        assert status == 2 and "seed=3" in err


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_how_to_begin(call, name):
    status, out, _ = call(name, "--help")
    assert status == 0 and f"python {name}.py" in out and "(KEY=VALUE changes it)" in out


def test_every_config_composes_and_builds():
    """Every model with every data set's shape, from the files in conf/ alone."""
    names = sorted(path.stem for path in (REPOSITORY / "conf" / "model").glob("*.yaml"))
    for model in names:
        for dataset in sorted(path.stem for path in (REPOSITORY / "conf" / "dataset").glob("*.yaml")):
            cfg = composed(f"model={model}", f"dataset={dataset}")
            assert cfg.dataset.name == dataset
            shape = {"channels": 3, "height": 8, "width": 8, "levels": 256}
            shape |= {"frames": 5} if model == "video" else {}
            with torch.device("meta"):
                assert models.build({**cfg.model, **shape}).shape[-3:] == (3, 8, 8)
    assert len(names) >= 2
