"""A prior over a VQ-VAE's codes, from images to codes and back.

    pip install -e '.[examples]'
    python examples/vq_prior.py                              all of it, on the digits; --data fashion_mnist, …

A VQ-VAE (1711.00937) turns an image into a small grid of codes, numbers of vectors in its codebook, and codes back into
an image. Codes have no order: 17 is not near 18. You can also run one step at a time:

    python examples/vq_prior.py codes --out vq               train the VQ-VAE; vq/codes.npy, vq/vqvae.safetensors
    python train.py dataset=npy dataset.path=vq/codes.npy dataset.levels=64 model=gated_pixel_cnn model.input=embedding
    python sample.py npy=vq/drawn.npy out=vq/codes.png       codes from the prior
    python examples/vq_prior.py decode --out vq              vq/drawn.npy as images: vq/drawn.png

Legend: n images · c channel (colour) · h w rows, columns · k l rows, columns of codes · d features.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vector_quantize_pytorch import VectorQuantize

import pixelrnn
from cli.output import save_grid

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 32  # images of a picture


class VQVAE(nn.Module):
    """Images (n c h w) in [-1, 1] to codes (n k l) and back; k = h / 2^halvings.

    Args:
        channels: of the images.
        size: of the codebook.
        halvings: how often the encoder halves height and width.
        d: features of a code's vector.
    """

    def __init__(self, channels: int, size: int, halvings: int, d: int = 32, width: int = 64):
        super().__init__()
        encoder, decoder = [nn.Conv2d(channels, width, 3, padding=1)], [nn.Conv2d(d, width, 3, padding=1)]
        for _ in range(halvings):
            encoder += [nn.ReLU(), nn.Conv2d(width, width, 4, stride=2, padding=1)]
            decoder += [nn.ReLU(), nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)]
        self.encoder = nn.Sequential(*encoder, nn.ReLU(), nn.Conv2d(width, d, 1))
        self.decoder = nn.Sequential(*decoder, nn.ReLU(), nn.Conv2d(width, channels, 3, padding=1))
        self.codebook = VectorQuantize(d, codebook_size=size, decay=0.95, accept_image_fmap=True, kmeans_init=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images → what comes back (n c h w), and the loss that keeps features near their codes' vectors."""
        vectors, _, commitment = self.codebook(self.encoder(x))
        return self.decoder(vectors), commitment

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (n c h w) → codes (n k l)."""
        return self.codebook(self.encoder(x))[1]

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (n k l) → images (n c h w)."""
        return self.decoder(self.codebook.codebook[codes].permute(0, 3, 1, 2))


def halvings_of(height: int) -> int:
    """So many that four to seven rows of codes are left of these images' rows."""
    return max(1, (height // 4).bit_length() - 1)


def make_codes(args) -> None:
    """Train the VQ-VAE, and write the codes of all training images."""
    dataset = pixelrnn.dataset({"name": args.data})
    x, _ = dataset.train.batch(slice(None), torch.Generator().manual_seed(0))
    _, channels, height, _ = x.shape
    scale = (dataset.levels - 1) / 2
    torch.manual_seed(0)
    model = VQVAE(channels, args.codebook, halvings_of(height))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, args.steps)
    for step in range(args.steps):
        images = x[torch.randint(len(x), (64,))] / scale - 1
        back, commitment = model(images)
        error = F.mse_loss(back, images)
        optimizer.zero_grad()
        (error + 0.25 * commitment).backward()
        optimizer.step()
        rate.step()
        if step % max(1, args.steps // 10) == 0 or step + 1 == args.steps:
            print(f"VQ-VAE {step + 1}/{args.steps} · mean square error {error.item():.4f}", flush=True)

    model.eval()
    codes = torch.cat([model.encode(some / scale - 1) for some in x.split(500)])
    used = len(codes.unique())
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.out / "codes.npy", codes.numpy().astype(np.int64))
    settings = {"data": args.data, "codebook": str(args.codebook), "levels": str(dataset.levels)}
    save_file(model.state_dict(), args.out / "vqvae.safetensors", settings | {"shape": " ".join(map(str, x.shape[1:]))})
    both = torch.stack([x[:SHOWN].long(), images_of(model, codes[:SHOWN], dataset.levels)], 1)
    save_grid(args.out / "back.png", both.flatten(0, 1), dataset.levels, 16)
    print(f"{args.out}: codes.npy, {tuple(codes.shape)}, {used} of {args.codebook} codes in use")
    print(f"{args.out}: vqvae.safetensors; back.png, images beside what comes back")


def images_of(model: VQVAE, codes: Tensor, levels: int) -> Tensor:
    """The images (n c h w) of codes (n k l), integers in [0, levels)."""
    scale = (levels - 1) / 2
    return ((model.decode(codes) + 1) * scale).round().clamp(0, levels - 1).long()


def load(folder: Path) -> tuple[VQVAE, int]:
    """The VQ-VAE that `make_codes` wrote, and the levels of its images."""
    with safe_open(folder / "vqvae.safetensors", "pt") as file:
        settings = file.metadata()
    channels, height, _ = map(int, settings["shape"].split())
    model = VQVAE(channels, int(settings["codebook"]), halvings_of(height))
    model.load_state_dict(load_file(folder / "vqvae.safetensors"))
    return model.eval(), int(settings["levels"])


def decode(args) -> None:
    """Decode codes that were drawn, and write a picture of the images."""
    model, levels = load(args.out)
    for name in args.drawn:
        codes = torch.from_numpy(np.load(args.out / f"{name}.npy").astype(np.int64))
        save_grid(args.out / f"{name}.png", images_of(model, codes[:, 0], levels)[: 2 * SHOWN], levels, 16)
        print(args.out / f"{name}.png")


def run(command: str, *arguments: str) -> None:
    """Run one of the project's commands, and say it first."""
    print("\n" + shlex.join(["python", command, *arguments]), flush=True)
    subprocess.run([sys.executable, str(ROOT / command), *arguments], check=True)


def everything(args) -> None:
    """All steps, with a prior that reads embeddings and one that reads numbers, trained alike."""
    out = args.out
    make_codes(args)
    for way in ("embedding", "scaled"):
        prior, drawn = out / way, out / f"drawn-{way}.npy"
        model = ["model=gated_pixel_cnn", "model.layers=4", "model.dropout=0.4", f"model.input={way}"]
        of_codes = ["dataset=npy", f"dataset.path={out / 'codes.npy'}", f"dataset.levels={args.codebook}"]
        steps = [f"steps={args.prior_steps}", "evaluate_every=50", "sample_every=0"]
        run("train.py", *of_codes, *model, *steps, f"hydra.run.dir={prior}")
        run("sample.py", f"checkpoint={prior}", f"n={2 * SHOWN}", f"npy={drawn}", f"out={out / f'codes-{way}.png'}")
    args.drawn = ["drawn-embedding", "drawn-scaled"]
    decode(args)
    for way in ("embedding", "scaled"):
        summary = json.loads((out / way / "summary.json").read_text())
        print(f"{way}: {summary['test_bits_per_dim']:.3f} bits a code on the test split")


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python examples/vq_prior.py", description=__doc__.split("\n")[0])
    options.add_argument("step", nargs="?", default="all", choices=["all", "codes", "decode"])
    options.add_argument(
        "--data", default="digits", help="a data set that needs no arguments: digits, fashion_mnist, …"
    )
    options.add_argument("--codebook", type=int, default=64, metavar="N", help="how many codes there are")
    options.add_argument("--steps", type=int, default=1500, metavar="N", help="of the VQ-VAE's training")
    options.add_argument("--prior-steps", type=int, default=400, metavar="N", help="of the priors' training")
    options.add_argument("--out", type=Path, default=Path("vq"), metavar="FOLDER")
    options.add_argument("--drawn", nargs="*", default=["drawn"], metavar="NAME", help="of .npy files to decode")
    args = options.parse_args(argv)
    {"all": everything, "codes": make_codes, "decode": decode}[args.step](args)


if __name__ == "__main__":
    main()
