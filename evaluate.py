"""Measure the likelihood of a whole split under a trained model: `python evaluate.py [checkpoint=…] [split=test]`."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from torch import Tensor

import data
from conf.command import run
from data.splits import Split
from models.base import ImageModel, bits_per_dim
from models.checkpoint import find, read, rebuild, write_atomically
from report import Bar, environment


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda → the device; ValueError for another name, or for cuda where there is none.

    Of several GPUs, torchrun's processes take one each. It becomes the current one, which torch and Triton use.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is not allowed: auto, cpu or cuda is")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not available: torch finds no GPU; cpu or auto is allowed")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f"LOCAL_RANK={index}: expected less than {count}, the number of GPUs here")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def check_writable(path: Path, suffix: str) -> None:
    """Raise ValueError or OSError, naming the path, unless a file of that suffix can be written there."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: a name that ends in {suffix} is needed")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise PermissionError(f"{path} cannot be written")
    write_atomically(path.with_name(f".{path.name}.probe"), lambda file: None)
    path.with_name(f".{path.name}.probe").unlink()


def nats_of(
    model: ImageModel,
    split: Split,
    batch_size: int,
    seed: int = 0,
    tell: Callable[[int], None] = lambda n: None,
    label: int | None = None,
) -> dict[str, Tensor]:
    """Nats of each image of a split, in its order: "nats" (n,) float64, and the parts that they are a sum of, if any.

    Args:
        seed: that of stochastic binarization.
        label: the class that every image is taken for, of a model with classes; None: its own.
    """
    device, training = model.device, model.training
    generator = torch.Generator().manual_seed(seed)
    nats: dict[str, list[Tensor]] = {}
    model.eval()
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            x, labels = split.batch(slice(start, start + batch_size), generator)
            x, given = model.check(x.to(device)), label_for(model, labels)
            if label is not None:
                given = torch.full((len(x),), label, device=device)
            parts = model.parts(x, given)
            total = torch.stack([*parts.values()]).sum(0) if parts else -model.log_prob(x, given)
            for name, value in {"nats": total, **parts}.items():
                nats.setdefault(name, []).append(value.double().cpu())
            tell(len(x))
    model.train(training)
    return {name: torch.cat(values) for name, values in nats.items()}


def label_for(model: ImageModel, labels: Tensor | None) -> Tensor | None:
    """The labels (b,) of a batch where the model is conditioned on them, on its device."""
    return labels.to(model.device) if model.classes else None


def check_classes(model: ImageModel, dataset: data.Dataset) -> None:
    """Raise ValueError where a model is conditioned on classes that the data set does not have."""
    if model.classes and model.classes != dataset.classes:
        has = f"{dataset.classes} classes" if dataset.classes else "no labels"
        allowed = f"0 or {dataset.classes}" if dataset.classes else "0"
        raise ValueError(f"model.classes={model.classes} is not allowed: {dataset.name} has {has}, {allowed} is")


def summarise(nats: Tensor, shape: tuple[int, int, int]) -> dict[str, float]:
    """Mean and standard error of nats (n,) of images of shape (c h w), in nats and bits/dim."""
    mean, error = nats.mean().item(), nats.std().item() / len(nats) ** 0.5 if len(nats) > 1 else 0.0
    return {
        "nats": mean,
        "nats_standard_error": error,
        "bits_per_dim": bits_per_dim(mean, shape),
        "bits_per_dim_standard_error": bits_per_dim(error, shape),
    }


def classify(model: ImageModel, split: Split, cfg) -> dict[str, float]:
    """Take each image for one of the class of largest log p(x | class): all are as likely before (Bayes' rule).

    Returns:
        accuracy and its standard error, how many images were right, and the likelihood without the label.
    """
    if not model.classes:
        raise ValueError("classify=true is not possible: the model was trained without classes (model.classes=0)")
    nats = []
    for label in range(model.classes):
        with Bar(f"class {label}", len(split)) as bar:
            nats.append(nats_of(model, split, cfg.batch_size, cfg.seed, bar.advance, label)["nats"])
    nats = torch.stack(nats, dim=1)  # (n classes)
    right = nats.argmin(1) == torch.from_numpy(split.labels.astype("int64"))
    accuracy = right.double().mean().item()
    marginal = summarise(math.log(model.classes) - torch.logsumexp(-nats, 1), model.shape)
    return {
        "accuracy": accuracy,
        "accuracy_standard_error": (accuracy * (1 - accuracy) / len(right)) ** 0.5,
        "right": int(right.sum()),
        **{f"marginal_{name}": value for name, value in marginal.items()},
    }


def line(result: dict[str, float]) -> str:
    """A `summarise` in words."""
    return (
        f"{result['nats']:.4f} ± {result['nats_standard_error']:.4f} nats, "
        f"{result['bits_per_dim']:.4f} ± {result['bits_per_dim_standard_error']:.4f} bits/dim"
    )


def main(cfg) -> None:
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size={cfg.batch_size} is not allowed: at least 1 is")
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None:
        check_writable(out, ".json")
    path = find(cfg.checkpoint)
    checkpoint = read(path, choose_device(cfg.device))
    model = rebuild(checkpoint)
    dataset = dataset_of(checkpoint, cfg.root)
    check_classes(model, dataset)
    split = dataset.split(cfg.split)
    print(f"{path} · {dataset.name} {cfg.split}, {len(split):,} images")
    with Bar("evaluate", len(split)) as bar:
        result = nats_of(model, split, cfg.batch_size, cfg.seed, bar.advance)
    total = summarise(result.pop("nats"), model.shape)
    print(f"{cfg.split}: {line(total)}" + ", given the label" * bool(model.classes))
    numbers = {"checkpoint": str(path), "split": cfg.split, "images": len(split), **total}
    for name, nats in result.items():
        mean = summarise(nats, model.shape)
        print(f"  of which {name}: {mean['nats']:.4f} ± {mean['nats_standard_error']:.4f} nats")
        numbers[f"{name}_nats"] = mean["nats"]
    if cfg.classify:
        told = classify(model, split, cfg)
        marginal = {name.removeprefix("marginal_"): value for name, value in told.items()}
        percent, error = 100 * told["accuracy"], 100 * told["accuracy_standard_error"]
        print(f"accuracy {percent:.2f} ± {error:.2f} %, {told['right']} of {len(split)} images")
        print(f"without the label: {line(marginal)}")
        numbers |= told
    if out is not None:
        overrides = HydraConfig.get().overrides.task
        numbers |= {"command": " ".join(["python evaluate.py", *overrides]), **environment(model.device)}
        write_atomically(out, lambda file: file.write((json.dumps(numbers, indent=2) + "\n").encode()))


def dataset_of(checkpoint: dict, root: str | None) -> data.Dataset:
    """The data set that a checkpoint was trained on, below another folder where `root` names one."""
    config = dict(checkpoint["config"]["dataset"])
    return data.build(config if root is None else {**config, "root": root})


if __name__ == "__main__":
    run("evaluate", main)
