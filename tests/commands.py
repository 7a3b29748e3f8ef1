"""What tests of the commands share."""

import os
import subprocess
import sys
from pathlib import Path

import evaluate
import sample
import train

REPOSITORY = Path(__file__).resolve().parent.parent
COMMANDS = {"train": (train.main, train.prepare), "sample": (sample.main,), "evaluate": (evaluate.main,)}
TINY = ["model.hidden=4", "model.layers=1", "model.head_features=8", "batch_size=256"]
SHORT = [
    *TINY,
    "steps=12",
    "warmup=2",
    "log_every=4",
    "evaluate_every=6",
    "save_every=5",
    "sample_every=12",
    "samples=4",
]


def process(script: str, *arguments: str, check: bool = False, **options) -> subprocess.CompletedProcess:
    line = [sys.executable, str(REPOSITORY / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, env=environment, capture_output=True, text=True, check=check, **options)


def refused(result: tuple[int, str, str], words: list[str]) -> None:
    """A mistake ended in exit status 2 and one line with these words in it."""
    status, _, err = result
    assert status == 2, result
    assert len(err.splitlines()) == 1, err
    for word in words:
        assert word in err
