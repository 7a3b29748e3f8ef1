"""Likelihoods of many images under a model: nats of each, their summary, and classification by Bayes' rule.

Legend: b batch · n images · c channel (colour) · h w rows, columns.

A `split` is anything with a length whose `batch(index, generator)` returns images (b c h w) and their labels (b,) or
None; where it has labels, `labels` are all of them, (n,) as a NumPy array. `data.Split` is one.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from checks import check
from models.base import ImageModel, bits_per_dim

EVALUATION_BATCH = 64  # images: small enough for a cache, large enough for a GPU


def label_for(model: ImageModel, labels: Tensor | None) -> Tensor | None:
    """Return the labels (b,) of a batch on the model's device, or None if it is not conditioned on them."""
    return labels.to(model.device) if model.classes and labels is not None else None


def nats_of(
    model: ImageModel,
    split,
    batch_size: int = EVALUATION_BATCH,
    seed: int = 0,
    tell: Callable[[int], None] = lambda images: None,
    label: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> dict[str, Tensor]:
    """Measure the nats of each image of a split, in its order, in eval mode; the model keeps the mode it was in.

    Args:
        split: images, as above.
        batch_size: images at a time.
        seed: of stochastic binarization.
        tell: called after each batch with the number of images in it.
        label: one class to take every image for, of a model with classes, or NO_LABEL; None: each image's own.
        share: (k, n): of n processes that share the batches this is number k, and measures the batches k, k+n, ….

    Returns:
        "nats": (n,) float64; and by name the parts that they are the sum of, if the model has parts.
    """
    device, training = model.device, model.training
    generator = torch.Generator().manual_seed(seed)
    nats: dict[str, list[Tensor]] = {}
    model.eval()
    with torch.no_grad():
        for number, start in enumerate(range(0, len(split), batch_size)):
            x, labels = split.batch(slice(start, start + batch_size), generator)  # others' too: they take random bits
            if number % share[1] != share[0]:
                tell(len(x))
                continue
            x, labels = model.check(x.to(device)), label_for(model, labels)
            if label is not None:
                labels = torch.full((len(x),), label, device=device)
            parts = model.parts(x, labels)
            total = torch.stack([*parts.values()]).sum(0) if parts else -model.log_prob(x, labels)
            for name, value in {"nats": total, **parts}.items():
                nats.setdefault(name, []).append(value.cpu().double())
            tell(len(x))
    model.train(training)
    return {name: torch.cat(values) for name, values in nats.items()}


def summarise(nats: Tensor, shape: tuple[int, int, int]) -> dict[str, float]:
    """Return mean and standard error of nats (n,) of images of shape (c h w), in nats and bits/dim."""
    mean, error = nats.mean().item(), nats.std().item() / len(nats) ** 0.5 if len(nats) > 1 else 0.0
    return {
        "nats": mean,
        "nats_standard_error": error,
        "bits_per_dim": bits_per_dim(mean, shape),
        "bits_per_dim_standard_error": bits_per_dim(error, shape),
    }


def classify(
    model: ImageModel,
    split,
    batch_size: int = EVALUATION_BATCH,
    seed: int = 0,
    tell: Callable[[int], None] = lambda images: None,
) -> dict[str, float]:
    """Take each image for one of the class with the largest log p(x | class): Bayes' rule, with equal priors.

    Args:
        split: images with labels, as above; it is passed over once for each class.
        batch_size, seed, tell: as in `nats_of`.

    Returns:
        accuracy and its standard error, how many images are right, and the likelihood without the label.

    Raises:
        ValueError: the model has no classes.
    """
    check("model.classes", model.classes, int, 1)
    nats = [nats_of(model, split, batch_size, seed, tell, label)["nats"] for label in range(model.classes)]
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
