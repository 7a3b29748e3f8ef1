"""Draw images from a trained model: `python sample.py [checkpoint=…] [n=64] [out=samples.png]`."""

import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from conf.command import run
from evaluate import choose_device
from models.checkpoint import find, load, write_atomically
from models.sampling import sample
from report import Bar


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


def check_writable(path: Path, suffix: str) -> None:
    """Raise ValueError or OSError, naming the path, unless a file of that suffix can be written there."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: a name that ends in {suffix} is needed")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{path} cannot be written")
    write_atomically(path.with_name(f".{path.name}.probe"), lambda file: None)
    path.with_name(f".{path.name}.probe").unlink()


def main(cfg) -> None:
    out = Path(cfg.out)
    check_writable(out, ".png")
    if cfg.npy is not None:
        check_writable(Path(cfg.npy), ".npy")
    if cfg.columns is not None and cfg.columns < 1:
        raise ValueError(f"columns={cfg.columns} is not allowed: at least 1 is")
    path = find(cfg.checkpoint)
    model = load(path, choose_device(cfg.device))
    print(f"{path} · {type(model).__name__}, {model.channels}×{model.height}×{model.width}, {model.levels} levels")
    start = time.perf_counter()
    with Bar("sample rows", max(cfg.n, 1) * model.height) as bar:

        def tell(rows: int) -> None:
            bar.advance(rows)
            bar.text(f"{bar.done / model.height / (time.perf_counter() - start):.1f} images/s")

        x = sample(
            model,
            cfg.n,
            seed=cfg.seed,
            method=cfg.method,
            temperature=cfg.temperature,
            batch_size=cfg.batch_size,
            tell=tell,
        )
    seconds = time.perf_counter() - start
    save_grid(out, x, model.levels, cfg.columns)
    if cfg.npy is not None:
        write_atomically(Path(cfg.npy), lambda file: np.save(file, x.numpy(), allow_pickle=False))
    print(
        f"{cfg.n} images in {seconds:.2f} s ({cfg.n / seconds:.1f} images/s): {out}"
        + (f", {cfg.npy}" if cfg.npy else "")
    )


if __name__ == "__main__":
    run("sample", main)
