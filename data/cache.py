"""Where data lies on disk, and how a source is converted once into a memory-mapped .npy file."""

import hashlib
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: processes that start together may then do the same work twice
    fcntl = None

CACHE = "~/.cache/pixelrnn"


def folder(root: str | os.PathLike | None, name: str) -> Path:
    """The folder of data set `name`: root/name, or ~/.cache/pixelrnn/name where root is None."""
    if not isinstance(root, (str, os.PathLike, type(None))) or root == "":
        raise ValueError(f"dataset.root: {root!r} is not a folder's path; null means {CACHE}")
    return Path(CACHE if root is None else root).expanduser() / name


def source(option: str, path: object, name: str, what: str) -> Path:
    """Check an option of data set `name` that is a path to `what`; ValueError where it is not given."""
    if not isinstance(path, (str, os.PathLike)) or path in ("", "???"):
        raise ValueError(f"dataset.{option}: {name} needs dataset.{option}={what}, got {path!r}")
    return Path(path).expanduser()


def stamp(path: Path) -> tuple[int, int]:
    """What tells a changed file from the same file: its size in bytes and its time in ns."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def key(*parts: object) -> str:
    """A name for a converted file, of 16 hexadecimal digits, that depends on all it was made from."""
    text = repr([str(part) if isinstance(part, Path) else part for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def exclusive(where: Path) -> Iterator[None]:
    """Make the folder `where` and let one process at a time work in it: a training's ranks start together."""
    try:
        where.mkdir(parents=True, exist_ok=True)
        (where / ".lock").touch()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"{where}: cannot write there ({reason}); set dataset.root to another folder") from None
    with open(where / ".lock") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The head of a .npy file (format 1.0), 128 bytes whatever the shape: it can be rewritten in place."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + text.ljust(117).encode() + b"\n"


def store(path: Path, blocks: Iterable[np.ndarray]) -> None:
    """Write blocks (k …) of one type, one after another, as the .npy file `path` of shape (n …).

    The file grows under a temporary name and gets its own in one step: it is there whole or not at all. No
    more than a block is in memory, and n need not be known beforehand.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    n, kind = 0, None
    try:
        with open(temporary, "wb") as file:
            file.write(_header(np.dtype(np.uint8), (0,)))
            for block in blocks:
                assert kind in (None, (block.dtype, block.shape[1:])), f"{kind} then {block.dtype} {block.shape}"
                kind = block.dtype, block.shape[1:]
                n += len(block)
                file.write(np.ascontiguousarray(block).data)
            assert kind is not None, "nothing to store"
            file.seek(0)
            file.write(_header(kind[0], (n, *kind[1])))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> np.ndarray:
    """Memory-map a .npy file that `store` wrote; ValueError where it is damaged."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path}: damaged ({reason}); delete it and it is made again") from None
