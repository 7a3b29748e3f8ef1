"""How fast a training step is: `python -m bench.training`.

A step is forward, backward, and RMSprop's step with zero_grad, on random binary images that are on the device
already. Each model is timed in turn with a baseline, the same function of the same weights as it is usually
written, and with a matrix product of 1024³, whose rate says what the machine can do just then. The baselines:

    PixelCNN      (b f h w) layout, whole k×k kernels, `weight * mask` in each forward
    DiagBiLSTM    the skewed map (b f h w+h−1), one direction after the other, a loop over its columns with a
                  2×1 convolution of the hidden state, differentiated by autograd; the model's stem and head

Arithmetic is counted once, for both: the live multiply-adds of the model's masks (`live_multiply_adds`). A
step counts as three forwards, as backward needs a product for the inputs' gradient and one for the weights';
a multiply-add is two operations.

Legend: b batch · c channel · h w rows, columns · f features · v levels · i j a row, a column.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import Clock, build, describe, interleave, parse, parser, spread, table, whole, write
from models import DiagBiLSTM, PixelCNN
from models.diag_bilstm import DiagonalLSTMLayer


class DenseConv(nn.Conv2d):
    """A masked convolution with all k×k taps, (b f h w) → (b f h w).

    Args:
        weight, mask: (outputs inputs) of a 1×1, or (outputs inputs (k+1)/2 k), no rows below the centre.
        bias: (outputs).
    """

    def __init__(self, weight: Tensor, mask: Tensor, bias: Tensor):
        if weight.dim() == 2:
            weight, mask = weight[:, :, None, None], mask[:, :, None, None]
        outputs, inputs, rows, k = weight.shape
        super().__init__(inputs, outputs, k, padding=k // 2, device=weight.device)
        self.register_buffer("mask", F.pad(mask.to(weight.dtype), (0, 0, 0, k - rows)))
        with torch.no_grad():
            self.weight.copy_(F.pad(weight, (0, 0, 0, k - rows)))
            self.bias.copy_(bias)

    @classmethod
    def like(cls, masked: nn.Module) -> "DenseConv":
        """Of a MaskedConv or a MaskedLinear."""
        return cls(masked.weight, masked.mask, masked.bias)

    def forward(self, u: Tensor) -> Tensor:
        return F.conv2d(u, self.weight * self.mask, self.bias, padding=self.padding)


class DensePixelCNN(nn.Module):
    """The network of a PixelCNN in (b f h w) layout, with `DenseConv` everywhere."""

    def __init__(self, model: PixelCNN):
        super().__init__()
        body, self.channels, self.scale = model.body, model.channels, model.scale
        self.stem = DenseConv.like(model.stem)
        self.down, self.conv, self.up = (
            nn.ModuleList(map(DenseConv.like, part)) for part in (body.down, body.conv, body.up)
        )
        self.first, self.logits = DenseConv.like(model.head.first), DenseConv.like(model.head.logits)

    def network(self, x: Tensor) -> Tensor:
        """Images (b c h w) → logits (b v c h w)."""
        u = self.stem(self.scale(x))
        for down, conv, up in zip(self.down, self.conv, self.up, strict=True):
            u = u + up(conv(down(u.relu()).relu()).relu())
        logits = self.logits(self.first(u.relu()).relu())
        return logits.unflatten(1, (self.channels, -1)).transpose(1, 2)

    def parameters_at(self, x: Tensor) -> Tensor:
        """As the model's: logits (b h w c v)."""
        return self.network(x).permute(0, 3, 4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """As the model's: nats of each image (b,)."""
        return F.cross_entropy(self.network(x), x.long(), reduction="none").flatten(1).sum(1)


def skew(u: Tensor) -> Tensor:
    """Move row i to the right by i: (b f h w) → (b f h w+h−1), zeros elsewhere."""
    h, w = u.shape[2:]
    return F.pad(u, (0, h)).flatten(2)[:, :, :-h].unflatten(2, (h, w + h - 1))


def unskew(u: Tensor, w: int) -> Tensor:
    """(b f h w+h−1) → (b f h w)."""
    h = u.shape[2]
    return F.pad(u.flatten(2), (0, h)).unflatten(2, (h, w + h))[..., :w]


class SkewedLSTM(nn.Module):
    """One direction of a layer, from left to right: (b 2f h w) → (b f h w)."""

    def __init__(self, layer: DiagonalLSTMLayer, direction: int):
        super().__init__()
        left, up = layer.state_weight[direction].chunk(2, dim=1)  # (4f f) each
        self.input = DenseConv(layer.input_weight[direction], layer.mask, layer.bias[direction])
        self.state = nn.Conv1d(left.shape[1], len(left), 2, bias=False, device=left.device)
        with torch.no_grad():
            self.state.weight.copy_(torch.stack([up, left], dim=2))

    def forward(self, u: Tensor) -> Tensor:
        b, _, h, w = u.shape
        gates = skew(self.input(u))  # zero, without a bias, in the corners: states stay zero there
        hidden = cell = u.new_zeros(b, self.state.in_channels, h)
        columns = []
        for column in gates.unbind(3):
            now = column + self.state(F.pad(hidden, (1, 0)))  # taps: the row above, the row itself
            o, forget, i, g = now.chunk(4, dim=1)
            cell = forget.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            columns.append(hidden)
        return unskew(torch.stack(columns, dim=3), w)


class SkewedLSTMs(nn.Module):
    """The body of a DiagBiLSTM on skewed maps: (b h w+extra 2f) → (b h w 2f)."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.extra_columns = body.extra_columns
        self.forwards = nn.ModuleList(SkewedLSTM(lstm, 0) for lstm in body.lstm)
        self.mirrored = nn.ModuleList(SkewedLSTM(lstm, 1) for lstm in body.lstm)
        self.up = nn.ModuleList(map(DenseConv.like, body.up))

    def forward(self, u: Tensor) -> Tensor:
        u = u.permute(0, 3, 1, 2).contiguous()
        for forwards, mirrored, up in zip(self.forwards, self.mirrored, self.up, strict=True):
            moved_down = F.pad(mirrored(u.flip(3)).flip(3)[:, :, :-1], (0, 0, 1, 0))
            u = u + up(forwards(u) + moved_down)
        return u.permute(0, 2, 3, 1)[:, :, : u.shape[3] - self.extra_columns]


def baseline(model: nn.Module) -> nn.Module:
    """The same function of a copy of the weights (residual, without skip and dropout), plainly written."""
    if isinstance(model, PixelCNN):
        return DensePixelCNN(model)
    assert isinstance(model, DiagBiLSTM)
    out = copy.deepcopy(model)
    out.body = SkewedLSTMs(out.body)
    return out


def live_multiply_adds(model: nn.Module) -> int:
    """Multiply-adds of one image's forward that no mask makes zero.

    The live weights of every masked convolution, and of a Diagonal BiLSTM's layer, in each of two directions,
    the live input-to-state and all state-to-state weights; times height · (width + the body's extra columns)
    in stem and body, height · width in the head. What is no product is not counted; taps that fall outside
    the image are.
    """

    def live(part: nn.Module) -> int:
        count = sum(int(m.mask.sum()) for m in part.modules() if hasattr(m, "mask"))
        lstms = [m for m in part.modules() if isinstance(m, DiagonalLSTMLayer)]  # one mask for both directions
        return count + sum(int(m.mask.sum()) + m.state_weight.numel() for m in lstms)

    wide = model.width + model.body.extra_columns
    return model.height * (wide * (live(model.stem) + live(model.body)) + model.width * live(model.head))


def step_of(model: nn.Module, x: Tensor):
    """A training step of a model on images x, as what takes a clock and ends three laps."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-3, alpha=0.95, eps=1e-8, momentum=0.9, foreach=True)
    sub_pixels = math.prod(x.shape[1:])
    model.train()

    def step(clock: Clock) -> None:
        loss = model(x).mean() / sub_pixels
        clock.lap("forward")
        loss.backward()
        clock.lap("backward")
        optimizer.step()
        optimizer.zero_grad()
        clock.lap("optimizer")

    return step


def compare(name: str, model: nn.Module, b: int, n: int, args) -> list[dict]:
    """Three rows: the model, its baseline, and the product of two n×n matrices, timed between them."""
    plain, (c, h, w) = baseline(model), model.shape
    x = torch.randint(0, model.levels, (b, c, h, w), generator=torch.Generator().manual_seed(0))
    x = x.to(args.device)
    left, right, product = torch.randn(3, n, n, device=args.device)
    products = 20 if args.device.type == "cuda" else 1  # one alone takes a GPU no longer than its launch

    def matmul() -> None:
        for _ in range(products):
            torch.mm(left, right, out=product)

    things = {
        "ours": step_of(model, x),
        "baseline": step_of(plain, x),
        "matmul": whole(matmul),
    }
    times = interleave(things, args.device, args.repeats, warmup=3)
    multiply_adds = live_multiply_adds(model)
    operations = {"ours": 6 * multiply_adds * b, "baseline": 6 * multiply_adds * b, "matmul": 2 * n**3}
    times["matmul"]["total"] = [t / products for t in times["matmul"]["total"]]
    ms = {thing: spread(laps["total"]) for thing, laps in times.items()}
    gflops = {thing: operations[thing] / (ms[thing]["median"] * 1e6) for thing in things}
    rows = []
    for thing in ("ours", "baseline"):
        row = {**describe(name, model, b), "implementation": thing, "step_ms": ms[thing]}
        row |= {f"{lap}_ms": spread(times[thing][lap]) for lap in ("forward", "backward", "optimizer")}
        row |= {"images_per_second": b / ms[thing]["median"] * 1e3, "multiply_adds": multiply_adds}
        row |= {"gflops": gflops[thing], "share_of_matmul": gflops[thing] / gflops["matmul"]}
        rows.append(row | {"ratio": ms[thing]["median"] / ms["ours"]["median"], "ratio_to": "ours"})
    measured = {"step_ms": ms["matmul"], "gflops": gflops["matmul"], "share_of_matmul": 1.0}
    rows.append({"model": name, "implementation": "matmul", "shape": [n, n, n], **measured})
    return rows


def main(argv: list[str] | None = None) -> None:
    description = "Time a training step of each model against the same network plainly written."
    args = parse(parser("training", description, repeats=20), argv)
    b, side, hidden, layers, n = (2, 5, 4, 2, 64) if args.quick else (16, 28, 16, None, 1024)
    rows = []
    for name in args.models:
        model = build(name, side, 1, 2, hidden, layers, args.device)
        rows += compare(name, model, b, n, args)
    times = ("step_ms", "forward_ms", "backward_ms", "optimizer_ms")
    rates = ("images_per_second", "gflops", "share_of_matmul", "ratio")
    table("A training step; ratio: time over that of the model here", rows, ("model", "implementation", *times))
    table(
        "The same as rates; share of what the matrix product reaches",
        rows,
        ("model", "implementation", "shape", "parameters", "multiply_adds", *rates),
    )
    write(args, rows)


if __name__ == "__main__":
    main()
