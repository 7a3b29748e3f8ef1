"""How fast a training step is: `python -m bench.training`.

A step is forward, backward, and RMSprop's step with zero_grad, on random images that are on the device already: binary
ones of 28×28, and on a GPU the papers' sizes (`ON_A_GPU`), with products in bfloat16 as train.py has them. Each model
is timed in turn with a baseline, the same function of the same weights as it is usually written (`bench.plain`), and
with a matrix product of 1024³ (on a GPU 8192³), whose rate says what the machine can do just then; on a CPU a model
with an LSTM also with itself, with torch's scans in place of compiled ones. On a GPU all are timed as one CUDA graph,
as train.py runs the models here, and operation by operation; `kernels` says what takes the model's time there.

Arithmetic is counted once, for both: the multiply-adds that no mask makes zero. A step counts as three forwards, as
backward needs a product for the inputs' gradient and one for the weights'; a multiply-add is two operations.

Legend: b batch · c channel · h w rows, columns.
"""

import copy
import math
import sys
from functools import partial

import torch
from torch import Tensor, nn

from bench.measure import Clock, Results, build, describe, interleave, parse, parser, spread, table, whole
from bench.plain import baseline, live_multiply_adds
from kernels.backend import use
from models.optimizers import build_optimizer
from models.training_step import TrainingStep

ON_A_GPU = [  # model, side, colours, levels, h, layers, features of the head, batch
    ("diag_bilstm", 28, 1, 2, 16, 7, 32, 16),
    ("diag_bilstm", 32, 3, 256, 128, 12, 1024, 16),
    ("diag_bilstm", 32, 3, 256, 128, 12, 1024, 64),
    ("row_lstm", 32, 3, 256, 128, 12, 1024, 16),
    ("pixel_cnn", 32, 3, 256, 128, 15, 1024, 16),
    ("gated_pixel_cnn", 32, 3, 256, 128, 15, 1024, 16),
]


RMSPROP = {"lr": 1e-3, "alpha": 0.95, "eps": 1e-8, "momentum": 0.9}


def step_of(model: nn.Module, x: Tensor, backend: str | None = None):
    """A training step of a model on images x, as a function of a clock, with three laps; operations by `backend`."""
    optimizer, sub_pixels = torch.optim.RMSprop(model.parameters(), **RMSPROP, foreach=True), math.prod(x.shape[1:])
    half = torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda)
    model.train()

    def step(clock: Clock) -> None:
        with half, use(backend):
            loss = model(x).mean() / sub_pixels
        clock.lap("forward")
        with use(backend):
            loss.backward()
        clock.lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")

    return step


def captured_step_of(model: nn.Module, x: Tensor):
    """The same as one CUDA graph, and so one lap."""
    optimizer = build_optimizer({"name": "rmsprop", **RMSPROP}, model)
    step = TrainingStep(model.train(), optimizer, bf16=True)
    return whole(lambda: step(x, lr=RMSPROP["lr"]))


def kernels_of(step, device: torch.device) -> list[dict] | str:
    """The kernels of a step, the longest first; what went wrong, where a GPU's profiler does not do this."""
    if (activity := torch.profiler.ProfilerActivity.CUDA) not in torch.profiler.supported_activities():
        return "expected a torch that profiles a GPU"
    try:
        with torch.profiler.profile(activities=[activity]) as profiler:
            step(Clock(device))
            torch.cuda.synchronize()
        found = [event for event in profiler.key_averages() if event.self_device_time_total]
    except Exception as error:  # what was timed before must not be lost
        return f"{type(error).__name__}: {error}"
    found.sort(key=lambda event: -event.self_device_time_total)
    return [{"name": x.key[:60], "launches": x.count, "us": round(x.self_device_time_total)} for x in found[:25]]


def compare(name: str, model: nn.Module, b: int, n: int, args) -> list[dict]:
    """Rows of the model, its baseline, and the product of two n×n matrices, timed between them.

    On a CPU of a model with an LSTM also one of itself with torch's scans in place of compiled ones.
    """
    plain, (c, h, w) = baseline(model), model.shape
    x = torch.randint(0, model.levels, (b, c, h, w), generator=torch.Generator().manual_seed(0))
    x = x.to(args.device)
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    left, right, product = torch.randn(3, n, n, device=args.device).to(dtype)
    products = 20 if args.device.type == "cuda" else 1  # a GPU computes one in less time than its launch takes

    def matmul() -> None:
        for _ in range(products):
            torch.mm(left, right, out=product)

    cuda, models = args.device.type == "cuda", {"ours": model, "baseline": plain}
    things = {(thing, True): captured_step_of(net, x) for thing, net in models.items()} if cuda else {}
    if not cuda and name in ("row_lstm", "diag_bilstm"):
        models["torch"] = copy.deepcopy(model)
    things |= {(thing, False): step_of(net, x, "torch" if thing == "torch" else None) for thing, net in models.items()}
    first = next(iter(things))
    things["matmul"] = whole(matmul)
    errors: dict[str, str] = {}
    times = interleave(things, args.device, args.repeats, warmup=3, errors=errors)
    multiply_adds = live_multiply_adds(model)
    times["matmul"]["total"] = [t / products for t in times["matmul"]["total"]]
    ms = {thing: spread(laps["total"]) for thing, laps in times.items()}
    gflops = {thing: (6 * multiply_adds * b) / (ms[thing]["median"] * 1e6) for thing in times}
    gflops["matmul"] = 2 * n**3 / (ms["matmul"]["median"] * 1e6)
    ours = ms[first]["median"] if first in ms else None
    rows = []
    for thing, step in things.items():
        if thing == "matmul":
            continue
        row = {**describe(name, model, b), "implementation": thing[0], "graph": thing[1]}
        if thing in errors:
            rows.append(row | {"error": errors[thing]})
            continue
        laps = {
            f"{lap}_ms": spread(t) for lap, t in times[thing].items() if lap in ("forward", "backward", "optimizer")
        }
        row |= {"step_ms": ms[thing], **laps}
        row |= {"images_per_second": b / ms[thing]["median"] * 1e3, "multiply_adds": multiply_adds}
        row |= {"gflops": gflops[thing], "share_of_matmul": gflops[thing] / gflops["matmul"]}
        if cuda:
            torch.cuda.reset_peak_memory_stats()
            step(Clock(args.device))
            row["peak_megabytes"] = torch.cuda.max_memory_allocated() / 2**20
            if thing == ("ours", False):
                row["kernels"] = kernels_of(step, args.device)
        rows.append(row | {"ratio": ours and ms[thing]["median"] / ours, "ratio_to": "ours"})
    measured = {"step_ms": ms["matmul"], "gflops": gflops["matmul"], "share_of_matmul": 1.0}
    rows.append({"model": name, "implementation": "matmul", "shape": [n, n, n], **measured})
    return rows


def main(argv: list[str] | None = None) -> int:
    description = "Time a training step of each model against the same network plainly written."
    args = parse(parser("training", description, repeats=20), argv)
    cuda = args.device.type == "cuda"
    if args.quick:
        cases, n = [(name, 5, 1, 2, 4, 2, 32, 2) for name in args.names], 64
    elif cuda:
        cases, n = [case for case in ON_A_GPU if case[0] in args.names], 8192
    else:
        cases, n = [(name, 28, 1, 2, None, None, 32, 16) for name in args.names], 1024
    times = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")
    rates = ("images_per_second", "gflops", "share_of_matmul", "ratio")
    results = Results(args, ("model", "implementation", "graph", "shape", "step_ms", *rates))

    def measure(name: str, side: int, channels: int, levels: int, hidden, layers, head: int, b: int) -> list[dict]:
        model = build(name, side, channels, levels, hidden, layers, args.device, head)
        return compare(name, model, b, n, args)

    for case in cases:
        name, side, channels, levels, hidden, layers, _, b = case
        about = {"model": name, "shape": [b, channels, side, side], "levels": levels}
        results.case({**about, "hidden": hidden, "layers": layers}, partial(measure, *case))
    table(
        "A training step; ratio: time over that of the model here",
        results.rows,
        ("model", "implementation", "graph", *times),
    )
    table(
        "The same as rates; share of what the matrix product reaches",
        results.rows,
        ("model", "implementation", "graph", "shape", "parameters", "multiply_adds", *rates),
    )
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
