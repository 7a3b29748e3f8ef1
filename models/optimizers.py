"""The optimizers of a training run, in the form that a CUDA graph can hold where the weights are on a GPU."""

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from checks import check, check_one_of, unexpected

OPTIMIZERS = {"rmsprop": torch.optim.RMSprop, "adamw": torch.optim.AdamW}


def build_optimizer(config: dict, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer that `name` names, with the other keys as its arguments; ValueError if they do not fit.

    Where parameters are on a GPU, so are the learning rate and the count of steps: nothing waits for the host.
    """
    arguments = {"lr": None} | {key: value for key, value in config.items() if key != "name"}
    parameters = [*parameters]
    check_one_of("optimizer.name", config.get("name"), OPTIMIZERS)
    kind, device = OPTIMIZERS[config["name"]], parameters[0].device
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
        raise ValueError(f"optimizer={config}: expected arguments of torch.optim.{kind.__name__} ({error})") from None


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
