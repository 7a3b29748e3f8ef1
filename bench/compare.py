"""A sweep's runs beside each other: `python -m bench.compare runs/sweeps/latest`.

One line for all runs that differ only in their seed: what they were given that others were not, bits/dim of the
validation and of the test split, seconds of training; and every job that failed, with its error. A split's bits/dim are
the mean over the seeds ± its standard error; of one run, the standard error over the images. Beside the table, which is
also written to compare.md in the folder, compare.svg has the curves of the validation split, means over the seeds too.

Any folder will do: the runs in it are found by what they wrote. `--out NAME` keeps the table in NAME.json, with the
command of the sweep or of each run and the machine, and the curves in NAME.svg.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli.plot import Points, curves
from cli.report import ENVIRONMENT, curve, metrics_of, read_json


class Run(NamedTuple):
    folder: Path
    overrides: dict[str, str]  # its arguments, by key
    summary: dict | None  # what it measured at its end
    error: str | None  # why it failed
    curve: Points  # bits/dim of the validation split, by step
    config: dict  # the values of all keys

    def value(self, key: str) -> str:
        """Return a key's value as it was given, else as the config has it; of a group that was not given, nothing."""
        value = self.config
        for name in key.split("."):
            value = value.get(name, {}) if isinstance(value, dict) else {}
        known = "" if isinstance(value, dict) else json.dumps(value).strip('"')
        return self.overrides.get(key, known)

    def command(self) -> str:
        """Return the command that started it; of a run that has not ended, from its arguments."""
        arguments = (f"{key}={value}" for key, value in self.overrides.items())
        return self.summary["command"] if self.summary else " ".join(["python train.py", *arguments])


def by_key(overrides: list[str]) -> dict[str, str]:
    """Split arguments KEY=VALUE; of a key given twice the last one counts."""
    return {key.lstrip("+"): value for key, _, value in (override.partition("=") for override in overrides)}


def read_yaml(path: Path) -> list | dict | None:
    """Read what Hydra wrote of a run; None if it cannot be read."""
    import yaml  # OmegaConf brings it

    try:
        return yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError):
        return None


def runs_below(folder: Path) -> Iterator[Run]:
    """Yield the runs in a folder and its folders, in the order of their numbers."""

    def number(path: Path) -> tuple:
        first = path.name.split("-")[0]
        return (int(first) if first.isdigit() else sys.maxsize, str(path))

    found = {path.parent for name in ("metrics.jsonl", "failed.json") for path in folder.rglob(name)}
    for path in sorted(found, key=number):
        summary, failed = read_json(path / "summary.json"), read_json(path / "failed.json")
        overrides = (summary or failed or {}).get("overrides") or read_yaml(path / ".hydra/overrides.yaml") or []
        error = failed["error"] if failed and not summary else None
        config = read_yaml(path / ".hydra/config.yaml") or {}
        yield Run(path, by_key(overrides), summary, error, curve(metrics_of(path), "val_bits_per_dim"), config)


def differing(runs: list[Run]) -> list[str]:
    """Return the keys whose values are not the same in all runs, in the order of the arguments."""
    keys = dict.fromkeys(key for run in runs for key in run.overrides)
    return [key for key in keys if len({run.value(key) for run in runs}) > 1]


def mean_and_error(values: list[float], single: float) -> tuple[float, float]:
    """Return the mean and its standard error; of one value, the error given with it."""
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else single


def cell(values: list[dict], name: str) -> str:
    if not values:
        return ""
    mean, error = mean_and_error([x[name] for x in values], values[0].get(f"{name}_standard_error", 0.0))
    return f"{mean:.4f} ± {error:.4f}"


Groups = dict[tuple[str, ...], list[Run]]


def grouped(runs: list[Run], keys: list[str]) -> Groups:
    """Return the runs by their values of these keys."""
    groups: Groups = {}
    for run in runs:
        groups.setdefault(tuple(run.value(key) for key in keys), []).append(run)
    return groups


def mean_curve(group: list[Run]) -> Points:
    """Return the mean of the curves of some runs, at the steps that all of them have."""
    found = [dict(run.curve) for run in group if run.curve]
    steps = [step for step in (found[0] if found else ()) if all(step in curve for curve in found)]
    return [(step, float(np.mean([curve[step] for curve in found]))) for step in steps]


def of_open(runs: list[Run]) -> str:
    """Say how many runs have not ended, and how far they are."""
    said, points = f"{len(runs)} not ended" if runs else "", mean_curve(runs)
    return f"{said}; val {points[-1][1]:.4f} at step {points[-1][0]:,}" if points else said


def rows_of(groups: Groups, keys: list[str]) -> list[dict[str, str]]:
    """The table: a row for the runs of a group, and one for each that failed."""
    out = []
    for values, group in groups.items():
        about, ended = dict(zip(keys, values, strict=True)), [run.summary for run in group if run.summary]
        open_ones = [run for run in group if not run.summary and not run.error]
        if ended or open_ones:
            seconds = f"{np.mean([x['train_seconds'] for x in ended]):.0f}" if ended else ""
            row = {**about, "runs": str(len(ended)), "parameters": f"{ended[0]['parameters']:,}" if ended else ""}
            row |= {"val bits/dim": cell(ended, "val_bits_per_dim"), "test bits/dim": cell(ended, "test_bits_per_dim")}
            out.append(row | {"seconds": seconds, "said": of_open(open_ones)})
        for run in group:
            if run.error:
                seed = f"seed={run.overrides['seed']}: " if "seed" in run.overrides else ""
                out.append({**about, "said": f"{seed}{run.error}"})
    best = [row for row in out if row.get("val bits/dim")]
    return sorted(best, key=lambda row: float(row["val bits/dim"].split()[0])) + [row for row in out if row not in best]


def markdown(rows: list[dict[str, str]]) -> str:
    columns = [key for key in dict.fromkeys(key for row in rows for key in row) if any(row.get(key) for row in rows)]
    lines = [columns, *([row.get(key, "").replace("|", "\\|") for key in columns] for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(columns))]
    padded = [" | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (padded[0], rule, *padded[1:]))


def said_of(folder: Path, runs: list[Run]) -> dict:
    """Say which commands gave the numbers, and on which machine the last run ended."""
    if sweep := read_yaml(folder / "multirun.yaml"):
        command = shlex.join(["python", "train.py", "-m", *sweep["hydra"]["overrides"]["task"]])
    else:  # no sweep of Hydra's: a line for each run
        command = "\n".join(run.command() for run in runs)
    last = max((run.summary for run in runs if run.summary), key=lambda x: x["date"], default={})
    return {"command": command} | {name: last[name] for name in ENVIRONMENT if name in last}


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n")[0])
    options.add_argument("folder", type=Path, help="of a sweep, as runs/sweeps/latest")
    options.add_argument("--each", action="store_true", help="a line for each run, not one for all its seeds")
    options.add_argument("--out", type=Path, metavar="NAME", help="also write NAME.json and NAME.svg")
    args = options.parse_args(argv)
    runs = list(runs_below(args.folder)) if args.folder.is_dir() else []
    if not runs:
        options.error(f"{args.folder}: expected the folder of a sweep, found no run below it")
    differ = differing(runs)
    keys = differ if args.each else [key for key in differ if key != "seed"]
    groups = grouped(runs, keys)
    rows = rows_of(groups, keys)
    table = markdown(rows)
    names = [", ".join(f"{key}={value}" for key, value in zip(keys, values, strict=True)) for values in groups]
    series = {name or args.folder.name: mean_curve(group) for name, group in zip(names, groups.values(), strict=True)}
    svg = curves(series, "step", "bits/dim of the validation split")
    (args.folder / "compare.md").write_text(table + "\n")
    (args.folder / "compare.svg").write_text(svg)
    print(f"{table}\n{args.folder}: compare.md, compare.svg")
    if args.out:
        kept = said_of(args.folder, runs) | {"rows": rows}
        args.out.with_name(f"{args.out.name}.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        args.out.with_name(f"{args.out.name}.svg").write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
