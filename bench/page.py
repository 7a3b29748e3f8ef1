"""Write docs/results.md from the files in bench/results/: `python -m bench.page`."""

import json
import sys
from pathlib import Path

from bench.pretrained import RESULTS as TRAINED
from bench.pretrained import WRITTEN, in_words, likelihood, stages
from files import write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "bench/results", ROOT / "docs/results.md"
MODELS = {"pixel_cnn": "PixelCNN", "gated_pixel_cnn": "GatedPixelCNN", "row_lstm": "RowLSTM"}
MODELS |= {"diag_bilstm": "DiagBiLSTM", "multi_scale": "MultiScale"}


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(*rows: tuple) -> str:
    """A table, of its head and its rows."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def link(name: str) -> str:
    return f"[json](../bench/results/{name})"


def value(of: dict, what: str, digits: int) -> str:
    """A number of a split and its standard error."""
    return f"{of[what]:.{digits}f} ± {of[f'{what}_standard_error']:.{digits}f}"


def runs(series: str, unit: str, digits: int) -> str:
    """The runs of one series, a row a model."""
    rows = [("model", "parameters", "seconds of training", f"validation, {unit}", f"test, {unit}", "")]
    what = unit.replace("/", "_per_")
    for model, name in MODELS.items():
        file = f"{series}-{model}.json"
        if not (RESULTS / file).exists():
            continue
        of = read(file)
        of_splits = (value(of, f"{split}_{what}", digits) for split in ("val", "test"))
        rows.append((WRITTEN[name], f"{of['parameters']:,}", f"{of['train_seconds']:.0f}", *of_splits, link(file)))
    return table(*rows)


def trained() -> str:
    rows = [("file", "model", "steps × images", "whole test split", "")]
    for path in sorted(TRAINED.glob("*.json")):
        of, name = json.loads(path.read_text()), path.stem
        steps = f"{of['config']['steps']:,} × {of['config']['batch_size']}"
        trainings = len(stages(of["training"]))
        steps += f", the last of {trainings} trainings" * (trainings > 1)
        card = f"[`{name}`](../pretrained/{name}.md)"
        rows.append((card, in_words(of), steps, likelihood(of), link(f"pretrained/{path.name}")))
    return table(*rows)


def compressed() -> str:
    rows = [("images", "", "this", "PNG", "WebP", "JPEG XL", "LZMA")]
    for row in read("compression-cpu.json")["rows"]:
        bits = f"{row['bits_per_dim']:.3f}"
        if row["codec"].startswith("prnn"):
            rows.append((row["data"], f"{row['images']:,}", f"**{bits}**"))
        elif "side by side" in row["codec"] or row["codec"] == "LZMA":
            rows[-1] += (bits,)
    return table(*rows)


def unusual() -> str:
    bits = ("bits/dim: own", "other", "less a PNG's: own", "other")
    rows = [("model of", "other images", *bits, "AUROC by bits", "by bits less a PNG's")]
    for of in read("scores-cpu.json")["rows"]:
        if "unusual" not in of:
            continue
        means = (of[f"{which}{what}"] for what in ("bits_per_dim", "corrected") for which in ("", "unusual_"))
        areas = (f"**{of[f'auroc_{what}']:.3f}**" for what in ("bits", "corrected"))
        rows.append((of["model"].rpartition("-")[0], of["unusual"], *(f"{mean:.3f}" for mean in means), *areas))
    return table(*rows)


def clips() -> str:
    rows = [("k", "the first frame", "frames 5 to 20, each", "bits/dim, all frames")]
    for of in sorted(read("video-cpu.json")["rows"], key=lambda of: of["past"]):
        if of["part"] == "likelihood":
            nats = (f"{of[name]:.2f} ± {of[f'{name}_error']:.2f}" for name in ("first_frame", "later_frames"))
            rows.append((of["past"], *nats, f"{of['bits_per_dim']:.4f}"))
    return table(*rows)


def page() -> str:
    digits, binary = read("digits_models-diag_bilstm.json"), read("binary_mnist_10min-diag_bilstm.json")
    return f"""# Results

Every number here is from a file in [bench/results/](../bench/results), which a command of this project wrote, with the
machine, the versions and the date. `python -m bench.page` writes this page from them. ± is the standard error over the
images of a split. How fast: [speed](speed.md). The papers' own experiments: [experiments](experiments.md).

## Trained models

They come with the project; `python evaluate.py checkpoint=pretrained/NAME` repeats a number. Each card has the curve
and the command of its training.

{trained()}

## The five models on the digits

On {digits["cores"]} cores ({digits["device"]}): `{digits["command"]}`, and so on.

{runs("digits_models", "bits/dim", 4)}

## Binarized MNIST in ten minutes

On {binary["cores"]} cores ({binary["device"]}): `{binary["command"]}`, and so on.

{runs("binary_mnist_10min", "nats", 2)}

## Residual and skip connections, depth

[Experiments](experiments.md#ablations-residual-skip-depth) has the paper's ablations, on the digits and on
binarized MNIST, three seeds each.

## Clips

Nats a frame of two moving digits, by how many frames before it the model sees ({link("video-cpu.json")}).
[Video](models/video.md#how-good) has more.

{clips()}

## Files

Bits a dimension of the test splits as files, by trained models and by codecs for pictures, of up to 64 × 64 images
side by side (`python -m bench.compression`, {link("compression-cpu.json")}). [Compression](compression.md) has more.

{compressed()}

## Which images are unusual

Under a model of one set, the test split of the other (`python -m bench.scores`, {link("scores-cpu.json")}).
[Evaluation](evaluation.md#scores-of-single-images) says what this means.

{unusual()}
"""


def main() -> int:
    write_text(PAGE, page())
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
