"""Where drawn images go: a .npy file or a folder of PNGs, written as they come, and continued if interrupted.

Image k of a seed is the same whoever draws it, so the work may be cut anyhow: a run draws what is not there yet, and of
several processes (torchrun, or anything that sets RANK and WORLD_SIZE) each draws its share into the same place.

Beside the images stands a JSON of what they are: seed, temperature, the checkpoint's digest, versions. A run that would
add other images to those that are there ends in an error.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.checkpoint import write_atomically


def rank_and_world() -> tuple[int, int]:
    """Which of how many processes this is."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def share(images: list[int]) -> list[int]:
    """What of the images this process draws: by their numbers, as each process finds others missing."""
    rank, world = rank_and_world()
    return [k for k in images if k % world == rank]


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path, what: dict) -> None:
    """Write what the images are to `path`; where that is written already, they must be the same.

    Raises:
        ValueError: other images were begun there.
    """
    text = json.dumps(what, indent=2) + "\n"
    if rank_and_world()[0] == 0 and not path.exists():
        write_atomically(path, lambda file: file.write(text.encode()))
    wait_for(path)
    try:
        before = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path} is damaged: it is to say what images were begun; remove it to begin anew") from None
    for name in what:
        if name != "versions" and before.get(name) != what[name]:
            raise ValueError(
                f"{path}: images of {name}={before.get(name)} were begun, not of {name}={what[name]}; "
                "continue with the same arguments, or remove it"
            )


def wait_for(path: Path, seconds: float = 60.0) -> None:
    """Wait until another process made a file."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise FileNotFoundError(f"{path} is not there after {seconds:.0f} s: the process of rank 0 is to make it")
        time.sleep(0.05)


class NpyFile:
    """n images (n c h w) in a .npy file.

    Until all are there they stand in FILE.part, one byte an image in FILE.done says which, and FILE.json what they are.

    Args:
        path: the .npy file; one that is there is replaced when the last image is drawn.
        what: as `describe` writes it.
    """

    def __init__(self, path: Path, n: int, shape: tuple[int, int, int], dtype: np.dtype, what: dict):
        self.path, self.part, self.flags = path, beside(path, "part"), beside(path, "done")
        describing = beside(path, "json")
        if rank_and_world()[0] == 0 and not (self.part.exists() and self.flags.exists()):
            describing.unlink(missing_ok=True)  # of images that are whole, or of none
            self.flags.unlink(missing_ok=True)
            new = self.part.with_name(self.part.name + ".new")
            np.lib.format.open_memmap(new, mode="w+", dtype=dtype, shape=(n, *shape)).flush()
            os.replace(new, self.part)
            write_atomically(self.flags, lambda file: file.write(bytes(n)))
        wait_for(self.flags)
        describe(describing, what)
        self.done = np.memmap(self.flags, dtype=np.uint8, mode="r+")
        try:
            self.images = np.lib.format.open_memmap(self.part, mode="r+")
            whole = self.images.shape == (n, *shape) and self.images.dtype == dtype and self.done.shape == (n,)
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(f"{self.part} is damaged: remove it to begin anew")

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


class PngFolder:
    """One PNG an image, FOLDER/000000.png and so on, and FOLDER/samples.json."""

    def __init__(self, folder: Path, n: int, levels: int, what: dict):
        self.folder, self.n, self.levels = folder, n, levels
        folder.mkdir(parents=True, exist_ok=True)
        describe(folder / "samples.json", what)

    def file(self, k: int) -> Path:
        return self.folder / f"{k:06d}.png"

    def missing(self) -> list[int]:
        return [k for k in range(self.n) if not self.file(k).exists()]

    def put(self, images: list[int], x: Tensor) -> None:
        pixels = (x if x.shape[1] == 3 else x[:, :1]).double().mul(255 / (self.levels - 1)).round().to(torch.uint8)
        for k, image in zip(images, pixels.permute(0, 2, 3, 1).numpy(), strict=True):
            picture = Image.fromarray(image if image.shape[2] == 3 else image[:, :, 0])
            write_atomically(self.file(k), lambda file, picture=picture: picture.save(file, format="PNG"))

    def finish(self) -> bool:
        return not self.missing()


def beside(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
