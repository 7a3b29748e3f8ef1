"""Exact-likelihood image models. `build` makes one from a config; the classes may be called directly as well."""

import inspect
from collections.abc import Mapping

from models.diag_bilstm import DiagBiLSTM
from models.gated_pixel_cnn import GatedPixelCNN
from models.multi_scale import MultiScale
from models.pixel_cnn import PixelCNN
from models.row_lstm import RowLSTM

__all__ = ["DiagBiLSTM", "GatedPixelCNN", "MultiScale", "PixelCNN", "RowLSTM"]


def build(config: Mapping):
    """Make the model that a config names.

    Args:
        config: `_target_` ("models.PixelCNN", …) and the arguments of that class's constructor. No other class, and
            nothing nested, is ever instantiated, so a config from an untrusted checkpoint is safe.

    Raises:
        ValueError: for an unknown class, an unknown, missing or wrong argument; names it and what is allowed.
    """
    arguments = {str(key): value for key, value in config.items()}
    target = arguments.pop("_target_", None)
    allowed = {f"models.{name}": globals()[name] for name in __all__}
    if not isinstance(target, str) or target not in allowed:
        raise ValueError(f"_target_={target!r} is no model: one of {', '.join(allowed)} is")
    parameters = inspect.signature(allowed[target]).parameters
    for name in arguments:
        if name not in parameters:
            raise ValueError(f"{name!r} is no argument of {target}: {', '.join(parameters)} are")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ValueError(f"{target} needs {', '.join(missing)}")
    return allowed[target](**arguments)
