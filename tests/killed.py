"""Run a command that dies, or meets a full disk, at one of its writes: python tests/killed.py EVENT K SCRIPT ARGUMENTS

EVENT is of the K-th write of a whole file, or of the K-th line of metrics:

    half        dies when half of the file is written
    written     dies between the last byte and the file's name
    named       dies once it has its name
    line        dies in the middle of a line of metrics
    full        the disk is full
    full-line   the disk is full when a line of metrics is written
"""

import errno
import os
import runpy
import signal
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at(k: int, first, call):
    """A function that does `first` before its k-th call."""
    count = 0

    def counted(*arguments, **named):
        nonlocal count
        count += 1
        if count == k:
            first(*arguments)
        return call(*arguments, **named)

    return counted


def halve(descriptor: int) -> None:
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    die()


def fill(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def name_and_die(*paths) -> None:
    os.rename(*paths)
    die()


def half_a_line(records, *_) -> None:
    records.file.write('{"step": 1')
    records.file.flush()
    die()


def fill_line(records, *_) -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), records.file.fileno())


def arrange(event: str, k: int) -> None:
    if event in ("line", "full-line"):
        from cli.loggers import Records

        Records.write = at(k, {"line": half_a_line, "full-line": fill_line}[event], Records.write)
    elif event in ("half", "full"):
        os.fsync = at(k, {"half": halve, "full": fill}[event], os.fsync)
    else:
        os.replace = at(k, {"written": lambda *_: die(), "named": name_and_die}[event], os.replace)


if __name__ == "__main__":
    event, k, script, *arguments = sys.argv[1:]
    arrange(event, int(k))
    sys.argv = [script, *arguments]
    runpy.run_path(str(REPOSITORY / script), run_name="__main__")
