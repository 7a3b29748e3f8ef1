"""Multi-Scale PixelRNN (1601.06759, section 3.6): a small image first, then the large one given the small one.

Legend: b batch · c channel (colour) · h w rows, columns · v levels · d features of the condition · n nets.

The small image is the large one's pixels in even rows and columns (counted from 0), so with x⁰ the smallest:

    p(x) = p(x⁰) · p(x¹ | x⁰) · p(x² | x¹) · …         each twice as high and as wide as the one before

Each net of the larger images is any of the models, conditioned on the smaller image, which transposed convolutions
bring to its size. With `copy_known` its pixels in even rows and columns are known: they cost no nats and are copied
when an image is drawn. All probabilities then sum to one. Without it (the paper's form) a net predicts them again, and
mass is lost on images that disagree with the smaller one: p(x) is then no normalized likelihood.
"""

import torch
from torch import Tensor, nn

from checks import check, check_one_of, unexpected
from models.base import AutoregressiveModel, ImageModel, Run, Stage, as_written, check_label_dropout
from models.diag_bilstm import DiagBiLSTM
from models.gated_pixel_cnn import GatedPixelCNN
from models.pixel_cnn import PixelCNN
from models.row_lstm import RowLSTM

KINDS: dict[str, type[AutoregressiveModel]] = {
    "pixel_cnn": PixelCNN,
    "gated_pixel_cnn": GatedPixelCNN,
    "row_lstm": RowLSTM,
    "diag_bilstm": DiagBiLSTM,
}


class Upsample(nn.Sequential):
    """Images as a net reads them (b k h w) → features of images twice as high and as wide (b d 2h 2w)."""

    def __init__(self, inputs: int, d: int):
        super().__init__(
            nn.Conv2d(inputs, d, 3, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(d, d, 4, stride=2, padding=1),
            nn.ReLU(),
        )


class MultiScale(ImageModel):
    """Multi-Scale PixelRNN.

    Args:
        channels, levels, height, width: what the images are; height and width are divisible by 2^doublings.
        hidden, layers: of the nets of the larger images.
        base, conditional: "pixel_cnn", "gated_pixel_cnn", "row_lstm" or "diag_bilstm": the net of the smallest images,
            and those of the larger ones.
        base_hidden, base_layers: of the net of the smallest images; None: hidden, layers.
        doublings: how often the image is doubled.
        copy_known: whether pixels of the smaller image are known in the larger one (else: the paper's form).
        train: "joint" trains all nets, "base" only that of the smallest images.
        residual, skip, head, head_features, mixtures, dropout, classes, label_dropout, input, input_features: of every
            net, see `AutoregressiveModel`; a label that is left out is left out in all nets.

    Raises:
        ValueError: for an argument outside what is allowed.
    """

    map_features = 0

    def __init__(
        self,
        channels: int,
        levels: int,
        height: int,
        width: int,
        hidden: int,
        layers: int,
        base: str = "diag_bilstm",
        conditional: str = "diag_bilstm",
        base_hidden: int | None = None,
        base_layers: int | None = None,
        doublings: int = 1,
        copy_known: bool = True,
        train: str = "joint",
        residual: bool = True,
        skip: bool = False,
        head: str = "softmax",
        head_features: int = 32,
        mixtures: int = 10,
        dropout: float = 0.0,
        classes: int = 0,
        label_dropout: float = 0.0,
        input: str = "scaled",
        input_features: int = 16,
    ):
        super().__init__(locals())
        check_one_of("base", base, KINDS)
        check_one_of("conditional", conditional, KINDS)
        check_one_of("train", train, ("joint", "base"))
        check("copy_known", copy_known, bool, False, True)
        check("doublings", doublings, int, 1, 30)
        check("classes", classes, int, 0)
        check_label_dropout(label_dropout, classes)
        base_hidden = hidden if base_hidden is None else base_hidden
        base_layers = layers if base_layers is None else base_layers
        sizes = {"hidden": hidden, "layers": layers, "base_hidden": base_hidden, "base_layers": base_layers}
        for name, value in sizes.items():
            check(name, value, int, 1)
        for name, value in (("height", height), ("width", width)):
            check(name, value, int, 1)
            if value % 2**doublings:
                raise unexpected(name, value, f"a multiple of 2^doublings = {2**doublings}")
        self.channels, self.levels, self.height, self.width = channels, levels, height, width
        self.classes, self.label_dropout = classes, label_dropout
        self.copy_known, self.only_base = copy_known, train == "base"
        shared = {"residual": residual, "skip": skip, "head": head, "head_features": head_features}
        shared |= {"mixtures": mixtures, "dropout": dropout, "classes": classes, "label_dropout": label_dropout}
        shared |= {"input": input, "input_features": input_features}

        def net(kind: str, halvings: int, hidden: int, layers: int, d: int) -> AutoregressiveModel:
            size = height // 2**halvings, width // 2**halvings
            return KINDS[kind](channels, levels, *size, hidden, layers, **shared, map_features=d)

        smallest = net(base, doublings, base_hidden, base_layers, 0)
        larger = [net(conditional, halvings, hidden, layers, hidden) for halvings in reversed(range(doublings))]
        self.all_nets = nn.ModuleList([smallest, *larger])
        self.upsample = nn.ModuleList(Upsample(net.stem.inputs.size, hidden) for net in larger)

    @property
    def nets(self) -> list[AutoregressiveModel]:
        return list(self.all_nets)

    def of_stage(self, k: int, x: Tensor) -> Tensor:
        net = self.nets[k]
        return x[:, :, :: self.height // net.height, :: self.width // net.width]

    def sizes(self, x: Tensor) -> list[Tensor]:
        """Images x (b c h w) in all sizes, the smallest first."""
        return [self.of_stage(k, x) for k in range(len(self.nets))]

    def from_smaller(self, k: int, smaller: Tensor, run: Run = as_written) -> Tensor:
        """The maps that `nets[k]` is conditioned on, made of smaller images (b c h/2 w/2): (b d h w)."""
        x = self.nets[k].read(smaller.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = x.clone(memory_format=torch.contiguous_format)  # other layouts are rounded differently
        return run(self.upsample[k - 1], x)

    def known(self, x: Tensor) -> Tensor:
        """Which sub-pixels of images x (b c h w) the smaller images show: (b c h w), true or false."""
        out = torch.zeros_like(x, dtype=torch.bool)
        out[:, :, ::2, ::2] = True
        return out

    def nats_of(self, k: int, sizes: list[Tensor], label: Tensor | None) -> Tensor:
        """Nats of each pixel (b h w) of the images of size k, given those of size k − 1."""
        net, x = self.nets[k], sizes[k]
        if k == 0:
            return net.nats_at(x, label)
        nats = net.nats_at(x, label, self.from_smaller(k, sizes[k - 1]))
        return nats.masked_fill(self.known(x)[:, 0], 0.0) if self.copy_known else nats

    def nats_at(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Images (b c h w), not checked → nats of each pixel (b h w), a smaller image's where it shows the pixel."""
        sizes = self.sizes(x)
        out = self.nats_of(0, sizes, label)
        for k in range(1, len(sizes)):
            smaller, out = out, self.nats_of(k, sizes, label).clone()
            out[:, ::2, ::2] += smaller
        return out

    def forward(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Images (b c h w), not checked → nats of each (b,); in training with train="base", of the smallest image."""
        sizes, label = self.sizes(x), self.labels_in_training(label)
        used = 1 if self.training and self.only_base else len(sizes)
        return torch.stack([self.nats_of(k, sizes, label).sum((1, 2)) for k in range(used)]).sum(0)

    def parts(self, x: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        sizes = self.sizes(x)
        names = [f"{'conditional' if k else 'base'}_{net.height}x{net.width}" for k, net in enumerate(self.nets)]
        return {name: self.nats_of(k, sizes, label).sum((1, 2)) for k, name in enumerate(names)}

    def conditionals(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """log p(value | everything drawn before it) of every sub-pixel: x (b c h w) → (b c h w v).

        With copy_known, those of pixels that a smaller image shows are the smaller net's: smaller images come first,
        each in raster order, so that the whole is a likelihood. Without, all are those of the largest net.
        """
        self.check_condition(len(self.check(x)), label, cond)
        sizes = self.sizes(x)
        out = self.nets[0].conditionals(sizes[0], label)
        for k, net in enumerate(self.nets[1:], start=1):
            smaller, out = out, net.conditionals(sizes[k], label, self.from_smaller(k, sizes[k - 1]))
            if self.copy_known:
                out = out.clone()
                out[:, :, ::2, ::2] = smaller
        return out

    def stage(
        self,
        k: int,
        b: int,
        drawn: list[Tensor],
        label: Tensor | None = None,
        cond: Tensor | None = None,
        run: Run = as_written,
    ) -> Stage:
        net = self.nets[k]
        if k == 0:
            return Stage(net, net.condition(label))
        condition = net.condition(label, self.from_smaller(k, drawn[-1], run))
        if not self.copy_known:
            return Stage(net, condition)
        x = drawn[-1].new_zeros(b, *net.shape)
        x[:, :, ::2, ::2] = drawn[-1]
        return Stage(net, condition, x, self.known(x))
