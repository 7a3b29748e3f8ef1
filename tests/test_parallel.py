"""One run by several processes: what one process would have computed, stopped and continued with any number of them."""

import gc
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cli.parallel import own_part, total
from data.splits import Split
from models.training_step import TrainingStep
from tests.cases import ARCHITECTURES, CASES, build
from tests.commands import REPOSITORY, process
from train import nats_of_all

pytestmark = pytest.mark.slow
EVERY_MODEL = {name: {"hidden": 8} for name in (*ARCHITECTURES, "multi_scale", "video")}
EVERY_MODEL["gated_pixel_cnn"]["classes"] = 3
EVERY_MODEL["multi_scale-given"] = {"hidden": 8, "train": "base"}  # some parameters take no part
STORED = REPOSITORY.parent / "shared" / "data" / "unpack.py"
RUN = ["model.hidden=4", "model.layers=2", "model.head_features=8", "model.dropout=0.3", "batch_size=30", "warmup=2"]
RUN += ["log_every=5", "evaluate_every=10", "save_every=5", "sample_every=0", "samples=4", "evaluate_images=150"]


def started(processes: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0"]
    command = [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    return subprocess.Popen([*command, str(REPOSITORY / "train.py"), *arguments], **pipes)


def finished(run: subprocess.Popen) -> str:
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    assert not err, err
    return out


def numbers(folder) -> list[dict]:
    """The lines of metrics, without what depends on the machine."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "images_per_second"} for line in lines]


def assert_alike(folder, other, tolerance: float, only: str = "") -> None:
    """The same metrics, or those lines of them that have a value of this name; averaged weights; final numbers."""
    mine, others = ([line for line in numbers(x) if not only or only in line] for x in (folder, other))
    assert [line["step"] for line in mine] == [line["step"] for line in others]
    for line, expected in zip(mine, others, strict=True):
        assert line == pytest.approx(expected, rel=tolerance), line["step"]
    mine, others = (torch.load(x / "last.pt", weights_only=True)["ema"] for x in (folder, other))
    for name, expected in others.items():
        torch.testing.assert_close(mine[name], expected, rtol=1e-3, atol=1e-4)
    results = [json.loads((x / "summary.json").read_text()) for x in (folder, other)]
    keys = ("test_nats", "test_nats_standard_error", "val_nats", "best_step", "test_images")
    assert [results[0][key] for key in keys] == pytest.approx([results[1][key] for key in keys], rel=tolerance)


def test_two_processes_are_one(tmp_path):
    alone, two = tmp_path / "alone", tmp_path / "two"
    process("train.py", *RUN, "steps=50", f"hydra.run.dir={alone}", check=True)
    out = finished(started(2, *RUN, "steps=50", "accumulate=2", f"hydra.run.dir={two}"))
    assert "1 threads in each of 2 processes" in out and out.count("test_nats") == out.count("steps 0 to 50") - 1 == 0
    assert_alike(two, alone, 1e-5)


@pytest.mark.skipif(not os.environ.get("THOROUGH"), reason="it takes a minute: THOROUGH=1 runs it")
def test_two_processes_draw_the_bits_of_one(tmp_path):
    """Stochastic binarization, in training and in both splits, of MNIST's images."""
    if not STORED.is_file():
        pytest.skip("the stored data sets (../shared/data beside the repository) are not there")
    subprocess.run([sys.executable, str(STORED), str(tmp_path), "mnist"], check=True, capture_output=True)
    bits = [*RUN, "model=pixel_cnn", "dataset=mnist", "dataset.binarize=stochastic", f"dataset.root={tmp_path}"]
    alone, two = tmp_path / "alone", tmp_path / "two"
    process("train.py", *bits, "steps=50", f"hydra.run.dir={alone}", check=True)
    finished(started(2, *bits, "steps=50", f"hydra.run.dir={two}"))
    assert_alike(two, alone, 1e-5)


def steps_of_every_model(rank: int, world: int, folder: str) -> None:
    """Two steps, dropout included, on this process's share of five images; weights and nats go to a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    out, bits = {}, torch.Generator().manual_seed(0)
    for case, extra in EVERY_MODEL.items():
        model = build(CASES[case], channels=1, levels=2, height=4, width=4, dropout=0.3, **extra).train()
        grey = np.random.default_rng(0).integers(0, 256, (70, *model.shape)).astype(np.uint8)
        split = Split(grey, None, "stochastic")
        step = TrainingStep(model, torch.optim.SGD(model.parameters()), clip=0.1, accumulate=2)
        for k in range(2):
            x, _ = split.batch(slice(8), bits)
            own, labels = own_part(8), torch.arange(8) % 3 if model.classes else None
            nats = step(x[own], None if labels is None else labels[own], lr=0.1, step=k, first=own.start, of=8)
        out[case] = [total(nats.item()), *(parameter.detach() for parameter in model.parameters())]
        if not model.classes:
            out[f"{case}, nats"] = [nats_of_all(model, split, lambda images: None)["nats"]]
        del step
    torch.save(out, f"{folder}/{world}-{rank}.pt")
    if world > 1:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def test_every_model_is_trained_and_measured_alike_by_three_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    work = [(0, 1), (0, 3), (1, 3), (2, 3)]
    processes = [context.Process(target=steps_of_every_model, args=(*of, str(tmp_path))) for of in work]
    for one in processes:
        one.start()
    for one in processes:
        one.join(120)
    assert [one.exitcode for one in processes] == [0] * 4
    alone, *others = (torch.load(tmp_path / f"{world}-{rank}.pt") for rank, world in work)
    assert len(alone) > len(EVERY_MODEL) > 5
    for name, expected in alone.items():
        for found in others:
            torch.testing.assert_close(
                found[name], expected, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_run_goes_on_with_another_number_of_processes(tmp_path):
    """One stopped by a signal with two, then killed with three, then ended by one, is one that never stopped."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    process("train.py", *RUN, "steps=60", f"hydra.run.dir={alone}", check=True)

    first = started(2, *RUN, "steps=60", f"hydra.run.dir={run}")
    wait_for(run, 5)
    first.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    assert first.returncode and f"to continue: python train.py resume={run}" in err, out + err

    second = started(3, f"resume={run}")
    wait_for(run, numbers(run)[-1]["step"] + 5)
    subprocess.run(["pkill", "-KILL", "-f", f"resume={run}"], check=True)
    second.communicate(timeout=120)

    process("train.py", f"resume={run}", check=True)
    assert_alike(run, alone, 1e-4, "val_nats")  # where it stopped, a line has fewer steps


def wait_for(folder, step: int) -> None:
    """Until a checkpoint of this step or a later one was written."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        try:
            if torch.load(folder / "last.pt", weights_only=True)["step"] >= step:
                return
        except (OSError, RuntimeError):
            pass
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step} in {folder}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([*RUN, "batch_size=1"], "batch_size=1: expected at least 2"),
        (["-m", *RUN, "seed=0,1"], "-m: expected one process"),
    ],
)
def test_a_mistake_ends_all_processes(arguments, said):
    run = started(2, *arguments)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1 and err.count(said) == 1 and 'train.py", line' not in err, err  # torchrun adds its own
