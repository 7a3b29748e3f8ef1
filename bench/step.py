"""A model of whole training steps and whole rows on an H100, where there is none: `python -m bench.step`.

What torch and Triton would launch is counted on tensors that have shapes and no numbers. A launch takes the time of the
bytes that it moves, of its multiply-adds, or of a node of a CUDA graph, whichever is longest; scans and the kernel that
draws a row take what `bench.model` said of them (bench/results/model.json). Nothing of it is a measurement.

    nodes               launches of a step or of a row, where a CUDA graph launches all of them
    products            ms, of matrix products and convolutions
    memory              ms, of all other launches
    kernels             ms, of the scans or of the row's kernel, at both of the model's times of the L2 cache
    all                 ms, likewise
    images_per_second   likewise
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import kernels
from bench.measure import build, table
from bench.stand_in import write_rows
from bench.training import RMSPROP
from models.optimizers import build_optimizer
from models.sampling.cached import Cached
from models.training_step import TrainingStep

BYTES = 0.8 * 3.35e12  # a second: an H100's memory
FLOPS = 0.6 * 989e12  # a second: its matrix instructions, in bfloat16
NODE = 2.9e-6  # seconds: measured on an H200 (bench/results/cost-cuda.json)
MODEL = Path(__file__).parent / "results" / "model.json"


class Step(NamedTuple):
    """A model and its images, and what `bench.model` calls its scans; "" if it has none."""

    name: str
    side: int
    channels: int
    levels: int
    hidden: int
    layers: int
    head_features: int
    scan: str
    forward: str = ""  # appended to the scan's name
    backward: str = ", backward"
    images: int = 16


class Row(NamedTuple):
    """A PixelCNN of 15 blocks that draws images of 32×32, and what `bench.model` calls its kernels."""

    images: int
    kernels: tuple[str, ...]


LARGE, SMALL = (32, 3, 256, 128, 12, 1024), (28, 1, 2, 16, 7, 32)
STEPS = {
    "Diagonal BiLSTM, 12 layers, h = 128, 32×32 colour": Step("diag_bilstm", *LARGE, "diagonal scan 32×33, f = 128"),
    "the same, features shared out": Step("diag_bilstm", *LARGE, "shared diagonal scan 32×33, f = 128"),
    "the same, and the GPU's own tanh": Step(
        "diag_bilstm", *LARGE, "shared diagonal scan 32×33, f = 128", ", fast tanh"
    ),
    "Row LSTM, 12 layers, h = 128, 32×32 colour": Step("row_lstm", *LARGE, "row scan 32×32, f = 128"),
    "PixelCNN, 15 blocks, h = 128, 32×32 colour": Step("pixel_cnn", 32, 3, 256, 128, 15, 1024, ""),
    "Gated PixelCNN, 15 layers, h = 128, 32×32 colour": Step("gated_pixel_cnn", 32, 3, 256, 128, 15, 1024, ""),
    "Diagonal BiLSTM, 7 layers, h = 16, 28×28 binary": Step("diag_bilstm", *SMALL, "diagonal scan 28×29, f = 16"),
}
ROWS = {
    f"a row of a PixelCNN, {n:,} images": Row(
        n, tuple(f"{x} of a PixelCNN, {n:,} images" for x in ("row", "rows above"))
    )
    for n in (16, 4224, 8448)
}


class Launch(NamedTuple):
    name: str
    bytes: int
    flops: int

    def seconds(self) -> float:
        return max(self.bytes / BYTES, self.flops / FLOPS, NODE)


class Launches(TorchDispatchMode):
    """Notes what torch's dispatcher meets, but what only makes or views a tensor."""

    NOTHING = ("detach", "device", "empty", "empty_like", "new_empty", "_unsafe_view", "promote_types")

    def __init__(self):
        super().__init__()
        self.launches: list[Launch] = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        out = function(*arguments, **(named or {}))
        name = function._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((arguments, named, out)) if isinstance(x, Tensor)]
        if tensors and not function.is_view and name not in self.NOTHING:
            moved = sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in tensors)
            self.launches += [Launch(name, moved, flops_of(function, arguments, out)), *beside(name, arguments)]
        return out


def flops_of(function, arguments: tuple, out) -> int:
    if function._overloadpacket in flop_registry:
        return flop_registry[function._overloadpacket](*arguments, out_val=out)
    name = function._schema.name
    if "masked_conv" in name:
        weight = out if "gradient" in name else arguments[1]
        return 2 * arguments[0][..., 0].numel() * weight.numel()
    return 0


def beside(name: str, arguments: tuple) -> list[Launch]:
    """What a scan launches besides its kernel: its weights in bfloat16; backward, their gradient too."""
    if not name.startswith("lstm_scan"):
        return []
    casts = [Launch("weights", 3 * arguments[1].numel(), 0)]
    if name == "lstm_scan":
        return casts
    _, weight, hidden, gates = arguments[:4]
    read = hidden.numel() * weight.shape[2] // hidden.shape[4] * hidden.element_size()  # once for each tap
    gather = [Launch("what taps read", 2 * read // 3 if k else read, 0) for k in range(4)]
    flops = 2 * weight.numel() * hidden[..., 0, 0].numel()
    return [*casts, *casts, *gather, Launch("bmm", read + gates.numel() * gates.element_size(), flops)]


def launches_of(step: Step) -> list[Launch]:
    """All that a step launches, optimizer and averaging included, with products in bfloat16."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        sizes = step.side, step.channels, step.levels, step.hidden, step.layers
        model, average = (build(step.name, *sizes, None, step.head_features).train() for _ in range(2))
        optimizer = build_optimizer({"name": "rmsprop", **RMSPROP}, model)
        taken = TrainingStep(model, optimizer, average, clip=1.0)
        x = torch.zeros(step.images, *model.shape, dtype=torch.long)
        with kernels.use("triton"), torch.autocast("cpu", torch.bfloat16):
            taken(x, lr=1e-3)  # makes the optimizer's state
            with Launches() as found:
                taken(x, lr=1e-3)
    return found.launches


def launches_of_row(row: Row) -> list[Launch]:
    """What the stem reads of the rows above, in bfloat16 and computed by torch; the layers have their own kernel."""
    model = build("pixel_cnn", 32, 3, 256, 128, 15, "meta", 1024).bfloat16().eval()
    with torch.no_grad():
        evaluator = Cached(model, row.images, images_last=False, network=model.in_row().aligned())
        with Launches() as found:
            evaluator.stem.begin_row(first=False)
    return found.launches


def modelled(name: str, ms: dict[str, list[float]]) -> dict:
    """A row of the table; `ms` holds what each kernel takes."""
    if name in ROWS:
        step = ROWS[name]
        kernel = [sum(ms[part][k] for part in step.kernels) for k in range(2)]
        found, times, more = launches_of_row(step), 32, len(step.kernels)
    else:
        step = STEPS[name]
        ways = (step.forward, step.backward) if step.scan else ()
        scans = [ms[f"{step.scan}, b = {step.images}{way}"] for way in ways]
        kernel = [step.layers * sum(x[k] for x in scans) for k in range(2)]
        found, times, more = launches_of(step), 1, 0
    rest = [x for x in found if not x.name.startswith("lstm_scan")]
    products, memory = (sum(x.seconds() * 1e3 for x in rest if bool(x.flops) == kind) for kind in (True, False))
    out = {"step": name, "nodes": len(found) + more, "products": products, "memory": memory}
    both = [products + memory + x for x in kernel]
    rate = [step.images * 1e3 / (times * x) for x in reversed(both)]
    ranges = {"kernels": kernel, "all": both, "images_per_second": rate}
    return out | {key: dict(zip(("low", "high"), pair, strict=True)) for key, pair in ranges.items()}


def in_three_digits(x):
    if isinstance(x, dict):
        return {key: in_three_digits(value) for key, value in x.items()}
    return float(f"{x:.3g}") if isinstance(x, float) else x


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.split("\n")[0])
    options.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    args = options.parse_args(argv)
    ms = {row["kernel"]: row["ms"] for row in json.loads(MODEL.read_text())["rows"]}
    rows = [in_three_digits(modelled(name, ms)) for name in (*STEPS, *ROWS)]
    table("A model of an H100, not a measurement: ms", rows, tuple(rows[0]))
    if args.json:
        write_rows(args.json, "python -m bench.step", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
