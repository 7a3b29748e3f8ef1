"""The folders of data on disk, and the conversion of a source, once, into a memory-mapped .npy file."""

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from checks import reason_of, unexpected
from files import write_atomically

try:
    import fcntl
except ImportError:  # Windows: processes that start together may then do the same work twice
    fcntl = None

CACHE = "~/.cache/pixelrnn"
HEAD = 128  # bytes of the head of a .npy file


def folder(root: str | os.PathLike | None, name: str) -> Path:
    """Return the folder of data set `name`: root/name, or ~/.cache/pixelrnn/name if root is None."""
    if not isinstance(root, (str, os.PathLike, type(None))) or root == "":
        raise unexpected("dataset.root", root, f"a folder, or null for {CACHE}")
    return Path(CACHE if root is None else root).expanduser() / name


def source(option: str, path: object, name: str, what: str) -> Path:
    """Return an option of data set `name` that is a path, to `what`; ValueError if there is none."""
    if not isinstance(path, (str, os.PathLike)) or path in ("", "???"):
        raise unexpected(f"dataset.{option}", path, f"{what}, for dataset={name}")
    return Path(path).expanduser()


def stamp(path: Path) -> tuple[int, int]:
    """Return size in bytes and time in ns of a file, which tell whether it has changed."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def key(*parts: object) -> str:
    """Make a name of 16 hexadecimal digits for a converted file, from everything that it depends on."""
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
        raise ValueError(
            f"{where}: expected a folder to write to ({reason}); set dataset.root to another folder"
        ) from None
    with open(where / ".lock") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def once(make: Callable[[], None], *targets: Path) -> None:
    """Call make(), which writes `targets` into one folder, unless they are there; of several processes, one does."""
    if all(target.is_file() for target in targets):
        return
    with exclusive(targets[0].parent):
        if not all(target.is_file() for target in targets):
            make()


def _header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """Make the head of a .npy file (format 1.0), of one length for any shape, so that it can be rewritten in place."""
    text = f"{{'descr': '{dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", HEAD - 10) + text.ljust(HEAD - 11).encode() + b"\n"


def store(path: Path, blocks: Iterable[np.ndarray], places: np.ndarray | None = None) -> None:
    """Write blocks (k …) of one type, one after another, as the .npy file `path` of shape (n …).

    The file grows under a temporary name and gets its own in one step: it is there whole or not at all. No
    more than a block is in memory, and n need not be known beforehand.

    Args:
        places: (n,) the row of the file for each row of the blocks in turn; None: as they come.
    """

    def write(file: BinaryIO) -> None:
        n, kind = 0, None
        file.write(_header(np.dtype(np.uint8), (0,)))
        for block in blocks:
            assert kind in (None, (block.dtype, block.shape[1:])), f"{kind} then {block.dtype} {block.shape}"
            kind = block.dtype, block.shape[1:]
            if places is None:
                file.write(np.ascontiguousarray(block).data)
            else:
                for row, place in zip(block, places[n : n + len(block)], strict=True):
                    file.seek(HEAD + int(place) * row.nbytes)
                    file.write(np.ascontiguousarray(row).data)
            n += len(block)
        assert kind is not None, "nothing to store"
        file.seek(0)
        file.write(_header(kind[0], (n, *kind[1])))

    write_atomically(path, write)


def load(path: Path, rest: tuple[int, ...], *dtypes: type, n: int | None = None) -> np.ndarray:
    """Memory-map a .npy file that `store` wrote, of shape (n, *rest) and one of these types; ValueError otherwise.

    Args:
        n: how many rows it has; None: any number.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="r")
        right = array.ndim == 1 + len(rest) and array.shape[1:] == rest and array.dtype in dtypes
        if not right or n not in (None, len(array)):
            raise ValueError(f"an array {array.shape} of {array.dtype}")
    except Exception as error:  # as in `arrays.open_integers`
        raise ValueError(f"{path}: damaged ({reason_of(error)}); delete it and it is made again") from None
    return array
