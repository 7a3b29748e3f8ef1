"""A run, told to people: `python -m cli.report runs/…` writes its report.html and model_card.md again.

`train.py` writes both after each validation. report.html is one file that needs no other: curves, samples by step, the
final numbers, the command and the versions, the config. model_card.md says the same in the form that model hubs show.
"""

import argparse
import base64
import json
import math
import re
import sys
from html import escape
from pathlib import Path

from cli.plot import Points, curves
from files import write_text

PICTURES = {  # folders of step_NUMBER.png, and what a reader must know of them
    "samples": "",
    "completions": "<p>In a row: an image of the validation split, what of it is known, completions.</p>\n",
}
ENVIRONMENT = ("date", "device", "cpu", "cores", "threads", "python", "torch", "triton", "commit")
STYLE = """body { font: 15px/1.5 sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1f2328 }
section:nth-of-type(-n+2) { display: inline-block; vertical-align: top; margin-right: 2rem } /* numbers, curves */
table { border-collapse: collapse } td, th { padding: .2rem 1rem .2rem 0; text-align: left; vertical-align: top }
pre { background: #f6f8fa; padding: .8rem; overflow: auto } svg { max-width: 100%; height: auto }
figure { display: inline-block; margin: 0 1rem 1rem 0 } img { image-rendering: pixelated; max-width: 100% }"""


class Run:
    """What a run's folder holds: lines of metrics, the final numbers (once it has ended), config, pictures."""

    def __init__(self, folder: Path):
        self.metrics, self.summary = metrics_of(folder), read_json(folder / "summary.json") or {}
        self.config = read(folder / ".hydra/config.yaml")
        self.pictures = {name: pictures_of(folder / name) for name in PICTURES}
        self.name = f"{folder.parent.name}/{folder.name}"

    def numbers(self) -> dict[str, str]:
        """The final numbers, or the last ones there are, as people read them."""
        said = self.summary
        if not said:
            last = {key: value for row in self.metrics for key, value in row.items()}
            return {name.replace("_", " "): f"{value:.6g}" for name, value in last.items()}
        out = {}
        for split in ("test", "val"):
            for unit, words in (("bits_per_dim", "bits/dim"), ("nats", "nats")):
                value, error = said[f"{split}_{unit}"], said[f"{split}_{unit}_standard_error"]
                out[f"{split}, {words}"] = f"{value:.4f} ± {error:.4f}"
        out |= {"test images": f"{said['test_images']:,}", "parameters": f"{said['parameters']:,}"}
        out |= {"steps": f"{said['steps']:,}", "best step": f"{said['best_step']:,}"}
        seconds = f"{said['train_seconds']:.0f} s, {said['images_per_second']:.0f} images/s"
        return out | {"training": seconds}

    def environment(self) -> dict[str, str]:
        return {name: str(self.summary[name]) for name in ENVIRONMENT if self.summary.get(name) is not None}


def read(path: Path) -> str:
    """The text of a file; nothing if there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_json(path: Path) -> dict | None:
    """The JSON object in a file; None: there is none, or it is cut short."""
    try:
        value = json.loads(read(path))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def row_of(line: str, step: float = math.inf) -> dict | None:
    """The values in a line of metrics; None: it is not whole, or of a step after this one."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a line that a killed run left unfinished, or of another origin
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step else None


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that are whole."""
    return [row for line in read(folder / "metrics.jsonl").splitlines() if (row := row_of(line))]


def pictures_of(folder: Path) -> list[tuple[int, Path]]:
    """The pictures step_NUMBER.png in a folder, by their numbers."""
    found = [(re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in folder.glob("step_*.png")]
    return sorted((int(name[1]), path) for name, path in found if name)


def curve(metrics: list[dict], name: str) -> Points:
    """A number of the metrics, by step."""
    return [(row["step"], row[name]) for row in metrics if name in row]


def table(rows: dict[str, str]) -> str:
    lines = (f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in rows.items())
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def pictures(run: Run, name: str) -> str:
    """The pictures of one kind; nothing where there are none."""
    figures = []
    for step, path in run.pictures[name]:
        data = base64.b64encode(path.read_bytes()).decode()
        caption = f"<figcaption>step {step:,}</figcaption>"
        figures.append(f'<figure><img src="data:image/png;base64,{data}">{caption}</figure>')
    return PICTURES[name] + "\n".join(figures) if figures else ""


def html(run: Run) -> str:
    """The text of report.html."""
    series = {
        "training": curve(run.metrics, "train_bits_per_dim"),
        "validation": curve(run.metrics, "val_bits_per_dim"),
    }
    parts = {
        "Numbers": table(run.numbers()),
        "Bits/dim": curves(series, "step", "bits/dim"),
        **{name.capitalize(): pictures(run, name) for name in PICTURES},
        "Command": f"<pre>{escape(run.summary['command'])}</pre>" if run.summary else "",
        "Versions and machine": table(run.environment()) if run.summary else "",
        "Config": f"<pre>{escape(run.config)}</pre>",
    }
    body = "\n".join(f"<section>\n<h2>{name}</h2>\n{text}\n</section>" for name, text in parts.items() if text)
    state = "" if run.summary else "<p>This run has not ended.</p>\n"
    head = f'<meta charset="utf-8">\n<title>{escape(run.name)}</title>\n<style>\n{STYLE}\n</style>'
    return f'<!doctype html>\n<html lang="en">\n{head}\n<h1>{escape(run.name)}</h1>\n{state}{body}\n</html>\n'


def model_card(run: Run) -> str:
    """The text of model_card.md."""
    said, averaged = run.summary, not re.search(r"^ema: 0(\.0)?$", run.config, re.MULTILINE)
    numbers = "\n".join(f"| {name} | {value} |" for name, value in run.numbers().items())
    machine = "\n".join(f"| {name} | {value} |" for name, value in run.environment().items())
    return f"""---
library_name: pixelrnn
tags:
- image-generation
- autoregressive
- pixelrnn
---

# {run.name}

An autoregressive model of images with an exact likelihood ([1601.06759](https://arxiv.org/abs/1601.06759)), trained by

```
{said["command"]}
```

| | |
|---|---|
{numbers}

± is the standard error over the images of a split. The numbers are those of best.pt, the checkpoint with the best
validation; its weights are {"the averaged ones" if averaged else "not averaged"}.

## Use

```python
import pixelrnn

model = pixelrnn.load("best.pt")  # or what `python -m cli.export` wrote
pixelrnn.sample(model, 16, seed=0)  # (16 c h w) integers
model.log_prob(x)  # nats of each image of x (b c h w)
```

## Trained on

| | |
|---|---|
{machine}

```yaml
{run.config.strip()}
```
"""


def write_report(folder: Path) -> None:
    """Write report.html of a run, and once it has ended model_card.md."""
    run = Run(folder)
    write_text(folder / "report.html", html(run))
    if run.summary:
        write_text(folder / "model_card.md", model_card(run))


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m cli.report", description=__doc__.split("\n")[0])
    options.add_argument("folder", type=Path, help="of a run")
    args = options.parse_args(argv)
    if not (args.folder / "metrics.jsonl").exists():
        options.error(f"{args.folder}: expected the folder of a run, found no metrics.jsonl there")
    write_report(args.folder)
    print(args.folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
