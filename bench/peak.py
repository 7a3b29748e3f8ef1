"""What the multiply-add units of a CPU do at most: chains of them in registers, which load and store nothing."""

from __future__ import annotations

import torch

from bench.measure import interleave, spread, whole
from kernels import native
from kernels.vector import Code

COUNT = 10_000_000  # of times that each chain goes on


def chains(many: bool) -> int:
    """How many go on side by side: each waits for itself, and all are in registers."""
    return 24 if many else 12


def write(code: Code) -> None:
    """Write the function `run`."""

    def run(code: Code, count, out) -> None:
        sums = [code.variable(code.number(k)) for k in range(chains(code.many))]
        with code.loop(count):
            for x in sums:
                x.set(code.fma(x.get(), code.number(0.999), code.number(0.001)))
        for k, x in enumerate(sums):
            code.store(x.get(), out, k)

    code.function(run, "ip", name="run")


def multiply_adds(repeats: int, count: int = COUNT) -> float:
    """GFLOP/s in float32, two for each multiply-add, of as many threads as torch uses."""
    lanes, threads = native.lanes(1 << 20, False), torch.get_num_threads()
    side_by_side = chains(native.registers(lanes, False)[1])
    function = native.library(write, {"run": 2}, lanes)["run"]
    out = torch.empty(threads, side_by_side, lanes)

    def some(thread: int):
        function(count, out[thread].data_ptr())
        yield

    times = interleave({"all": whole(lambda: native.share(some, threads))}, torch.device("cpu"), repeats, warmup=1)
    return 2 * threads * count * side_by_side * lanes / (spread(times["all"]["total"])["median"] * 1e6)
