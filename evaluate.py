"""Measure the likelihood of a whole split under a trained model: `python evaluate.py [checkpoint=…] [split=test]`."""

from collections.abc import Callable

import torch
from torch import Tensor

import data
from conf.command import run
from data.splits import Split
from models.base import AutoregressiveModel, bits_per_dim
from models.checkpoint import find, read, rebuild
from report import Bar


def choose_device(name: str) -> torch.device:
    """auto, cpu or cuda → the device; ValueError for another name, or for cuda where there is none."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device={name!r} is not allowed: auto, cpu or cuda is")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda' is not available: torch finds no GPU; cpu or auto is allowed")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def nats_of(
    model: AutoregressiveModel,
    split: Split,
    batch_size: int,
    seed: int = 0,
    tell: Callable[[int], None] = lambda n: None,
) -> Tensor:
    """Nats of each image of a split (n,) float64, in its order. `seed` is that of stochastic binarization."""
    device, training = model.stem.weight.device, model.training
    generator = torch.Generator().manual_seed(seed)
    nats = []
    model.eval()
    with torch.no_grad():
        for start in range(0, len(split), batch_size):
            x, _ = split.batch(slice(start, start + batch_size), generator)
            nats.append(-model.log_prob(x.to(device)).double().cpu())
            tell(len(x))
    model.train(training)
    return torch.cat(nats)


def summarise(nats: Tensor, shape: tuple[int, int, int]) -> dict[str, float]:
    """Mean and standard error of nats (n,) of images of shape (c h w), in nats and bits/dim."""
    mean, error = nats.mean().item(), nats.std().item() / len(nats) ** 0.5 if len(nats) > 1 else 0.0
    return {
        "nats": mean,
        "nats_standard_error": error,
        "bits_per_dim": bits_per_dim(mean, shape),
        "bits_per_dim_standard_error": bits_per_dim(error, shape),
    }


def main(cfg) -> None:
    if cfg.batch_size < 1:
        raise ValueError(f"batch_size={cfg.batch_size} is not allowed: at least 1 is")
    path = find(cfg.checkpoint)
    checkpoint = read(path, choose_device(cfg.device))
    model = rebuild(checkpoint)
    config = dict(checkpoint["config"]["dataset"])
    dataset = data.build(config if cfg.root is None else {**config, "root": cfg.root})
    split = dataset.split(cfg.split)
    print(f"{path} · {dataset.name} {cfg.split}, {len(split):,} images")
    with Bar("evaluate", len(split)) as bar:
        nats = nats_of(model, split, cfg.batch_size, cfg.seed, bar.advance)
    result = summarise(nats, model.shape)
    print(
        f"{cfg.split}: {result['nats']:.4f} ± {result['nats_standard_error']:.4f} nats, "
        f"{result['bits_per_dim']:.4f} ± {result['bits_per_dim_standard_error']:.4f} bits/dim"
    )


if __name__ == "__main__":
    run("evaluate", main)
