"""The examples run to their end, small."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.commands import REPOSITORY

pytestmark = pytest.mark.slow


def test_a_prior_over_the_codes_of_a_vqvae(tmp_path):
    pytest.importorskip("vector_quantize_pytorch")
    arguments = ["--steps", "40", "--prior-steps", "20", "--codebook", "16", "--out", str(tmp_path / "vq")]
    command = [sys.executable, str(REPOSITORY / "examples/vq_prior.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "vq"
    codes = np.load(out / "codes.npy")
    assert codes.shape == (1297, 4, 4) and 0 <= codes.min() < codes.max() < 16
    for way in ("embedding", "scaled"):
        summary = json.loads((out / way / "summary.json").read_text())
        assert summary["steps"] == 20 and 0 < summary["test_bits_per_dim"] < 4.2
        drawn = np.load(out / f"drawn-{way}.npy")
        assert drawn.shape == (64, 1, 4, 4) and drawn.max() < 16
        with Image.open(out / f"drawn-{way}.png") as picture:
            assert picture.size == (16 * 58, 4 * 58) and len(np.unique(picture)) > 12
