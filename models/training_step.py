"""A training step: loss, gradients, clipping, the optimizer, the averaged weights; on a GPU, all as one CUDA graph.

Legend: b batch · c channel (colour) · h w rows, columns.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.cuda_graph import captured, in_turn, on
from models.dropout import key_of, masks_of
from models.optimizers import set_rate

WARM_UP = 2  # steps before a capture: libraries choose algorithms, the optimizer makes its state


class TrainingStep:
    """`step(x, label, lr=…)` takes a step of the optimizer on images, and returns the nats that they had before it.

    On a GPU, the steps on images of a new shape run as they come twice, on the graph's stream; the third is captured,
    and from then on each copies its images and its numbers to where the graph reads them, and replays it. Losses and
    weights are the same bits as without a graph.

    In one of several processes (torch.distributed), each takes the step on its share of the images, and all get the
    same weights, by DistributedDataParallel; there is no graph then.

    Args:
        model: what makes nats (b,) of images. A graph stays in the mode, training or not, that it was captured in.
        optimizer: of the model's parameters, from `build_optimizer`.
        average: a copy of the model whose weights follow the model's.
        clip: gradients of a larger norm than this, all together, are scaled down to it.
        accumulate: into how many parts the images are cut, one after the other, so that less memory is needed.
        seed: of dropout.
        bf16: on a GPU, matrix products in bfloat16 (weights, states and sums stay in float32).
        graph: on a GPU, capture a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None = None,
        clip: float | None = None,
        *,
        accumulate: int = 1,
        seed: int = 0,
        bf16: bool = False,
        graph: bool = True,
    ):
        self.model, self.optimizer, self.average, self.clip = model, optimizer, average, clip
        self.accumulate, self.seed = accumulate, seed
        self.parameters = [*model.parameters()]
        self.device = self.parameters[0].device
        self.processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        self.forward = distributed(model) if self.processes > 1 else model
        cuda = self.device.type == "cuda"
        self.bf16, self.graph = bf16 and cuda, graph and cuda and self.processes == 1
        self.decay = torch.zeros((), device=self.device)
        self.inputs: list[Tensor | None] = []  # where the graph reads them
        self.keys = torch.zeros(0, 2, dtype=torch.long, device=self.device)  # of each image's dropout
        self.images = (0, 0)
        self.replay: Callable[[], None] | None = None

    def __call__(
        self,
        *inputs: Tensor | None,
        lr: float,
        decay: float = 0.0,
        step: int = 0,
        first: int = 0,
        of: int | None = None,
    ) -> Tensor:
        """Take a step of the optimizer.

        Args:
            inputs: images (b c h w), not checked, and what they are conditioned on.
            lr: the learning rate.
            decay: how much of themselves the averaged weights keep, from 0 (none: the model's are copied) to 1.
            step: its number, of which dropout depends.
            first, of: the number of the first of these images among those of all processes, and how many all are;
                None: b.

        Returns:
            The part of these images in the mean nats of all before the step, a scalar: with one process, their mean.
        """
        inputs = [None if x is None else x.to(self.device) for x in inputs]
        of = of or len(inputs[0])
        with on(self.device):
            set_rate(self.optimizer, lr)
            self.decay.fill_(decay)
            if self.images != (first, of) or len(self.keys) != len(inputs[0]):
                self.images, numbers = (first, of), torch.arange(first, first + len(inputs[0]), device=self.device)
                self.keys, self.replay, self.inputs = torch.stack([numbers, numbers], dim=1), None, []
            self.keys[:, 0] = key_of(self.seed, step)
            return (self.run if self.graph else self.compute)(inputs)

    def compute(self, inputs: list[Tensor | None]) -> Tensor:
        """Take the step, one operation after the other."""
        for parameter in self.parameters:
            parameter.grad = None  # a backward pass would add to it
        nats, parts = 0.0, [[None] * self.accumulate if x is None else x.tensor_split(self.accumulate) for x in inputs]
        for k, (keys, *part) in enumerate(zip(self.keys.tensor_split(self.accumulate), *parts, strict=True)):
            nats = nats + self.add_gradients(keys, part, last=k == self.accumulate - 1)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        if self.average:
            follow(self.average, self.model, self.decay)
        return nats

    def add_gradients(self, keys: Tensor, part: list[Tensor | None], last: bool) -> Tensor:
        """Add a part's gradients to what there is, and return its share in the mean nats of all images."""
        own = nullcontext() if last or self.processes == 1 else self.forward.no_sync()  # others' come with the last
        half = torch.autocast("cuda", torch.bfloat16, enabled=self.bf16)
        with own:
            with masks_of(keys), half:
                nats = self.forward(*part).sum() / self.images[1]
            # the processes' gradients are averaged, and should be added
            (nats * self.processes / part[0][0].numel()).backward()
        return nats.detach()

    def run(self, inputs: list[Tensor | None]) -> Tensor:
        """Take the step from the graph's memory: as it comes at first, then captured, then replayed."""
        if shapes(inputs) != shapes(self.inputs):
            self.replay = self.nats = None  # frees the memory of an older graph
            self.inputs, self.warm = [None if x is None else x.clone() for x in inputs], 0
            self.stream = torch.cuda.Stream(self.device)
        for static, x in zip(self.inputs, inputs, strict=True):
            if x is not None:
                static.copy_(x)
        if self.warm < WARM_UP:
            self.warm += 1
            with in_turn(self.stream):
                self.compute_again()
        else:
            self.replay = self.replay or captured(self.compute_again, self.stream)
            self.replay()
        return self.nats.clone()

    def compute_again(self) -> None:
        self.nats = self.compute(self.inputs)


def distributed(model: nn.Module) -> nn.Module:
    """The model, whose gradients are averaged over all processes as soon as a backward pass has them."""
    devices = [model.device] if model.device.type == "cuda" else None
    kind = nn.parallel.DistributedDataParallel
    of_buffers = {"forward_sync_buffers", "broadcast_buffers"} & {*inspect.signature(kind).parameters}
    options = {max(of_buffers): False}  # masks, which never change; torch 2.13 has given it the longer name
    partly = bool(getattr(model, "only_base", False))  # some parameters take no part
    return kind(model, devices, find_unused_parameters=partly, **options)


def follow(average: nn.Module, model: nn.Module, decay: Tensor) -> None:
    """Move averaged weights to decay · average + (1 − decay) · model; decay is a scalar, on their device."""
    averages = [*average.parameters()]
    with torch.no_grad():
        news = torch._foreach_mul([*model.parameters()], 1 - decay)
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, news)


def shapes(inputs: list[Tensor | None]) -> list:
    return [None if x is None else x.shape for x in inputs]
