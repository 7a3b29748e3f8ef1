"""The stored real data sets beside the repository, where they are there."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import data

UNPACK = Path(__file__).resolve().parents[2] / "shared/data/unpack.py"


def stored_sets() -> ModuleType:
    """The script that lays them out; where it is not there, the test is skipped."""
    if not UNPACK.is_file():
        pytest.skip("the stored data sets (../shared/data beside the repository) are not there")
    spec = importlib.util.spec_from_file_location("unpack", UNPACK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cifar10_test(stored: ModuleType) -> np.ndarray:
    """The first 1,000 test images: (n c h w)."""
    mosaic = np.asarray(Image.open(stored.check("cifar10/test_00.webp")).convert("RGB"))
    return mosaic.reshape(-1, 32, 40, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)[:1000]


def first_test_images(config: dict, n: int, folder: Path) -> Tensor:
    """The first n test images (n c h w) of a data set, or clips, laid out in a folder if need be."""
    name = config["name"]
    if name == "cifar10":
        return torch.from_numpy(cifar10_test(stored_sets())[:n].copy()).long()
    if name not in ("digits", "moving_digits"):  # which come with the project
        lay_out = getattr(stored_sets(), name, None)
        if lay_out is None:
            pytest.skip(f"{name} is not among the stored data sets")
        (folder / name).mkdir()
        lay_out(folder / name)
    return data.build({**config, "root": folder}).test.batch(slice(n))[0].long()
