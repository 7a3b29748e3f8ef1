"""What `python -m bench.model` models: launches of the papers' sizes, and how often each walks its loops.

Legend: b batch · h w rows, columns · f features.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch

import kernels
import kernels.draw_row
import kernels.lstm_scan
import kernels.row_product
from bench.measure import build
from kernels.jit import cdiv
from kernels.lstm_scan import lstm_scan
from models.sampling.memory import windows
from models.sampling.rules import Draw
from models.sampling.triton_row import TritonRow


class Case(NamedTuple):
    """A launch to model.

    `loops` counts how often a loop is walked, by what its line in the source holds, in order of appearance; the loop
    that is `None` there is the one whose turns are the steps. It gets a launch's arguments.
    """

    run: Callable[[], None]
    module: object
    kernel: str
    loops: Callable[[dict], list[dict[str, list]]]  # one for each kind of step, which are equally many
    steps: int  # 0: the kernel as a whole
    aim: str = ""


def scan(
    b: int, extent: int, f: int, diagonal: bool, backward: bool, form: str = "auto", aim: str = "", fast: bool = False
) -> Case:
    h, w = (extent, extent + 1) if diagonal else (extent, extent)
    directions, taps = (2, 2) if diagonal else (1, 3)

    def run() -> None:
        pre = torch.empty(b, h, w, directions, 4 * f, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(directions, 4 * f, taps * f, requires_grad=True)
        hidden = lstm_scan(pre, weight, diagonal, form, fast)
        torch.autograd.grad(hidden, [pre, weight], torch.empty_like(hidden))

    def loops(x: dict) -> list[dict]:
        blocks = 1 if x["ONE"] else cdiv(f, x["BLOCK_N"])
        read = taps * cdiv(4 * f if backward else f, x["BLOCK_K"])
        steps = {"for step in": [None], "for back in": [None]}
        return [steps | {"for block in": [blocks], "for block_k in": [read], "while": [1]}]  # it waits for nobody

    kernel = f"lstm_scan_{'bwd' if backward else 'fwd'}_kernel"
    return Case(run, kernels.lstm_scan, kernel, loops, h + w - 1 if diagonal else h, aim)


def convolution(b: int, side: int, f: int, backward: bool, aim: str = "") -> Case:
    """A 3×3 below mask B, forward or the gradient of its weights."""

    def run() -> None:
        u = torch.empty(b, side, side, f, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(f, f, 2, 3, requires_grad=True)
        out = kernels.masked_conv(u, weight, torch.empty(f), True, live=5, backend="triton")
        torch.autograd.grad(out, [u, weight], torch.empty_like(out))

    def loops(x: dict) -> list[dict]:
        blocks = x["pixels_of_part"] // x["BLOCK_P"] if backward else x["TAPS"] * cdiv(f, x["BLOCK_K"])
        return [{"for block in": [blocks]}]

    return Case(run, sys.modules["kernels.masked_conv"], f"masked_conv{'_weight' * backward}_kernel", loops, 0, aim)


def row(b: int, name: str, aim: str = "", type: torch.dtype = torch.bfloat16) -> Case:
    """A row of 32×32 colour images, 15 layers of 128 features, a head of 1024; without what the rows above give."""

    def run() -> None:
        model = build(name, 32, 3, 256, 128, 15, "meta", 1024).to(type).eval()
        x = torch.zeros(b, *model.shape, dtype=torch.long, device="meta")
        TritonRow(model, b, None, Draw(x.float()), x[:, :, 0].contiguous()).program.run()

    def loops(x: dict) -> list[dict]:
        def blocks(name: str, size: int) -> list[int]:
            return [n] if (n := cdiv(size, x[name])) > 1 or name == "BLOCK_K" else []  # a single one is no loop

        f, wide, between = (x[name] // x["groups"] for name in ("f", "stream_features", "between_features"))
        down, out = x["down_weight"] is not None, []
        for g in range(1, x["groups"] + 1):
            main = x["num_inputs"] - (x["f"] - g * f if down else x["stream_features"] - g * wide)
            read = [*[g * wide] * down, main, g * f, g * wide, g * between]
            made = [wide, *[f] * down, x["GATES"] * f, wide, between, x["num_outputs"]]
            counts = {"for block_k": [n for size in read for n in blocks("BLOCK_K", size)]}
            counts["for block in"] = [n for size in made for n in blocks("BLOCK_N", size)]
            chunks = {"for chunk in": [x["IMAGES"] // x["CHOSEN"]]}
            out.append({"for j in": [1], "for g in": [None], "for layer in": [x["layers"]], **counts, **chunks})
        return out

    return Case(run, kernels.draw_row, "draw_row_kernel", loops, 96, aim)


def rows_above(b: int, type: torch.dtype = torch.bfloat16) -> Case:
    """What the rows above give to a row of the same PixelCNN."""

    def run() -> None:
        here = torch.empty(15, b, 34, 128, dtype=type, device="meta")
        weight, bias, out = here.new_empty(15, 384, 128), here.new_empty(15, 128), here.new_empty(15, b, 32, 128)
        kernels.row_product.row_product((windows(here, 3),), weight, bias, out)

    def loops(x: dict) -> list[dict]:
        return [{"for block in": [x["X_TAPS"] * cdiv(x["x_k"], x["BLOCK_K"])]}]

    return Case(run, kernels.row_product, "row_product_kernel", loops, 0)


CASES = {
    "diagonal scan 32×33, f = 128, b = 16": scan(16, 32, 128, True, False, "streamed", "9k clk"),
    "diagonal scan 32×33, f = 128, b = 16, backward": scan(16, 32, 128, True, True, "streamed", "10k clk"),
    "shared diagonal scan 32×33, f = 128, b = 16": scan(16, 32, 128, True, False, "shared", "9k clk"),
    "shared diagonal scan 32×33, f = 128, b = 16, backward": scan(16, 32, 128, True, True, "shared", "10k clk"),
    "diagonal scan 32×33, f = 128, b = 16, fast tanh": scan(16, 32, 128, True, False, "streamed", fast=True),
    "shared diagonal scan 32×33, f = 128, b = 16, fast tanh": scan(16, 32, 128, True, False, "shared", fast=True),
    "diagonal scan 28×29, f = 32, b = 16": scan(16, 28, 32, True, False),
    "diagonal scan 28×29, f = 32, b = 16, backward": scan(16, 28, 32, True, True),
    "diagonal scan 28×29, f = 16, b = 16": scan(16, 28, 16, True, False, aim="2.6k clk"),
    "diagonal scan 28×29, f = 16, b = 16, backward": scan(16, 28, 16, True, True),
    "diagonal scan 28×29, f = 16, b = 16, fast tanh": scan(16, 28, 16, True, False, fast=True),
    "row scan 32×32, f = 128, b = 16": scan(16, 32, 128, False, False, "streamed"),
    "row scan 32×32, f = 128, b = 16, backward": scan(16, 32, 128, False, True, "streamed"),
    "row scan 28×28, f = 16, b = 16": scan(16, 28, 16, False, False),
    "row scan 28×28, f = 16, b = 16, backward": scan(16, 28, 16, False, True),
    "convolution 3×3, 32×32, 128 → 128, b = 16": convolution(16, 32, 128, False),
    "convolution 3×3, 32×32, 128 → 128, b = 16, weights' gradient": convolution(16, 32, 128, True),
    "row of a PixelCNN, 16 images": row(16, "pixel_cnn", aim="9.4 ms"),
    "row of a PixelCNN, 4,224 images": row(4224, "pixel_cnn"),
    "row of a PixelCNN, 8,448 images": row(8448, "pixel_cnn", aim="18.8 ms"),
    "rows above of a PixelCNN, 16 images": rows_above(16),
    "rows above of a PixelCNN, 4,224 images": rows_above(4224),
    "rows above of a PixelCNN, 8,448 images": rows_above(8448),
    "row of a Diagonal BiLSTM, 16 images": row(16, "diag_bilstm"),
    "row of a PixelCNN, 16 images, float32": row(16, "pixel_cnn", type=torch.float32),
    "row of a PixelCNN, 8,448 images, float32": row(8448, "pixel_cnn", type=torch.float32),
    "rows above of a PixelCNN, 8,448 images, float32": rows_above(8448, torch.float32),
}
