"""What scores of single images are worth: `python -m bench.scores`, with the models of pretrained/.

auroc      MNIST and Fashion-MNIST under a model of each: do bits a dimension tell the other set's images from its
           own, and do bits less those of a PNG? With histograms, beside the JSON
surprise   docs/surprise.png: binarized digits, whole and with a square inverted, beside the bits of their pixels
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

import data
from bench.measure import Results, parse, parser, table
from bench.pretrained import FOLDER
from cli.output import bytes_of, picture
from cli.scoring import heat, histogram
from files import write_atomically, write_text
from models.checkpoint import load
from models.scores import auroc, scores

ROOT = Path(__file__).resolve().parent.parent
SURPRISE = ROOT / "docs/surprise.png"
SETS = {"mnist": "mnist-diag_bilstm", "fashion_mnist": "fashion_mnist-diag_bilstm"}  # and the models of them
COLUMNS = ("model", "unusual", "images", "bits_per_dim", "unusual_bits_per_dim", "auroc_bits", "auroc_corrected")
DIGITS, SQUARE, SCALE = 8, 6, 4


def images_of(name: str, n: int) -> Tensor:
    return data.build({"name": name, "root": None}).test.first(n).batch(slice(None))[0].long()


def compare(name: str, args) -> Iterator[dict]:
    """A row for the other set under the model of one."""
    model, (other,) = load(FOLDER / f"{SETS[name]}.safetensors"), (of for of in SETS if of != name)
    own, others = (scores(model, images_of(of, args.images)) for of in (name, other))
    values = {"bits_per_dim": (own.bits_per_dim, others.bits_per_dim), "corrected": (own.corrected, others.corrected)}
    for what, of_both in values.items():
        text = histogram(dict(zip((name, other), of_both, strict=True)), what.replace("_", " "))
        path = Path(args.out) / f"{args.name}-{name}-{what}.svg"
        write_text(path, text)
    row = {"model": SETS[name], "unusual": other, "images": len(own.nats)}
    for of, found in (("", own), ("unusual_", others)):
        row |= {f"{of}bits_per_dim": found.bits_per_dim.mean().item()}
        row |= {f"{of}corrected": found.corrected.mean().item()}
    yield row | {f"auroc_{what.split('_')[0]}": auroc(*of_both) for what, of_both in values.items()}


def draw_surprise(path: Path) -> dict:
    """Draw digits and what a model finds surprising in them; say how the bits in and around the square grow."""
    model, x = load(FOLDER / "binary_mnist-diag_bilstm.safetensors"), images_of("binary_mnist", 10_000)
    x = x[:: len(x) // DIGITS]  # they are sorted
    damaged, i, j = x.clone(), 17, 5
    damaged[:, :, i : i + SQUARE, j : j + SQUARE] = 1 - damaged[:, :, i : i + SQUARE, j : j + SQUARE]
    whole, other = scores(model, x).bits, scores(model, damaged).bits
    most = other.quantile(0.999).item()
    rows = [image for of, bits in ((x, whole), (damaged, other)) for image in (bytes_of(of, 2), heat(bits, most))]
    rows = [row.expand(-1, 3, -1, -1) for row in rows]
    both = torch.nn.functional.pad(torch.stack(rows), (1, 1, 1, 1), value=96)
    both = both.repeat_interleave(SCALE, 3).repeat_interleave(SCALE, 4)
    pixels = rearrange(both, "row n c h w -> (row h) (n w) c").numpy()
    write_atomically(path, lambda file: picture(pixels).save(file, format="PNG"))
    grown = (other - whole).mean(0)
    near = torch.zeros_like(grown, dtype=torch.bool)
    near[i : i + SQUARE + 2, j - 2 : j + SQUARE + 2] = True  # the pixels after it, which it surprises too
    return {"bits": whole.sum((1, 2)).mean().item(), "damaged_bits": other.sum((1, 2)).mean().item()} | {
        "grown_near": grown[near].sum().item(),
        "grown_elsewhere": grown[~near].sum().item(),
        "most_bits": most,
    }


def main(argv: list[str] | None = None) -> int:
    options = parser("scores", "Tell two data sets apart by scores, and draw what surprises a model.", 1, SETS)
    options.add_argument("--images", type=int, default=10_000, help="of each test split (%(default)s)")
    args = parse(options, argv)
    results = Results(args, COLUMNS)
    for name in args.names:
        results.case({"model": SETS[name]}, partial(compare, name, args))
    results.case({"part": "surprise"}, lambda: [{"part": "surprise", **draw_surprise(SURPRISE)}])
    table("AUROC: 1, all of the other set's images score higher; 0.5, no difference", results.rows[:-1], COLUMNS)
    return results.finish()


if __name__ == "__main__":
    sys.exit(main())
