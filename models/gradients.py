"""The loss of a training step and its gradients; on a GPU, both passes as one CUDA graph.

Legend: b batch · c channel (colour) · h w rows, columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.cuda_graph import captured, in_turn, on


class Gradients:
    """`gradients(x, label)` leaves in each parameter's `grad` the gradient of the nats a sub-pixel of images.

    A graph is captured from the first images, after two runs that leave no trace; from then on each call copies its
    images to where the graph reads them, and replays it. Losses and gradients are the same bits as without a graph, and
    so are the random numbers that dropout takes.

    Args:
        model: what makes nats (b,) of images. A graph stays in the mode, training or not, that it was captured in.
        bf16: on a GPU, matrix products in bfloat16 (weights, states and sums stay in float32).
        graph: on a GPU, capture a graph.
    """

    def __init__(self, model: nn.Module, bf16: bool = False, graph: bool = True):
        self.model, self.parameters = model, [*model.parameters()]
        self.device = self.parameters[0].device
        cuda = self.device.type == "cuda"
        self.bf16, self.graph = bf16 and cuda, graph and cuda
        self.inputs: list[Tensor | None] = []  # where the graph reads them
        self.replay: Callable[[], None] | None = None

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """Images (b c h w), not checked, and what they are conditioned on → their mean nats, a scalar."""
        inputs = [None if x is None else x.to(self.device) for x in inputs]
        with on(self.device):
            if not self.graph:
                return self.compute(inputs)
            if shapes(inputs) != shapes(self.inputs):
                self.capture(inputs)
            for static, x in zip(self.inputs, inputs, strict=True):
                if x is not None:
                    static.copy_(x)
            self.replay()
            for parameter, grad in zip(self.parameters, self.grads, strict=True):
                parameter.grad = grad  # where the graph writes: what others may have put there is dropped
            return self.nats.clone()

    def compute(self, inputs: list[Tensor | None]) -> Tensor:
        """Run both passes, one operation after the other."""
        self.forget()
        with torch.autocast("cuda", torch.bfloat16, enabled=self.bf16):
            nats = self.model(*inputs).mean()
        (nats / inputs[0][0].numel()).backward()
        return nats.detach()

    def forget(self) -> None:
        """Drop the gradients there are: a backward pass would add to them."""
        for parameter in self.parameters:
            parameter.grad = None

    def capture(self, inputs: list[Tensor | None]) -> None:
        """Capture both passes over images like these."""
        self.replay = self.nats = self.grads = None  # frees the memory of an older graph
        self.inputs = [None if x is None else x.clone() for x in inputs]
        stream, random = torch.cuda.Stream(self.device), torch.cuda.get_rng_state(self.device)
        with in_turn(stream):
            for _ in range(2):
                self.compute(self.inputs)
        self.forget()
        torch.cuda.set_rng_state(random, self.device)
        self.replay = captured(self.compute_again, stream)

    def compute_again(self) -> None:
        """Compute from the graph's own memory into it."""
        self.nats = self.compute(self.inputs)
        self.grads = [parameter.grad for parameter in self.parameters]


def shapes(inputs: list[Tensor | None]) -> list:
    return [None if x is None else x.shape for x in inputs]
