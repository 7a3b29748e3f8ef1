"""One run by several processes, as torchrun starts them: what the first decides holds for all, and what each finds.

With one process, all of this is what it would be without.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

import torch
import torch.distributed as dist

from cli.command import Stopped
from cli.machine import rank_and_world


@contextmanager
def together() -> Iterator[None]:
    """Within, the processes of torchrun can talk to each other; those but the first print no output, only errors."""
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if rank else sys.stdout):
            yield
        gc.collect()  # what still holds the group: destroying it first can abort the process
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def others_alive() -> Iterator[None]:
    """Say in one line that another process has ended, and this one cannot go on."""
    try:
        yield
    except RuntimeError as error:
        raise Stopped(f"another process of this run has ended ({str(error).splitlines()[0]})", 1) from error


def from_first(make: Callable[[], object]) -> object:
    """Call `make` in the first process only, and return its result in all; if it raises an error, all stop."""
    rank, world = rank_and_world()
    if world == 1:
        return make()
    said, error = [None, None], None
    if rank == 0:
        try:
            said = [make(), None]
        except Exception as raised:
            said, error = [None, 1], raised
    with others_alive():
        dist.broadcast_object_list(said)
    if error:
        raise error
    if said[1]:
        raise Stopped("", said[1])  # the first one says why
    return said[0]


def largest(n: int) -> int:
    """Return the largest of the processes' integers, in all of them."""
    if rank_and_world()[1] == 1:
        return n
    out = torch.tensor(n)
    with others_alive():
        dist.all_reduce(out, dist.ReduceOp.MAX)
    return int(out)


def total(x: float) -> float:
    """Return the sum of the processes' numbers, in all of them."""
    if rank_and_world()[1] == 1:
        return x
    out = torch.tensor(x, dtype=torch.float64)
    with others_alive():
        dist.all_reduce(out)
    return out.item()


def gathered(x: object) -> list:
    """Return what the processes have, in all of them, by their numbers."""
    out = [None] * rank_and_world()[1]
    if len(out) == 1:
        return [x]
    with others_alive():
        dist.all_gather_object(out, x)
    return out


def own_part(n: int) -> slice:
    """Return which of n things are this process's: as many as others have, or one more."""
    rank, world = rank_and_world()
    return slice(rank * n // world, (rank + 1) * n // world)
