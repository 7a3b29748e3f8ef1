"""How small images become, and how fast: `python -m bench.compression RUN [RUN …]`.

A row a run and codec, for the test split of the data that the run was trained on: bytes, bits/dim, and of the run's
model also what `log_prob` says, how far the file is from that, and megabytes of pixels (a byte a sub-pixel) coded and
decoded a second by all threads. Decoded images are compared with those that were coded.

Without a run, an untrained PixelCNN codes the digits: what `--quick` measures.
"""

import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

import data
import models
from bench.measure import Results, interleave, parse, parser, spread, table, whole
from cli.other_codecs import sizes
from models.base import bits_per_dim
from models.checkpoint import find, read, rebuild
from models.compression import compress, decompress, read_head
from models.likelihood import label_for, nats_of

COLUMNS = ("data", "model", "codec", "images", "bytes", "bits_per_dim", "log_prob_bits_per_dim", "over_percent")
COLUMNS += ("over_bytes", "blocks", "encode_mb_per_second", "decode_mb_per_second")


def subject(run: Path | None):
    """A model, its data set and the step it was trained to; without a run, an untrained one."""
    if run is None:
        dataset = data.build({"name": "digits", "root": None})
        torch.manual_seed(0)
        return models.PixelCNN(**dataset.shape, hidden=4, layers=1, head_features=8).eval(), dataset, 0
    path = find(run)
    checkpoint = read(path)
    return rebuild(checkpoint, path), data.build(checkpoint["config"]["dataset"]), checkpoint.get("step")


def measure(run: Path | None, args) -> Iterator[dict]:
    model, dataset, step = subject(run)
    split = dataset.test.first(args.images)
    x, labels = split.batch(slice(None), torch.Generator().manual_seed(0))
    label = label_for(model, labels)
    about = {"data": dataset.name, "images": len(x), "shape": list(model.shape), "levels": model.levels}
    kept = {}

    def encode() -> None:
        kept["file"] = compress(model, x, label)

    def decode() -> None:
        assert torch.equal(decompress(model, kept["file"]).long(), x.long()), "other images"

    times = interleave({"encode": whole(encode), "decode": whole(decode)}, args.device, args.repeats, warmup=0)
    seconds = {name: spread(laps["total"])["median"] / 1e3 for name, laps in times.items()}
    nats = nats_of(model, split)["nats"].mean().item()
    size, ideal = len(kept["file"]), bits_per_dim(nats, model.shape) * x.numel() / 8
    ours = about | {"codec": f"prnn, {type(model).__name__}", "model": type(model).__name__, "step": step}
    ours |= {"parameters": sum(p.numel() for p in model.parameters()), "run": None if run is None else run.name}
    ours |= {"bytes": size, "bits_per_dim": 8 * size / x.numel(), "log_prob_bits_per_dim": 8 * ideal / x.numel()}
    ours |= {"over_bytes": size - ideal, "over_percent": 100 * (size / ideal - 1)}
    ours |= {"blocks": read_head(kept["file"])[0].blocks, "seconds": seconds}
    yield ours | {f"{name}_mb_per_second": x.numel() / 1e6 / s for name, s in seconds.items()}
    start = time.perf_counter()
    for codec, other in sizes(x, model.levels).items():
        yield about | {"codec": codec, "bytes": other, "bits_per_dim": 8 * other / x.numel()}
    print(f"bench.compression: the other codecs took {time.perf_counter() - start:.0f} s", flush=True)


def main(argv: list[str] | None = None) -> int:
    options = parser("compression", "Compress the test split of each run, and compare with other codecs.", repeats=3)
    options.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="the folder of a run, or a checkpoint")
    options.add_argument("--images", type=int, help="of the test split, the first so many (default: all)")
    args = parse(options, argv)
    if args.device.type != "cpu":
        options.error("--device: expected cpu, which codes")
    if args.quick:
        args.images = 40
    results = Results(args, COLUMNS)
    for run in args.runs or [None]:
        results.case({"run": str(run)}, partial(measure, run, args))
    table("The test splits; over: of what log_prob says", results.rows, COLUMNS)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
