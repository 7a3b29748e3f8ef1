"""Measure the likelihood of a split or of one's own images under a trained model: `python evaluate.py [split=test]`."""

from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig

from checks import check, check_one_of, unexpected
from cli import command, scoring
from cli.details import NEIGHBOURS, check_folder, save_nearest, write_details
from cli.images import Images, images_of
from cli.machine import choose_device, environment
from cli.output import check_writable, labels_in_rows, write_json
from cli.progress import Bar
from cli.runs import check_classes, dataset_of, find_model
from data.splits import SPLITS
from models.base import NO_LABEL, ImageModel
from models.checkpoint import read, rebuild
from models.details import details, nearest
from models.likelihood import classify, nats_of, summarise
from models.sampling import sample
from models.scores import Scores, scores

SAMPLES, PICTURED = 64, 10  # that are compared with the training images, and of them in a picture
COMPARED = 256  # images of the split that are compared, too


def in_words(summary: dict[str, float]) -> str:
    """Put a `summarise` into words."""
    return (
        f"{summary['nats']:.4f} ± {summary['nats_standard_error']:.4f} nats, "
        f"{summary['bits_per_dim']:.4f} ± {summary['bits_per_dim_standard_error']:.4f} bits/dim"
    )


def given_what(model: ImageModel, labelled: bool) -> str:
    """Say whether the model was told the labels of the images, if it can be."""
    return f", given {'the' if labelled else 'no'} label" if model.classes else ""


def likelihood(cfg, model: ImageModel, checkpoint: dict, path: Path) -> dict:
    """Measure a split, say what it has, and return the numbers."""
    dataset = dataset_of(checkpoint, cfg.root, path)
    check_classes(model, dataset)
    split = dataset.split(cfg.split)
    print(f"{path} · {dataset.name} {cfg.split}, {len(split):,} images")

    with Bar("evaluate", len(split)) as bar:
        label = NO_LABEL if cfg.without_label else None
        nats = nats_of(model, split, cfg.batch_size, cfg.seed, bar.count, label)
    total = summarise(nats.pop("nats"), model.shape)
    print(f"{cfg.split}: {in_words(total)}{given_what(model, not cfg.without_label)}")
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
    """Score single images, write the table and the maps, and return the numbers of the whole set."""
    check_one_of("split", cfg.split, SPLITS)

    def scored(key: str) -> tuple[Images, Scores]:
        given = images_of(cfg, key, model, checkpoint, path, rounded=True)
        print(f"{path} · {cfg[key]}, {len(given):,} images")
        with Bar("score", len(given)) as bar:
            found = scores(model, given.x, given.labels, batch_size=cfg.batch_size, tell=bar.count)
        total = summarise(found.nats, model.shape)
        print(f"{cfg[key]}: {in_words(total)}{given_what(model, given.labels is not None)}")
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


def detail(cfg, model: ImageModel, checkpoint: dict, path: Path) -> dict:
    """Say where the bits are and whether the probabilities come true, draw both, and return the numbers."""
    given = images_of(cfg, "split" if cfg.images is None else "images", model, checkpoint, path, rounded=True)
    with Bar("details", len(given)) as bar:
        found = details(model, given, cfg.batch_size, cfg.seed, bar.count)
    said = write_details(Path(cfg.details), found)
    of_colours = said["bits_by_colour"].items()
    print("bits a sub-pixel: " + ", ".join(f"{bits:.4f} {name}" for name, bits in of_colours))
    print(f"calibration: {100 * said['calibration_error']:.2f} % of the probability is in a wrong place")
    return said


def near(cfg, model: ImageModel, checkpoint: dict, path: Path) -> dict:
    """Lay samples beside the training images nearest to them, and compare with how near a split's images are."""
    dataset = dataset_of(checkpoint, cfg.root, path)
    generator = torch.Generator().manual_seed(cfg.seed)
    train, held_out = (dataset.split(name).batch(slice(None), generator)[0] for name in ("train", cfg.split))
    label, _ = labels_in_rows(range(model.classes), SAMPLES)
    x = sample(model, SAMPLES, seed=cfg.seed, label=label)
    held_out = held_out[torch.randperm(len(held_out), generator=generator)[:COMPARED]]
    with Bar("nearest", len(train)) as bar:
        distances, places = nearest(torch.cat([x.cpu().long(), held_out.long()]), train, NEIGHBOURS, bar.count)
    save_nearest(Path(cfg.nearest), x[:PICTURED].cpu(), train, places[:PICTURED], model.levels)
    of_samples, of_split = distances[:SAMPLES, 0].median().item(), distances[SAMPLES:, 0].median().item()
    print(f"{cfg.nearest}: a sample in each row, then the {NEIGHBOURS} training images nearest to it")
    print(f"distance to the nearest (root mean square, values): samples {of_samples:.3f}, {cfg.split} {of_split:.3f}")
    return {"nearest_to_samples": of_samples, f"nearest_to_{cfg.split}": of_split}


def main(cfg) -> None:
    check("batch_size", cfg.batch_size, int, 1)
    check("seed", cfg.seed, int, 0)
    out = None if cfg.out is None else Path(cfg.out)
    if out is not None:
        check_writable(out, ".json")
    scoring.check_places(cfg.scores, cfg.maps, [cfg.images, cfg.against])
    if cfg.details is not None:
        check_folder(Path(cfg.details))
    if cfg.nearest is not None:
        check_writable(Path(cfg.nearest), ".png")
    if cfg.labels is not None and cfg.images is None:
        raise unexpected("labels", cfg.labels, "images= with it")
    singly = [key for key in ("images", "scores", "maps", "against") if cfg[key] is not None]
    if singly and cfg.classify:
        raise unexpected("classify", cfg.classify, f"false with {singly[0]}=")
    path = find_model(cfg.checkpoint)
    checkpoint = read(path, choose_device(cfg.device))
    model = rebuild(checkpoint, path)
    if cfg.without_label and not model.label_dropout:
        raise unexpected("without_label", cfg.without_label, f"false, as {path} was trained without label_dropout")
    if cfg.classify and not model.classes:
        raise unexpected("classify", cfg.classify, f"false, as {path} was trained without classes")
    numbers = (score if singly else likelihood)(cfg, model, checkpoint, path)
    for key, more in (("details", detail), ("nearest", near)):
        numbers |= more(cfg, model, checkpoint, path) if cfg[key] is not None else {}
    if out is not None:
        line = " ".join(["python evaluate.py", *HydraConfig.get().overrides.task])
        write_json(out, {"checkpoint": str(path), **numbers, "command": line, **environment(model.device)})


if __name__ == "__main__":
    command.run("evaluate", main)
