"""The README and docs name files that are there, and its figures are what the command draws."""

import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from bench import figures
from tests.commands import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")), *DOCS.glob("*.ipynb")]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))


def anchors(page: Path) -> list[str]:
    """The names of a page's headings in links, as GitHub makes them."""
    headings = re.findall("^#+ (.*)$", page.read_text(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@every_page
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    assert links or page.name == "CONTRIBUTING.md"
    for link in links:
        if "://" not in link:
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_the_readme_begins_with_a_picture_and_two_commands():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    top = "\n".join(lines[:15])
    assert "![" in top and "pip install -e . && python train.py" in top and "python sample.py" in top


def test_the_figures_are_what_the_command_draws(tmp_path):
    assert figures.main(["--out", str(tmp_path)]) == 0
    drawn_here = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    assert len(drawn_here) == 2 + len(figures.LAYERS)
    for name in drawn_here:
        kept, drawn = (Image.open(folder / name).convert("RGB") for folder in (DOCS, tmp_path))
        assert kept.size == drawn.size
        difference = ImageChops.difference(kept, drawn).convert("L").point(lambda value: 255 * (value > 32))
        assert sum(difference.histogram()[128:]) < 0.02 * kept.width * kept.height  # letters of another Pillow
