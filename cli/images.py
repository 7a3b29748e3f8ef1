"""Images that a command is given: a split of the data that a model was trained on, a file, or a folder of pictures.

Legend: n images · c channel (colour) · h w rows, columns.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checks import nearest, one_of, unexpected
from cli.runs import dataset_of
from data.arrays import open_integers
from data.given import files_of, read_images
from data.splits import SPLITS
from models.base import ImageModel


@dataclass
class Images:
    """Images and their labels, which `models.likelihood` measures as it does a split, and a name of each."""

    x: Tensor  # (n c h w)
    labels: Tensor | None  # (n,); None: there are none, or the model needs none
    names: list[str]  # of a picture its file's name, else the image's number

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, some: slice, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        return self.x[some], None if self.labels is None else self.labels[some]


def images_named(
    cfg, key: str, n: int | None, model: ImageModel, checkpoint: dict, path: Path, rounded: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Take in the first n images (n c h w) that `cfg[key]` names, and their labels (n,) if the data set has them.

    The arguments and errors are those of `images_of`; n may be None, for all.
    """
    given = str(cfg[key])
    if given in SPLITS:
        split = dataset_of(checkpoint, cfg.root, path).split(given).first(n)
        return split.batch(slice(None), torch.Generator().manual_seed(cfg.seed))
    if Path(given).exists():
        return read_images(Path(given), model.shape, model.levels, n, rounded), None
    expected = f"{one_of(SPLITS)}, a .npy file, a picture or a folder of pictures"
    raise unexpected(key, cfg[key], expected + nearest(given, SPLITS))


def images_of(cfg, key: str, model: ImageModel, checkpoint: dict, path: Path, rounded: bool = False) -> Images:
    """Take the images in that `cfg[key]` names, and their labels if the model is conditioned on them.

    Args:
        cfg: a config with root and seed, perhaps n, and a file of labels.
        checkpoint, path: the model's, which says what its splits are of.
        rounded: as in `read_images`.

    Raises:
        ValueError, OSError: there are no such images, or they are not the model's.
    """
    given, n, file, names = str(cfg[key]), cfg.get("n"), cfg.labels if key == "images" else None, None
    x, of_images = images_named(cfg, key, n, model, checkpoint, path, rounded)
    if given not in SPLITS and not given.lower().endswith(".npy"):
        names = [file.name for file in files_of(Path(given), n)]
    if file is not None:
        of_images = torch.from_numpy(np.array(open_integers(Path(file), "labels"), dtype=np.int64))[: len(x)]
    if not model.classes or cfg.get("without_label"):
        of_images = None
    elif of_images is None and not model.label_dropout:
        raise unexpected("labels", file, f"a .npy file of labels (n,), as {given} has none")
    model.check_condition(len(model.check(x)), of_images)
    return Images(x, of_images, names or [str(k) for k in range(len(x))])
