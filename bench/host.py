"""What a training step costs the host of a GPU: `python -m bench.host`, where there is none.

The steps are those of `train.py`: both passes, clipping, the optimizer, the moving average. Triton's launches go all
the way through Triton and then do nothing, and what torch computes is tiny: images of 2×2, 16 features, one image. That
leaves Python, torch's dispatcher and a little arithmetic. A GPU's driver adds its own time to each launch, which is not
counted here. As a graph, all of a step is a replay, which does nothing here either.

    operations   that torch's dispatcher and Triton meet in a step
    passes       ms for both passes
    rest         ms for clipping, the optimizer and the averaged weights, which a CPU computes one parameter after the
                 other, and a GPU all together
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from bench.measure import Clock, Results, build, describe, interleave, parse, parser, spread, table
from bench.stand_in import StandIn
from bench.training import ON_A_GPU, RMSPROP
from kernels.jit import triton
from models.optimizers import build_optimizer
from models.training_step import WARM_UP, TrainingStep


@contextmanager
def launches_that_do_nothing() -> Iterator[dict[str, int]]:
    """Within, Triton finds each kernel compiled, and running it does nothing. Yields how many were launched."""
    from triton.runtime.jit import JITFunction

    count = {"launches": 0}

    def run(*_) -> None:
        count["launches"] += 1

    def compiled(kernel, key, *_):
        nothing = SimpleNamespace(function=0, packed_metadata=(), launch_metadata=lambda *_: None, run=run)
        return kernel.device_caches[0][0].setdefault(key, nothing)

    with StandIn(), mock.patch.object(JITFunction, "_do_compile", compiled):
        yield count


class Operations(TorchDispatchMode):
    """Counts what torch's dispatcher meets."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        self.count += 1
        return function(*arguments, **(named or {}))


def step_of(model: nn.Module, graph: bool):
    """A step as `train.py` takes it, as a function of a clock: two laps, or one as a graph."""
    optimizer = build_optimizer({"name": "rmsprop", **RMSPROP}, model)
    x = torch.zeros(1, *model.shape, dtype=torch.long)
    step = TrainingStep(model.train(), optimizer, copy.deepcopy(model), clip=1.0)
    compute, clip = step.compute, nn.utils.clip_grad_norm_

    def compute_in_bfloat16(inputs: list) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return compute(inputs)

    step.compute = compute_in_bfloat16
    step(x, lr=1e-3)
    if graph:
        step.graph, step.inputs, step.warm, step.replay = True, [x], WARM_UP, lambda: None
        step.compute_again()

    def run(clock: Clock) -> None:
        def clipped(*arguments, **named) -> None:
            clock.lap("passes")
            clip(*arguments, **named)

        with mock.patch.object(nn.utils, "clip_grad_norm_", clipped):
            step(x, lr=1e-3, decay=0.99)
        clock.lap("all" if graph else "rest")

    return run


def measure(name: str, layers: int, launches: dict[str, int], args) -> list[dict]:
    """Two rows: operation by operation, and as a graph."""
    graphs = (False, True)
    model = build(name, 2, 1, 2, 16, layers, args.device)
    things = {graph: step_of(copy.deepcopy(model), graph) for graph in graphs}
    times, rows = interleave(things, args.device, args.repeats, warmup=3), []
    for graph in graphs:
        before = launches["launches"]
        with Operations() as operations:
            things[graph](Clock(args.device))
        met = {"operations": operations.count, "launches": launches["launches"] - before}
        ms = {f"{lap}_ms": spread(values) for lap, values in times[graph].items() if lap != "all"}
        rows.append({**describe(name, model, 1), "graph": graph, **met, **ms})
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser("host", "Time what a training step costs the host of a GPU, where there is none.", repeats=40)
    options.set_defaults(device="cpu", threads=1)
    args = parse(options, argv)
    if triton is None or triton.knobs.runtime.interpret:
        options.error("Triton must be installed, and TRITON_INTERPRET not be 1: it would run what is launched")
    if args.device.type != "cpu":
        options.error("--device: expected cpu; on a GPU see `python -m bench.training`")
    args.name = args.name.replace("-cpu", "")
    columns = ("model", "layers", "graph", "operations", "launches", "passes_ms", "rest_ms", "total_ms")
    results = Results(args, columns)
    cases = sorted({(name, layers) for name, _, _, _, _, layers, *_ in ON_A_GPU if name in args.names})
    with launches_that_do_nothing() as launches, kernels.use("triton"):
        for name, layers in cases:
            about = {"model": name, "layers": layers}
            results.case(about, partial(measure, name, 1 if args.quick else layers, launches, args))
    table("What a training step costs the host, without a GPU's driver", results.rows, columns)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
