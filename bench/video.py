"""What the frames before tell of the next one: `python -m bench.video RUN …`, runs that differ in `model.past`.

likelihood   of the test split's clips under each run's best checkpoint: nats of the first frame, and of those from the
             fifth on, which every run may have seen all that it can see before
pictures     of the last run: docs/video.gif, clips that it draws; docs/video.png, in rows, a test clip, its first
             frames, and two continuations of them, for a few clips

Legend: n clips · t frames · c channel (colour) · h w rows, columns.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import data
from bench.measure import Results, parse, parser, table
from bench.pretrained import training_of
from cli.moving import MILLISECONDS_OF_CLIPS, write_gif
from cli.output import completions_in_rows, grid, save_grid, upper_rows
from models.base import bits_per_dim
from models.checkpoint import read, rebuild
from models.likelihood import nats_of
from models.sampling import sample

DOCS = Path(__file__).resolve().parent.parent / "docs"
PARTS = ("likelihood", "pictures")
COLUMNS = ("past", "first_frame", "first_frame_error", "later_frames", "later_frames_error", "bits_per_dim")
LATER = 4  # frames before those that are averaged
DRAWN, CONTINUED, KEPT = 16, 3, 0.25  # clips of the GIF; test clips that are continued, from which part of their frames


def likelihood(runs: list[Path], images: int | None) -> Iterator[dict]:
    """A row for each run."""
    for run in runs:
        checkpoint = read(run / "best.pt")
        model = rebuild(checkpoint, run)
        split = data.build(checkpoint["config"]["dataset"]).test.first(images)
        nats = nats_of(model, split, batch_size=16)
        total, of_frames = nats.pop("nats"), torch.stack([*nats.values()], 1)
        row = {"part": "likelihood", "past": model.past, "parameters": sum(p.numel() for p in model.parameters())}
        for name, of in (("first_frame", of_frames[:, 0]), ("later_frames", of_frames[:, LATER:].mean(1))):
            row |= {name: of.mean().item(), f"{name}_error": of.std().item() / len(of) ** 0.5}
        row |= {"bits_per_dim": bits_per_dim(total.mean().item(), model.shape), "clips": len(split)}
        yield row | {"frames": of_frames.mean(0).tolist(), "config": checkpoint["config"], "training": training_of(run)}


def draw(run: Path, folder: Path) -> dict:
    """Draw clips of a run, and continue some of the test split's."""
    checkpoint = read(run / "best.pt")
    model = rebuild(checkpoint, run)
    x = sample(model, DRAWN, seed=0)
    write_gif(folder / "video.gif", [grid(frame, model.levels) for frame in x.unbind(1)], MILLISECONDS_OF_CLIPS)
    given = data.build(checkpoint["config"]["dataset"]).test.batch(slice(CONTINUED))[0].long()
    known = upper_rows(given, KEPT)
    twice = (given.repeat_interleave(2, 0), known.repeat_interleave(2, 0))
    drawn = sample(model, 2 * CONTINUED, seed=0, known=twice)
    save_grid(folder / "video.png", completions_in_rows(given, known, drawn), model.levels)
    return {"part": "pictures", "past": model.past, "drawn": DRAWN, "continued": CONTINUED}


def main(argv: list[str] | None = None) -> int:
    options = parser("video", "Nats a frame by how many frames before it a model sees.", 1, dict.fromkeys(PARTS))
    options.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run that has ended")
    args = parse(options, argv)
    for run in args.runs:
        if not (run / "summary.json").is_file() or "past" not in read(run / "best.pt")["model"]:
            options.error(f"{run}: expected a run of model=video that has ended")
    results = Results(args, COLUMNS)
    cases = {
        "likelihood": partial(likelihood, args.runs, 20 if args.quick else None),
        "pictures": lambda: [draw(args.runs[-1], Path(args.out) if args.quick else DOCS)],
    }
    for name in args.names:
        results.case({"part": name}, cases[name])
    table("Clips: nats a frame", results.rows, COLUMNS)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
