"""Draw images from a trained model: `python sample.py [checkpoint=…] [n=64] [out=samples.png]`."""

import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from checks import check
from conf.command import run
from data.arrays import open_integers
from data.given import read_images
from data.splits import SPLITS
from evaluate import check_writable, choose_device, dataset_of
from models.base import ImageModel
from models.checkpoint import find, read, rebuild, write_atomically
from models.sampling import batches
from output import NpyFile, PngFolder, digest, rank_and_world, share
from report import Bar, commit, version

PICTURED = 4096  # of more images than these, the picture shows the first


def grid(x: Tensor, levels: int, columns: int | None = None) -> Image.Image:
    """Images x (n c h w) of `levels` values → one picture of them, small ones enlarged, in `columns` columns.

    One colour is shown as grey, three as RGB; of another number of colours, the first as grey.
    """
    n, c, h, w = x.shape
    columns = min(n, columns or math.ceil(n**0.5))
    rows = math.ceil(n / columns)
    scale = max(1, 56 // max(h, w))
    pixels = (x if c == 3 else x[:, :1]).double().mul(255 / (levels - 1)).round().to(torch.uint8)
    pixels = pixels.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    canvas = torch.full((rows * columns, pixels.shape[1], h * scale + 2, w * scale + 2), 96, dtype=torch.uint8)
    canvas[:n, :, 1:-1, 1:-1] = pixels
    canvas = rearrange(canvas, "(row column) c h w -> (row h) (column w) c", column=columns).numpy()
    return Image.fromarray(canvas if c == 3 else canvas[:, :, 0])


def save_grid(path: Path, x: Tensor, levels: int, columns: int | None = None) -> None:
    """Write `grid` as a PNG, whole or not at all."""
    write_atomically(path, lambda file: grid(x, levels, columns).save(file, format="PNG"))


def labels_in_rows(classes: int, n: int | None) -> tuple[Tensor | None, int | None]:
    """Which class each of n images is drawn from, and how many columns make a row a class: (n,), or None without.

    Where n is None, as many as fill whole rows, about 64.
    """
    if not classes:
        return None, None
    columns = max(1, (64 if n is None else n) // classes)
    return torch.arange(columns * min(classes, 64) if n is None else n) // columns % classes, columns


class Completion(NamedTuple):
    """Images to complete: x (n c h w), which sub-pixels are known (n c h w), and the images' labels (n,) or None."""

    x: Tensor
    known: Tensor
    label: Tensor | None


def to_complete(cfg, model: ImageModel, checkpoint: dict) -> Completion:
    """What `complete`, `keep` and `mask` say."""
    n, label = 8 if cfg.n is None else cfg.n, None
    check("n", n, int, 1)
    check("completions", cfg.completions, int, 1)
    if cfg.complete in SPLITS:
        split = dataset_of(checkpoint, cfg.root).split(cfg.complete)
        x, label = split.batch(slice(0, n), torch.Generator().manual_seed(cfg.seed))
        x, label = model.check(x.long()), label if model.classes else None
    else:
        x = read_images(Path(cfg.complete), model.shape, model.levels, n)
    if cfg.label is not None:
        label = torch.full((len(x),), cfg.label)
    if model.classes and label is None:
        raise ValueError(f"label is missing: complete={cfg.complete} has no labels, and the model has classes")
    if cfg.mask is None:
        check("keep", cfg.keep, float, 0, 1)
        known = torch.zeros_like(x, dtype=torch.bool)
        known[:, :, : round(cfg.keep * model.height)] = True
        return Completion(x, known, label)
    known = torch.from_numpy(np.array(open_integers(Path(cfg.mask), "mask"))).bool()
    c, h, w = model.shape
    if tuple(known.shape) not in ((h, w), (c, h, w), tuple(x.shape)):
        allowed = f"({h}, {w}), ({c}, {h}, {w}) or {tuple(x.shape)}"
        raise ValueError(f"mask={cfg.mask} has the shape {tuple(known.shape)}: {allowed} is allowed")
    return Completion(x, known.expand_as(x), label)


def beside(given: Completion, drawn: Tensor, completions: int, levels: int) -> Tensor:
    """A row for each image: the image, what is known of it on grey, and its completions (n·completions c h w)."""
    shown = torch.where(given.known, given.x, (levels - 1) // 2)
    rows = torch.cat([given.x[:, None], shown[:, None], drawn.long().unflatten(0, (-1, completions))], dim=1)
    return rows.flatten(0, 1)


def sink_of(cfg, n: int, model: ImageModel, path: Path) -> NpyFile | PngFolder | None:
    """What `npy` or `pngs` says: where the images go as they come."""
    keys = ("seed", "temperature", "bf16", "label", "complete", "keep", "mask", "completions")
    what = {"n": n, "checkpoint": digest(path), **{key: cfg[key] for key in keys}}
    what |= {"versions": {name: version(name) for name in ("torch", "triton", "numpy")} | {"commit": commit()}}
    if cfg.npy is not None:
        dtype = np.dtype(np.uint8 if model.levels <= 256 else np.int64)
        return NpyFile(Path(cfg.npy), n, model.shape, dtype, what)
    return None if cfg.pngs is None else PngFolder(Path(cfg.pngs), n, model.levels, what)


def main(cfg) -> None:
    out, (rank, world) = Path(cfg.out), rank_and_world()
    check_writable(out, ".png")
    if cfg.npy is not None:
        check_writable(Path(cfg.npy), ".npy")
    if cfg.npy is not None and cfg.pngs is not None:
        raise ValueError(f"npy={cfg.npy} and pngs={cfg.pngs} are given: one of them is allowed")
    if world > 1 and cfg.npy is None and cfg.pngs is None:
        raise ValueError(f"{world} processes draw into one place: npy=FILE.npy or pngs=FOLDER is needed")
    if cfg.columns is not None and cfg.columns < 1:
        raise ValueError(f"columns={cfg.columns} is not allowed: at least 1 is")
    path, device = find(cfg.checkpoint), choose_device(cfg.device)
    checkpoint = read(path, device)
    model = rebuild(checkpoint)
    print(f"{path} · {type(model).__name__}, {model.channels}×{model.height}×{model.width}, {model.levels} levels")
    columns, known = cfg.columns, None
    if cfg.complete is not None:
        given = to_complete(cfg, model, checkpoint)
        known = given.x.repeat_interleave(cfg.completions, 0), given.known.repeat_interleave(cfg.completions, 0)
        label = None if given.label is None else given.label.repeat_interleave(cfg.completions)
        n, columns = len(known[0]), 2 + cfg.completions
    else:
        n, label = 64 if cfg.n is None else cfg.n, cfg.label
        check("n", n, int, 1)
        if label is None and model.classes:
            label, in_rows = labels_in_rows(model.classes, cfg.n)
            n, columns = len(label), columns or in_rows
    label = torch.full((n,), label) if isinstance(label, int) else label
    sink = sink_of(cfg, n, model, path)
    images = list(range(n)) if sink is None else share(sink.missing())
    rows, start, drawn = sum(net.height for net in model.nets), time.perf_counter(), []
    with Bar("sample rows", max(len(images), 1) * rows) as bar:

        def tell(done: int) -> None:
            bar.advance(done)
            bar.text(f"{bar.done / rows / (time.perf_counter() - start):.1f} images/s")

        at = 0
        parts = batches(
            model,
            len(images),
            seed=cfg.seed,
            method=cfg.method,
            bf16=cfg.bf16,
            temperature=cfg.temperature,
            label=None if label is None else label[images],
            known=None if known is None else (known[0][images], known[1][images]),
            images=images,
            batch_size=cfg.batch_size,
            tell=tell,
        )
        for x in parts if images else ():
            if sink is None:
                drawn.append(x)
            else:
                sink.put(images[at : at + len(x)], x)
            at += len(x)
    seconds = time.perf_counter() - start
    said = f"{len(images)} images in {seconds:.2f} s ({len(images) / seconds:.1f} images/s)"
    if sink is not None and not sink.finish():
        print(f"{said}: the share of process {rank} of {world}, {cfg.npy or cfg.pngs} is not whole yet")
        return
    if sink is not None and cfg.npy is not None and Path(cfg.npy).exists():
        drawn = [torch.from_numpy(np.load(cfg.npy))]
    if drawn:
        x = torch.cat(drawn)
        picture = x[:PICTURED] if cfg.complete is None else beside(given, x, cfg.completions, model.levels)
        save_grid(out, picture, model.levels, columns)
        said += f": {out}" + (f", {cfg.npy}" if cfg.npy else "")
    else:
        said += f": {cfg.pngs}"
    print(said)


if __name__ == "__main__":
    run("sample", main)
