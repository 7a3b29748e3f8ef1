"""Measure the likelihood of a split or of one's own images under a trained model: `python evaluate.py [split=test]`."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from checks import check, check_one_of, unexpected
from cli import command, scoring
from cli.images import Images, images_of
from cli.machine import choose_device, environment
from cli.output import check_writable, write_json
from cli.progress import Bar
from cli.runs import check_classes, dataset_of
from data.splits import SPLITS
from models.base import ImageModel
from models.checkpoint import find, read, rebuild
from models.likelihood import classify, nats_of, summarise
from models.scores import Scores, scores


def in_words(summary: dict[str, float]) -> str:
    """Put a `summarise` into words."""
    return (
        f"{summary['nats']:.4f} ± {summary['nats_standard_error']:.4f} nats, "
        f"{summary['bits_per_dim']:.4f} ± {summary['bits_per_dim_standard_error']:.4f} bits/dim"
    )


def likelihood(cfg, model: ImageModel, checkpoint: dict, path: Path) -> dict:
    """Measure a split, say what it has, and return the numbers."""
    dataset = dataset_of(checkpoint, cfg.root, path)
    check_classes(model, dataset)
    split = dataset.split(cfg.split)
    print(f"{path} · {dataset.name} {cfg.split}, {len(split):,} images")

    with Bar("evaluate", len(split)) as bar:
        nats = nats_of(model, split, cfg.batch_size, cfg.seed, bar.count)
    total = summarise(nats.pop("nats"), model.shape)
    print(f"{cfg.split}: {in_words(total)}" + ", given the label" * bool(model.classes))
    numbers = {"split": cfg.split, "images": len(split), **total}
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
    return numbers


def score(cfg, model: ImageModel, checkpoint: dict, path: Path) -> dict:
    """Score single images, write what was asked for, and return the numbers of the whole set."""
    check_one_of("split", cfg.split, SPLITS)

    def scored(key: str) -> tuple[Images, Scores]:
        given = images_of(cfg, key, model, checkpoint, path, rounded=True)
        print(f"{path} · {cfg[key]}, {len(given):,} images")
        with Bar("score", len(given)) as bar:
            found = scores(model, given.x, given.labels, batch_size=cfg.batch_size, tell=bar.count)
        total = summarise(found.nats, model.shape)
        print(f"{cfg[key]}: {in_words(total)}" + ", given the label" * bool(model.classes))
        return given, found

    given, found = scored("images" if cfg.images is not None else "split")
    table = None if cfg.scores is None else Path(cfg.scores)
    name = cfg.split if cfg.images is None else cfg.images
    numbers = {"scored": name, "images": len(given)}
    numbers |= summarise(found.nats, model.shape)
    if table is not None:
        scoring.write_table(table, given, found)
    if cfg.maps is not None:
        most = scoring.write_maps(Path(cfg.maps), given, found, model.levels)
        print(f"{cfg.maps}: from 0 bits a pixel, black, to {most:.2f}, pale yellow")
    if cfg.against is not None:
        others = scored("against")[1]
        numbers |= {"against": cfg.against, **scoring.compare((name, cfg.against), found, others, table)}
        print(f"AUROC of {name} against {cfg.against} (0.5: it does not tell them apart)")
        for key, value in numbers.items():
            if key.startswith("auroc_"):
                print(f"  by {key.removeprefix('auroc_').replace('_', ' ')}: {value:.4f}")
    return numbers


def main(cfg) -> None:
    check("batch_size", cfg.batch_size, int, 1)
    check("seed", cfg.seed, int, 0)
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None:
        check_writable(out, ".json")
    scoring.check_places(cfg.scores, cfg.maps, [cfg.images, cfg.against])
    if cfg.labels is not None and cfg.images is None:
        raise unexpected("labels", cfg.labels, "images= with it")
    singly = [key for key in ("images", "scores", "maps", "against") if cfg[key] is not None]
    if singly and cfg.classify:
        raise unexpected("classify", cfg.classify, f"false with {singly[0]}=")
    path = find(cfg.checkpoint)
    checkpoint = read(path, choose_device(cfg.device))
    model = rebuild(checkpoint, path)
    if cfg.classify and not model.classes:
        raise unexpected("classify", cfg.classify, f"false, as {path} was trained without classes")
    numbers = (score if singly else likelihood)(cfg, model, checkpoint, path)
    if out is not None:
        line = " ".join(["python evaluate.py", *HydraConfig.get().overrides.task])
        write_json(out, {"checkpoint": str(path), **numbers, "command": line, **environment(model.device)})


if __name__ == "__main__":
    command.run("evaluate", main)
