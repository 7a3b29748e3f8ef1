"""Lossless compression with a model: a file's size is the images' likelihood, and any machine decodes it.

Legend: n images · b of a block · c channel (colour) · h w rows, columns · d features of the condition.

A range coder gives each sub-pixel −log₂ of its probability. The rows that compute them on a CPU give the same bits on
every machine (`models.sampling.cpu_row`), and so the decoder finds the probabilities of the encoder.
"""

import copy
import json
import math
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from checks import check
from kernels import native
from models import exported
from models.base import NO_LABEL, ImageModel, Stage
from models.compression.file import Block, Head, head_of_blocks, read_blocks, read_head, write_file
from models.compression.rules import Coded, Decode, Encode, constriction
from models.sampling import PixelLoop
from models.sampling.cpu_maps import compiled

__all__ = ["Decompressed", "Opened", "compress", "decompress", "decompressed", "opened", "read_head"]

SUB_PIXELS = 2**18  # of a block, about: what a block adds is little beside its bytes then


class Decompressed(NamedTuple):
    """Images (n c h w), their numbers in what was compressed, and what is wrong with the blocks that are left out."""

    x: Tensor
    numbers: list[int]
    damage: list[str]


def compress(
    model: ImageModel,
    x: Tensor,
    label: Tensor | None = None,
    cond: Tensor | None = None,
    *,
    images_of_block: int | None = None,
    model_inside: bool = False,
    tell: Callable[[int], None] = lambda rows: None,
) -> bytes:
    """Compress images x (n c h w) of integers in [0, levels) without loss.

    Args:
        model: any model of `models`; a copy of it codes, in float32 on the CPU.
        label, cond: what the images are conditioned on, as in `model.log_prob`. Labels are stored; `cond` is not, and
            is needed again.
        images_of_block: of blocks that decode independently; None: about 2¹⁸ sub-pixels a block.
        model_inside: put the model into the file, so that nothing else is needed to decode it.
        tell: called after each row of a block with how many rows of images that were.

    Raises:
        ValueError: x, label or cond are not of the model, or there are no images.
        ImportError: constriction, the range coder, is not installed.
    """
    model.check(x)
    check("images", len(x), int, 1, 2**32 - 1)
    model.check_condition(len(x), label, cond)
    label = model.labels_for(len(x), label)
    constriction()
    of_block = images_per_block(model) if images_of_block is None else images_of_block
    check("images_of_block", of_block, int, 1, 2**16 - 1)
    coder = on_cpu(model)
    head = Head(
        model.shape, model.levels, len(x), of_block, digest(coder), exported_bytes(coder) if model_inside else None
    )
    blocks: list[Block | None] = [None] * head.blocks

    def code(number: int):
        some = slice(number * of_block, (number + 1) * of_block)
        images, *given = (None if part is None else part[some].cpu() for part in (x, label, cond))
        content = encoded(coder, images.long(), *given, tell)
        blocks[number] = Block(number, len(images), content, checksum(images, model.levels))
        yield

    native.share(code, head.blocks)
    return write_file(head, blocks)


def decompress(model: ImageModel | None, data: bytes, cond: Tensor | None = None) -> Tensor:
    """The images (n c h w), uint8 or int64, that `compress` made these bytes of; see `decompressed`."""
    return decompressed(data, model, cond).x


def decompressed(
    data: bytes,
    model: ImageModel | None = None,
    cond: Tensor | None = None,
    *,
    skip_damaged: bool = False,
    tell: Callable[[int], None] = lambda rows: None,
) -> Decompressed:
    """Decode what `compress` gave.

    Args:
        model: the one that compressed; None: the one inside the file.
        cond: (n d h w), where the model has map_features.
        skip_damaged: leave damaged blocks out, instead of an error. With a damaged head, `model` must be given, and
            images of another model are left out too.
        tell: called after each row of a block with how many rows of images that were.

    Raises:
        ValueError: it is no such file, of another version or another model, or a block is damaged.
        ImportError: constriction, the range coder, is not installed.
    """
    constriction()
    head, at, coder, damage = opened(data, model, skip_damaged)
    good, kind = [], torch.uint8 if coder.levels <= 256 else torch.int64
    for block in read_blocks(data, at, head):
        (good if isinstance(block, Block) else damage).append(block)
        if damage and not skip_damaged:
            raise ValueError(damage[0])
    parts: list[Tensor | None] = [None] * len(good)

    def code(k: int):
        block, start = good[k], good[k].number * head.of_block
        given = None if cond is None else cond[start : start + block.images].cpu()
        x = decoded(coder, block, given, tell)
        if checksum(x, coder.levels) == block.checksum:
            parts[k] = x.to(kind)
        else:
            damage.append(f"block {block.number} of {head.blocks}: its images have another checksum")
            if not skip_damaged:
                raise ValueError(damage[-1])
        yield

    native.share(code, len(good))
    whole = [(block, x) for block, x in zip(good, parts, strict=True) if x is not None]
    empty = torch.empty(0, *coder.shape, dtype=kind)
    numbers = [block.number * head.of_block + k for block, _ in whole for k in range(block.images)]
    return Decompressed(torch.cat([empty, *(x for _, x in whole)]), numbers, damage)


class Opened(NamedTuple):
    """A compressed file: its head, where its blocks begin, the model that decodes it, and what of that is damaged."""

    head: Head
    at: int
    model: ImageModel
    damage: list[str]


def opened(data: bytes, model: ImageModel | None = None, skip_damaged: bool = False) -> Opened:
    """Read the head of a compressed file; arguments and errors as of `decompressed`."""
    damage = []
    try:
        head, at = read_head(data)
    except ValueError as error:
        if not skip_damaged or model is None:
            raise
        damage.append(str(error))
        head, at = head_of_blocks(data, model.shape, model.levels, digest(on_cpu(model)))
    if model is None:
        if head.model is None:
            raise ValueError("expected a model, as there is none inside the file")
        model = imported(head.model)
    model = on_cpu(model)
    if digest(model) != head.digest:
        raise ValueError(
            f"expected the model {head.digest.hex()}, which it was coded with, found {digest(model).hex()}"
        )
    if (head.shape, head.levels) != (model.shape, model.levels):
        raise ValueError(f"expected images {model.shape} of {model.levels} levels, found {head.shape}, {head.levels}")
    return Opened(head, at, model, damage)


def images_per_block(model: ImageModel) -> int:
    """How many images a block has by default: a multiple of a tile."""
    return max(16, min(4096, SUB_PIXELS // math.prod(model.shape) // 16 * 16))


def on_cpu(model: ImageModel) -> ImageModel:
    """A copy that codes."""
    return copy.deepcopy(model).cpu().float().eval()


def digest(model: ImageModel) -> bytes:
    """What tells models apart: 8 bytes of a SHA-256 over config and weights."""
    config = json.dumps(sorted((name, str(value)) for name, value in model.config.items()))
    return bytes.fromhex(exported.checksum({"model": config}, model.state_dict()))[:8]


def checksum(x: Tensor, levels: int) -> int:
    """CRC-32 of images: of a byte each value up to 256 levels, else of four, little-endian."""
    return zlib.crc32(x.numpy().astype(np.uint8 if levels <= 256 else np.dtype("<u4")).tobytes())


def exported_bytes(model: ImageModel) -> bytes:
    return exported.content(model.config, model.state_dict(), None)


def imported(content: bytes) -> ImageModel:
    """The model inside a file."""
    from models.checkpoint import load

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / exported.NAME
        path.write_bytes(content)
        try:
            return load(path)
        except ValueError as error:
            raise ValueError(f"the model inside: {str(error).removeprefix(f'{path}: ')}") from None


def first_label(model: ImageModel) -> int:
    """The lowest label that an image may have."""
    return NO_LABEL if model.label_dropout else 0


def of_labels(model: ImageModel):
    """What codes labels, counted from the lowest: all are as likely."""
    return constriction().stream.model.Uniform(model.classes - first_label(model))


def encoded(
    model: ImageModel, x: Tensor, label: Tensor | None, cond: Tensor | None, tell: Callable[[int], None]
) -> bytes:
    """Code a block's images x (b c h w)."""
    coder = constriction().stream.queue.RangeEncoder()
    if label is not None:
        coder.encode((label - first_label(model)).to(torch.int32).numpy(), of_labels(model))

    def rule(k: int, stage: Stage) -> Encode:
        return Encode(coder, model.of_stage(k, x), stage.known)

    visit(model, rule, len(x), label, cond, tell)
    return coder.get_compressed().astype("<u4").tobytes()


def decoded(model: ImageModel, block: Block, cond: Tensor | None, tell: Callable[[int], None]) -> Tensor:
    """Decode a block's images (b c h w)."""
    words, label = np.frombuffer(block.content, "<u4").astype(np.uint32), None
    coder = constriction().stream.queue.RangeDecoder(words)
    if model.classes:
        label = torch.from_numpy(coder.decode(of_labels(model), block.images)).long() + first_label(model)

    def rule(k: int, stage: Stage) -> Decode:
        x = torch.zeros(block.images, *stage.net.shape, dtype=torch.long) if stage.x is None else stage.x.clone()
        return Decode(coder, x, stage.known)

    return visit(model, rule, block.images, label, cond, tell)


def visit(
    model: ImageModel,
    rule_of: Callable[[int, Stage], Coded],
    b: int,
    label: Tensor | None,
    cond: Tensor | None,
    tell: Callable[[int], None],
) -> Tensor:
    """Visit the sub-pixels of b images by a rule for each stage; return the images."""
    drawn: list[Tensor] = []
    loops: dict[ImageModel, PixelLoop] = {}
    for k, net in enumerate(model.nets):
        with torch.no_grad():
            stage = model.stage(k, b, drawn, label, cond, compiled)
        rule = rule_of(k, stage)
        if net in loops:
            drawn.append(loops[net].again(rule, stage.condition, lambda: tell(b)))
        else:
            loops[net] = PixelLoop(net, "cached", rule, b, stage.condition, backend="cpu")
            drawn.append(loops[net].run(lambda: tell(b)))
    return model.joined(drawn)
