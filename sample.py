"""Draw images from a trained model: `python sample.py [checkpoint=…] [n=64] [out=samples.png]`."""

import sys

from kernels.draw_row_cpu import compile_ahead

# Beside all that is imported below, unless it says that rows may be computed otherwise.
if __name__ == "__main__" and not {"backend", "method", "device"} & {key.partition("=")[0] for key in sys.argv}:
    compile_ahead()

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import ListConfig, OmegaConf
from PIL import Image
from torch import Tensor

from checks import check, one_of, unexpected
from cli import command
from cli.images import images_named
from cli.machine import choose_device, commit, rank_and_world, version
from cli.moving import MILLISECONDS_OF_CLIPS, halfway_through, write_gif
from cli.output import (
    Memory,
    NpyFile,
    PngFolder,
    Sink,
    check_writable,
    completions_in_rows,
    digest,
    grid,
    labels_in_rows,
    save_grid,
    share,
    upper_rows,
)
from cli.progress import Bar
from cli.runs import find_model
from data.arrays import open_integers
from models.base import NO_LABEL, ImageModel
from models.checkpoint import read, rebuild
from models.sampling import batches, check_arguments, check_guidance

DRAWN, COMPLETED = {3: 64, 4: 16}, {3: 8, 4: 2}  # where n does not say how many: images (c h w), clips (t c h w)
MOST = 1 << 20  # images that memory is asked to hold
MOST_ON_DISK = 1 << 24  # with npy= and pngs=; more are drawn by several commands, with other seeds
PICTURED = 4096  # of more images than these, the picture shows the first
MOVING = 64  # the same of the moving picture


class Request(NamedTuple):
    """The images to draw, and how many columns their picture has.

    Legend: n images, or clips · t frames · c channel (colour) · h w rows, columns.
    """

    n: int
    label: Tensor | None = None  # (n,): the class of each
    known: tuple[Tensor, Tensor] | None = None  # x (n c h w), and which of its sub-pixels are kept (n c h w)
    columns: int | None = None  # None: as square as possible
    completions: int = 0  # of each image to complete, one after another; 0: no images are completed

    def of(self, images: list[int]) -> dict:
        """Return what `batches` takes to draw these of the images."""
        label = None if self.label is None else self.label[images]
        known = None if self.known is None else (self.known[0][images], self.known[1][images])
        return {"n": len(images), "images": images, "label": label, "known": known}


def request_of(cfg, model: ImageModel, checkpoint: dict, path: Path) -> Request:
    """Build the request from the command line."""
    if cfg.complete is not None:
        return completion_of(cfg, model, checkpoint, path)
    n, columns = DRAWN[len(model.shape)] if cfg.n is None else cfg.n, cfg.columns
    check("n", n, int, 1, MOST_ON_DISK if cfg.npy or cfg.pngs else MOST)
    asked = labels_asked(cfg, model)
    if asked is not None and len(asked) == 1:
        return Request(n, torch.full((n,), asked[0]), columns=columns)
    label, in_rows = labels_in_rows(range(model.classes) if asked is None else asked, cfg.n)
    return Request(n if label is None else len(label), label, columns=columns or in_rows)


def labels_asked(cfg, model: ImageModel) -> list[int] | None:
    """Return the labels that the command line names; None: it names none."""
    if cfg.label is None:
        return None
    if cfg.label == "none" and model.label_dropout:
        return [NO_LABEL]
    asked = list(cfg.label) if isinstance(cfg.label, ListConfig) else [cfg.label]
    if not asked or not all(type(label) is int and 0 <= label < model.classes for label in asked):
        classes = f"0 to {model.classes - 1}, or some of them, [0,1]" if model.classes else "null"
        none = ", or none" if model.label_dropout else ""
        why = "" if model.classes else ", as the model was built without classes"
        raise unexpected("label", cfg.label, classes + none + why)
    return asked


def completion_of(cfg, model: ImageModel, checkpoint: dict, path: Path) -> Request:
    """Build the request that completes images of a split or a file, several times each."""
    n = COMPLETED[len(model.shape)] if cfg.n is None else cfg.n
    check("n", n, int, 1, MOST)
    check("completions", cfg.completions, int, 1, MOST // n)
    x, label = images_named(cfg, "complete", n, model, checkpoint, path, rounded=True)
    x, label = model.check(x.long()), label if model.classes else None
    asked = labels_asked(cfg, model)
    if asked is not None:
        if len(asked) not in (1, len(x)):
            raise unexpected("label", cfg.label, f"one label, or one for each of {len(x)} images")
        label = torch.tensor(asked).expand(len(x))
    if model.classes and label is None and not model.label_dropout:
        raise unexpected("label", cfg.label, f"0 to {model.classes - 1}, as complete={cfg.complete} has no labels")
    x, known, label = (
        None if tensor is None else tensor.repeat_interleave(cfg.completions, 0)
        for tensor in (x, known_of(cfg, model, x), label)
    )
    return Request(len(x), label, (x, known), 2 + cfg.completions, cfg.completions)


def known_of(cfg, model: ImageModel, x: Tensor) -> Tensor:
    """Return which sub-pixels of images x (n c h w), or clips, `keep` or `mask` keeps: of the same shape, bool."""
    if cfg.mask is None:
        check("keep", cfg.keep, float, 0, 1)
        return upper_rows(x, cfg.keep)
    known, allowed = open_integers(Path(cfg.mask), "mask"), [x.shape[k:] for k in reversed(range(x.dim() - 1))]
    if known.shape not in allowed:
        raise ValueError(f"{cfg.mask}: expected shape {one_of(str(tuple(s)) for s in allowed)}, found {known.shape}")
    return torch.from_numpy(np.array(known != 0)).expand_as(x)


def check_places(cfg, out: Path) -> None:
    """Raise ValueError or OSError unless the picture and the images can go where the command line says."""
    check_writable(out, ".png")
    if cfg.gif is not None:
        check_writable(Path(cfg.gif), ".gif")
    if cfg.npy is not None:
        check_writable(Path(cfg.npy), ".npy")
    if cfg.npy is not None and cfg.pngs is not None:
        raise unexpected("pngs", cfg.pngs, f"null with npy={cfg.npy}")
    world = rank_and_world()[1]
    if world > 1 and cfg.npy is None and cfg.pngs is None:
        raise unexpected("WORLD_SIZE", world, "npy=FILE.npy or pngs=FOLDER with it, one place for all processes")
    if cfg.columns is not None:
        check("columns", cfg.columns, int, 1)


def sink_of(cfg, n: int, model: ImageModel, path: Path) -> Sink:
    """Open the place for n images that `npy` or `pngs` names, or else keep them in memory."""
    if cfg.npy is None and cfg.pngs is None:
        return Memory(n)
    keys = ("seed", "temperature", "guidance", "bf16", "label", "complete", "keep", "mask", "completions")
    asked = OmegaConf.to_container(cfg)
    what = {"n": n, "checkpoint": digest(path), **{key: asked[key] for key in keys}}
    what |= {"versions": {name: version(name) for name in ("torch", "triton", "numpy")} | {"commit": commit()}}
    if cfg.npy is None:
        return PngFolder(Path(cfg.pngs), n, model.levels, what)
    return NpyFile(Path(cfg.npy), n, model.shape, np.dtype(np.uint8 if model.levels <= 256 else np.int64), what)


def options_of(cfg) -> dict:
    """Return how the command line says to draw, as `batches` takes it."""
    return {key: cfg[key] for key in ("seed", "method", "backend", "bf16", "temperature", "guidance", "batch_size")}


def draw(cfg, model: ImageModel, request: Request, images: list[int], sink: Sink) -> float:
    """Draw these of the request's images into the sink; return the seconds that it took."""
    rows, start, at = sum(net.height for net in model.nets), time.perf_counter(), 0
    with Bar("sample rows", max(len(images), 1) * rows) as bar:

        def tell(done: int) -> None:
            bar.advance(done)
            bar.text(f"{bar.done / rows / (time.perf_counter() - start):.1f} images/s")

        for x in batches(model, **request.of(images), **options_of(cfg), tell=tell) if images else ():
            sink.put(images[at : at + len(x)], x)
            at += len(x)
    return time.perf_counter() - start


def pictured(request: Request, x: Tensor) -> Tensor:
    """Lay images x (n c h w) out for their picture: with their completions if there are any, each image in a row."""
    if not request.completions:
        return x
    given, known = (tensor[: len(x) : request.completions] for tensor in request.known)
    return completions_in_rows(given, known, x)


def save_gif(path: Path, request: Request, x: Tensor, model: ImageModel) -> None:
    """Write the moving picture of the first of images x (n c h w), those that are completed in whole rows.

    Of clips (n t c h w), their frames.
    """
    x = x[: max(1, MOVING // max(1, request.completions)) * max(1, request.completions)]
    if x.dim() == 5:
        frames = pictured(request, x).unbind(1)
        write_gif(path, [grid(of_frame, model.levels, request.columns) for of_frame in frames], MILLISECONDS_OF_CLIPS)
        return

    def picture_of(halfway: Tensor) -> Image.Image:
        if request.known is not None:
            given, known = (tensor[: len(x)] for tensor in request.known)
            halfway = torch.where(known, given, halfway)
        return grid(pictured(request, halfway), model.levels, request.columns)

    write_gif(path, [picture_of(x) for x in halfway_through(x, model)])


def main(cfg) -> None:
    out = Path(cfg.out)
    check_places(cfg, out)
    path, device = find_model(cfg.checkpoint), choose_device(cfg.device)
    checkpoint = read(path, device)
    model = rebuild(checkpoint, path)
    print(f"{path} · {type(model).__name__}, {'×'.join(map(str, model.shape))}, {model.levels} levels")

    request = request_of(cfg, model, checkpoint, path)
    check_arguments(**options_of(cfg))
    model.check_condition(request.n, request.label)
    check_guidance(model, cfg.guidance, request.label)
    sink = sink_of(cfg, request.n, model, path)
    images = share(sink.missing())
    seconds = draw(cfg, model, request, images, sink)

    said = f"{len(images)} images in {seconds:.2f} s ({len(images) / seconds:.1f} images/s)"
    said = said if images else "nothing was left to draw"
    if not sink.finish():
        rank, world = rank_and_world()
        print(f"{said}: the share of process {rank} of {world}, {sink.path} is not whole yet")
        return
    x = sink.first(request.n if request.completions else PICTURED)
    if x is not None:
        save_grid(out, pictured(request, x), model.levels, request.columns)
        if cfg.gif is not None:
            save_gif(Path(cfg.gif), request, x, model)
    places = [*(() if x is None else (out, cfg.gif)), sink.path]
    print(f"{said}: {', '.join(str(place) for place in places if place is not None)}")


if __name__ == "__main__":
    command.run("sample", main)
