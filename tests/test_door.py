"""`import pixelrnn` works from any folder, once the project is installed."""

import os
import subprocess
import sys

import pytest

from tests.commands import REPOSITORY

SCRIPT = """
import pixelrnn, torch
model = pixelrnn.PixelCNN(1, 2, 4, 4, 4, 1)
x = pixelrnn.sample(model, 2, seed=0)
print(tuple(x.shape), float(model.log_prob(x).sum()) < 0, len(pixelrnn.dataset({"name": "digits"}).train) > 1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [False, True], ids=["by_path", "installed"])
def test_it_works_in_another_folder(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": "" if installed else str(REPOSITORY / "library")}
    (tmp_path / "pixelrnn").mkdir()  # as where a checkout of that name is
    command = [sys.executable, "-c", SCRIPT]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    if installed and "No module named 'pixelrnn'" in process.stderr:
        pytest.skip("the project is not installed here: pip install -e .")
    assert process.stdout.split("\n")[0] == "(2, 1, 4, 4) True True", process.stderr
