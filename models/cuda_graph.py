"""A GPU's work said once and replayed: a CUDA graph.

Python takes longer to launch a kernel than a GPU takes for many of them. A graph is captured from one run; a replay
launches all of it at once, on the same memory, and asks the host nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch


def on(device: torch.device):
    """Make `device` the current one: Triton's launches and CUDA graphs go there, not to where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def in_turn(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """On another stream, if there is one, after all that the current one has to do; that waits for it afterwards."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(run: Callable[[], None], stream: "torch.cuda.Stream") -> Callable[[], None]:
    """Capture `run` as a CUDA graph, and return what replays it.

    It must have run before on this stream: libraries allocate workspaces and choose algorithms on first use, which a
    graph cannot record.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay
