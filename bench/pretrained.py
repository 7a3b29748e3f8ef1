"""Measure the models in pretrained/ and write their cards: `python -m bench.pretrained [NAME …]`.

For each: its likelihood on the whole test split, to bench/results/pretrained/NAME.json; a picture of samples and a card
beside the weights; and the list of all, pretrained/README.md. How it was trained stays in the JSON as it is; of a model
that has just been trained, `--training runs/…` puts it there, with its curve.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch

import data
from cli.machine import environment
from cli.output import labels_in_rows, save_grid
from cli.plot import curves
from cli.report import curve, metrics_of, read_json
from files import write_text
from models.checkpoint import read, rebuild
from models.likelihood import nats_of, summarise
from models.sampling import sample

ROOT = Path(__file__).resolve().parent.parent
FOLDER, RESULTS = ROOT / "pretrained", ROOT / "bench/results/pretrained"
DRAWN = {3: 64, 4: 8}  # samples of a picture: images (c h w), clips (t c h w)
FIRST = 64  # images of the test split whose likelihood is kept too, so that it is repeated soon
DATA = {  # what it is, and its licence
    "digits": "handwritten digits of 8×8 pixels, [in the project](../data/DIGITS.md), CC BY 4.0",
    "mnist": "MNIST (LeCun, Cortes, Burges), CC BY-SA 3.0",
    "fashion_mnist": "Fashion-MNIST (Xiao, Rasul, Vollgraf 2017, [1708.07747](https://arxiv.org/abs/1708.07747)), MIT",
    "binary_mnist": "the fixed binarization of MNIST (Larochelle and Murray 2011), as MNIST CC BY-SA 3.0",
    "cifar10": "CIFAR-10 (Krizhevsky 2009), for research; its authors name no licence",
    "moving_digits": "clips of the handwritten digits, [in the project](../data/DIGITS.md), CC BY 4.0",
}
WRITTEN = {"PixelCNN": "PixelCNN", "GatedPixelCNN": "Gated PixelCNN", "RowLSTM": "Row LSTM"}
WRITTEN |= {"DiagBiLSTM": "Diagonal BiLSTM", "MultiScale": "Multi-Scale", "Video": "Video"}
KEPT = ("command", "device", "cores", "train_seconds", "images_per_second", "best_step", "date")
HEADER = """# Trained models

Each is one file that every command takes, by a short name in any folder, and from Python (`pixelrnn.load`):

```
python sample.py checkpoint=pretrained/binary_mnist-diag_bilstm
python evaluate.py checkpoint=pretrained/digits-diag_bilstm     repeats its number
```

The config of its training is inside. The numbers are those of the whole test split, ± the standard error over its
images; each card says how the model was trained. `python -m bench.pretrained` measures them again and writes these
pages.

| file | model | test split |
|---|---|---|
"""


def training_of(folder: Path) -> dict:
    """What a run's folder says of a training: some of summary.json, and bits/dim of the validation split by step."""
    summary, metrics = read_json(folder / "summary.json"), metrics_of(folder)
    if summary is None:
        raise SystemExit(f"{folder}: expected the folder of a run that has ended, found no summary.json")
    training = {key: summary[key] for key in KEPT if key in summary}
    if begun := re.search(r" init_from=(\S+)", training["command"]):
        known = RESULTS / f"{Path(begun[1]).name}.json"
        of_project = Path(begun[1]).parent.name == FOLDER.name
        before = json.loads(known.read_text())["training"] if of_project else training_of(Path(begun[1]))
        training["began_with"] = {key: before[key] for key in (*KEPT, "validation", "began_with") if key in before}
    return training | {"validation": curve(metrics, "val_bits_per_dim")}


def measure(name: str, training: dict | None) -> dict:
    """Measure a model and draw its samples; return its numbers, its config and how it was trained."""
    path, known = FOLDER / f"{name}.safetensors", RESULTS / f"{name}.json"
    checkpoint = read(path)
    model, config = rebuild(checkpoint, path).eval(), checkpoint["config"]
    split = data.build({**config["dataset"], "root": None}).test
    nats = nats_of(model, split)["nats"]
    labels = {"labels": split.labels[:FIRST].tolist()} if model.classes else {}
    label, columns = labels_in_rows(range(model.classes), None)
    n = DRAWN[len(model.shape)] if label is None else len(label)
    save_grid(FOLDER / f"{name}.png", sample(model, n, seed=0, label=label), model.levels, columns)
    training = training or json.loads(known.read_text())["training"]
    return {
        "test": {"images": len(nats), **summarise(nats, model.shape)},
        "first": {"images": len(nats[:FIRST]), "nats": nats[:FIRST].mean().item()} | labels,
        "model": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "config": config,
        "training": training,
        "command": f"python -m bench.pretrained {name}",
        **environment(torch.device("cpu")),
    }


def in_words(of: dict) -> str:
    """The size of a model."""
    config, layers = of["config"]["model"], of["config"]["model"]["layers"]
    text = f"{WRITTEN[of['model']]}, {layers} layer{'s' * (layers > 1)}, h = {config['hidden']}"
    if "past" in config:
        text += f", of frames given the last {config['past']}"
    if config.get("head") == "logistic_mixture":
        text += f", logistic mixture of {config['mixtures']}"
    return text + f", given one of {config['classes']} classes" * bool(config.get("classes"))


def likelihood(of: dict) -> str:
    """What it has on the test split: bits/dim, and for binary images nats."""
    test = of["test"]
    bits = f"{test['bits_per_dim']:.4f} ± {test['bits_per_dim_standard_error']:.4f} bits/dim"
    nats = f"{test['nats']:.2f} ± {test['nats_standard_error']:.2f} nats"
    return f"{nats}, {bits}" if of["config"]["dataset"]["name"] == "binary_mnist" else f"{bits}, {nats}"


def stages(training: dict) -> list[dict]:
    """The trainings that a model had, the first one first: each began with the weights of the one before."""
    return [*(stages(training["began_with"]) if "began_with" in training else []), training]


def drawn(name: str, training: dict) -> str:
    """The curves of all trainings that a model had; each counts its own steps."""
    *before, last = [stage["validation"] for stage in stages(training)]
    series = {f"training {k}": points for k, points in enumerate(before, 1)}
    return curves(series | {name: last}, "step", "bits/dim, validation")


def where(training: dict, what: str) -> str:
    """What a training ran on, how long and when."""
    text = f"{training['device']}, {training['cores']} core{'s' * (training['cores'] > 1)}"
    if "train_seconds" in training:
        text += f", {training['train_seconds'] / 60:.0f} minutes ({training['images_per_second']:.0f} {what}/s)"
    return f"{text}, {training['date'][:10]}"


def card(name: str, of: dict) -> str:
    """The text of a model's card."""
    training, config = of["training"], of["config"]
    size, what = (FOLDER / f"{name}.safetensors").stat().st_size, "clips" if of["model"] == "Video" else "images"
    row = "| began with | the weights after {best_step:,} steps of the training before, on {} |\n"
    before = "".join(row.format(where(stage, what), **stage) for stage in stages(training)[:-1])
    best, steps = training["best_step"], config["steps"]
    kept = f"; the weights are those after {best:,}, the best on the validation split" * (best < steps)
    half = ", in half precision" * (size < 4 * of["parameters"])
    commands = "\n".join(stage["command"] for stage in stages(training))
    return f"""# {name}

![samples]({name}.png)

| | |
|---|---|
| model | {in_words(of)}; {of["parameters"]:,} parameters, {size / 1e3:,.0f} kB{half} |
| test split, {of["test"]["images"]:,} {what} | {likelihood(of)} |
| data | {DATA[config["dataset"]["name"]]} |
{before}| trained for | {steps:,} steps of {config["batch_size"]} {what}{kept} |
| trained on | {where(training, what)} |

The samples are the first ones of seed 0, not chosen. The model was trained by

```
{commands}
```

![bits/dim of the validation split](../bench/results/pretrained/{name}.svg)

`python evaluate.py checkpoint=pretrained/{name}` repeats the likelihood
([json](../bench/results/pretrained/{name}.json)). The weights, averaged over the last steps, are under the project's
licence, MIT.
"""


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.pretrained", description=__doc__.split("\n")[0])
    options.add_argument("names", nargs="*", metavar="NAME", help="of a file in pretrained/ (all)")
    options.add_argument("--training", type=Path, metavar="RUN", help="folder of the run that trained NAME")
    args = options.parse_args(argv)
    every = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
    for name in args.names:
        if name not in every:
            options.error(f"{name}: expected one of {', '.join(every)}")
    if args.training and len(args.names) != 1:
        options.error(f"--training: expected one NAME, found {len(args.names)}")
    training = training_of(args.training) if args.training else None
    for name in args.names or every:
        of = measure(name, training)
        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / f"{name}.json", json.dumps(of, indent=2, ensure_ascii=False) + "\n")
        write_text(RESULTS / f"{name}.svg", drawn(name, of["training"]))
        print(f"{name}: {likelihood(of)}", flush=True)
    rows = []
    for name in every:
        if not (RESULTS / f"{name}.json").exists():
            continue  # its turn comes
        of = json.loads((RESULTS / f"{name}.json").read_text())
        write_text(FOLDER / f"{name}.md", card(name, of))
        rows.append(f"| [`{name}`]({name}.md) | {in_words(of)} | {likelihood(of)} |\n")
    write_text(FOLDER / "README.md", HEADER + "".join(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
