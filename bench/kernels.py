"""How fast the operations of `kernels` are, each with its gradients: `python -m bench.kernels`.

Each is timed in turn with the same function as it is usually written:

    diagonal_lstm   one layer, both directions: `loop`, on skewed maps, column after column, by autograd; and with
                    --compile `compiled`, that loop under torch.compile; on a CPU also `torch`, the torch form
    row_lstm        one layer: `loop`, row after row, by autograd; and `compiled`, `torch`
    masked_conv     3×3 of mask B: `dense`, all nine taps of the masked weight
    stem            7×7 of mask A on three colours: `dense`, all 49 taps
    cross_entropy   `library`, torch.nn.functional.cross_entropy of the logits in float32
    gate            `plain`, tanh(a) · σ(b)

The floor of a row is the time that its operations take at the rate of a matrix product, or that its inputs, outputs
and their gradients take at the rate of a copy, whichever is longer; both rates are measured in the same run. `share`
is the floor over the time. That a scan's steps follow each other is not in it.

On a CPU numbers are float32, and sizes small. On a GPU numbers are bfloat16 and sizes the papers'; the passes are
captured as CUDA graphs, which time the GPU and not Python, and `eager_ms` is how long both take without a graph.

Legend: b batch · h w rows, columns · k input features · f features · v levels.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from bench.measure import Clock, Results, ceilings, interleave, parse, parser, spread, table
from bench.plain import DenseConv, DenseRowLSTM, SkewedLSTM
from models.cuda_graph import captured, in_turn
from models.diag_bilstm import DiagonalLSTMLayer
from models.features import Stretch
from models.layers import MaskedConv
from models.row_lstm import RowLSTMLayer


class Work(NamedTuple):
    """Things that compute the same, and what it takes at least."""

    shape: dict[str, int]
    things: dict[str, tuple[Callable[[], Tensor], list[Tensor]]]  # name → the forward pass, what has a gradient
    multiply_adds: int  # of the forward pass; the backward pass has twice as many
    numbers: int  # of inputs and outputs; each is read or written once, and its gradient too


class BothDirections(nn.Module):
    """The baseline of a Diagonal BiLSTM's layer: (b 2f h w) → (b 2f h w), one direction after the other."""

    def __init__(self, layer: DiagonalLSTMLayer):
        super().__init__()
        self.forwards, self.mirrored = (SkewedLSTM(layer, direction) for direction in range(2))

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([self.forwards(u), self.mirrored(u.flip(3)).flip(3)], dim=1)


def leaf(args: argparse.Namespace, x: Tensor) -> Tensor:
    return x.detach().to(args.device, args.dtype).clone(memory_format=torch.contiguous_format).requires_grad_()


def beside(args: argparse.Namespace, loop: nn.Module, u: Tensor, compile: bool) -> dict:
    """A baseline in (b f h w) layout, and what torch.compile makes of it."""
    loop = loop.to(args.device, args.dtype)
    first = leaf(args, u.permute(0, 3, 1, 2))
    wanted = [first, *(p for p in loop.parameters() if p.requires_grad)]
    out = {"loop" if compile else "dense": (lambda: loop(first), wanted)}
    if compile and args.compile:
        compiled = torch.compile(loop)
        out["compiled"] = lambda: compiled(first), wanted
    return out


def ours(args: argparse.Namespace, scan: Callable[..., Tensor], given: list[Tensor]) -> dict:
    """A scan by the form that is taken by itself, and on a CPU by torch."""
    forms = {"ours": None, "torch": "torch"} if args.device.type == "cpu" else {"ours": None}
    return {name: (lambda backend=backend: scan(*given, backend=backend), given) for name, backend in forms.items()}


def diagonal(args: argparse.Namespace, b: int, h: int, w: int, f: int) -> Work:
    layer, pixels = DiagonalLSTMLayer(Stretch(f), Stretch(2 * f), []), b * h * w
    u = leaf(args, torch.randn(b, h, w, 2 * f))
    given = [u, *(leaf(args, x) for x in (layer.masked_input_weight(), layer.bias, layer.state_weight))]
    things = ours(args, kernels.diagonal_lstm, given)
    things |= beside(args, BothDirections(layer), u, compile=True)
    return Work({"b": b, "h": h, "w": w, "f": f}, things, pixels * 2 * 4 * f * 4 * f, pixels * 4 * f)


def row(args: argparse.Namespace, b: int, h: int, w: int, f: int) -> Work:
    layer, pixels, k = RowLSTMLayer(Stretch(f), Stretch(2 * f), []), b * h * w, 2 * f
    u, weight = leaf(args, torch.randn(b, h, w, k)), layer.input.masked_weight()
    parts = weight[:, k:], layer.input.bias, layer.state_weight, weight[:, :k]
    given = [u, *(leaf(args, x) for x in parts)]
    things = ours(args, kernels.row_lstm, given)
    things |= beside(args, DenseRowLSTM(layer), u, compile=True)
    return Work({"b": b, "h": h, "w": w, "f": f}, things, pixels * 4 * f * (2 * k + 3 * f), pixels * 3 * f)


def convolution(args: argparse.Namespace, kind: str, kernel: int, b: int, h: int, w: int, k: int, f: int) -> Work:
    groups = 1 if kind == "B" else k
    layer = MaskedConv(kind, kernel, Stretch(k, groups), [Stretch(f, groups)])
    u = leaf(args, torch.randn(b, h, w, k))
    given = [u, leaf(args, layer.masked_weight()), leaf(args, layer.bias)]
    things = {"ours": (lambda: kernels.masked_conv(*given, live=layer.live), given)}
    things |= beside(args, DenseConv.like(layer), u, compile=False)
    pixels = b * h * w
    return Work(
        {"b": b, "h": h, "w": w, "k": k, "f": f}, things, pixels * int(layer.mask.sum()), pixels * (k + f) + k * f
    )


def cross_entropy(args: argparse.Namespace, n: int, v: int) -> Work:
    logits, target = leaf(args, torch.randn(n, v)), torch.randint(v, (n,), device=args.device)
    things = {
        "ours": (lambda: kernels.cross_entropy(logits, target), [logits]),
        "library": (lambda: F.cross_entropy(logits.float(), target, reduction="none"), [logits]),
    }
    return Work({"n": n, "v": v}, things, 0, n * v * 3 // 2)  # read, read again, and the gradient written


def gate(args: argparse.Namespace, n: int, f: int) -> Work:
    u = leaf(args, torch.randn(n, 2 * f))
    plain = lambda: u[:, :f].tanh() * u[:, f:].sigmoid()  # noqa: E731
    return Work({"n": n, "f": f}, {"ours": (lambda: kernels.gate(u), [u]), "plain": (plain, [u])}, 0, n * 4 * f)


OPERATIONS: dict[str, tuple[Callable, list[tuple], list[tuple]]] = {  # function, sizes on a GPU, on a CPU
    "diagonal_lstm": (
        diagonal,
        [(16, 32, 33, 128), (64, 32, 33, 128), (16, 28, 29, 16), (16, 64, 65, 64)],
        [(16, 28, 29, 16)],
    ),
    "row_lstm": (row, [(16, 32, 32, 128), (64, 32, 32, 384), (16, 28, 28, 16)], [(16, 28, 28, 16)]),
    "masked_conv": (
        lambda args, *sizes: convolution(args, "B", 3, *sizes),
        [(16, 32, 32, 128, 128), (64, 32, 32, 128, 128)],
        [(16, 28, 28, 16, 16)],
    ),
    "stem": (
        lambda args, *sizes: convolution(args, "A", 7, *sizes),
        [(64, 32, 32, 3, 256)],
        [(16, 28, 28, 1, 32)],
    ),
    "cross_entropy": (cross_entropy, [(64 * 3072, 256), (1 << 20, 2)], [(16 * 784, 2), (3072, 256)]),
    "gate": (gate, [(64 * 1024, 128)], [(16 * 784, 32)]),
}
QUICK = {
    "diagonal_lstm": (1, 3, 4, 2),
    "row_lstm": (1, 3, 4, 2),
    "masked_conv": (1, 4, 4, 2, 3),
    "stem": (1, 4, 4, 3, 6),
    "cross_entropy": (5, 3),
    "gate": (5, 2),
}


def both_passes(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[Clock], None]:
    """What takes a clock and ends two laps."""
    d_out = None

    def run(clock: Clock) -> None:
        nonlocal d_out
        out = forward()
        clock.lap("forward")
        if d_out is None:  # in the first round, which is not counted
            d_out = torch.randn_like(out)
        torch.autograd.grad(out, wanted, d_out, allow_unused=True)  # a baseline may have empty parameters
        clock.lap("backward")

    return run


REPLAYS = 10  # between two events: a single one may end before the host has recorded the second event


def captured_passes(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[Clock], None]:
    """The same on a GPU from two graphs: laps "forward", and "both"."""
    graphs: list[Callable[[], None]] = []

    def capture() -> None:
        d_out, stream = torch.randn_like(forward()), torch.cuda.Stream()
        for run in (forward, lambda: torch.autograd.grad(forward(), wanted, d_out, allow_unused=True)):
            with in_turn(stream):
                run()
                run()
            graphs.append(captured(run, stream))

    def run(clock: Clock) -> None:
        if not graphs:
            capture()
        for name, replay in zip(("forward", "both"), graphs, strict=True):
            for _ in range(REPLAYS):
                replay()
            clock.lap(name)

    return run


def compare(name: str, work: Work, reached: dict[str, float], args: argparse.Namespace) -> list[dict]:
    """A row for each thing, beside the floor of all of them."""
    errors: dict[str, str] = {}
    cuda = args.device.type == "cuda"
    things = {thing: both_passes(*how) for thing, how in work.things.items()}
    if cuda:
        things = {f"{thing} eager": run for thing, run in things.items()}
        things |= {thing: captured_passes(*how) for thing, how in work.things.items()}
    times = interleave(things, args.device, args.repeats, warmup=3, errors=errors)
    if cuda:
        for laps in (times[thing] for thing in work.things if thing in times):
            laps["forward"], laps["total"] = ([t / REPLAYS for t in laps[lap]] for lap in ("forward", "both"))
            laps["backward"] = [both - first for both, first in zip(laps["total"], laps["forward"], strict=True)]
    gflops, gigabytes = 6 * work.multiply_adds / 1e9, 2 * work.numbers * args.dtype.itemsize / 1e9
    floor = 1e3 * max(gflops / reached["gflops"], gigabytes / reached["gigabytes_per_second"])
    ours = spread(times["ours"]["total"])["median"] if "ours" in times else None
    about = {"operation": name, "shape": work.shape, "dtype": str(args.dtype).removeprefix("torch.")}
    rows = [{**about, "implementation": thing, "error": text} for thing, text in errors.items()]
    for thing in (thing for thing in work.things if thing in times):
        laps, ms = times[thing], spread(times[thing]["total"])
        row = {**about, "implementation": thing, "ms": ms} | {
            f"{lap}_ms": spread(laps[lap]) for lap in ("forward", "backward")
        }
        if eager := times.get(f"{thing} eager"):
            row["eager_ms"] = spread(eager["total"])
        row |= {"gflop": gflops, "gigabytes": gigabytes, "floor_ms": floor, "share": floor / ms["median"]}
        rows.append(row | {"ratio": ours and ms["median"] / ours, "ratio_to": "ours"})
    return rows


def main(argv: list[str] | None = None) -> int:
    options = parser(
        "kernels", "Time each operation and its gradients against how it is usually written.", 20, OPERATIONS
    )
    options.add_argument("--compile", action="store_true", help="also torch.compile the loops: minutes")
    args = parse(options, argv)
    cuda = args.device.type == "cuda"
    args.dtype = torch.bfloat16 if cuda else torch.float32
    n, megabytes = (64, 1) if args.quick else (8192, 1024) if cuda else (1024, 64)
    times = ("ms", "forward_ms", "backward_ms", "eager_ms", "floor_ms", "share", "ratio")
    results = Results(args, ("operation", "shape", "implementation", *times[:4], "ratio"))
    if not results.rows:
        most = ceilings(args.device, args.dtype, n, megabytes, args.repeats)
        results.add({"implementation": "ceilings", **most})
    reached = {key: results.rows[0][key] for key in ("gflops", "gigabytes_per_second")}

    def measure(name: str, sizes: tuple) -> list[dict]:
        torch.manual_seed(0)
        return compare(name, OPERATIONS[name][0](args, *sizes), reached, args)

    for name in args.names:
        _, on_gpu, on_cpu = OPERATIONS[name]
        for sizes in [QUICK[name]] if args.quick else on_gpu if cuda else on_cpu:
            results.case({"operation": name, "sizes": list(sizes)}, partial(measure, name, sizes))
    table(
        "An operation and its gradients; ratio: time over ours",
        results.rows[1:],
        ("operation", "shape", "implementation", *times),
    )
    rates = f"{reached['gflops']:.0f} GFLOP/s by a matrix product, {reached['gigabytes_per_second']:.0f} GB/s by a copy"
    print(f"\n{rates}: what the floors are computed with")
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
