"""Where images go: one picture of many, and a sink that takes them as they are drawn.

Legend: n images · c channel (colour) · h w rows, columns.

A sink keeps the images in memory, in a .npy file or as PNGs in a folder, and in the last two a run that was cut short
is continued. Image k of a seed is the same whoever draws it, so the work can be divided in any way: a run draws what is
missing, and of several processes (torchrun, or anything that sets RANK and WORLD_SIZE) each draws its share into the
same place.

A JSON file beside the images says how they were drawn: seed, temperature, the checkpoint's digest, versions. A run that
would add different images to those that are there ends in an error.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from cli.machine import is_first, rank_and_world
from files import naming, reserve, write_atomically, write_text
from models.video import film

# ---------------------------------------------------------------------------------------------------------------- files


def check_writable(path: Path, suffix: str) -> None:
    """Raise ValueError or OSError, naming the path, unless a file with that suffix can be written there."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: expected a name that ends in {suffix}, found {path.name}")
    if path.is_dir():
        raise ValueError(f"{path}: expected a file, found a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: expected a folder for {path.name}, found none")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{path}: expected a place to write to, found no permission")
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")  # each process has its own
    with naming(path, probe):
        write_atomically(probe, lambda file: None)
    probe.unlink()


def write_json(path: Path, values: dict) -> None:
    """Write values as a JSON file, whole or not at all."""
    text = json.dumps(values, indent=2) + "\n"
    write_text(path, text)


def digest(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def with_suffix(path: Path, suffix: str) -> Path:
    """Return the path of FILE.suffix in the folder of FILE."""
    return path.with_name(f"{path.name}.{suffix}")


# ------------------------------------------------------------------------------------------------------------- pictures


UNKNOWN = -1  # in place of a value


def in_words(shape: tuple[int, ...]) -> str:
    """Say what an image is, or a clip: images of 1×8×8, clips of 20×1×16×16."""
    return f"{'images' if len(shape) == 3 else 'clips'} of {'×'.join(map(str, shape))}"


def bytes_of(x: Tensor, levels: int) -> Tensor:
    """Scale values 0..levels-1 of images (n c h w) to 0..255, uint8: three colours, or else the first as (n 1 h w).

    UNKNOWN is a medium grey.
    """
    x = (x if x.shape[1] == 3 else x[:, :1]).cpu().double()
    return torch.where(x == UNKNOWN, 128, x * (255 / (levels - 1))).round().to(torch.uint8)


def picture(pixels: np.ndarray) -> Image.Image:
    """Turn pixels (h w c), uint8 of one colour or three, into a picture, grey or RGB."""
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def grid(x: Tensor, levels: int, columns: int | None = None) -> Image.Image:
    """Lay images x (n c h w) of `levels` values out in one picture, small ones enlarged; clips (n t c h w) in rows.

    Three colours are shown as RGB; of any other number, the first one as grey.

    Args:
        columns: of the picture, where no clips are in it; None: about as many as rows.
    """
    if x.dim() == 5:
        x, columns = x.flatten(0, 1), x.shape[1]
    n, _, h, w = x.shape
    columns = min(n, columns or math.ceil(n**0.5))
    rows = math.ceil(n / columns)
    scale = max(1, 56 // max(h, w))
    pixels = bytes_of(x, levels).repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    canvas = torch.full((rows * columns, pixels.shape[1], h * scale + 2, w * scale + 2), 96, dtype=torch.uint8)
    canvas[:n, :, 1:-1, 1:-1] = pixels
    return picture(rearrange(canvas, "(row column) c h w -> (row h) (column w) c", column=columns).numpy())


def save_grid(path: Path, x: Tensor, levels: int, columns: int | None = None) -> None:
    """Write `grid` as a PNG, whole or not at all."""
    write_atomically(path, lambda file: grid(x, levels, columns).save(file, format="PNG"))


def labels_in_rows(labels: Sequence[int], n: int | None) -> tuple[Tensor | None, int | None]:
    """Share labels out to n images so that each row of a picture has one of them.

    Args:
        n: images; None: about 64, in whole rows.

    Returns:
        labels (n,) and the number of columns, or (None, None) where there are no labels.
    """
    if not labels:
        return None, None
    columns = max(1, (64 if n is None else n) // len(labels))
    rows = torch.arange(columns * min(len(labels), 64) if n is None else n) // columns % len(labels)
    return torch.tensor(list(labels))[rows], columns


def upper_rows(x: Tensor, keep: float) -> Tensor:
    """Return which sub-pixels of images x (n c h w) are in the upper fraction `keep` of their rows: (n c h w) bool.

    Of clips (n t c h w), which are in that fraction of their frames, from the first.
    """
    known = torch.zeros_like(x, dtype=torch.bool)
    parts = known.movedim(1 if x.dim() == 5 else 2, 0)
    parts[: round(keep * len(parts))] = True
    return known


def completions_in_rows(x: Tensor, known: Tensor, drawn: Tensor) -> Tensor:
    """Lay each image out in a row: the image, its known pixels on grey, and its completions.

    Args:
        x: images (n c h w), or clips.
        known: which of their sub-pixels are known, of the same shape.
        drawn: the same number of completions of each image, one image after another: (n·completions c h w).

    Returns:
        images (n·(2 + completions) c h w).
    """
    shown = torch.where(known, x.long(), UNKNOWN)
    rows = torch.cat([x[:, None], shown[:, None], drawn.long().unflatten(0, (len(x), -1))], dim=1)
    return rows.flatten(0, 1)


# ---------------------------------------------------------------------------------------------------- several processes


def share(images: list[int]) -> list[int]:
    """Return those of the images that this process draws.

    Their numbers decide, not their places in the list, because processes do not all find the same images missing.
    """
    rank, world = rank_and_world()
    return [k for k in images if k % world == rank]


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Wait until another process has made a file; FileNotFoundError after `seconds`."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(
                f"{path}: expected a file from the process of rank 0, found none in {seconds:.0f} s"
            )
        time.sleep(0.05)


def describe(path: Path, what: dict) -> None:
    """Write to `path` how the images are drawn, or compare with what is written there.

    Raises:
        ValueError: the images there were drawn in another way, or the file is damaged.
    """
    if is_first() and not path.exists():
        write_json(path, what)
    wait_for(path)
    try:
        before = json.loads(path.read_text())
    except (ValueError, RecursionError):
        before = None
    if not isinstance(before, dict):
        raise ValueError(f"{path}: expected JSON about the images, found damage; remove it to start again")
    for name in what:
        if name != "versions" and before.get(name) != what[name]:
            raise ValueError(
                f"{path}: expected {name}={what[name]}, found images of {name}={before.get(name)}; "
                "continue with the same arguments, or remove it"
            )


# ---------------------------------------------------------------------------------------------------------------- sinks


class Sink(Protocol):
    """A place for n images, numbered from 0, that come in any order and from any number of processes."""

    path: Path | None  # of the images; None: they are on no disk

    def missing(self) -> list[int]:
        """Return the numbers of the images that are not there yet."""

    def put(self, images: list[int], x: Tensor) -> None:
        """Take images x (b c h w) with these numbers, on the CPU."""

    def finish(self) -> bool:
        """Tell whether all images are there, and give the place its final form if so."""

    def first(self, n: int) -> Tensor | None:
        """Return the first n images (n c h w) for a picture, once all are there; None: no picture is wanted."""


class Memory:
    """Keep n images in memory."""

    path = None

    def __init__(self, n: int):
        self.images: list[Tensor | None] = n * [None]

    def missing(self) -> list[int]:
        return [k for k, image in enumerate(self.images) if image is None]

    def put(self, images: list[int], x: Tensor) -> None:
        for k, image in zip(images, x, strict=True):
            self.images[k] = image

    def finish(self) -> bool:
        return not self.missing()

    def first(self, n: int) -> Tensor | None:
        return torch.stack(self.images[:n])


def write_zeros(file: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    """Write a .npy file of zeros that the disk has room for."""
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    reserve(file, math.prod(shape) * dtype.itemsize)


class NpyFile:
    """Write n images (n c h w) to a .npy file.

    Until all are there, FILE.part holds them, FILE.done has one byte an image that says which, and FILE.json says how
    they are drawn.

    Args:
        path: the .npy file. One that is there is whole, and must be of these images.
        what: as `describe` writes it.

    Raises:
        ValueError: the files there are damaged or of other images.
    """

    def __init__(self, path: Path, n: int, shape: tuple[int, ...], dtype: np.dtype, what: dict):
        self.path, self.part, self.flags = path, with_suffix(path, "part"), with_suffix(path, "done")
        description = with_suffix(path, "json")
        self.done = np.ones(n, np.uint8)
        if path.exists():
            if not description.exists():
                raise ValueError(f"{path}: expected no file there, or images and {description.name}, found a file")
            describe(description, what)
            return
        if is_first() and not (self.part.exists() and self.flags.exists()):
            description.unlink(missing_ok=True)  # of images that are whole, or of none
            self.flags.unlink(missing_ok=True)
            write_atomically(self.part, lambda file: write_zeros(file, dtype, (n, *shape)))
            write_atomically(self.flags, lambda file: file.write(bytes(n)))
        wait_for(self.flags)
        describe(description, what)
        try:
            self.done = np.memmap(self.flags, dtype=np.uint8, mode="r+")
            self.images = np.lib.format.open_memmap(self.part, mode="r+")
            whole = self.images.shape == (n, *shape) and self.images.dtype == dtype and self.done.shape == (n,)
        except Exception:  # of nearly every type
            whole = False
        if not whole:
            raise ValueError(f"{self.part}: expected {(n, *shape)} {dtype}, found damage; remove it to start again")

    def missing(self) -> list[int]:
        return np.flatnonzero(self.done == 0).tolist()

    def put(self, images: list[int], x: Tensor) -> None:
        """Write images, and only then that they are there."""
        self.images[images] = x.numpy()
        self.images.flush()
        self.done[images] = 1
        self.done.flush()

    def finish(self) -> bool:
        """Give the file its name if all images are there; of several processes the last one does."""
        if not self.done.all():
            return False
        try:
            os.replace(self.part, self.path)
            self.flags.unlink()
        except FileNotFoundError:  # another process was quicker
            pass
        return True

    def first(self, n: int) -> Tensor | None:
        return torch.from_numpy(np.array(np.load(self.path, mmap_mode="r")[:n]))


class PngFolder:
    """Write one PNG an image, FOLDER/000000.png and so on, and FOLDER/samples.json as `describe` does.

    A clip's frames are stacked from top to bottom.
    """

    def __init__(self, folder: Path, n: int, levels: int, what: dict):
        self.path, self.n, self.levels = folder, n, levels
        folder.mkdir(parents=True, exist_ok=True)
        describe(folder / "samples.json", what)

    def file(self, k: int) -> Path:
        """Return the path of image k."""
        return self.path / f"{k:06d}.png"

    def missing(self) -> list[int]:
        return [k for k in range(self.n) if not self.file(k).exists()]

    def put(self, images: list[int], x: Tensor) -> None:
        pixels = rearrange(bytes_of(film(x), self.levels), "b c h w -> b h w c").numpy()
        for k, image in zip(images, pixels, strict=True):
            write_atomically(self.file(k), lambda file, image=image: picture(image).save(file, format="PNG"))

    def finish(self) -> bool:
        return not self.missing()

    def first(self, n: int) -> Tensor | None:
        return None
