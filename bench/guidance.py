"""What guidance does: `python -m bench.guidance`, with the digits' models of pretrained/.

classifier   a small convolutional network, trained on the training split: how well it tells test images
samples      a hundred of each class for each guidance: how many it takes for their class, and how varied they are
likelihood   of the test split: given the label, without, and by a model that never had labels
picture      docs/guidance.png: the first samples of each class, a row a class, without guidance and with

Legend: n images · c channel (colour) · h w rows, columns.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import data
from bench.measure import Results, parse, parser, table
from bench.pretrained import FOLDER
from cli.output import UNKNOWN, save_grid
from models.base import NO_LABEL, ImageModel
from models.checkpoint import find, load
from models.likelihood import nats_of, summarise
from models.sampling import sample

PICTURE = Path(__file__).resolve().parent.parent / "docs/guidance.png"
GUIDED, WITHOUT = "digits-gated_pixel_cnn.classes", "digits-gated_pixel_cnn"
STRENGTHS = (0.0, 1.0, 1.5, 2.0, 3.0)
PARTS = ("classifier", "samples", "likelihood", "picture")
COLUMNS = ("part", "guidance", "images", "accuracy", "accuracy_standard_error", "variety", "model", "bits_per_dim")
SHOWN, PICTURED = 7, (1.0, 1.5, 3.0)  # of each class and guidance, and with which


def share(right: Tensor) -> dict:
    """The share of those that are right (n,), and its standard error."""
    mean = right.double().mean().item()
    return {"images": len(right), "accuracy": mean, "accuracy_standard_error": (mean * (1 - mean) / len(right)) ** 0.5}


def classifier(split: data.Split, levels: int, classes: int, steps: int) -> nn.Module:
    """A network that tells the classes of images (n c h w) in [0, levels), trained on a split."""
    torch.manual_seed(0)
    x, labels = split.batch(slice(None))
    _, c, h, w = x.shape
    network = nn.Sequential(
        nn.Conv2d(c, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(64 * (h // 2) * (w // 2), classes),
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    for _ in range(steps):
        some = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(network(x[some] / (levels - 1)), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


def taken_for(network: nn.Module, x: Tensor, levels: int) -> Tensor:
    """The classes (n,) that images (n c h w) are taken for."""
    with torch.no_grad():
        return network(x.float() / (levels - 1)).argmax(1)


def variety(x: Tensor, labels: Tensor) -> float:
    """How far images (n c h w) are from the mean of their class (n,): the root mean square, in values."""
    x = x.double()
    return torch.cat([x[labels == k] - x[labels == k].mean(0) for k in labels.unique()]).square().mean().sqrt().item()


def samples(model: ImageModel, network: nn.Module, test: data.Split, of_class: int) -> Iterator[dict]:
    """A row for each guidance; the first is the test split itself."""
    x, labels = test.batch(slice(None))
    yield {"part": "samples", "of": "test split", **share(taken_for(network, x, model.levels) == labels)} | {
        "variety": variety(x, labels)
    }
    label = torch.arange(model.classes).repeat_interleave(of_class)
    for guidance in STRENGTHS:
        x = sample(model, len(label), label=label, guidance=guidance)
        row = {"part": "samples", "guidance": guidance, **share(taken_for(network, x, model.levels) == label)}
        yield row | {"variety": variety(x, label), "distinct": len(x.flatten(1).unique(dim=0))}


def likelihood(model: ImageModel, without: ImageModel, test: data.Split) -> Iterator[dict]:
    """Rows: the model given labels, given none, and the one that never had any."""
    for name, of, label in (
        ("given the label", model, None),
        ("given none", model, NO_LABEL),
        (WITHOUT, without, None),
    ):
        nats = nats_of(of, test, label=label)["nats"]
        yield {"part": "likelihood", "model": name, "images": len(nats), **summarise(nats, of.shape)}


def draw(model: ImageModel, path: Path) -> dict:
    label = torch.arange(model.classes).repeat_interleave(SHOWN)
    drawn = [sample(model, len(label), label=label, guidance=guidance) for guidance in PICTURED]
    rows = torch.stack(
        [x.long().unflatten(0, (model.classes, SHOWN)) for x in drawn], 1
    )  # (class guidance shown c h w)
    rows = nn.functional.pad(rows, (*[0] * 6, 0, 1), value=UNKNOWN)  # grey between them
    save_grid(path, rows.flatten(1, 2)[:, :-1].flatten(0, 1), model.levels, len(PICTURED) * (SHOWN + 1) - 1)
    return {"part": "picture", "guidance": list(PICTURED)}


def main(argv: list[str] | None = None) -> int:
    options = parser("guidance", "Draw with guidance, and tell how well and how varied.", 1, dict.fromkeys(PARTS))
    options.add_argument(
        "--checkpoint", type=Path, default=FOLDER / f"{GUIDED}.safetensors", help="(that of pretrained/)"
    )
    args = parse(options, argv)
    test, train = (getattr(data.build({"name": "digits"}), name) for name in ("test", "train"))
    model, without = load(find(args.checkpoint)), load(FOLDER / f"{WITHOUT}.safetensors")
    steps, of_class = (20, 2) if args.quick else (1500, 100)
    network = classifier(train, model.levels, model.classes, steps)
    results = Results(args, COLUMNS)

    def told() -> dict:
        x, labels = test.batch(slice(None))
        return {
            "part": "classifier",
            "label_dropout": model.label_dropout,
            **share(taken_for(network, x, model.levels) == labels),
        }

    cases = {
        "classifier": lambda: [told()],
        "samples": partial(samples, model, network, test, of_class),
        "likelihood": partial(likelihood, model, without, test),
        "picture": lambda: [draw(model, Path(args.out) / "guidance.png" if args.quick else PICTURE)],
    }
    for name in args.names:
        results.case({"part": name}, cases[name])
    table("Guidance: who tells the classes apart, and how varied images are", results.rows, COLUMNS)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
