"""The models as they are usually written, which the benchmarks time beside the models here; and what both must compute.

    PixelCNN        (b f h w) layout, whole k×k kernels, `weight * mask` in each forward
    GatedPixelCNN   the same
    RowLSTM         the same, and a loop over the rows with a 1×3 convolution of the hidden state, by autograd
    DiagBiLSTM      the skewed map (b f h w+h−1), one direction after the other, a loop over its columns with a
                    2×1 convolution of the hidden state, differentiated by autograd; the model's stem and head

Legend: b batch · c channel · h w rows, columns · f features · v levels.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import DiagBiLSTM, GatedPixelCNN, PixelCNN, RowLSTM
from models.diag_bilstm import DiagonalLSTMLayer
from models.features import size_of
from models.layers import MaskedLinear
from models.row_lstm import RowLSTMLayer


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


class DenseRowConv(nn.Module):
    """A 1×3 convolution along the row with all three taps, and a 1×1 of others: one `MaskedLinear` has both."""

    def __init__(self, masked: MaskedLinear):
        super().__init__()
        n = size_of(masked.inputs[:2])
        (left, centre), (left_mask, centre_mask) = (
            part[:, :n].chunk(2, dim=1) for part in (masked.weight, masked.mask)
        )
        self.weight = nn.Parameter(torch.stack([left, centre, torch.zeros_like(left)], dim=2)[:, :, None].detach())
        mask = torch.stack([left_mask, centre_mask, torch.zeros_like(left_mask)], dim=2)[:, :, None]
        self.register_buffer("mask", mask)
        self.bias = nn.Parameter(masked.bias.detach().clone())
        self.beside = nn.Parameter(masked.weight[:, n:, None, None].detach().clone())

    def forward(self, u: Tensor, *beside: Tensor) -> Tensor:
        out = F.conv2d(u, self.weight * self.mask, self.bias, padding=(0, 1))
        return out + F.conv2d(beside[0], self.beside) if beside else out


class DenseBlock(nn.Module):
    """A block of a PixelCNN."""

    def __init__(self, body: nn.Module, layer: int):
        super().__init__()
        self.down, self.conv, self.up = (DenseConv.like(part[layer]) for part in (body.down, body.conv, body.up))

    def forward(self, u: Tensor) -> Tensor:
        return u + self.up(self.conv(self.down(u.relu()).relu()).relu())


class DenseGatedLayer(nn.Module):
    """A layer of a Gated PixelCNN, on both stacks, one above the other."""

    def __init__(self, body: nn.Module, layer: int):
        super().__init__()
        vertical = body.vertical_conv[layer]
        self.vertical = DenseConv(vertical.weight, torch.ones_like(vertical.weight), vertical.bias)
        self.horizontal, self.up = DenseRowConv(body.horizontal[layer]), DenseConv.like(body.up[layer])

    @staticmethod
    def gate(u: Tensor) -> Tensor:
        a, b = u.chunk(2, dim=1)
        return a.tanh() * b.sigmoid()

    def forward(self, u: Tensor) -> Tensor:
        v, u = u.chunk(2, dim=1)
        v = self.gate(self.vertical(v))
        return torch.cat([v, u + self.up(self.gate(self.horizontal(u, v)))], dim=1)


class DenseRowLSTM(nn.Module):
    """One layer's LSTM, (b 2f h w) → (b f h w): a loop over the rows, differentiated by autograd."""

    def __init__(self, lstm: RowLSTMLayer):
        super().__init__()
        self.input = DenseRowConv(lstm.input)
        self.state_weight = nn.Parameter(lstm.state_weight.detach().clone())

    def forward(self, u: Tensor) -> Tensor:
        rows, hidden, cell = [], None, 0
        for now in self.input(u).unbind(2):
            if hidden is not None:
                now = now + F.conv1d(hidden, self.state_weight, padding=1)
            o, forget, i, g = now.chunk(4, dim=1)
            cell = forget.sigmoid() * cell + i.sigmoid() * g.tanh()
            hidden = o.sigmoid() * cell.tanh()
            rows.append(hidden)
        return torch.stack(rows, dim=2)


class DenseRowLSTMLayer(nn.Module):
    """A layer of a Row LSTM."""

    def __init__(self, body: nn.Module, layer: int):
        super().__init__()
        self.lstm, self.up = DenseRowLSTM(body.lstm[layer]), DenseConv.like(body.up[layer])

    def forward(self, u: Tensor) -> Tensor:
        return u + self.up(self.lstm(u))


class DenseNet(nn.Module):
    """A network in (b f h w) layout, with `DenseConv` in stem, layers and head.

    Args:
        layers: one module a layer: the stream (b f h w) → what it becomes.
    """

    def __init__(self, model: nn.Module, layers: list[nn.Module]):
        super().__init__()
        self.channels, self.scale = model.channels, model.scale
        self.stem, self.layers = DenseConv.like(model.stem), nn.ModuleList(layers)
        self.first, self.logits = DenseConv.like(model.head.first), DenseConv.like(model.head.last)

    def network(self, x: Tensor) -> Tensor:
        """Images (b c h w) → logits (b v c h w)."""
        u = self.stem(self.scale(x))
        for layer in self.layers:
            u = layer(u)
        u = u[:, -self.first.in_channels :]
        logits = self.logits(self.first(u.relu()).relu())
        return logits.unflatten(1, (self.channels, -1)).transpose(1, 2)

    def outputs(self, x: Tensor) -> Tensor:
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

    def forward(self, u: Tensor, condition: None = None) -> Tensor:
        u = u.permute(0, 3, 1, 2).contiguous()
        for forwards, mirrored, up in zip(self.forwards, self.mirrored, self.up, strict=True):
            moved_down = F.pad(mirrored(u.flip(3)).flip(3)[:, :, :-1], (0, 0, 1, 0))
            u = u + up(forwards(u) + moved_down)
        return u.permute(0, 2, 3, 1)[:, :, : u.shape[3] - self.extra_columns]


LAYERS = {PixelCNN: DenseBlock, GatedPixelCNN: DenseGatedLayer, RowLSTM: DenseRowLSTMLayer}


def baseline(model: nn.Module) -> nn.Module:
    """The same function of a copy of the weights (residual, without skip and dropout), plainly written."""
    if type(model) in LAYERS:
        return DenseNet(model, [LAYERS[type(model)](model.body, layer) for layer in range(model.body.layers)])
    assert isinstance(model, DiagBiLSTM)
    out = copy.deepcopy(model)
    out.body = SkewedLSTMs(out.body)
    return out


def live_multiply_adds(model: nn.Module) -> int:
    """Multiply-adds of one image's forward that no mask makes zero.

    Live weights of stem and body are used height · (width + the body's extra columns) times, those of the head height ·
    width times. Only products are counted; taps that fall outside the image are among them.
    """
    of_features, of_pixels = model.in_row().multiply_adds()
    return model.height * ((model.width + model.body.extra_columns) * of_features + model.width * of_pixels)
