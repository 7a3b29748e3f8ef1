"""Begin a training with the weights of a trained model."""

from torch import nn

from models.base import ImageModel
from models.body import Body


def begin_with(model: ImageModel, trained: ImageModel) -> None:
    """Give a model the weights of a trained one.

    It may have more layers: those behind the trained ones begin by adding nothing to the residual stream, so that the
    model begins as the same function (Chen et al. 2016, 1511.05641).

    Raises:
        ValueError: other weights differ.
    """
    weights = trained.state_dict()
    for path, body in model.named_modules():
        if isinstance(body, Body):
            weights |= further_layers(path, body, trained)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


def further_layers(path: str, body: Body, trained: nn.Module) -> dict:
    """The weights of a body's layers that the trained model, whose body has the same path, does not have."""
    had = dict(trained.named_modules()).get(path)
    if not isinstance(had, Body) or not body.residual:
        return {}
    out = {}
    for name, weight in body.state_dict().items():
        part, *rest = name.split(".")
        if rest and rest[0].isdigit() and int(rest[0]) >= had.layers:
            out[f"{path}.{name}"] = 0 * weight if part in ("up", "to_head") else weight
    return out
