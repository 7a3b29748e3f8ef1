"""Where a command runs: which process and device, with which versions and commit, and how its memory behaves.

It needs no Hydra, so that bench/ runs where only torch is installed.
"""

import ctypes
import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from checks import unexpected


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process, from 0, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Tell whether this process is the one that writes and prints."""
    return rank_and_world()[0] == 0


def one_of_several() -> bool:
    """Tell whether this process and others train one model together."""
    return dist.is_available() and dist.is_initialized()


def choose_device(name: str) -> torch.device:
    """Return the device that auto, cpu, mps, cuda or cuda:N means; ValueError for another name, or for one not here.

    auto is a GPU of NVIDIA's or AMD's, else the CPU. Of several such GPUs, torchrun's processes take one each. That GPU
    becomes the current one, which torch and Triton use.
    """
    kind, _, number = name.partition(":")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise unexpected("device", name, "auto, cpu, cuda, cuda:N or mps")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise unexpected("device", name, "auto or cpu, as torch finds no GPU of Apple's")
    if kind == "cuda" and not torch.cuda.is_available():
        raise unexpected("device", name, "auto or cpu, as torch finds no GPU")
    if kind in ("cpu", "mps") or not torch.cuda.is_available():
        return torch.device("cpu" if kind == "auto" else kind)
    if number and rank_and_world()[1] > 1:
        raise unexpected("device", name, "cuda or auto, as several processes take one GPU each")
    index, count = int(number or os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        what, found = ("device", name) if number else ("LOCAL_RANK", index)
        raise unexpected(what, found, f"less than {count}, the number of GPUs here")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def device_name(device: torch.device) -> str:
    """Return the name of a GPU's maker, or the processor's; Apple's GPU has that of its processor."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name() + ", GPU" * (device.type == "mps")
    )


def cpu_name() -> str:
    """Return the processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Return the commit of the checkout, with -dirty if a tracked file outside bench/results differs, or None."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    if not (root / ".git").exists():
        return None
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, str | int | None]:
    """Return when, on which machine and with which versions a number was measured, to be written beside it."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(device),
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "commit": commit(),
    }


def keep_freed_memory() -> None:
    """Ask glibc to keep the memory that a training step frees for the next step; elsewhere do nothing.

    By default it returns tensors of a few megabytes to the system and gets them back zeroed page by page: about ten
    thousand page faults in a step of a Diagonal BiLSTM on a CPU.
    """
    trim_threshold, mmap_threshold, top_pad = -1, -3, -2  # names in malloc.h: M_TRIM_THRESHOLD, …
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError, OSError):
        return
    mallopt(mmap_threshold, 32 << 20)  # the largest that glibc takes
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 64 << 20)
