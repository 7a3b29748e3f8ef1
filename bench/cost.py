"""Four figures that a model of the kernels' cost gives for an H100, beside the GPU's: `python -m bench.cost`.

    scan_forward    µs a step of the Diagonal BiLSTM's scan, 16 images of 32×33, 128 features, bfloat16
    scan_backward   the same, backward
    row_kernel      ms a pixel of the row kernel: 16 images of 32×32×3, a PixelCNN of 15 blocks, h = 128, bfloat16
    graph_node      µs a node of one captured row of the same, operation by operation

The model counts the instructions, barriers and bytes of one step in the compiled kernels and issues them at an H100's
rates, at 1.755 GHz; it gives a range. `ratio` is what was measured over the middle of that range. Kernels are cut as
they were for the model (`cut`), whatever `form_of` and `form_for` choose today; `bench.sweep` compares the cuts.

Legend: b batch · h w rows, columns · f features.
"""

import argparse
import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

import kernels.draw_row
import kernels.lstm_scan
from bench.measure import Results, interleave, parse, parser, spread, table, whole
from bench.sampling import large
from kernels.lstm_scan import lstm_scan
from models.sampling import PixelLoop
from models.sampling.rules import Draw

SCAN = (16, 32, 33, 128)  # b h w f: the paper's CIFAR-10 size
QUICK_SCAN = (1, 3, 4, 16)
ROUNDS = 10  # launches of a scan between two events: a single one is over before the host has launched the next


@contextmanager
def cut(module, choice: str, **changes) -> Iterator[None]:
    """Within, the form that `module.choice` chooses has these fields instead."""
    choose = getattr(module, choice)
    setattr(module, choice, lambda *arguments, **named: choose(*arguments, **named)._replace(**changes))
    try:
        yield
    finally:
        setattr(module, choice, choose)


class Launches:
    """Within, what a module launches is kept: `again()` does it once more, in the same memory, without the rest.

    Args:
        options: of the compiler, above those that the module names.
    """

    def __init__(self, module, **options: int):
        self.module, self.calls, self.options = module, [], options

    def __enter__(self) -> "Launches":
        self.launch = self.module.launch
        self.module.launch = self.keep
        return self

    def __exit__(self, *_) -> None:
        self.module.launch = self.launch

    def keep(self, kernel, grid: tuple, *arguments, **named) -> None:
        named |= self.options
        self.launch(kernel, grid, *arguments, **named)
        self.calls.append((kernel, grid, arguments, named))

    def again(self) -> None:
        for kernel, grid, arguments, named in self.calls:
            self.launch(kernel, grid, *arguments, **named)

    def compiled(self) -> dict[str, int]:
        """What the first kernel takes: registers of a thread, bytes that spill, bytes of shared memory."""
        kernel, grid, arguments, named = self.calls[0]
        one = kernel[grid](*arguments, **named)
        if one is None or not hasattr(one, "n_regs"):  # where nothing was compiled
            return {}
        return {"registers": one.n_regs, "spills": one.n_spills, "shared_bytes": one.metadata.shared}


def scan_launches(size: tuple, backward: bool, form: str = "streamed", **changes) -> tuple[Launches, int]:
    """The launches of the Diagonal BiLSTM's scan, one way, in bfloat16, and how many steps they are."""
    b, h, w, f = size
    new = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    pre = new(b, h, w, 2, 4 * f).requires_grad_(backward)
    weight = (new(2, 4 * f, 2 * f) * f**-0.5 / 2).requires_grad_(backward)
    # Registers are 65,536: all threads of a program share them.
    options = {"maxnreg": min(255, 2048 // changes["warps"])} if "warps" in changes else {}
    hidden = lstm_scan(pre, weight, True, form) if backward else None  # as it is usually cut
    with cut(kernels.lstm_scan, "form_of", **changes), Launches(kernels.lstm_scan, **options) as launches:
        if backward:
            torch.autograd.grad(hidden, [pre, weight], torch.randn_like(hidden))
        else:
            lstm_scan(pre, weight, True, form)
    return launches, h + w - 1


def drawn_rows(model, backend: str, b: int, rounds: int) -> PixelLoop:
    """Draw the first row and the second, `rounds` times each, and return the loop that did."""
    uniforms = torch.rand(b, *model.shape, device=model.device)
    loop = PixelLoop(model, "cached", Draw(uniforms), b, backend=backend)
    with loop.drawing():
        for i in [0] * rounds + [1] * rounds:
            loop.evaluator.load(i)
            loop.rule.load(i)
            loop.row(first=i == 0)
    return loop


def times_of(run: Callable[[], None], args: argparse.Namespace, rounds: int = 1) -> list[float]:
    """Milliseconds of one of `rounds` calls, as often as `args.repeats` says."""

    def several() -> None:
        for _ in range(rounds):
            run()

    return [t / rounds for t in interleave({"": whole(several)}, args.device, args.repeats, warmup=2)[""]["total"]]


def scan_step(args: argparse.Namespace, backward: bool) -> dict:
    """Cut in blocks of 32 features forward and 128 backward, by 8 warps."""
    changes = {"block_n": 128 if backward else 32, "warps": 8}
    size = QUICK_SCAN if args.quick else SCAN
    launches, steps = scan_launches(size, backward, **changes)
    ms = times_of(launches.again, args, ROUNDS)
    return {"shape": list(size), "form": changes, "measured": spread(ms, 1e3 / steps), **launches.compiled()}


def pixel_cnn(args: argparse.Namespace):
    return large("pixel_cnn", args).eval().bfloat16()


def row_kernel(args: argparse.Namespace) -> dict:
    changes, b = {"images": 16, "block_n": 64, "block_k": 64, "warps": 4}, 2 if args.quick else 16
    return {"form": changes, **timed_row_kernel(pixel_cnn(args), b, args, changes)}


def timed_row_kernel(model, b: int, args: argparse.Namespace, changes: dict) -> dict:
    """A row of pixels, without what the rows above give: "measured" in ms a pixel of all images."""
    with cut(kernels.draw_row, "form_for", **changes), Launches(kernels.draw_row) as launches:
        loop = drawn_rows(model, "triton", b, rounds=1)
    with loop.drawing():
        launches.calls = launches.calls[-1:]
        ms = times_of(launches.again, args)
        return {"shape": [b, *model.shape], "measured": spread(ms, 1 / model.width), **launches.compiled()}


def graph_node(args: argparse.Namespace) -> dict:
    """Of any row but the first, captured after one such row ran as it is."""
    model, b = pixel_cnn(args), 2 if args.quick else 16
    loop = drawn_rows(model, "torch", b, rounds=1)
    with loop.drawing():
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(graph, stream=loop.stream):
            loop.evaluator.row(loop.rule, loop.values, False)
        graph.instantiate()
        nodes = nodes_of(graph)
        ms = times_of(graph.replay, args)
    row = {"shape": [b, *model.shape], "nodes": nodes, "row_ms": spread(ms)}
    return row | {"measured": spread(ms, 1e3 / (nodes or NODES))}


NODES = 11722  # of a row of the PixelCNN, by count of its operations: where the graph itself does not say


def nodes_of(graph) -> int | None:
    """How many nodes a captured graph has; None where neither torch nor CUDA says."""
    count = ctypes.c_size_t()
    try:
        status = ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(
            ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count)
        )
    except (OSError, AttributeError, RuntimeError):
        return None
    return count.value if status == 0 else None


FIGURES = {  # what measures it, unit, the model's range
    "scan_forward": (partial(scan_step, backward=False), "µs a step", (31.0, 33.0)),
    "scan_backward": (partial(scan_step, backward=True), "µs a step", (15.0, 16.5)),
    "row_kernel": (row_kernel, "ms a pixel", (0.28, 0.34)),  # 0.49–0.60 million cycles
    "graph_node": (graph_node, "µs a node", (1.6, 2.4)),
}


def held_against(name: str, args: argparse.Namespace) -> list[dict]:
    """One row: what was measured, beside the model's range and its middle."""
    measure, unit, model = FIGURES[name]
    row = measure(args)
    middle = sum(model) / 2
    out = {"figure": name, "unit": unit, "measured": row.pop("measured"), "model": {"low": model[0], "high": model[1]}}
    return [out | {"ratio": out["measured"]["median"] / middle, "ratio_to": "the middle of the model's range", **row}]


def on_a_gpu(options: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parse(options, argv)
    if args.device.type != "cuda":
        options.error(f"--device={args.device.type}: expected cuda")
    return args


def main(argv: list[str] | None = None) -> int:
    description = "Hold four figures of a model of the kernels' cost against the GPU."
    args = on_a_gpu(parser("cost", description, repeats=10, names=FIGURES), argv)
    results = Results(args, ("figure", "measured", "unit", "model", "ratio", "nodes", "row_ms"))
    for name in args.names:
        results.case({"figure": name}, partial(held_against, name, args))
    columns = ("figure", "measured", "unit", "model", "ratio", "nodes", "row_ms", "registers", "spills")
    table("Measured beside the model; ratio: measured over the middle of the model's range", results.rows, columns)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
