"""A GPU that is not there: `install()` makes tensors on the CPU say that they are on one, for the rest of the process.

Triton's launches go to `bench.stand_in`: bound, checked and recorded, never run. So all host code runs as on a GPU, and
the numbers mean nothing. What a GPU would refuse is refused: a launch or a capture while another device is the current
one, a synchronisation while a row is captured.

    FAKE_GPU_INDEX   the device that tensors are on (0); the current one is 0 at first
    FAKE_GPU_OUT     a folder: the variants of kernels that were launched go there when the process ends
"""

import atexit
import contextlib
import functools
import os
import pickle
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

INDEX = int(os.environ.get("FAKE_GPU_INDEX", 0))
HERE = torch.device("cuda", INDEX)
CPU = torch.device("cpu")
FACTORIES = "zeros ones empty full tensor randn rand randint arange eye randperm as_tensor linspace empty_strided"
ALIKE = "zeros_like ones_like empty_like full_like randn_like rand_like"
METHODS = "to new_zeros new_ones new_empty new_full new_tensor"

real_device = torch.Tensor.device
real_bmm = torch.bmm
gpu = None  # the stand-in, once installed
state = {"device": 0, "capturing": False, "replaying": False, "graphs": 0, "replays": 0}
SYNCHRONISING = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def on_cpu(x):
    """A device by any of its names: the CPU in place of a GPU."""
    if isinstance(x, torch.device) and x.type == "cuda":
        return CPU
    return "cpu" if isinstance(x, str) and x.split(":")[0] == "cuda" else x


def with_devices(function):
    """The function, told the CPU where it is told a GPU."""

    @functools.wraps(function)
    def wrapped(*arguments, **named):
        return function(*map(on_cpu, arguments), **{name: on_cpu(x) for name, x in named.items()})

    return wrapped


def index_of(device) -> int:
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return 0 if index is None else index


def check_current(what: str) -> None:
    assert state["device"] == INDEX, f"{what} on cuda:{INDEX} while cuda:{state['device']} is the current device"


def synchronize(*_, **__) -> None:
    assert not state["capturing"], "a synchronisation while a CUDA graph is captured"


class Device:
    """torch.cuda.device."""

    def __init__(self, device):
        self.index = index_of(device)

    def __enter__(self):
        self.before, state["device"] = state["device"], self.index

    def __exit__(self, *_):
        state["device"] = self.before


class Stream:
    def __init__(self, device=None):
        self.device = state["device"] if device is None else index_of(device)

    def wait_stream(self, stream) -> None:
        pass

    def is_capturing(self) -> bool:
        return state["capturing"]

    synchronize = synchronize


class Event:
    def __init__(self, **_):
        pass

    def record(self, *_) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other) -> float:
        return (other.at - self.at) * 1e3

    synchronize = synchronize


class Graph(TorchDispatchMode):
    """torch.cuda.CUDAGraph: notes what torch computes while it is captured, and computes it again in the same memory.

    It is computed while it is captured, which it is not on a GPU, and then undone.
    """

    def __init__(self, keep_graph: bool = False):
        super().__init__()
        self.calls: list[tuple] = []
        self.before: dict[int, tuple] = {}  # memory, and what was there before the capture

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        assert function not in SYNCHRONISING, f"a synchronisation while a CUDA graph is captured: {function}"
        for x in tree_leaves((arguments, named)):
            if isinstance(x, torch.Tensor) and (memory := x.untyped_storage()).data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()
        out = function(*arguments, **(named or {}))
        self.calls.append((function, arguments, named or {}, out))
        return out

    def __exit__(self, *of) -> None:
        super().__exit__(*of)
        for memory, before in self.before.values():
            memory.copy_(before)

    def instantiate(self) -> None:
        pass

    def replay(self) -> None:
        check_current("a replay")
        state["replays"] += 1
        with torch.no_grad():
            for function, arguments, named, out in self.calls if state["replaying"] else ():
                again = function(*arguments, **named)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def replaying():
    """Within, a replay computes what was captured; it does nothing elsewhere."""
    state["replaying"] = True
    yield
    state["replaying"] = False


@contextlib.contextmanager
def graph(graph: Graph, pool=None, stream=None):
    """torch.cuda.graph."""
    check_current("a capture")
    assert stream is None or stream.device == INDEX, "captured on another device's stream"
    assert not state["capturing"]
    state["capturing"] = True
    state["graphs"] += 1
    random = torch.get_rng_state()
    with graph if state["replaying"] else contextlib.nullcontext():
        yield
    torch.set_rng_state(random)
    state["capturing"] = False


@contextlib.contextmanager
def on_stream(stream):
    """torch.cuda.stream, which makes the stream's device the current one."""
    with Device(stream.device):
        yield


def bmm(a, b, out_dtype=None, **named):
    return real_bmm(a, b, **named) if out_dtype is None else real_bmm(a.to(out_dtype), b.to(out_dtype), **named)


class Autocast(torch.autocast):
    def __init__(self, device_type, *arguments, **named):
        super().__init__(on_cpu(device_type), *arguments, **named)


def install():
    """Fake torch.cuda and have the stand-in, `gpu`, record Triton's launches."""
    cuda, tensor = torch.cuda, torch.Tensor
    cuda.is_available, cuda.device_count = lambda: True, lambda: INDEX + 1
    cuda.get_device_name = lambda *_: "no GPU: a fake"
    cuda.get_device_capability = lambda *_: (9, 0)
    properties = SimpleNamespace(multi_processor_count=132, total_memory=80 << 30, major=9, minor=0)
    cuda.get_device_properties = lambda *_: properties
    cuda.max_memory_allocated = lambda *_: 1
    cuda.current_device, cuda.set_device = lambda: state["device"], lambda device: state.update(device=index_of(device))
    cuda.empty_cache = cuda.reset_peak_memory_stats = lambda *_: None
    cuda.get_rng_state_all, cuda.set_rng_state_all = lambda: [], lambda states: None
    cuda.get_rng_state, cuda.set_rng_state = lambda _: torch.get_rng_state(), lambda x, _: torch.set_rng_state(x)
    cuda.manual_seed_all = lambda seed: None
    cuda.synchronize, cuda.device, cuda.Stream, cuda.Event = synchronize, Device, Stream, Event
    cuda.current_stream, cuda.stream, cuda.CUDAGraph, cuda.graph = Stream, on_stream, Graph, graph
    cuda.is_current_stream_capturing = lambda: state["capturing"]
    torch.accelerator.current_stream = Stream
    tensor.is_cuda = property(lambda x: real_device.__get__(x).type == "cpu")
    tensor.device = property(lambda x: HERE if real_device.__get__(x).type == "cpu" else real_device.__get__(x))
    tensor.cuda = tensor.cpu = lambda x, *_, **__: x
    torch.nn.Module.cuda = torch.nn.Module.cpu = lambda module, *_: module
    for name in f"{FACTORIES} {ALIKE}".split():
        setattr(torch, name, with_devices(getattr(torch, name)))
    for name in METHODS.split():
        setattr(tensor, name, with_devices(getattr(tensor, name)))
    for place, name in ((torch.nn.Module, "to"), (torch, "load"), (torch, "get_autocast_dtype")):
        setattr(place, name, with_devices(getattr(place, name)))
    torch.is_autocast_enabled = with_devices(torch.is_autocast_enabled)
    torch.bmm, torch.autocast = bmm, Autocast
    torch.compile = lambda module, **_: module  # Dynamo does not trace what is faked here
    global gpu
    gpu = stand_in()


def stand_in():
    """Record launches from now on."""
    from bench.stand_in import StandIn

    class Checked(StandIn):
        def record(self, **named) -> bool:
            check_current("a launch")
            return super().record(**named)

    out = Checked().__enter__()
    if folder := os.environ.get("FAKE_GPU_OUT"):
        atexit.register(lambda: (Path(folder) / f"{os.getpid()}.pickle").write_bytes(pickle.dumps(out.variants)))
    return out
