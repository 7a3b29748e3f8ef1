"""Compress images with a trained model, without loss, and back: `python compress.py images=test out=test.prnn`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from checks import check, check_one_of, unexpected
from cli import command
from cli.images import images_of
from cli.other_codecs import formats, sizes
from cli.output import PngFolder, check_writable, digest, in_words
from cli.progress import Bar
from cli.runs import find_model
from files import write_atomically
from models.base import ImageModel, bits_per_dim
from models.checkpoint import read, rebuild
from models.compression import compress, decompressed, opened, read_head
from models.likelihood import nats_of

SUFFIX = ".prnn"


def prepare(argv: list[str]) -> list[str]:
    """Turn `FILE.prnn` into file=FILE.prnn, and `info` into info=true."""
    out = []
    for argument in argv:
        if argument.endswith(SUFFIX) and "=" not in argument and not argument.startswith("-"):
            quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
            argument = f"file='{quoted}'"
        out.append("info=true" if argument == "info" else argument)
    return out


@contextmanager
def progress(name: str, images: int, rows: int) -> Iterator[Callable[[int], None]]:
    """Show how far it is: rows that are done, where each image has `rows`, and images/s."""
    start = time.perf_counter()
    with Bar(f"{name} rows", images * rows) as bar:

        def tell(done: int) -> None:
            bar.advance(done)
            bar.text(f"{bar.done / rows / (time.perf_counter() - start):.1f} images/s")

        yield tell


def rows_in(model: ImageModel) -> int:
    """The rows of an image that are coded."""
    return sum(net.height for net in model.nets)


def write(cfg) -> None:
    """Compress images into a file."""
    out = Path(cfg.out)
    check_writable(out, SUFFIX)
    path = find_model(cfg.checkpoint)
    checkpoint = read(path)
    model = rebuild(checkpoint, path)
    given = images_of(cfg, "images", model, checkpoint, path)
    x = given.x
    print(f"{path} · {type(model).__name__} · {cfg.images}, {len(x):,} images")

    start = time.perf_counter()
    with progress("compress", len(x), rows_in(model)) as tell:
        options = {"images_of_block": cfg.images_of_block, "model_inside": cfg.weights == "inside"}
        content = compress(model, x, given.labels, **options, tell=tell)
    seconds = time.perf_counter() - start
    write_atomically(out, lambda file: file.write(content))

    with Bar("log_prob", len(x)) as bar:
        nats = nats_of(model, given, tell=bar.count)["nats"].mean().item()
    head, _ = read_head(content)
    inside = 0 if head.model is None else len(head.model)
    print(
        f"{out}: {len(content):,} bytes, {bits_of(len(content) - inside, x):.4f} bits/dim"
        f" (log_prob: {bits_per_dim(nats, model.shape):.4f}), {len(x) / seconds:.1f} images/s"
        + f"; {inside:,} bytes of it are the model"
        * bool(inside)
    )
    if cfg.compare:
        with Bar("other codecs", len(x) * len(formats())) as bar:
            others = sizes(x, model.levels, bar.count)
        for name, size in others.items():
            print(f"  {name:<28} {size:>14,} bytes, {bits_of(size, x):.4f} bits/dim")


def bits_of(size: int, x: Tensor) -> float:
    """Bytes for images x (n c h w) → bits a sub-pixel."""
    return 8 * size / x.numel()


@contextmanager
def in_file(cfg) -> Iterator[None]:
    """Have a ValueError of what is done inside name the compressed file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{cfg.file}: {error}") from None


def content_of(cfg) -> bytes:
    """The bytes of the compressed file."""
    if not Path(cfg.file).is_file():
        raise FileNotFoundError(f"{cfg.file}: expected compressed images, found none")
    return Path(cfg.file).read_bytes()


def info(cfg) -> None:
    """Say what a compressed file holds."""
    content = content_of(cfg)
    with in_file(cfg):
        head, _ = read_head(content)
    inside = "none" if head.model is None else f"{len(head.model):,} bytes"
    size = len(content) - len(head.model or b"")
    print(f"{cfg.file}: {head.images:,} {in_words(head.shape)}, {head.levels} levels")
    print(f"  {len(content):,} bytes, {8 * size / (head.images * math.prod(head.shape)):.4f} bits/dim")
    blocks = f"{head.blocks:,} blocks of {head.of_block} images" if head.blocks > 1 else "1 block"
    print(f"  {blocks} · model {head.digest.hex()} · model inside: {inside}")


def is_inside(content: bytes) -> bool:
    """Whether the model is inside a compressed file, as far as its head can be read."""
    try:
        return read_head(content)[0].model is not None
    except ValueError:
        return False


def restore(cfg) -> None:
    """Decode a compressed file."""
    out = Path(cfg.out)
    if out.suffix == ".npy":
        check_writable(out, ".npy")
    elif out.suffix:
        raise ValueError(f"{out}: expected a name that ends in .npy, or a folder for PNGs, found {out.name}")
    content, model = content_of(cfg), None
    if not is_inside(content) or cfg.checkpoint is not None:
        with in_file(cfg):
            if not cfg.skip_damaged:
                read_head(content)  # whose error is nearer than that of a checkpoint
        path = find_model(cfg.checkpoint)
        model = rebuild(read(path), path)
    start = time.perf_counter()
    with in_file(cfg):
        head, _, model, _ = opened(content, model, cfg.skip_damaged)
        with progress("decompress", head.images, rows_in(model)) as tell:
            x, numbers, damage = decompressed(content, model, skip_damaged=cfg.skip_damaged, tell=tell)
    seconds = time.perf_counter() - start
    for text in damage:
        print(f"{cfg.file}: {text}")
    if out.suffix:
        write_atomically(out, lambda file: np.save(file, x.numpy()))
    else:
        folder = PngFolder(out, head.images, head.levels, {"file": digest(Path(cfg.file))})
        folder.put(numbers, x)
    lost = f" of {head.images:,}; what is damaged is left out" if len(x) < head.images else ""
    print(f"{out}: {len(x):,} images{lost}, {len(x) / seconds:.1f} images/s")


def main(cfg) -> None:
    if cfg.weights is not None:
        check_one_of("weights", cfg.weights, ["inside"])
    for key, most in (("n", math.inf), ("images_of_block", 2**16 - 1)):
        if cfg[key] is not None:
            check(key, cfg[key], int, 1, most)
    check("seed", cfg.seed, int, 0)
    if cfg.info and cfg.file is None:
        raise unexpected("info", cfg.info, f"FILE{SUFFIX} beside it")
    if (cfg.images is None) == (cfg.file is None):
        raise unexpected("images", cfg.images, f"images=… to compress, or FILE{SUFFIX}, one of the two")
    if cfg.info:
        return info(cfg)
    if cfg.out is None:
        raise unexpected("out", cfg.out, f"FILE{SUFFIX}" if cfg.file is None else "FILE.npy, or a folder for PNGs")
    return write(cfg) if cfg.file is None else restore(cfg)


if __name__ == "__main__":
    command.run("compress", main, prepare)
