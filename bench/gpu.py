"""Everything that wants a GPU: `python -m bench.gpu --part 1`, then `--part 2`, then 3, each less than five minutes.

Part 1, whether the kernels are right, and as quick as a model of their cost says:

    cost            python -m bench.cost: four figures beside the model's
    sweep           python -m bench.sweep: the kernels cut in other ways
    tests           the tests of kernels and samplers on the GPU, side by side where pytest-xdist is installed

Part 2, how quick everything is:

    sampling        python -m bench.sampling
    training        python -m bench.training
    kernels         python -m bench.kernels
    tests-training  the tests that train, with torch.compile too
    sanitizer       some tests under compute-sanitizer, where that is installed

Part 3, the form of the LSTM scans whose programs wait for each other, by itself and last:

    tests-shared    whether it is right
    shared          python -m bench.sweep --sweep shared: how quick it is

Without --part, all. Nothing that was measured is lost, whatever happens and whenever the command is killed. Each step
is a process of its own, and may take until the time of all steps up to it is over: what one leaves is the next one's.
What hangs is killed with all that it started. DIR gets

    gpu-1.json      part 1: which steps ran, their commands, exit status and seconds, rewritten at each change
    gpu-1.log       all that they print, which this command prints too
    STEP-cuda.json  what a benchmark measured, each row as soon as it is there

(gpu-2 for part 2, gpu-3 for part 3, gpu without --part.) Exit status 1 if any step failed. It needs no Hydra.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

START = time.monotonic()  # before torch is imported, which takes its time

import torch  # noqa: E402

from bench.measure import LOST  # noqa: E402
from cli.machine import environment  # noqa: E402
from files import write_text  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "1": ("cost", "sweep", "tests"),
    "2": ("sampling", "training", "kernels", "tests-training", "sanitizer"),
    "3": ("tests-shared", "shared"),
}
LIMITS = {  # seconds; those of a part are 285 together
    "cost": 55,
    "sweep": 115,
    "tests": 115,
    "sampling": 95,
    "training": 65,
    "kernels": 45,
    "tests-training": 45,
    "sanitizer": 35,
    "tests-shared": 120,
    "shared": 60,
}
# Seconds for one case of each.
CASES = {"cost": 20, "sweep": 20, "sampling": 30, "training": 30, "kernels": 30, "shared": 20}
COMPILE = 240  # seconds more for the kernels, where loops are compiled too
LOG = 15 << 17  # bytes that a step may print: those of ten steps are less than 20 MiB


class Step(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds
    resumes: bool = False  # with --resume, after its process lost the GPU


def steps(names: list[str], out: Path, quick: bool = False, compiled: bool = False) -> list[Step]:
    """The steps of these names, in the order given. `quick`: tiny sizes, and few tests."""
    python = sys.executable
    limits, cases = dict(LIMITS), dict(CASES)
    if compiled:
        limits["kernels"] += COMPILE
        cases["kernels"] += COMPILE

    def benchmark(name: str, *more: str, repeats: int | None = None) -> list[str]:
        here = ["--device", "cuda", "--out", str(out), "--case-limit", str(cases[name])]
        often = ["--repeats", str(repeats)] if repeats and not quick else []
        return [python, "-m", f"bench.{name}", *more, *often, *here, *["--quick"] * quick]

    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.at_once"]
    # Warnings of versions that never met this code are no failures.
    pytest += ["-o", "addopts=", "-v", "--tb=short", "-W", "default", "-rfE"]
    cores = len(os.sched_getaffinity(0))
    workers = 0 if quick or not importlib.util.find_spec("xdist") else min(8, cores)
    tests = pytest
    if workers > 1:  # each with its part of the cores, for what the GPU is compared with
        tests = ["env", f"OMP_NUM_THREADS={cores // workers}", *pytest, "-n", str(workers)]
    chosen = "test_operations or test_gpu and not training_in or test_row_kernel and draws or test_row_product"
    training, layouts, shared = "training_in", "any_layout and not torch", "test"
    if quick:
        chosen = "two_runs and gate or pixels_of_the_naive and gated_pixel_cnn-skip"
        training, shared = "learns and RowLSTM-False", "refused"
    files = [f"tests/test_{name}.py" for name in ("operations", "gpu", "row_kernel", "row_product")]
    # Memory that torch keeps for itself would hide what is read beyond a tensor's end.
    sanitizer = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", "compute-sanitizer", "--error-exitcode", "9"]
    commands = {
        "cost": benchmark("cost"),
        "sweep": benchmark("sweep"),
        "tests": [*tests, *files, "-k", chosen],
        "sampling": benchmark("sampling", repeats=2),
        "training": benchmark("training", repeats=5),
        "kernels": benchmark("kernels", *["--compile"] * compiled, repeats=5),
        "tests-training": [*tests, "tests/test_gpu.py", "-k", training],
        "sanitizer": [*sanitizer, *pytest, "tests/test_operations.py", "-k", layouts],
        "tests-shared": [*pytest, "tests/test_gpu_shared.py", "-k", shared],
        "shared": benchmark("sweep", "--sweep", "shared", "--name", "shared-cuda" + "-quick" * quick),
    }
    return [Step(name, commands[name], limits[name], name in cases) for name in names]


def text_of(command: list[str], out: Path) -> str:
    """A command as one types it, with DIR for the folder."""
    return shlex.join(["python" if word == sys.executable else word for word in command]).replace(str(out), "DIR")


def end_with_parent() -> None:
    """In a new process: be killed when the one that started it ends, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


# Signals that came. An exception of their handler could be lost, or leave a process that nobody knows.
asked_to_end: list[int] = []


def end_if_asked() -> None:
    if asked_to_end:
        sys.exit(128 + asked_to_end[0])


class Run:
    """Steps in turn, and the two files that say what became of them.

    Args:
        name: of the files, without .json and .log.
        about: what gpu.json says beside the rows.
        start: when the time began, of time.monotonic().
    """

    def __init__(self, steps: list[Step], out: Path, name: str, about: dict, start: float):
        self.steps, self.out, self.about, self.start = steps, out, about, start
        self.path, self.log = out / f"{name}.json", out / f"{name}.log"
        self.rows = [
            {"step": step.name, "command": text_of(step.command, out), "status": "waits", "seconds": None}
            for step in steps
        ]

    def save(self) -> None:
        text = json.dumps({**self.about, "rows": self.rows}, indent=2, ensure_ascii=False) + "\n"
        write_text(self.path, text)

    def say(self, text: str) -> None:
        """Print a line, and write it to the log."""
        with self.log.open("a") as file:
            file.write(text + "\n")
        echo((text + "\n").encode())

    def all(self) -> int:
        """Run the steps; the exit status: 1 where one failed."""
        self.log.write_bytes(b"")
        self.save()
        until = self.start
        for step, row in zip(self.steps, self.rows, strict=True):
            end_if_asked()
            until += step.limit
            if not shutil.which(program_of(step.command)):
                row |= {"status": "not installed", "seconds": 0.0}
                self.save()
                continue
            self.say(f"\n──── {step.name}: {max(0.0, until - time.monotonic()):.0f} s at most: {row['command']}")
            begin, row["status"] = time.monotonic(), "runs"
            self.save()
            try:
                row["status"] = self.step(step, until)
            except BaseException:
                row["status"] = "interrupted"
                raise
            finally:
                row["seconds"] = round(time.monotonic() - begin, 1)
                self.save()
                for path in self.out.glob("*.json.tmp"):  # a write that was cut short; the file itself is whole
                    path.unlink()
            self.say(f"──── {step.name}: {said(row)}")
        text = self.log.read_text(errors="replace").splitlines()
        self.say("\n" + "\n".join(line for line in text if line.startswith("cost: ")))  # the end is what is read
        self.say("\n".join(f"{row['step']:15} {said(row)}" for row in self.rows))
        self.say(f"{self.path}")
        return int(any(row["status"] not in (0, "not installed") for row in self.rows))

    def step(self, step: Step, until: float) -> int | str:
        """Run a step, and again while its process loses the GPU: the exit status, or why there is none."""
        command = step.command
        while True:
            status = self.process(command, until)
            if status != LOST or not step.resumes:
                return status
            command = [*step.command, "--resume"]
            self.say(f"──── {step.name} goes on in another process")

    def process(self, command: list[str], until: float) -> int | str:
        """Run a process, its text going to the log and from there to stdout."""
        with self.log.open("ab") as into, self.log.open("rb") as back:
            begin = back.seek(0, os.SEEK_END)
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=into,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
                start_new_session=True,  # a group, to be killed together
                preexec_fn=end_with_parent,
            )
            try:
                while True:
                    end_if_asked()
                    over = time.monotonic() >= until
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0 if over else min(0.1, max(0.0, until - time.monotonic())))
                    echo(back.read())
                    if process.returncode is not None:
                        return process.returncode
                    if over:
                        return "too long"
                    if back.tell() - begin > LOG:
                        return "printed too much"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # what it started, too
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5)  # a driver may hold it longer
                if into.seek(0, os.SEEK_END) > begin + LOG:
                    into.truncate(begin + LOG)
                echo(back.read())


def program_of(command: list[str]) -> str:
    """What a command runs, after `env NAME=VALUE`."""
    return next(word for word in command if word != "env" and "=" not in word)


def said(row: dict) -> str:
    status = row["status"]
    status = f"status {status}" if isinstance(status, int) else status
    return status if row["seconds"] is None else f"{status}, {row['seconds']:.0f} s"


def echo(text: bytes) -> None:
    """Print; where nobody reads any more, the log still has it."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()


def driver() -> str | None:
    """What nvidia-smi says of driver, clocks and power, in one line."""
    asked = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,compute_mode"
    try:
        line = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        return subprocess.run(line, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [name for part in PARTS.values() for name in part]
    options.add_argument("--part", choices=PARTS, help="the steps of a part (all)")
    options.add_argument("--only", metavar="STEPS", help="these steps, with commas between, in this order")
    options.add_argument("--out", default="bench/results", type=Path, metavar="DIR", help="folder (%(default)s)")
    options.add_argument("--quick", action="store_true", help="tiny sizes and few tests: does it run at all?")
    options.add_argument(
        "--compile", action="store_true", help=f"also torch.compile the loops of kernels: {COMPILE} s more"
    )
    args = options.parse_args(argv)
    if args.part and args.only:
        options.error("--part and --only: one of them")
    names = args.only.split(",") if args.only else list(PARTS[args.part]) if args.part else known
    for name in names:
        if name not in known:
            options.error(f"--only={name}: expected {', '.join(known)}")
    if args.out.exists() and not args.out.is_dir():
        options.error(f"--out: {args.out} is not a folder")
    if not torch.cuda.is_available():
        options.error("torch finds no GPU here")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    typed = shlex.join(["python", "-m", "bench.gpu", *(sys.argv[1:] if argv is None else argv)])
    about = {"command": typed.replace(str(args.out), "DIR"), **environment(torch.device("cuda")), "gpu": driver()}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: asked_to_end.append(number))
    name = f"gpu-{args.part}" if args.part else "gpu"
    return Run(steps(names, out, args.quick, args.compile), out, name, about, START).all()


if __name__ == "__main__":
    sys.exit(main())
