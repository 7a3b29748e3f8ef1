"""Writing files: whole or not at all, and with an error that names the file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def nameless(error: BaseException | None, path: Path) -> OSError | None:
    """Return the system's error behind another one, if it names no file, or only this one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error if error.filename in (None, str(path)) else None
        error = error.__cause__ if error.__suppress_context__ else error.__context__
    return None


@contextmanager
def naming(path: Path, written: Path | None = None) -> Iterator[None]:
    """Have an OSError of what is done inside name `path`: that of a full disk names no file.

    torch.save raises another error while it closes its archive; the system's is then behind that one.

    Args:
        written: the file that is meant by that name.
    """
    try:
        yield
    except Exception as error:
        found = nameless(error, written or path)
        if found is None:
            raise
        raise OSError(found.errno, found.strerror, str(path)) from None


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Call write(file) on a new file beside `path`, and rename it to `path` once it is safely on the disk.

    Whatever happens midway, `path` holds the old contents or the new, whole; of several processes, those of one.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path, unfinished):
            with open(unfinished, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file as `write_atomically` does: whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def reserve(file: BinaryIO, size: int) -> None:
    """Append `size` zeros that the disk has room for, so that memory mapped to them can be written without fail."""
    file.flush()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), file.tell(), size)
        return
    for start in range(0, size, 1 << 20):
        file.write(bytes(min(1 << 20, size - start)))
