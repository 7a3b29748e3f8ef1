"""What the benchmarks share: options, models, interleaved timing, what they ran on, a table and a JSON file.

Machines are shared and noisy. What is compared is therefore timed in turn, A B A B …, in one run, and ratios
are those of medians. And they fail: what was measured is on the disk at once (`Results`).
"""

import argparse
import gc
import json
import math
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

import models
from cli.machine import environment, keep_freed_memory
from files import write_text

LOST = 3  # exit status: the GPU no longer answers this process; another one goes on with --resume

MODELS = {  # class, hidden, layers
    "pixel_cnn": ("models.PixelCNN", 16, 15),
    "gated_pixel_cnn": ("models.GatedPixelCNN", 32, 10),
    "row_lstm": ("models.RowLSTM", 16, 7),
    "diag_bilstm": ("models.DiagBiLSTM", 16, 7),
}


def build(
    name: str,
    side: int,
    channels: int,
    levels: int,
    hidden: int | None,
    layers: int | None,
    device,
    head_features: int = 32,
):
    """A model for side × side images, of the same weights each time; None: as in `MODELS`, and where torch makes it."""
    target, usual_hidden, usual_layers = MODELS[name]
    torch.manual_seed(0)
    model = models.build(
        {
            "_target_": target,
            "channels": channels,
            "levels": levels,
            "height": side,
            "width": side,
            "hidden": hidden or usual_hidden,
            "layers": layers or usual_layers,
            "head_features": head_features,
        }
    )
    return model if device is None else model.to(device)


def describe(name: str, model: torch.nn.Module, b: int) -> dict:
    """What a row says of the model it is about: `shape` is (b c h w)."""
    hidden, layers = model.body.hidden, model.body.layers
    sizes = {"shape": [b, *model.shape], "levels": model.levels, "hidden": hidden, "layers": layers}
    return {"model": name, **sizes, "parameters": sum(p.numel() for p in model.parameters())}


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected an integer of at least 1")
    return int(text)


def parser(command: str, description: str, repeats: int, names: dict = MODELS) -> argparse.ArgumentParser:
    """The options that all benchmarks have; `names` are what can be measured."""
    out = argparse.ArgumentParser(prog=f"python -m bench.{command}", description=description)
    out.add_argument("--out", default="bench/results", metavar="DIR", help="folder of the JSON (%(default)s)")
    out.add_argument("--name", help="name of the JSON, without .json (command and device, sampling-cpu)")
    out.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    out.add_argument("--threads", type=positive, metavar="N", help="of torch on the CPU (torch's own choice)")
    what = "models" if names is MODELS else command
    out.add_argument(
        f"--{what}", dest="names", default=",".join(names), help="which, with commas between (%(default)s)"
    )
    out.add_argument("--repeats", type=positive, metavar="N", help=f"how often all is timed ({repeats})")
    out.add_argument("--quick", action="store_true", help="tiny sizes, two repeats: does it run at all?")
    out.add_argument(
        "--case-limit", type=positive, metavar="SECONDS", help=f"end with status {LOST} where a case takes longer"
    )
    out.add_argument(
        "--resume", action="store_true", help="go on after the last case of DIR/NAME.json, which an earlier run left"
    )
    out.set_defaults(command=command, usual_repeats=repeats, what=what, allowed=tuple(names))
    return out


def parse(options: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Read the options, set torch's threads; `command_line` is what was typed, less the folder of `out`."""
    args = options.parse_args(argv)
    args.names = args.names.split(",")
    for name in args.names:
        if name not in args.allowed:
            options.error(f"--{args.what}={name}: expected {', '.join(args.allowed)}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and not torch.cuda.is_available():
        options.error("--device=cuda: expected cpu, as torch finds no GPU")
    if Path(args.out).exists() and not Path(args.out).is_dir():
        options.error(f"--out: {args.out} is not a folder")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = torch.device(args.device)
    keep_freed_memory()  # as train.py does
    args.repeats = args.repeats or (2 if args.quick else args.usual_repeats)
    args.name = args.name or f"{args.command}-{args.device.type}" + "-quick" * args.quick
    typed, out = list(sys.argv[1:] if argv is None else argv), Path(args.out)
    if out.is_absolute():
        typed = [argument.replace(args.out, out.name) for argument in typed]
    args.command_line = shlex.join(["python", "-m", f"bench.{args.command}", *typed])
    return args


class Clock:
    """Milliseconds of named laps; on a GPU by events, so that a lap waits for nothing."""

    def __init__(self, device: torch.device):
        self.cuda, self.names, self.times = device.type == "cuda", [], []
        if self.cuda:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.times.append(event)
        else:
            self.times.append(time.perf_counter())

    def lap(self, name: str) -> None:
        """End the lap `name`; the next begins."""
        self.names.append(name)
        self.mark()

    def read(self) -> dict[str, float]:
        """The laps, and "total"."""
        if self.cuda:
            torch.cuda.synchronize()
            seconds = [self.times[0].elapsed_time(event) / 1e3 for event in self.times]
        else:
            seconds = [t - self.times[0] for t in self.times]
        laps = {n: 1e3 * (b - a) for n, a, b in zip(self.names, seconds, seconds[1:], strict=False)}
        return {**laps, "total": 1e3 * seconds[-1]}


def interleave(
    things: dict, device: torch.device, repeats: int, warmup: int, errors: dict[str, str] | None = None
) -> dict[str, dict[str, list]]:
    """Time things in turn, A B A B …

    Args:
        things: name → what to call with a `Clock`; it ends laps as it likes, and one at its end.
        warmup: how many rounds are thrown away first.
        errors: where it is given, a thing that raises an exception is left out from then on, and its error goes there,
            by name; unless all do, or the device no longer answers.

    Returns:
        name → lap → its milliseconds in each round.
    """
    rounds: dict[str, list[dict]] = {name: [] for name in things}
    for _ in range(warmup + repeats):
        for name, thing in things.items():
            if errors and name in errors:
                continue
            try:
                clock = Clock(device)
                thing(clock)
                rounds[name].append(clock.read())
            except Exception as error:
                if errors is None or len(errors) == len(things) - 1 or not answers(device):
                    raise
                traceback.print_exc()
                errors[name] = text_of(error)
                del rounds[name]
    return {name: {lap: [r[lap] for r in kept[warmup:]] for lap in kept[0]} for name, kept in rounds.items()}


def whole(thing: Callable[[], object]) -> Callable[[Clock], None]:
    """Wrap what takes no clock: all of it is one lap."""

    def run(clock: Clock) -> None:
        thing()
        clock.lap("all")

    return run


def spread(ms: list[float], factor: float = 1.0) -> dict[str, float]:
    """Median, minimum, quartiles and number of times in milliseconds, each multiplied by `factor` first."""
    low, q1, median, q3 = (round(float(t) * factor, 4) for t in np.percentile(ms, (0, 25, 50, 75)))
    return {"median": median, "min": low, "q1": q1, "q3": q3, "repeats": len(ms)}


def ceilings(device: torch.device, dtype: torch.dtype, n: int, megabytes: int, repeats: int) -> dict[str, float]:
    """What the device reaches at best, just now: GFLOP/s of an n³ matrix product, GB/s of a copy (read and written).

    The product is in `dtype`; both are the median of as many repeats.
    """
    left, right = torch.randn(2, n, n, device=device).to(dtype)
    source = torch.zeros(megabytes << 18, device=device)
    target = torch.empty_like(source)
    rounds = 20 if device.type == "cuda" else 1  # a GPU computes one in less time than its launch takes

    def products() -> None:
        for _ in range(rounds):
            left @ right

    def copies() -> None:
        for _ in range(rounds):
            target.copy_(source)

    times = interleave({"product": whole(products), "copy": whole(copies)}, device, repeats, warmup=2)
    product, copy = (spread(times[name]["total"])["median"] / rounds for name in ("product", "copy"))
    return {"gflops": 2 * n**3 / (product * 1e6), "gigabytes_per_second": 2 * (megabytes << 20) / (copy * 1e6)}


class Results:
    """The rows of a benchmark: DIR/NAME.json has each as soon as it is added, and is whole at any moment.

    Until `finish` the file says `unfinished`: how many cases are done. A case is what is measured together; one that
    fails is a row that says so, and the next one comes.

    Args:
        columns: what of a row is printed when it is added.
    """

    def __init__(self, args: argparse.Namespace, columns: tuple[str, ...]):
        self.args, self.columns, self.lock = args, columns, threading.Lock()
        self.path = Path(args.out) / f"{args.name}.json"
        self.about = {"command": args.command_line, **environment(args.device)}
        self.rows: list[dict] = []
        self.number = self.done = 0  # of cases: met, measured
        if args.resume and self.path.exists():
            before = json.loads(self.path.read_text())
            self.rows, self.done = before["rows"], before.get("unfinished", math.inf)

    def save(self, **more) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.about, **more, "rows": self.rows}, indent=2, ensure_ascii=False) + "\n"
        write_text(self.path, text)

    def add(self, row: dict) -> None:
        """Write a row, then print it."""
        with self.lock:
            self.rows.append(row)
            self.save(unfinished=self.done)
        said = [labelled(key, row[key]) for key in (*self.columns, "error") if row.get(key) is not None]
        print("  ".join([f"{self.args.command}:", *said]), flush=True)

    def case(self, about: dict, measure: Callable[[], Iterable[dict]]) -> None:
        """Add the rows of `measure()`, each when it is known; an exception is one more row, `about` and "error".

        Ends the process with status `LOST` where the GPU no longer answers, or after --case-limit seconds.
        """
        self.number += 1
        if self.number <= self.done:
            return  # by the run that this one resumes
        failed, watch = False, threading.Timer(self.args.case_limit or 0, self.give_up, (about, self.number))
        watch.daemon = True
        if self.args.case_limit:
            watch.start()
        try:
            for row in measure():
                self.add(row)
        except Exception as error:
            traceback.print_exc()
            self.fail(about, text_of(error), self.number)
            failed = True
        watch.cancel()
        with self.lock:
            self.done = self.number
            if self.rows:
                self.save(unfinished=self.done)
        if failed and not answers(self.args.device):
            print(f"{self.args.command}: the GPU no longer answers", flush=True)
            sys.stdout.flush()
            os._exit(LOST)  # without destructors, which would ask the GPU
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def fail(self, about: dict, text: str, number: int) -> None:
        """A row that says what became of case `number`, which is done."""
        self.done = number
        self.add({**about, "error": text})

    def give_up(self, about: dict, number: int) -> None:
        if self.done < number:
            self.fail(about, f"no end after {self.args.case_limit} s", number)
            sys.stdout.flush()
            os._exit(LOST)

    def finish(self) -> int:
        """Write the file for the last time and say where it is; the exit status: 1 where a case failed."""
        self.save()
        at = self.about
        print(f"\n{at['device']}, {at['cores']} cores, {at['threads']} threads, torch {torch.__version__}")
        print(self.path)
        return int(any("error" in row for row in self.rows))


NAMED = ("error", "no_room", "model", "bf16")


def labelled(key: str, value) -> str:
    """A value of a row as one line of text has it: numbers with their name."""
    is_number = isinstance(value, int | float) or (isinstance(value, dict) and "median" in value)
    return f"{key} {cell(value)}" if is_number or key in NAMED else cell(value)


def text_of(error: Exception) -> str:
    """An exception in one line, a long one cut: Triton's hold whole programs."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def answers(device: torch.device) -> bool:
    """Tell whether the device still computes for this process: after some errors a GPU does not."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize()
        return bool((torch.ones(2, device=device) == 1).all())
    except RuntimeError:
        return False


WIDE = 160  # characters of a text in a line: the file has all


def cell(value) -> str:
    """A value as the table shows it: of a spread the median and quartiles, of a number three digits."""
    if value is None:
        return ""
    if isinstance(value, str) and len(value) > WIDE:
        return value[:WIDE] + "…"
    if isinstance(value, dict) and "median" not in value:
        return " ".join(f"{name}={size}" for name, size in value.items())
    if isinstance(value, dict):
        return f"{cell(value['median'])} ({cell(value['q1'])}–{cell(value['q3'])})"
    if isinstance(value, list):
        return "×".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def table(title: str, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Print some of the rows' keys, and what went wrong."""
    if any("error" in row for row in rows):
        columns = (*columns, "error")
    lines = [columns, *([cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    print(f"\n{title}")
    for line in lines:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())
