"""The optimizers of a training run, in the form that a CUDA graph can hold where the weights are on a GPU."""

import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from checks import check, check_one_of, unexpected


class Muon(torch.optim.AdamW):
    """Muon for weights, AdamW for biases, both at one learning rate.

    Legend: W a weight as a matrix (m n), see `matrix_of`; G its gradient; M the mean of gradients, at first 0;
    lr the learning rate, λ `weight_decay`, μ `momentum`.

        M ← μ M + (1 − μ) G
        W ← (1 − lr λ) W − lr · 0.2 √max(m, n) · orthogonal(μ M + (1 − μ) G)

    The factor makes a step as large, in the root mean square of its numbers, as AdamW's usually is.

    Weights of the same shape, as a network's layers have them, are computed together. After a step, weights have no
    gradients any more. Why not torch.optim.Muon: it accepts only matrices, takes one after the other, and needs the
    learning rate as a number on the host, which a CUDA graph cannot change.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the factor: Liu et al. 2025, 2502.16982.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], momentum: float = 0.95, **adamw):
        if not 0 <= momentum < 1:
            raise unexpected("optimizer.momentum", momentum, "a number from 0 to below 1")
        of_kind = {True: [], False: []}
        for name, parameter in named:
            of_kind[parameter.dim() < 2 or name.split(".")[-1] == "bias"].append(parameter)
        super().__init__([{"params": of_kind[False]}, {"params": of_kind[True]}], **adamw)
        self.momentum = momentum

    def __setstate__(self, state: dict) -> None:
        torch.optim.Optimizer.__setstate__(self, state)  # AdamW's would look for its own state in all weights

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        group = self.param_groups[0]
        of_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in group["params"]:
            if weight.grad is not None:
                of_shape.setdefault(tuple(weight.shape), []).append(weight)
        for weights in of_shape.values():
            gradients, means = [weight.grad for weight in weights], [self.mean_of(weight) for weight in weights]
            torch._foreach_lerp_(means, gradients, 1 - self.momentum)
            of_all = torch.stack(torch._foreach_lerp(means, gradients, 1 - self.momentum))
            steps = orthogonal(of_all.reshape(-1, *matrix_of(weights[0].shape)))
            steps = steps * (group["lr"] * 0.2 * max(steps.shape[1:]) ** 0.5)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_sub_(weights, [*steps.view(-1, *weights[0].shape)])
            for weight in weights:
                weight.grad = None  # so that AdamW skips it
        super().step()

    def mean_of(self, weight: nn.Parameter) -> Tensor:
        state = self.state[weight]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(weight)
        return state["mean"]


def matrix_of(shape: Sequence[int]) -> tuple[int, int]:
    """A weight as a matrix (m n): its dimensions cut in two where that is most nearly square.

    So a convolution's is (outputs, inputs · taps), and the Diagonal BiLSTM's both directions' outputs by their inputs.
    """
    cuts = ((math.prod(shape[:k]), math.prod(shape[k:])) for k in range(1, len(shape)))
    return min(cuts, key=lambda cut: max(cut) / min(cut))


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices (n rows columns) with the same singular vectors, whose singular values are all near 1.

    Five steps of a polynomial (Jordan et al. 2024) that take what is not far below the largest to 0.7 to 1.2.
    """
    x = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x if x.shape == matrices.shape else x.mT


OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW, "muon": Muon}


def build_optimizer(config: dict, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a model's parameters that `name` names, with the other keys as its arguments.

    Raises:
        ValueError: they do not fit.

    Where parameters are on a GPU, so are the learning rate and the count of steps: nothing waits for the host.
    """
    arguments = {"lr": None} | {key: value for key, value in config.items() if key != "name"}
    check_one_of("optimizer.name", config.get("name"), OPTIMIZERS)
    kind, device = OPTIMIZERS[config["name"]], next(model.parameters()).device
    parameters = model.named_parameters() if kind is Muon else model.parameters()
    for key, value in arguments.items():
        if key == "betas":
            if not (isinstance(value, list) and len(value) == 2 and all(isinstance(x, int | float) for x in value)):
                raise unexpected("optimizer.betas", value, "two numbers, as in [0.9,0.99]")
        elif key in ("lr", "eps", "weight_decay", "alpha", "momentum"):
            check(f"optimizer.{key}", value, float, 0)
    if device.type == "cuda":
        arguments |= {"capturable": True, "lr": torch.tensor(float(arguments["lr"]), device=device)}
        # a step that no graph holds is warned of: the first ones are such, and so are all where no graph is asked for
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
    try:
        return kind(parameters, foreach=True, **arguments)  # a few operations for all parameters together
    except (TypeError, ValueError) as error:
        raise ValueError(f"optimizer={config}: expected arguments of {kind.__name__} ({error})") from None


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate, in place where a CUDA graph reads it."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a state that was saved on any device; ValueError if a tensor of it has another shape than its parameter.

    The optimizer keeps its own arguments, even where the state was written with others.
    """
    groups = [{**group, **optimizer.defaults} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(f"{name} of shape {tuple(value.shape)} for a parameter {tuple(parameter.shape)}")
