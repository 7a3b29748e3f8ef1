"""The base of all models: p(x) = Π p(x_k | x_<k) over sub-pixels in raster order, red before green before blue.

Legend: b batch · c channel (colour) · h w rows, columns · f features · v levels · d features of the condition.

A model is a stem (7×7 convolution, mask A), a body (the architecture) and a head (the likelihood). Features are cut in
one group a colour wherever the head tells colours apart. A body may ask for `extra_columns` of features at the right
end of the image, and leaves them out of what it returns.

A condition, whatever it is made of, is a map (b h w d), or (b 1 1 d) where it is the same everywhere, that reaches
every layer: a label's embedding, features that the caller gives, or both side by side. A model with `label_dropout` was
trained without its labels at times: images of label NO_LABEL have zeros in place of an embedding.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks import check, check_one_of, unexpected
from models.body import Body
from models.dropout import drop_labels
from models.features import Stretch
from models.in_row import Network
from models.layers import MaskedConv, in_rows, side_by_side, state_dtype
from models.logistic_mixture import LogisticMixtureHead
from models.softmax import SoftmaxHead

HEADS = ("softmax", "logistic_mixture")
NO_LABEL = -1  # of an image whose class is not said
# Arguments younger than the first models, as those were: then they are not in a model's config.
LATER = {"label_dropout": 0.0, "input": "scaled", "input_features": 16}
INPUTS = ("scaled", "embedding")
Run = Callable[[nn.Module, Tensor], Tensor]  # who computes what a module makes of a tensor; `as_written`: itself
as_written: Run = nn.Module.__call__


class Stage(NamedTuple):
    """One step of drawing an image: what it draws is an image too, a smaller one or a frame."""

    net: "AutoregressiveModel"
    condition: Tensor | None  # what `net` is conditioned on
    x: Tensor | None = None  # values (b c h w) of the pixels that are known already
    known: Tensor | None = None  # which these are (b c h w), true or false


class ImageModel(nn.Module):
    """A model of images (b c h w) of integers in [0, levels), or of clips (b t c h w): where images are said, those.

    An image may be drawn in several stages, by one network or by several: the smaller ones of Multi-Scale, the frames
    of a clip. `nets`, `of_stage`, `stage` and `joined` say how; whoever samples or codes asks nothing else.
    """

    channels: int
    levels: int
    height: int
    width: int
    classes: int  # labels that the model is conditioned on; 0: none
    label_dropout: float  # probability with which it is not told an image's label in training; above 0: it needs none
    map_features: int  # features of the maps that it is conditioned on; 0: none

    def __init__(self, arguments: Mapping):
        """`arguments` are the locals of a constructor that has done nothing yet: itself and what it was given."""
        super().__init__()
        given = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
        given = {name: value for name, value in given.items() if name not in LATER or value != LATER[name]}
        self.config = {"_target_": f"models.{type(self).__name__}", **given}  # what `models.build` takes

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, h, w) of an image, (t, c, h, w) of a clip."""
        return self.channels, self.height, self.width

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def scale(self, x: Tensor) -> Tensor:
        """Integers in [0, levels) → numbers in [-1, 1], as the network reads them."""
        weight = next(self.parameters())
        return (x.to(state_dtype(weight)) * (2 / (self.levels - 1)) - 1).to(weight.dtype)

    def check(self, x: Tensor) -> Tensor:
        """Return `x` (b c h w) if it holds images of this model, raise ValueError otherwise."""
        if x.shape[1:] != self.shape or x.is_floating_point() or x.is_complex():
            expected, found = f"integers (b, {', '.join(map(str, self.shape))})", f"{tuple(x.shape)} of {x.dtype}"
            raise ValueError(f"x: expected {expected}, found {found}")
        if x.numel():
            low, high = (int(n) for n in x.aminmax())
            if low < 0 or high >= self.levels:
                raise ValueError(f"x: expected values from 0 to {self.levels - 1}, found {low} to {high}")
        return x

    def check_condition(self, b: int, label: Tensor | None = None, cond: Tensor | None = None) -> None:
        """Raise ValueError unless `label` and `cond` are what b images of this model are conditioned on."""
        check_label(self.classes, b, label, needed=not self.label_dropout)
        expected = (b, self.map_features, self.height, self.width)
        if self.map_features and cond is None:
            raise ValueError(f"cond: expected maps {expected}, which the model is conditioned on; found none")
        if not self.map_features and cond is not None:
            raise ValueError("cond: expected none, as the model was built without map_features")
        if cond is not None and not isinstance(cond, Tensor):
            raise ValueError(f"cond: expected a tensor, found a {type(cond).__name__}")
        if cond is not None and (tuple(cond.shape) != expected or not cond.is_floating_point()):
            raise ValueError(f"cond: expected floats {expected}, found {tuple(cond.shape)} of {cond.dtype}")

    def labels_for(self, b: int, label: Tensor | None) -> Tensor | None:
        """The labels (b,) of b images; where none are given and the model needs none, NO_LABEL for all."""
        if label is None and self.label_dropout:
            return torch.full((b,), NO_LABEL, device=self.device)
        return label

    def labels_in_training(self, label: Tensor | None) -> Tensor | None:
        """In training, labels (b,) of which a share `label_dropout` is NO_LABEL now; else the labels themselves."""
        if not self.training or not self.label_dropout or label is None:
            return label
        return drop_labels(label, self.label_dropout, NO_LABEL)

    def forward(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Images (b c h w), not checked → nats of each (b,): the loss of training."""
        raise NotImplementedError

    def nats_at(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Images (b c h w), not checked → nats of each pixel (b h w), its colours together; they add up to all."""
        raise NotImplementedError

    def log_prob(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """The log-likelihood of images: x (b c h w) integers in [0, levels) → (b,) nats.

        Args:
            label: (b,) integers in [0, classes), where the model has classes. With label_dropout, NO_LABEL is one too,
                and None is NO_LABEL for all.
            cond: (b d h w), where the model has map_features.

        Raises:
            ValueError: something has another shape or type, or values outside, is missing, or not expected.
        """
        self.check_condition(len(self.check(x)), label, cond)
        return -self(x, label, cond)

    def conditionals(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """log p(value | everything before it) of every sub-pixel: x (b c h w) → (b c h w v).

        Arguments and errors as in `log_prob`.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write weights and config to model.safetensors in a folder, which is made if need be, and config.json.

        Raises:
            ValueError: the model is of a class of the caller's own, which nobody else could rebuild.
        """
        from models.exported import save_pretrained  # which imports the models

        save_pretrained(self, Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, device: str | torch.device = "cpu", **options) -> "ImageModel":
        """Load what `save_pretrained` wrote to a folder, an exported file, or a model on the Hugging Face hub.

        Args:
            options: of `huggingface_hub.hf_hub_download`: revision, token, cache_dir, ….

        Raises:
            ValueError, FileNotFoundError: as `models.checkpoint.load`, or it is a model of another class.
            ImportError: there is no such folder, and huggingface_hub is not installed.
        """
        from models.checkpoint import load
        from models.exported import fetched

        model = load(fetched(name, **options), device)
        if not isinstance(model, cls):
            raise ValueError(f"{name}: expected a {cls.__name__}, found a {type(model).__name__}")
        return model

    def push_to_hub(self, name: str, card: str | os.PathLike | None = None, **options) -> str:
        """Publish the model on the Hugging Face hub as "user/name"; return its address.

        Args:
            card: a file that becomes its README, such as a run's model_card.md.
            options: token, and those of `huggingface_hub.HfApi.create_repo`: private, ….

        Raises:
            ImportError: huggingface_hub is not installed.
        """
        from models.exported import push_to_hub

        return push_to_hub(self, name, None if card is None else Path(card), **options)

    def parts(self, x: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """The parts that the nats of images are a sum of, where there is more than one: name → (b,)."""
        return {}

    @property
    def nets(self) -> list["AutoregressiveModel"]:
        """The network of each stage, in the order of drawing; one network may have several stages."""
        raise NotImplementedError

    def of_stage(self, k: int, x: Tensor) -> Tensor:
        """The part of images x, or of a mask of their shape, that stage k draws: (b c h w), a view."""
        return x

    def joined(self, drawn: list[Tensor]) -> Tensor:
        """The images that the stages' draws (b c h w) add up to: where nothing else is said, the last of them."""
        return drawn[-1]

    def stage(
        self,
        k: int,
        b: int,
        drawn: list[Tensor],
        label: Tensor | None = None,
        cond: Tensor | None = None,
        run: Run = as_written,
    ) -> Stage:
        """The draw by `nets[k]` of b images, given what the stages before it drew.

        Args:
            label, cond: as in `log_prob`.
            run: computes the modules that the stage's condition is made by.
        """
        raise NotImplementedError


class AutoregressiveModel(ImageModel):
    """An exact-likelihood model of images (b c h w) of integers in [0, levels); a subclass names its `architecture`.

    Args:
        channels, levels, height, width: what the images are.
        hidden: the paper's h.
        layers: how many layers or blocks the body has.
        residual, skip: whether a layer's output is added to its input; whether every layer also feeds the head.
        head: "softmax" (levels logits a sub-pixel) or "logistic_mixture" (ordinal: 254 is near 255).
        head_features: features of the layer before the head's parameters.
        mixtures: components of a logistic mixture.
        dropout: probability with which a feature is left out of a layer's output in training.
        classes: number of class labels that the model is conditioned on; 0: none.
        map_features: d of maps `cond` (b d h w) that the model is conditioned on; 0: none.
        label_dropout: probability with which it is not told an image's label in training (classifier-free guidance,
            2207.12598): it is then a model of images without labels too.
        input: how the network reads a value: "scaled" to [-1, 1], or as an "embedding", a learned vector of each level,
            for values without an order.
        input_features: of an embedding.

    Raises:
        ValueError: for an argument outside what is allowed.
    """

    architecture: ClassVar[type[Body]]

    def __init__(
        self,
        channels: int,
        levels: int,
        height: int,
        width: int,
        hidden: int,
        layers: int,
        residual: bool = True,
        skip: bool = False,
        head: str = "softmax",
        head_features: int = 32,
        mixtures: int = 10,
        dropout: float = 0.0,
        classes: int = 0,
        map_features: int = 0,
        label_dropout: float = 0.0,
        input: str = "scaled",
        input_features: int = 16,
    ):
        super().__init__(locals())
        check_one_of("head", head, HEADS)
        check_one_of("input", input, INPUTS)
        groups = channels if head == "softmax" and isinstance(channels, int) else 1
        for name, value, low in (
            ("channels", channels, 1),
            ("levels", levels, 2),
            ("height", height, 1),
            ("width", width, 1),
            ("layers", layers, 1),
            ("hidden", hidden, groups),
            ("head_features", head_features, groups),
            ("mixtures", mixtures, 1),
            ("classes", classes, 0),
            ("map_features", map_features, 0),
            ("input_features", input_features, 1),
        ):
            check(name, value, int, low)
        check("residual", residual, bool, False, True)
        check("skip", skip, bool, False, True)
        check("dropout", dropout, float, 0.0, 0.95)
        check_label_dropout(label_dropout, classes)
        self.channels, self.levels, self.height, self.width = channels, levels, height, width
        self.classes, self.map_features, self.label_dropout = classes, map_features, label_dropout
        d = (hidden if classes else 0) + map_features
        vertical = self.architecture.vertical_factor * hidden
        outputs = [Stretch(vertical, groups, before=True)] if vertical else []
        outputs.append(Stretch(2 * hidden - vertical, groups))
        read = channels * (input_features if input == "embedding" else 1)
        self.stem = MaskedConv("A", 7, Stretch(read, groups), outputs, self.architecture.extra_columns)
        self.body = self.architecture(hidden, layers, groups, residual, skip, dropout, d)
        if head == "softmax":
            self.head = SoftmaxHead(self.body.features, head_features, channels, levels)
        else:
            self.head = LogisticMixtureHead(self.body.features, head_features, channels, levels, mixtures)
        if classes:
            self.embedding = nn.Embedding(classes, hidden)
        self.value_embedding = nn.Embedding(levels, input_features) if input == "embedding" else None

    def read(self, x: Tensor) -> Tensor:
        """Integers (… c) → what the network reads of them (… c·k): numbers in [-1, 1], k = 1, or embeddings of k."""
        return self.scale(x) if self.value_embedding is None else self.value_embedding(x.long()).flatten(-2)

    def table(self) -> Tensor:
        """What the network reads of each level: (v k)."""
        return self.read(torch.arange(self.levels, device=self.device)[:, None])

    def condition(self, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor | None:
        """The condition of labels (b,), maps (b d h w) or both: (b h w d), (b 1 1 d) for labels only, or None."""
        parts = []
        if cond is not None:
            cond = cond.permute(0, 2, 3, 1).to(self.stem.weight.dtype)
            parts.append(F.pad(cond, (0, 0, 0, self.stem.extra)))
        if label is not None:
            embedded = self.embedding(label.long().clamp(min=0))[:, None, None]
            label = torch.where(label[:, None, None, None] >= 0, embedded, 0) if self.label_dropout else embedded
            parts.append(label.expand(-1, *parts[0].shape[1:3], -1) if parts else label)
        return torch.cat(parts, dim=-1) if parts else None

    def in_row(self) -> Network:
        """The network inside a row, as the cached sampler computes it."""
        row, above = in_rows([self.stem])
        stem = row.part(slice(-1, None))._replace(bias=None), above._replace(bias=row.bias)
        to_head = side_by_side(self.body.to_head) if self.body.skip else None
        join = side_by_side(self.body.up), to_head, self.body.residual
        head = side_by_side([self.head.first]), side_by_side([self.head.last])
        return Network(*stem, self.stem.reach, self.body.in_row(), *join, *head)

    def outputs(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The head's parameters of every conditional: images (b c h w) → for `softmax`, logits (b h w c v)."""
        return self.head(self.body(self.stem(self.read(x.permute(0, 2, 3, 1))), condition))

    def nats_at(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        return self.head.nats(self.outputs(x, self.condition(self.labels_for(len(x), label), cond)), x)

    def forward(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        return self.nats_at(x, self.labels_in_training(label), cond).sum((1, 2))

    def conditionals(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        self.check_condition(len(self.check(x)), label, cond)
        return self.head.conditionals(self.outputs(x, self.condition(self.labels_for(len(x), label), cond)), x)

    @property
    def nets(self) -> list["AutoregressiveModel"]:
        return [self]

    def stage(
        self,
        k: int,
        b: int,
        drawn: list[Tensor],
        label: Tensor | None = None,
        cond: Tensor | None = None,
        run: Run = as_written,
    ) -> Stage:
        return Stage(self, self.condition(label, cond))


def check_label_dropout(p: float, classes: int) -> None:
    """Raise ValueError unless a model with that number of classes (0: none) can leave labels out with probability p."""
    check("label_dropout", p, float, 0.0, 0.95)
    if p and not classes:
        raise unexpected("label_dropout", p, "0, as the model has no classes")


def check_label(classes: int, b: int, label: Tensor | None, needed: bool) -> None:
    """Raise ValueError unless `label` (b,) is of a model with that number of classes (0: none).

    Args:
        needed: whether there must be one for each image.
    """
    if not classes and label is not None:
        raise ValueError("label: expected none, as the model was built without classes")
    if classes and label is None and needed:
        raise ValueError(f"label: expected one of {classes} classes, which the model is conditioned on; found none")
    if label is None:
        return
    if not isinstance(label, Tensor):
        raise ValueError(f"label: expected a tensor of {b} integers, found a {type(label).__name__}")
    if tuple(label.shape) != (b,) or label.is_floating_point() or label.dtype == torch.bool:
        raise ValueError(f"label: expected integers ({b},), found {tuple(label.shape)} of {label.dtype}")
    if label.numel() and not (0 if needed else NO_LABEL) <= int(label.min()) <= int(label.max()) < classes:
        low, high = int(label.min()), int(label.max())
        none = "" if needed else f", or {NO_LABEL} for none"
        raise ValueError(f"label: expected values from 0 to {classes - 1}{none}, found {low} to {high}")


def bits_per_dim(nats: Tensor | float, shape: tuple[int, ...]):
    """Nats an image → bits a sub-pixel, for images of that shape."""
    return nats / (torch.log(torch.tensor(2.0)).item() * math.prod(shape))
