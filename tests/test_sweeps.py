"""Sweeps by each launcher and sweeper, as people type them: a job that fails is named, and the others end well."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.commands import REPOSITORY, SHORT

pytestmark = pytest.mark.slow


def sweep(cwd: Path, *arguments: str) -> subprocess.CompletedProcess:
    line = [sys.executable, str(REPOSITORY / "train.py"), "-m", *SHORT, "model=pixel_cnn", *arguments]
    return subprocess.run(line, cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)


def needs(module: str):
    found = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{module}")
    return pytest.mark.skipif(not found, reason=f"{module} is not installed: pip install -e '.[sweep]'")


@pytest.mark.parametrize(
    "launcher",
    [
        "basic",
        pytest.param("joblib", marks=needs("hydra_joblib_launcher")),
        pytest.param("submitit_local", marks=needs("hydra_submitit_launcher")),
    ],
)
def test_a_launcher_runs_all_jobs_and_names_the_one_that_failed(tmp_path, launcher):
    done = sweep(tmp_path, f"hydra/launcher={launcher}", "seed=0,1", "optimizer.lr=0.01,-1", "hydra.sweep.dir=swept")
    assert done.returncode == 2 and "optimizer.lr=-1" in done.stderr and "Traceback" not in done.stderr, done.stderr
    names = [f"{k}-optimizer.lr=0.01,seed={seed}" for k, seed in ((0, 0), (2, 1))]
    assert sorted(path.parent.name for path in tmp_path.rglob("summary.json")) == names
    failed = [json.loads(path.read_text()) for path in tmp_path.rglob("failed.json")]
    assert len(failed) == 2 and all("optimizer.lr=-1: expected" in x["error"] for x in failed)


@needs("hydra_optuna_sweeper")
def test_optuna_goes_on_from_its_storage(tmp_path):
    study = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1", "hydra.sweeper.study_name=x"]
    study += ["hydra.sweeper.storage=sqlite:///optuna.db", "optimizer.lr=interval(0.001,0.1)"]
    for k in range(2):
        done = sweep(tmp_path, *study, f"hydra.sweep.dir=swept{k}")
        assert done.returncode == 0, done.stderr
    assert "Using an existing study" in done.stderr
    best = OmegaConf.load(tmp_path / "swept1/optimization_results.yaml").best_value
    values = [json.loads(path.read_text())["val_bits_per_dim"] for path in tmp_path.rglob("summary.json")]
    assert len(values) == 4 and best == pytest.approx(min(values))
