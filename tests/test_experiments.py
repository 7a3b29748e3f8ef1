"""The recipes in conf/experiment/ compose and build, have the papers' sizes, and are what docs/experiments.md says."""

import inspect
import itertools
import re
import shlex
from typing import NamedTuple

import pytest
import torch

import models
from tests.commands import REPOSITORY, composed

CONF = REPOSITORY / "conf"
PAGE = (REPOSITORY / "docs" / "experiments.md").read_text()
NAMES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
MODELS = sorted(path.stem for path in (CONF / "model").glob("*.yaml"))

SHAPES = {  # channels, height, width, levels
    "digits": (1, 8, 8, 17),
    "mnist": (1, 28, 28, 256),
    "binary_mnist": (1, 28, 28, 2),
    "fashion_mnist": (1, 28, 28, 256),
    "cifar10": (3, 32, 32, 256),
    "imagenet32": (3, 32, 32, 256),
    "imagenet64": (3, 64, 64, 256),
}


class Paper(NamedTuple):
    dataset: str
    model: str
    layers: int
    hidden: int
    residual: bool
    head_features: int


PAPER = {  # 1601.06759, section 5
    "mnist_diag_bilstm_1x32": Paper("binary_mnist", "DiagBiLSTM", 1, 32, True, 32),
    "mnist_diag_bilstm_7x16": Paper("binary_mnist", "DiagBiLSTM", 7, 16, True, 32),
    "cifar10_pixel_cnn": Paper("cifar10", "PixelCNN", 15, 128, True, 1024),
    "cifar10_row_lstm": Paper("cifar10", "RowLSTM", 12, 128, True, 1024),
    "cifar10_diag_bilstm": Paper("cifar10", "DiagBiLSTM", 12, 128, True, 1024),
    "imagenet32_row_lstm": Paper("imagenet32", "RowLSTM", 12, 384, True, 1024),
    "imagenet64_row_lstm": Paper("imagenet64", "RowLSTM", 4, 512, False, 1024),
    "imagenet64_multi_scale": Paper("imagenet64", "MultiScale", 4, 512, False, 1024),
}

OURS = {  # sizes that no paper gives: what the model has beside the defaults of conf/model/
    "mnist_gated_pixel_cnn": {"layers": 18, "hidden": 32, "head_features": 32, "dropout": 0.1},
    "mnist_pixel_cnn": {"layers": 24, "hidden": 32, "head_features": 32, "dropout": 0.05},
    "mnist_row_lstm": {"layers": 7, "hidden": 16, "head_features": 32},
    "cifar10_gated_pixel_cnn": {"layers": 15, "hidden": 128, "head_features": 1024},
    "cifar10_gated_pixel_cnn_classes": {"layers": 15, "hidden": 128, "head_features": 1024, "classes": 10},
    "cifar10_pixel_cnn_logistic_mixture": {
        "layers": 15,
        "hidden": 128,
        "head_features": 1024,
        "head": "logistic_mixture",
    },
}


def built(cfg) -> models.base.ImageModel:
    """The model of a config, for its data set's shape: only shapes, no numbers."""
    shape = dict(zip(("channels", "height", "width", "levels"), SHAPES[cfg.dataset.name], strict=True))
    with torch.device("meta"):
        return models.build({**cfg.model, **shape})


def table(first: str) -> tuple[list[str], list[list[str]]]:
    """The headings and the rows of the page's table whose first heading is `first`, without backticks."""
    lines = PAGE.splitlines()
    (start,) = (k for k, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines[start:])
    headings, _, *rows = ([cell.strip().replace("`", "") for cell in row.strip("|").split("|")] for row in rows)
    return headings, rows


ROWS = {row[0]: row for row in table("experiment")[1]}
TRAINED = {key: value for key, value, _ in table("key")[1]}  # how all of them are trained; and some otherwise:
_, *KEYS = table("otherwise")[0]
OTHERWISE = {name: dict(zip(KEYS, values, strict=True)) for name, *values in table("otherwise")[1]}


def test_the_page_lists_every_experiment_once():
    assert sorted(row[0] for row in table("experiment")[1]) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_builds_with_the_parameters_that_the_page_says(name):
    cfg = composed(f"experiment={name}")
    model = built(cfg)
    assert model.shape == SHAPES[cfg.dataset.name][:3]
    _, _, parameters, _, _, command = ROWS[name]
    assert f"{sum(p.numel() for p in model.parameters()):,}" == parameters
    assert command == f"python train.py experiment={name}"


@pytest.mark.parametrize("name", PAPER)
def test_has_the_papers_sizes(name):
    cfg = composed(f"experiment={name}")
    sizes = (cfg.model[key] for key in ("layers", "hidden", "residual", "head_features"))
    target = cfg.model._target_.removeprefix("models.")
    assert Paper(cfg.dataset.name, target, *sizes) == PAPER[name]
    assert (cfg.model.skip, cfg.model.head) == (False, "softmax")
    assert f"{cfg.model.layers} layers, h = {cfg.model.hidden}" in ROWS[name][1].replace("1 layer,", "1 layers,")


@pytest.mark.parametrize("name", OURS)
def test_differs_from_the_models_defaults_as_told(name):
    kinds = ("gated_pixel_cnn", "pixel_cnn", "row_lstm")
    cfg, kind = composed(f"experiment={name}"), next(kind for kind in kinds if kind in name)
    assert cfg.model == {**composed(f"dataset={cfg.dataset.name}", f"model={kind}").model, **OURS[name]}


@pytest.mark.parametrize("name", NAMES)
def test_learns_at_the_rate_of_its_size_or_by_the_papers_optimizer(name):
    cfg, theirs = composed(f"experiment={name}"), composed(f"experiment={name}", "optimizer=rmsprop").optimizer
    lr = 1e-3 if cfg.model.hidden >= 128 else 3e-3
    assert (cfg.optimizer.name, cfg.optimizer.lr) == ("muon" if name in OTHERWISE else "adamw", lr)
    assert (theirs.name, theirs.lr, theirs.momentum) == ("rmsprop", 3e-4, 0.9)


def test_every_experiment_is_expected():
    assert sorted({**PAPER, **OURS}) == NAMES


def test_multi_scale_is_two_row_lstms_with_copied_pixels():
    base, larger = built(composed("experiment=imagenet64_multi_scale")).nets
    assert [type(net).__name__ for net in (base, larger)] == ["RowLSTM", "RowLSTM"]
    assert base.shape == (3, 32, 32) and larger.shape == (3, 64, 64)
    assert composed("experiment=imagenet64_multi_scale").model.copy_known is True


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_is_trained_as_the_page_says(name):
    cfg = composed(f"experiment={name}")
    for key, value in (TRAINED | OTHERWISE.get(name, {})).items():
        section, _, leaf = key.rpartition(".")
        given = (cfg[section] if section else cfg)[leaf]
        assert str(given).lower() == value, key


def commands() -> list[list[str]]:
    """Each run of each command of the page, a sweep's runs one by one: its arguments.

    Those that name a launcher or a sweeper are run in `tests/test_sweeps.py`.
    """
    runs = []
    for line in re.findall(r"^python train\.py (?!-m hydra/)(.*)", PAGE, re.MULTILINE):
        arguments = [argument for argument in shlex.split(line) if argument != "-m"]
        choices = [[f"{key}={v}" for v in value.split(",")] for key, _, value in (a.partition("=") for a in arguments)]
        runs += [list(choice) for choice in itertools.product(*choices)]
    return runs


@pytest.mark.slow
def test_every_command_of_the_page_builds():
    runs = commands()
    for arguments in runs:
        built(composed(*arguments))
    assert len(runs) >= 4 + 6  # the two ablations


@pytest.mark.parametrize("name", MODELS)
def test_a_models_config_names_every_argument(name):
    """But for those that the data decide, and maps, which no command line can give."""
    cfg = composed(f"model={name}").model
    arguments = inspect.signature(getattr(models, cfg._target_.removeprefix("models."))).parameters
    elsewhere = {"channels", "levels", "height", "width", "frames", "map_features"}
    assert set(cfg) - {"_target_"} == set(arguments) - elsewhere


def test_every_model_has_a_config():
    assert sorted(composed(f"model={name}").model._target_ for name in MODELS) == [
        f"models.{name}" for name in sorted(models.__all__)
    ]
