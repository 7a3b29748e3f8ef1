"""Write a trained model to one file to give away: `python -m cli.export runs/… out=NAME.safetensors`.

It holds the weights of the run's best checkpoint (the averaged ones where there are), the model's config, and the run's
config, step and validation; nothing in it can be run. `sample.py`, `evaluate.py` and `pixelrnn.load` take it wherever
they take a checkpoint.
"""

import argparse
import sys
from pathlib import Path

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


def export(path: Path, out: Path) -> str:
    """Write the model of a checkpoint to a file, and say what it is."""
    checkpoint = read(path)
    if checkpoint["config"] is None:
        raise unexpected("RUN", str(path), "a run, or a checkpoint of one")
    model = rebuild(checkpoint, path)
    config = checkpoint["config"]
    no_places = {"resume": None, "init_from": None, "dataset": config["dataset"] | {"root": None}}
    run = {"config": config | no_places, "step": checkpoint["step"], "best_val": checkpoint["best_val"]}
    exported.write(out, checkpoint["model"], model.state_dict(), run)
    parameters = sum(p.numel() for p in model.parameters())
    return f"{out}: {type(model).__name__}, {parameters:,} parameters, {out.stat().st_size / 1e6:.2f} MB"


def main(argv: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(prog="python -m cli.export", description=__doc__.split("\n")[0])
    options.add_argument("run", type=Path, metavar="RUN", help="the folder of a run, or one of its checkpoints")
    options.add_argument("out", type=out, metavar="out=NAME.safetensors", help="the file to write")
    args = options.parse_args(argv)
    try:
        print(export(find(args.run), args.out), f"· now: python sample.py checkpoint={args.out}")
    except MISTAKES as error:
        options.error(one_line(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
