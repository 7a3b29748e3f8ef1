"""Damaged files: some of each kind in the suite, and any number by `python -m tests.damage N`."""

import gzip
import io
import subprocess
import sys
import zipfile
from random import Random

import numpy as np
import pytest
from PIL import Image

from tests.commands import REPOSITORY
from tests.damage import DAMAGE, damaged, in_gzip, in_png, in_zip


@pytest.mark.slow
def test_damaged_files_are_refused_by_name_or_read(tmp_path, monkeypatch):
    """In another process; it fails for a file that takes more than 2 GB or 10 s."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    line = [sys.executable, "-m", "tests.damage", "400", "7"]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert " 0 failed of 400" in done.stdout


@pytest.mark.parametrize("kind", DAMAGE, ids=lambda kind: kind.__name__)
def test_every_damage_changes_a_file(kind):
    whole = bytes(range(48, 58)) * 30
    assert any(bytes(kind(bytearray(whole), Random(seed))) != whole for seed in range(9))
    for seed in range(50):
        kind(bytearray(), Random(seed))


def test_damage_in_depth_is_met_by_what_reads_the_inside():
    """The file around it is whole: its checksums are right."""
    random, out, picture = Random(0), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a", b"content" * 30)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(picture, "png")
    changed = 0
    for _ in range(20):
        changed += gzip.decompress(in_gzip(gzip.compress(b"content" * 30), random)) != b"content" * 30
        with zipfile.ZipFile(io.BytesIO(in_zip(out.getvalue(), random))) as archive:
            assert archive.testzip() is None
            changed += archive.read("a") != b"content" * 30
        changed += in_png(picture.getvalue(), random) != picture.getvalue()
    assert changed > 50 and damaged(b"content", Random(1)) != b"content"
