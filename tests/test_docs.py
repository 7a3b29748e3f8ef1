"""The README and docs name files that are there, and its figures are what the command draws."""

import re

import pytest
from PIL import Image, ImageChops

from bench import figures
from tests.commands import REPOSITORY

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *(REPOSITORY / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+?)\)", page.read_text())
    assert links or page.name == "CONTRIBUTING.md"
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_readme_begins_with_a_picture_and_two_commands():
    lines = (REPOSITORY / "README.md").read_text().splitlines()
    assert len(lines) <= 130
    top = "\n".join(lines[:15])
    assert "![" in top and "pip install -e . && python train.py" in top and "python sample.py" in top


def test_the_figures_are_what_the_command_draws(tmp_path):
    assert figures.main(["--out", str(tmp_path)]) == 0
    for name in ("sees.png", "row.png"):
        kept, drawn = (Image.open(folder / name).convert("RGB") for folder in (REPOSITORY / "docs", tmp_path))
        assert kept.size == drawn.size
        difference = ImageChops.difference(kept, drawn).convert("L").point(lambda value: 255 * (value > 32))
        assert sum(difference.histogram()[128:]) < 0.02 * kept.width * kept.height  # letters of another Pillow
