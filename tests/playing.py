"""The demo page, played with in a headless browser: `python -m tests.playing` takes the pictures of docs/.

It needs Playwright and a Chromium (Debian's, or Playwright's own).
"""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.commands import REPOSITORY

PATIENCE = 120  # seconds
STROKES = [[(0.35, 0.3), (0.45, 0.2), (0.6, 0.2), (0.66, 0.3), (0.62, 0.42), (0.5, 0.48)]]  # the upper half of a 3


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a page that runs in a folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(REPOSITORY / "demo.py"), f"port={port}"]
    with (folder / "demo.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while True:
            try:
                urllib.request.urlopen(address, timeout=5).read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until, (folder / "demo.log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def draw(page) -> None:
    """Take the brush, and draw a stroke on the sketchpad."""
    page.get_by_label("Brush").first.click()
    page.wait_for_timeout(500)
    box = page.locator("canvas").first.bounding_box()
    for stroke in STROKES:
        places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in stroke]
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=5)
        page.mouse.up()


def give(page, where: str, picture: Path) -> None:
    """Give the page a file."""
    page.locator(f"#{where} input[type=file]").set_input_files(picture)
    page.locator(f"#{where}").get_by_text(picture.stem).first.wait_for(timeout=1000 * PATIENCE)


def text_of(page, where: str, pattern: str) -> str:
    """The text of an element once it matches, and nothing is computed."""
    until = time.monotonic() + PATIENCE
    while "processing" in (text := page.locator(f"#{where}").inner_text()) or not re.search(pattern, text):
        assert time.monotonic() < until, f"#{where}: expected {pattern}, found {text!r}"
        page.wait_for_timeout(100)
    return text


def picture_in(page, where: str) -> str:
    """The address of the picture in an element."""
    image = page.locator(f"#{where} img").first
    image.wait_for(timeout=1000 * PATIENCE)
    return image.get_attribute("src")


def play(page, address: str, picture: Path, shots: Path | None = None) -> dict[str, str]:
    """Draw, complete, change the temperature, score, compress; what the page said of each.

    Args:
        picture: a file to score and to compress.
        shots: a folder for pictures of the page.
    """

    def shoot(name: str) -> None:
        page.wait_for_timeout(500)
        if shots is not None:
            page.screenshot(path=shots / f"demo-{name}.png")

    said = {}
    page.set_viewport_size({"width": 1100, "height": 900})
    page.goto(address)
    page.locator("canvas").first.wait_for(timeout=1000 * PATIENCE)
    page.wait_for_timeout(1500)
    draw(page)
    page.click("#complete")
    said["complete"] = text_of(page, "about", r"16 completions of \d+ to \d+ bits")
    first = picture_in(page, "drawn")
    shoot("draw")

    page.locator("#temperature input[type=number]").fill("0.1")
    page.locator("#temperature input[type=number]").press("Tab")
    page.click("#complete")
    until = time.monotonic() + PATIENCE
    while picture_in(page, "drawn") == first:
        assert time.monotonic() < until
        page.wait_for_timeout(100)
    page.wait_for_timeout(500)
    said["cold"] = text_of(page, "about", r"16 completions of \d+ to \d+ bits")

    page.get_by_role("tab", name="Score").click()
    give(page, "scored", picture)
    page.click("#score")
    said["score"] = text_of(page, "score_text", r"[\d.]+ bits/dim")
    picture_in(page, "where")
    shoot("score")

    page.get_by_role("tab", name="Compress").click()
    give(page, "given", picture)
    page.click("#compress")
    said["compress"] = text_of(page, "compress_text", r"Decoded, it is the same image")
    picture_in(page, "back")
    shoot("compress")
    return said


def digit(folder: Path) -> Path:
    """A picture of a digit as a file."""
    from cli.demo import enlarged
    from cli.output import bytes_of
    from models.checkpoint import load
    from models.sampling import sample

    x = sample(load(REPOSITORY / "pretrained/binary_mnist-diag_bilstm.safetensors"), 1, seed=5)
    enlarged(bytes_of(x, 2)[0]).save(folder / "digit.png")
    return folder / "digit.png"


def main() -> None:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    with served(folder) as address, browser() as chromium:
        for name, text in play(chromium.new_page(), address, digit(folder), REPOSITORY / "docs").items():
            print(f"{name}: {text}")


if __name__ == "__main__":
    main()
