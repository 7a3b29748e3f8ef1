"""A training step: loss, gradients, clipping, the optimizer, the averaged weights; on a GPU, all as one CUDA graph.

Legend: b batch · c channel (colour) · h w rows, columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.cuda_graph import captured, in_turn, on
from models.optimizers import set_rate

WARM_UP = 2  # steps before a capture: libraries choose algorithms, the optimizer makes its state


class TrainingStep:
    """`step(x, label, lr=…)` takes a step of the optimizer on images, and returns the nats that they had before it.

    On a GPU, the steps on images of a new shape run as they come twice, on the graph's stream; the third is captured,
    and from then on each copies its images and its two numbers to where the graph reads them, and replays it. Losses
    and weights are the same bits as without a graph, and so are the random numbers that dropout takes.

    Args:
        model: what makes nats (b,) of images. A graph stays in the mode, training or not, that it was captured in.
        optimizer: of the model's parameters, from `build_optimizer`.
        average: a copy of the model whose weights follow the model's.
        clip: gradients of a larger norm than this, all together, are scaled down to it.
        bf16: on a GPU, matrix products in bfloat16 (weights, states and sums stay in float32).
        graph: on a GPU, capture a graph.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: nn.Module | None = None,
        clip: float | None = None,
        bf16: bool = False,
        graph: bool = True,
    ):
        self.model, self.optimizer, self.average, self.clip = model, optimizer, average, clip
        self.parameters = [*model.parameters()]
        self.device = self.parameters[0].device
        cuda = self.device.type == "cuda"
        self.bf16, self.graph = bf16 and cuda, graph and cuda
        self.decay = torch.zeros((), device=self.device)
        self.inputs: list[Tensor | None] = []  # where the graph reads them
        self.replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | None, lr: float, decay: float = 0.0) -> Tensor:
        """Take a step of the optimizer.

        Args:
            inputs: images (b c h w), not checked, and what they are conditioned on.
            lr: the learning rate.
            decay: how much of themselves the averaged weights keep, from 0 (none: the model's are copied) to 1.

        Returns:
            The mean nats of the images before the step, a scalar.
        """
        inputs = [None if x is None else x.to(self.device) for x in inputs]
        with on(self.device):
            set_rate(self.optimizer, lr)
            self.decay.fill_(decay)
            return (self.run if self.graph else self.compute)(inputs)

    def compute(self, inputs: list[Tensor | None]) -> Tensor:
        """Take the step, one operation after the other."""
        for parameter in self.parameters:
            parameter.grad = None  # a backward pass would add to it
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            nats = self.model(*inputs).mean()
        (nats / inputs[0][0].numel()).backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.clip, foreach=True)
        self.optimizer.step()
        if self.average:
            follow(self.average, self.model, self.decay)
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


def follow(average: nn.Module, model: nn.Module, decay: Tensor) -> None:
    """Move averaged weights to decay · average + (1 − decay) · model; decay is a scalar, on their device."""
    averages = [*average.parameters()]
    with torch.no_grad():
        news = torch._foreach_mul([*model.parameters()], 1 - decay)
        torch._foreach_mul_(averages, decay)
        torch._foreach_add_(averages, news)


def shapes(inputs: list[Tensor | None]) -> list:
    return [None if x is None else x.shape for x in inputs]
