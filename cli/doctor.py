"""What this machine is, what computes what on it and why, and whether that works: `python -m cli.doctor`.

On each device it trains a tiny model for a step and draws an image, and compares both with torch's on the CPU. Exit
status 1 if something does not work, or a disk is nearly full; each such line begins with a !.
"""

import argparse
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import kernels
import models
from checks import one_of, reason_of
from cli.machine import commit, device_name, version
from data import LOADERS
from data.cache import CACHE
from kernels import native
from kernels.jit import triton
from models.optimizers import build_optimizer
from models.sampling import sample
from models.sampling.loop import backend_of_rows
from models.sampling.rules import Draw
from models.training_step import TrainingStep

PACKAGES = ("torch", "triton", "numpy", "einops", "hydra-core", "safetensors", "pillow", "llvmlite")
EXTRAS = {
    "log": ("tensorboard", "wandb", "trackio"),
    "parquet": ("pyarrow",),
    "hub": ("huggingface_hub",),
    "compress": ("constriction", "pillow-jxl-plugin"),
    "sweep": ("hydra-optuna-sweeper", "hydra-joblib-launcher", "hydra-submitit-launcher"),
}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", "TRITON_CACHE_DIR", "PIXELRNN_CPU")
LEAST = 1 << 30  # bytes that should be free on a disk


def devices() -> list[torch.device]:
    """The CPU, and every GPU that torch finds."""
    found = [torch.device("cuda", k) for k in range(torch.cuda.device_count())]
    found += [torch.device("mps")] * torch.backends.mps.is_available()
    return [*found, torch.device("cpu")]


def small_model(device: torch.device) -> models.DiagBiLSTM:
    """A tiny model, with the same weights on every device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.DiagBiLSTM(1, 4, 6, 6, hidden=16, layers=1, head_features=16).to(device)


def why_torch(device: torch.device) -> str:
    """Say why Triton's kernels do not compute on a device."""
    if device.type != "cuda":
        return "Triton's kernels are for NVIDIA's GPUs"
    if triton is None:
        return "Triton is not installed" + ", it is for Linux only" * (sys.platform != "linux")
    return "the kernels have never run on an AMD GPU"


def programs(device: torch.device) -> Iterator[str]:
    """Who computes what on a device, as the code itself decides it."""
    model = small_model(device)
    triton_computes = kernels.backend_for(model.stem.weight) == "triton"
    why = f"Triton {version('triton')}" if triton_computes else f"torch, as {why_torch(device)}"
    compiled = kernels.backend_for(model.stem.weight, compiled=True) == "cpu"
    yield f"convolutions, LSTM scans, loss: {why}" + "; scans of few features by a function compiled for it" * compiled
    rows = backend_of_rows(model, Draw(torch.zeros(1, 1, 6, 6, device=device)))
    yield (
        "cached sampler: "
        + {
            "triton": "a Triton kernel draws a row",
            "cpu": f"a function compiled for {native.cpu()[0]} draws a row",
            "torch": "a short step of torch a sub-pixel",
        }[rows]
    )
    step = TrainingStep(model, build_optimizer({"name": "adamw", "lr": 1e-3}, model), bf16=True)
    yield f"training: {'one CUDA graph a step' if step.graph else 'operation by operation'}, matrix products in " + (
        "bfloat16 (bf16=false: float32)" if step.bf16 else "float32"
    )


def check(device: torch.device, backend: str | None = None) -> tuple[float, torch.Tensor]:
    """Train a tiny model for a step, and draw an image by a backend: the nats before the step, and the pixels."""
    model = small_model(device)
    x = (torch.arange(72, device=device).reshape(2, 1, 6, 6) * 7) % 4
    step = TrainingStep(model, build_optimizer({"name": "adamw", "lr": 1e-3}, model), bf16=False)
    return float(step(x, None, lr=1e-3)), sample(small_model(device).eval(), 1, seed=0, backend=backend).cpu()


def said_of(device: torch.device) -> Iterator[str]:
    """The lines about a device."""
    memory = ""
    if device.type == "cuda":
        here = torch.cuda.get_device_properties(device)
        memory = f", {here.total_memory / 2**30:.0f} GiB, compute capability {here.major}.{here.minor}"
    elif device.type == "cpu":
        memory = f", {torch.get_num_threads()} threads"
    yield f"device={device}: {device_name(device)}{memory}"
    try:
        yield from (f"  {line}" for line in programs(device))
        nats, pixels = check(device)
    except Exception as error:  # whatever a driver or a compiler says
        yield f"! a step of training and a sample: {type(error).__name__}: {reason_of(error)}"
        return
    expected, drawn = check(torch.device("cpu"), "torch")
    others = (pixels != drawn).float().mean().item()
    if abs(nats - expected) > 1e-3 * expected:
        yield f"! a step of training: expected {expected:.4f} nats, as on the CPU, found {nats:.4f}"
    elif others > 0.1:  # rounding may change one, and that changes what follows
        yield f"! a sample: expected torch's pixels on the CPU, found {100 * others:.0f} % others"
    else:
        yield "  a step of training and a sample work"


def size(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def places() -> Iterator[str]:
    """The folders that are written to: how much is in them, and how much is free."""
    cache = Path(CACHE).expanduser()
    kept = [name for name in LOADERS if (cache / name).is_dir()]
    compiled = Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()
    runs = Path("runs")
    for what, folder in (
        ("runs", runs.absolute()),
        (f"data sets ({one_of(kept)})" if kept else "data sets", cache),
        ("compiled kernels", compiled),
        ("compiled rows", Path(native.FOLDER).expanduser()),
        ("temporary files", Path(tempfile.gettempdir())),
    ):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        used = (
            ""
            if what == "temporary files"
            else f", {size(folder) / 2**20:.0f} MiB"
            if folder.exists()
            else ", none yet"
        )
        writable = os.access(there, os.W_OK)
        mark = " " if free >= LEAST and writable else "!"
        yield f"{mark} {what}: {folder}{used}, {free / 2**30:.1f} GiB free{'' if writable else ', not writable'}"


def lines() -> Iterator[str]:
    """The whole report."""
    yield f"pixelrnn {version('pixelrnn') or '(not installed)'} in {Path(__file__).resolve().parent.parent}"
    yield f"  commit {commit() or 'unknown'} · {platform.platform()} · Python {platform.python_version()}"
    yield "  " + " · ".join(f"{name} {version(name) or 'none'}" for name in PACKAGES)
    for extra, names in EXTRAS.items():
        missing = [name for name in names if version(name) is None]
        yield f"  {extra}: " + (
            f"{', '.join(missing)} missing: pip install -e '.[{extra}]'" if missing else ", ".join(names)
        )
    for name in VARIABLES:
        if name in os.environ:
            yield f"  {name}={os.environ[name]}"
    for device in devices():
        yield from said_of(device)
    yield "folders"
    yield from places()


def main(argv: list[str] | None = None) -> int:
    argparse.ArgumentParser(prog="python -m cli.doctor", description=__doc__.split("\n")[0]).parse_args(argv)
    wrong = 0
    for line in lines():
        print(line, flush=True)
        wrong += line.startswith("!")
    print(f"{wrong} of these lines want attention" if wrong else "all is well")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
