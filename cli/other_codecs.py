"""How many bytes other lossless codecs take for the same images.

Legend: n images · c channel (colour) · h w rows, columns.

PNG, WebP and JPEG XL code each image by itself, and all of them side by side in pictures of up to 64 × 64, where a
file's head weighs less and the codec learns from more. LZMA codes the bytes of all images, one after another.
"""

import lzma
import math
from collections.abc import Callable, Iterator

import numpy as np
from einops import rearrange
from torch import Tensor

from models.scores import PNG, picture_bytes
from models.video import film

SIDE = 64  # images of a picture's row, and rows


def formats() -> dict[str, dict]:
    """Name → what Pillow is told. JPEG XL is there where pillow-jxl-plugin is."""
    out = {"PNG": PNG}
    out["WebP"] = {"format": "WEBP", "lossless": True, "quality": 100, "method": 6}
    try:
        import pillow_jxl  # noqa: F401, it registers the format
    except ImportError:
        return out
    return out | {"JPEG XL": {"format": "JXL", "lossless": True, "effort": 7}}


def sizes(x: Tensor, levels: int, tell: Callable[[int], None] = lambda images: None) -> dict[str, int]:
    """Images (n c h w), or clips, of integers in [0, levels) → name of a codec → bytes.

    Args:
        tell: called with numbers of images, which sum to n for each of `formats`.
    """
    pixels = film(x).cpu().numpy()
    raw = pixels.astype(np.uint8 if levels <= 256 else "<u2" if levels <= 2**16 else "<u4")
    packed = np.packbits(raw.astype(bool)) if levels == 2 else raw
    out = {}
    if levels <= 256 and pixels.shape[1] in (1, 3):
        for name, options in formats().items():
            out |= {f"{name}, each image": 0, f"{name}, side by side": 0}
            for some in np.split(raw, range(SIDE**2, len(raw), SIDE**2)):
                out[f"{name}, each image"] += sum(picture_bytes(image, levels, options) for image in some)
                out[f"{name}, side by side"] += sum(picture_bytes(picture, levels, options) for picture in sheets(some))
                tell(len(some))
    out["LZMA"] = len(lzma.compress(packed.tobytes(), preset=9 | lzma.PRESET_EXTREME))
    return out


def sheets(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images (n c h w), at most SIDE², as one picture (c rows·h columns·w), and what is left over as others."""
    while len(images):
        columns = min(SIDE, math.isqrt(len(images)))
        rows = len(images) // columns
        whole, images = images[: rows * columns], images[rows * columns :]
        yield rearrange(whole, "(row column) c h w -> c (row h) (column w)", column=columns)
