"""PixelRNN as a library, from any folder: `import pixelrnn`, after `pip install -e .` in the checkout.

The names are those of `models`, its `base`, `sampling`, `checkpoint`, `compression` and `scores`, which are packages
of the checkout: they can be imported too, once this module is.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where models, kernels and data are

from data import build as dataset
from kernels import use
from models import DiagBiLSTM, GatedPixelCNN, MultiScale, PixelCNN, RowLSTM, Video, build
from models.base import ImageModel
from models.checkpoint import find, load
from models.compression import compress, decompress
from models.sampling import batches, sample
from models.scores import scores

__all__ = [
    "DiagBiLSTM",
    "GatedPixelCNN",
    "ImageModel",
    "MultiScale",
    "PixelCNN",
    "RowLSTM",
    "Video",
    "batches",
    "build",
    "compress",
    "dataset",
    "decompress",
    "find",
    "load",
    "sample",
    "scores",
    "use",
]
