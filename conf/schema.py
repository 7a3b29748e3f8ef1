"""The keys of each command's config, with their types: Hydra refuses a misspelt key and a value of another type.

The keys inside `model`, `dataset` and `optimizer` are checked where they are used.
"""

from dataclasses import dataclass
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Train:
    model: Any = MISSING
    dataset: Any = MISSING
    optimizer: Any = MISSING
    experiment: Any = None

    steps: int = MISSING
    batch_size: int = MISSING
    accumulate: int = MISSING
    seed: int = MISSING
    device: str = MISSING
    bf16: bool = MISSING
    cuda_graph: bool = MISSING
    resume: str | None = None
    init_from: str | None = None

    warmup: int = MISSING
    decay: str = MISSING
    clip: float | None = None
    ema: float = MISSING

    log_every: int = MISSING
    evaluate_every: int = MISSING
    evaluate_images: int | None = None
    save_every: int = MISSING
    sample_every: int = MISSING
    samples: int = MISSING
    completed: int = MISSING
    logger: Any = MISSING


@dataclass
class Sample:
    checkpoint: str | None = None
    n: int | None = None
    label: Any = None
    complete: str | None = None
    keep: float = MISSING
    mask: str | None = None
    completions: int = MISSING
    root: str | None = None
    method: str = MISSING
    backend: str | None = None
    bf16: bool = MISSING
    temperature: float = MISSING
    guidance: float = MISSING
    seed: int = MISSING
    out: str = MISSING
    gif: str | None = None
    npy: str | None = None
    pngs: str | None = None
    columns: int | None = None
    batch_size: int | None = None
    device: str = MISSING


@dataclass
class Evaluate:
    checkpoint: str | None = None
    split: str = MISSING
    root: str | None = None
    images: str | None = None
    labels: str | None = None
    scores: str | None = None
    maps: str | None = None
    against: str | None = None
    details: str | None = None
    nearest: str | None = None
    classify: bool = MISSING
    without_label: bool = MISSING
    out: str | None = None
    batch_size: int = MISSING
    seed: int = MISSING
    device: str = MISSING


@dataclass
class Compress:
    images: str | None = None
    labels: str | None = None
    n: int | None = None
    file: str | None = None
    info: bool = MISSING
    out: str | None = None
    checkpoint: str | None = None
    root: str | None = None
    weights: str | None = None
    images_of_block: int | None = None
    skip_damaged: bool = MISSING
    compare: bool = MISSING
    seed: int = MISSING


@dataclass
class Demo:
    checkpoint: str | None = None
    port: int = MISSING
    open: bool = MISSING


# of each command
SCHEMAS = {"train": Train, "sample": Sample, "evaluate": Evaluate, "compress": Compress, "demo": Demo}


def register() -> None:
    """Make the schemas known to Hydra, as train_schema, sample_schema and evaluate_schema."""
    store = ConfigStore.instance()
    for name, schema in SCHEMAS.items():
        store.store(name=f"{name}_schema", node=schema)
