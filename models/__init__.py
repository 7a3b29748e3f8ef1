"""Exact-likelihood image models. `build` makes one from a config; the classes may be called directly as well."""

import inspect
from collections.abc import Mapping

from checks import check_one_of, one_of
from models.diag_bilstm import DiagBiLSTM
from models.gated_pixel_cnn import GatedPixelCNN
from models.multi_scale import MultiScale
from models.pixel_cnn import PixelCNN
from models.row_lstm import RowLSTM
from models.video import Video

__all__ = ["DiagBiLSTM", "GatedPixelCNN", "MultiScale", "PixelCNN", "RowLSTM", "Video"]


def build(config: Mapping):
    """Make the model that a config names.

    Args:
        config: `_target_` ("models.PixelCNN", …) and the arguments of that class's constructor. No other class, and
            nothing nested, is ever instantiated, so a config from an untrusted checkpoint is safe.

    Raises:
        ValueError: for an unknown class, an unknown, missing or wrong argument; names it and what was expected.
    """
    arguments = {str(key): value for key, value in config.items()}
    target = arguments.pop("_target_", None)
    allowed = {f"models.{name}": globals()[name] for name in __all__}
    check_one_of("_target_", target, allowed)
    parameters = inspect.signature(allowed[target]).parameters
    for name in arguments:
        if name not in parameters:
            raise ValueError(f"{target}: expected {one_of(parameters)}, found {name!r}")
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ValueError(f"{target}: expected {', '.join(missing)} too, found none")
    return allowed[target](**arguments)
