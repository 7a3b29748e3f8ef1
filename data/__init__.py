"""Data sets by name: from any source, integer images (n c h w) or clips (n t c h w), in train, val and test.

    dataset = data.build({"name": "mnist", "root": None, "binarize": "none"})
    x, labels = dataset.train.batch(index)

One file a kind of source; each loader is a function whose keyword arguments are the options of that data set.
"""

import inspect
from collections.abc import Mapping

from checks import check_one_of
from data.amat import binary_mnist
from data.arrays import npy
from data.cifar import cifar10
from data.digits import digits
from data.folder import image_folder
from data.idx import fashion_mnist, mnist
from data.imagenet import imagenet32, imagenet64
from data.moving import moving_digits
from data.parquet import parquet
from data.splits import Dataset, Split

LOADERS = {
    loader.__name__: loader
    for loader in (
        digits,
        mnist,
        binary_mnist,
        fashion_mnist,
        cifar10,
        imagenet32,
        imagenet64,
        moving_digits,
        npy,
        image_folder,
        parquet,
    )
}

__all__ = ["LOADERS", "Dataset", "Split", "build"]


def build(config: Mapping) -> Dataset:
    """Load the data set that `config` describes.

    Args:
        config: `name`, one of LOADERS, and any of that loader's keyword arguments.

    Raises:
        ValueError: an unknown name, option or value, or a damaged file; it says what was expected.
        FileNotFoundError: files are missing and cannot be downloaded; it says which to put where.

    Either is a single line.
    """
    # get, not items: a Hydra config raises an error of several lines on a value that is still "???".
    options = {key: config.get(key) for key in config}
    name = options.pop("name", None)
    check_one_of("dataset.name", name, LOADERS)
    allowed = inspect.signature(LOADERS[name]).parameters
    for key in options:
        if key not in allowed:
            raise ValueError(f"dataset.{key}: expected an option of {name}: {', '.join(allowed)}")
    return LOADERS[name](**options)
