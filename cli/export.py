"""Write a trained model to one file to give away: `python -m cli.export runs/… out=NAME.safetensors`.

It holds the weights of the run's best checkpoint (the averaged ones where there are), the model's config, and the run's
config, step and validation; nothing in it can be run. `sample.py`, `evaluate.py` and `pixelrnn.load` take it wherever
they take a checkpoint. With `--half` the weights are rounded to half precision: half the size, and nearly the same
model, so evaluate the file and not the run.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from checks import unexpected
from cli.command import MISTAKES, one_line
from models import exported
from models.checkpoint import find, read, rebuild


def out(argument: str) -> Path:
    """Read the argument out=NAME.safetensors."""
    path = Path(argument.removeprefix("out="))
    if path.suffix != ".safetensors":
        raise argparse.ArgumentTypeError(f"{argument}: expected out=NAME.safetensors")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{argument}: expected a folder {path.parent}, found none")
    return path


def halved(name: str, weight: Tensor) -> Tensor:
    """Round a weight to half precision.

    Raises:
        ValueError: it has values beyond it.
    """
    rounded = weight.half()
    if not rounded.isfinite().all():
        largest = weight.abs().max().item()
        raise ValueError(
            f"--half: expected weights up to {torch.finfo(torch.half).max:,.0f}, found {largest:,.0f} in {name}"
        )
    return rounded


def export(path: Path, out: Path, half: bool = False) -> str:
    """Write the model of a checkpoint to a file, its weights perhaps in half precision, and say what it is."""
    checkpoint = read(path)
    if checkpoint["config"] is None:
        raise unexpected("RUN", str(path), "a run, or a checkpoint of one")
    model = rebuild(checkpoint, path)
    config = checkpoint["config"]
    no_places = {"resume": None, "init_from": None, "dataset": config["dataset"] | {"root": None}}
    run = {"config": config | no_places, "step": checkpoint["step"], "best_val": checkpoint["best_val"]}
    weights = model.state_dict()
    if half:
        weights = {name: halved(name, weight) for name, weight in weights.items()}
    exported.write(out, checkpoint["model"], weights, run)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{out}: {type(model).__name__}, {parameters:,} parameters, {out.stat().st_size / 1e6:.2f} MB"


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m cli.export", description=__doc__.split("\n")[0])
    options.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, or one of its checkpoints")
    options.add_argument("out", type=out, metavar="out=NAME.safetensors", help="the file to write")
    options.add_argument("--half", action="store_true", help="round the weights to half precision, for half the size")
    args = options.parse_args(argv)
    try:
        print(export(find(args.run), args.out, args.half), f"· now: python sample.py checkpoint={args.out}")
    except MISTAKES as error:
        options.error(one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
