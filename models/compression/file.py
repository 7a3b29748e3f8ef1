"""The file that compressed images are: a head, perhaps the model, and blocks of images that decode independently.

    head     magic · version · flags · c h w · levels − 1 · images · images of a block · digest of the model · CRC-32
    frames   with flag 2, of clips: how many an image has · CRC-32
    model    with flag 1: its length, and an exported model (`models.exported`), which has a checksum of its own
    block    its number · its images · its bytes · CRC-32 of these · CRC-32 of its images · CRC-32 of this head · bytes

All integers are little-endian. A head of a block is found again by its checksum, so damage costs one block.
"""

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

MAGIC, VERSION = b"\x89PRN", 1
MODEL_INSIDE, CLIPS = 1, 2
HEAD = struct.Struct("<4sBBHHHHIH8s")
FRAMES = struct.Struct("<H")
BLOCK = struct.Struct("<IHIII")
CHECKSUM = struct.Struct("<I")
LENGTH = struct.Struct("<Q")


class Head(NamedTuple):
    """What a file says of its images."""

    shape: tuple[int, ...]  # (c h w), of clips (t c h w)
    levels: int
    images: int
    of_block: int  # images of each block but the last
    digest: bytes  # of the model that the images were coded with
    model: bytes | None = None  # that model, exported

    @property
    def blocks(self) -> int:
        return -(-self.images // self.of_block)


class Block(NamedTuple):
    """Images coded together."""

    number: int
    images: int
    content: bytes
    checksum: int  # of the images


def with_checksum(content: bytes) -> bytes:
    return content + CHECKSUM.pack(zlib.crc32(content))


def write_file(head: Head, blocks: list[Block]) -> bytes:
    """Put a file together."""
    *frames, c, h, w = head.shape
    flags = (MODEL_INSIDE if head.model is not None else 0) | (CLIPS if frames else 0)
    of_images = c, h, w, head.levels - 1, head.images, head.of_block
    parts = [with_checksum(HEAD.pack(MAGIC, VERSION, flags, *of_images, head.digest))]
    parts += [with_checksum(FRAMES.pack(t)) for t in frames]
    if head.model is not None:
        parts += [LENGTH.pack(len(head.model)), head.model]
    for block in blocks:
        fields = block.number, block.images, len(block.content), zlib.crc32(block.content), block.checksum
        parts += [with_checksum(BLOCK.pack(*fields)), block.content]
    return b"".join(parts)


def read_head(data: bytes) -> tuple[Head, int]:
    """The head of a file, and where its blocks begin.

    Raises:
        ValueError: it is no such file, of another version, or its head is damaged.
    """
    size = HEAD.size + CHECKSUM.size
    if len(data) < size or data[: len(MAGIC)] != MAGIC:
        raise ValueError("expected compressed images, found something else, or a damaged head")
    _, version, flags, c, h, w, levels, images, of_block, digest = HEAD.unpack_from(data)
    if data[:size] != with_checksum(data[: HEAD.size]):
        raise ValueError("the head is damaged: expected another checksum")
    if version != VERSION:
        raise ValueError(f"expected a file of version {VERSION}, found {version}")
    model, shape, at = None, (c, h, w), size
    if flags & CLIPS:
        of_frames, at = data[at : at + FRAMES.size], at + FRAMES.size + CHECKSUM.size
        if data[size:at] != with_checksum(of_frames):
            raise ValueError("the head is damaged: expected another checksum of the number of frames")
        shape = *FRAMES.unpack(of_frames), c, h, w
    if flags & MODEL_INSIDE:
        start = at + LENGTH.size
        (length,) = LENGTH.unpack_from(data.ljust(start, b"\0"), at)
        at = start + length
        model = data[start:at]
        if len(model) < length:
            raise ValueError(f"the model is damaged: expected {length:,} bytes, found {len(model):,}")
    if not (all(shape) and images and of_block):
        raise ValueError(f"expected images, found {images} of {'×'.join(map(str, shape))} in blocks of {of_block}")
    return Head(shape, levels + 1, images, of_block, digest, model), at


def read_blocks(data: bytes, at: int, head: Head) -> Iterator[Block | str]:
    """All blocks of a file in turn; in place of damaged ones, what is wrong."""
    number = 0
    while number < head.blocks:
        before, at = at, next_block(data, at, number, head)
        name = f"block {number} of {head.blocks}"
        if at == len(data):
            rest = f"blocks {number} to {head.blocks - 1} of {head.blocks}" if number + 1 < head.blocks else name
            yield f"{rest}: damaged, or the file ends before"
            return
        found, images, length, of_content, of_images = BLOCK.unpack_from(data, at)
        if found > number:
            yield f"{name}: its head is damaged"
            number += 1
            continue
        if at > before:
            yield f"before {name}: expected nothing, found {at - before:,} bytes"
        start = at + BLOCK.size + CHECKSUM.size
        content = data[start : start + length]
        number += 1
        if len(content) == length and zlib.crc32(content) == of_content:
            yield Block(found, images, content, of_images)
            at = start + length
        else:
            expected = f"expected another checksum of its {length:,} bytes"
            yield f"{name}: " + (
                f"expected {length:,} bytes, found {len(content):,}" if len(content) < length else expected
            )
            at = next_block(data, start, number, head) if number < head.blocks else len(data)
    if at != len(data):
        yield f"after the last block: expected the end, found {len(data) - at:,} bytes"


def heads_in(data: bytes) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Where heads of blocks stand, and their integers."""
    for at in range(len(data) - BLOCK.size - CHECKSUM.size + 1):
        of_block = data[at : at + BLOCK.size + CHECKSUM.size]
        if of_block == with_checksum(of_block[: BLOCK.size]):
            yield at, BLOCK.unpack_from(of_block)


def head_of_blocks(data: bytes, shape: tuple[int, ...], levels: int, digest: bytes) -> tuple[Head, int]:
    """What the head of a file must have been, by its blocks, and where they begin.

    Raises:
        ValueError: there are no blocks.
    """
    found = list(heads_in(data))
    if not found:
        raise ValueError("expected blocks of compressed images, found none")
    last, of_last = max((number, images) for _, (number, images, *_) in found)
    of_block = next((images for _, (number, images, *_) in found if number < last), of_last)
    return Head(shape, levels, last * of_block + of_last, of_block, digest), found[0][0]


def next_block(data: bytes, start: int, least: int, head: Head) -> int:
    """Where the next block of at least that number begins, from a place on; the end of the file, if there is none."""
    for at in range(start, len(data) - BLOCK.size - CHECKSUM.size + 1):
        (number,) = CHECKSUM.unpack_from(data, at)  # the first of a block's integers
        if least <= number < head.blocks:
            of_block = data[at : at + BLOCK.size + CHECKSUM.size]
            images = min(head.of_block, head.images - number * head.of_block)
            if of_block == with_checksum(of_block[: BLOCK.size]) and BLOCK.unpack_from(of_block)[1] == images:
                return at
    return len(data)
