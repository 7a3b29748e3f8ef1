"""Measure the likelihood of a whole split under a trained model: `python evaluate.py [checkpoint=…] [split=test]`."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from checks import check, unexpected
from cli import command
from cli.machine import choose_device, environment
from cli.output import check_writable, write_json
from cli.progress import Bar
from cli.runs import check_classes, dataset_of
from models.checkpoint import find, read, rebuild
from models.likelihood import classify, nats_of, summarise


def in_words(summary: dict[str, float]) -> str:
    """Put a `summarise` into words."""
    return (
        f"{summary['nats']:.4f} ± {summary['nats_standard_error']:.4f} nats, "
        f"{summary['bits_per_dim']:.4f} ± {summary['bits_per_dim_standard_error']:.4f} bits/dim"
    )


def main(cfg) -> None:
    check("batch_size", cfg.batch_size, int, 1)
    check("seed", cfg.seed, int, 0)
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None:
        check_writable(out, ".json")
    path = find(cfg.checkpoint)
    checkpoint = read(path, choose_device(cfg.device))
    model = rebuild(checkpoint, path)
    if cfg.classify and not model.classes:
        raise unexpected("classify", cfg.classify, f"false, as {path} was trained without classes")
    dataset = dataset_of(checkpoint, cfg.root, path)
    check_classes(model, dataset)
    split = dataset.split(cfg.split)
    print(f"{path} · {dataset.name} {cfg.split}, {len(split):,} images")

    with Bar("evaluate", len(split)) as bar:
        nats = nats_of(model, split, cfg.batch_size, cfg.seed, bar.count)
    total = summarise(nats.pop("nats"), model.shape)
    print(f"{cfg.split}: {in_words(total)}" + ", given the label" * bool(model.classes))
    numbers = {"checkpoint": str(path), "split": cfg.split, "images": len(split), **total}
    for name, part in nats.items():
        mean = summarise(part, model.shape)
        print(f"  of which {name}: {mean['nats']:.4f} ± {mean['nats_standard_error']:.4f} nats")
        numbers[f"{name}_nats"] = mean["nats"]

    if cfg.classify:
        with Bar("classes", model.classes * len(split)) as bar:
            found = classify(model, split, cfg.batch_size, cfg.seed, bar.count)
        percent, error = 100 * found["accuracy"], 100 * found["accuracy_standard_error"]
        print(f"accuracy {percent:.2f} ± {error:.2f} %, {found['right']} of {len(split)} images")
        print(f"without the label: {in_words({name: found[f'marginal_{name}'] for name in total})}")
        numbers |= found

    if out is not None:
        line = " ".join(["python evaluate.py", *HydraConfig.get().overrides.task])
        write_json(out, numbers | {"command": line, **environment(model.device)})


if __name__ == "__main__":
    command.run("evaluate", main)
