"""Fetch published files: from mirrors, with digests, resumed, and with one line that says what to do when offline."""

import hashlib
import http.client
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from data.cache import exclusive

CHUNK = 1 << 20
TIMEOUT = 30  # seconds without a byte


def matches(path: Path, digest: str) -> bool:
    """Tell whether a file has the digest, written "sha256:…" or "md5:…"."""
    algorithm, value = digest.split(":")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest() == value


def _open(url: str, have: int) -> tuple[http.client.HTTPResponse, bool]:
    """Ask for `url` from byte `have` on; return the answer and whether it starts there."""
    headers = {"User-Agent": "pixelrnn"} | ({"Range": f"bytes={have}-"} if have else {})
    answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
    span = answer.headers.get("Content-Range", "")
    return answer, answer.status == 206 and span.startswith(f"bytes {have}-")


def _transfer(url: str, part: Path) -> None:
    """Append what `part` lacks of `url` to it, or start again if the server does not resume; OSError."""
    have = part.stat().st_size if part.exists() else 0
    answer, resumed = _open(url, have)
    have = have if resumed else 0
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length else None
    console = Console(stderr=True)
    columns = TextColumn(part.stem), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with (
        answer,
        open(part, "ab" if resumed else "wb") as file,
        Progress(*columns, console=console, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task("", total=total, completed=have)
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            have += len(chunk)
            progress.update(bar, completed=have)
    if total is not None and have != total:
        raise OSError(f"ended after {have:,} of {total:,} bytes")


def _fetch_from(url: str, target: Path, digest: str) -> str | None:
    """Bring `url` to `target` if its digest is right; return None, or in a few words why not."""
    part = target.with_name(f"{target.name}.part")
    for _ in range(2):  # the rest of an earlier try may be of another file: then once more from the start
        fresh = not part.exists()
        try:
            _transfer(url, part)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code != 416:  # 416: there is nothing after what we have
                return f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__
        if matches(part, digest):
            os.replace(part, target)
            return None
        part.unlink()
        if fresh:
            break
    print(f"{url}: its {digest.split(':')[0]} is not the published one; not used", file=sys.stderr)
    return "wrong digest"


def fetch(folder: Path, bases: Sequence[str], files: Mapping[str, str]) -> None:
    """Make sure that all `files` lie in `folder`; those that do are taken as they are, without a network.

    Args:
        folder: where they belong.
        bases: addresses ending in "/", tried in turn; a file's address is base + name.
        files: name → digest of the published file, "sha256:…" or "md5:…".

    Raises:
        FileNotFoundError: no address gave a file; it names what to put where, and the addresses.
        ValueError: the folder cannot be written.
    """
    if all((folder / name).is_file() for name in files):
        return
    with exclusive(folder):
        for name, digest in files.items():
            failures = []
            if (folder / name).is_file():
                continue
            for base in bases:
                failure = _fetch_from(base + name, folder / name, digest)
                if failure is None:
                    break
                failures.append(f"{base}: {failure}")
            else:
                missing = [name for name in files if not (folder / name).is_file()]
                raise FileNotFoundError(
                    f"{folder.name}: cannot download ({'; '.join(failures)}); "
                    f"put {', '.join(missing)} from there into {folder}, or set dataset.root"
                )
