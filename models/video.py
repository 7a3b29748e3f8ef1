"""Clips, frame by frame: each given the last few frames, in the manner of Video Pixel Networks (1610.00527).

Legend: b batch · t frames · c channel (colour) · h w rows, columns · v levels · k features that a frame is read as · d
features of the condition.

    p(x) = Π_t p(x_t | x_{t−past} … x_{t−1})

One network, any of the models of images, draws all frames. What came before reaches it as maps: the last `past` frames
themselves, and what each layer of a small convolutional encoder makes of them, side by side. Before the first frame
there are none: one more feature of each frame says whether it exists, 1 or 0.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checks import check, check_one_of
from models.base import INPUTS, AutoregressiveModel, ImageModel, Run, Stage, as_written, check_label_dropout
from models.multi_scale import KINDS

FRAMES_AT_ONCE = 256  # outside training: enough to keep all cores busy, and it bounds the memory


def film(x: Tensor) -> Tensor:
    """Stack the frames of clips (n t c h w) from top to bottom: (n c t·h w); images (n c h w) stay as they are."""
    return x.movedim(-3, 1).flatten(2, -2)


def convolution(inputs: int, outputs: int) -> nn.Sequential:
    """A layer of the encoder: (b inputs h w) → (b outputs h w)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU())


class Video(ImageModel):
    """A model of clips (b t c h w).

    Args:
        channels, levels, height, width: what the frames are.
        frames: t, of a clip.
        hidden, layers: of the network that draws the frames.
        net: which that is, "pixel_cnn", "gated_pixel_cnn", "row_lstm" or "diag_bilstm".
        past: how many frames before it a frame is conditioned on; 0: each frame is drawn by itself.
        encoder_hidden, encoder_layers: features (None: `hidden`) and layers of the encoder of these frames. Each layer
            sees one pixel further, so with three a digit may move three pixels a frame and still be followed.
        residual, skip, head, head_features, mixtures, dropout, classes, label_dropout, input, input_features: of the
            network, see `AutoregressiveModel`; a clip has one label.

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
        frames: int,
        hidden: int,
        layers: int,
        net: str = "row_lstm",
        past: int = 2,
        encoder_hidden: int | None = None,
        encoder_layers: int = 3,
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
        check_one_of("net", net, KINDS)
        check_one_of("input", input, INPUTS)
        encoder_hidden = hidden if encoder_hidden is None else encoder_hidden
        sizes = {"channels": channels, "frames": frames, "hidden": hidden, "input_features": input_features}
        sizes |= {"encoder_hidden": encoder_hidden, "encoder_layers": encoder_layers}
        for name, value in sizes.items():
            check(name, value, int, 1)
        check("past", past, int, 0)
        check("classes", classes, int, 0)
        check_label_dropout(label_dropout, classes)
        self.channels, self.levels, self.height, self.width = channels, levels, height, width
        self.frames, self.past, self.classes, self.label_dropout = frames, past, classes, label_dropout
        of_net = {"residual": residual, "skip": skip, "head": head, "head_features": head_features}
        of_net |= {"mixtures": mixtures, "dropout": dropout, "classes": classes, "label_dropout": label_dropout}
        of_net |= {"input": input, "input_features": input_features}
        read = past * (channels * (input_features if input == "embedding" else 1) + 1)
        d = read + encoder_layers * encoder_hidden if past else 0
        self.net = KINDS[net](channels, levels, height, width, hidden, layers, **of_net, map_features=d)
        sizes = [read, *encoder_layers * [encoder_hidden]] if past else []
        self.encoder = nn.ModuleList(convolution(*pair) for pair in pairwise(sizes))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.frames, self.channels, self.height, self.width

    @property
    def nets(self) -> list[AutoregressiveModel]:
        return self.frames * [self.net]

    def of_stage(self, k: int, x: Tensor) -> Tensor:
        return x[:, k]

    def joined(self, drawn: list[Tensor]) -> Tensor:
        return torch.stack(drawn, 1)

    def before(self, x: Tensor) -> Tensor:
        """What is read of the frames before each of frames x (b t c h w), and before the one that comes next:
        (b t+1 k·past h w), the newest first.
        """
        read = self.net.read(x.movedim(2, -1))
        there = F.pad(torch.cat([read, torch.ones_like(read[..., :1])], -1), (0, 0, 0, 0, 0, 0, self.past, 0))
        newest_first = [there[:, self.past - back :][:, : x.shape[1] + 1] for back in range(1, self.past + 1)]
        return rearrange(newest_first, "past b t h w k -> b t (past k) h w").contiguous()

    def maps(self, before: Tensor, run: Run = as_written) -> Tensor:
        """The maps that the net is conditioned on: frames as they are read (b k·past h w) → (b d h w)."""
        made = [before]
        for layer in self.encoder:
            made.append(run(layer, made[-1]))
        return torch.cat(made, 1)

    def nats_at(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Clips (b t c h w), not checked → nats of each pixel (b t h w), its colours together; they add up to all."""
        return self.of_frames(x, label, self.net.nats_at)

    def of_frames(self, x: Tensor, label: Tensor | None, of: Callable[..., Tensor]) -> Tensor:
        """`of(frames (n c h w), their labels (n,), their maps (n d h w))` (n …) of all frames of clips: (b t …).

        In training all at once; else some at a time.
        """
        frames, n = x.flatten(0, 1), len(x) * self.frames
        label = None if label is None else label.repeat_interleave(self.frames)
        before = self.before(x[:, :-1]).flatten(0, 1) if self.past else None
        step, parts = max(n, 1) if torch.is_grad_enabled() else FRAMES_AT_ONCE, []
        for start in range(0, max(n, 1), step):
            some = slice(start, start + step)
            maps = None if before is None else self.maps(before[some])
            parts.append(of(frames[some], None if label is None else label[some], maps))
        return torch.cat(parts).unflatten(0, (-1, self.frames))

    def forward(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """Clips (b t c h w), not checked → nats of each (b,)."""
        return self.nats_at(x, self.labels_in_training(label)).sum((1, 2, 3))

    def parts(self, x: Tensor, label: Tensor | None = None) -> dict[str, Tensor]:
        """The nats of each frame, given those before it: name → (b,)."""
        of_frames = self.nats_at(x, label).sum((2, 3))
        return {f"frame_{t:0{len(str(self.frames))}}": nats for t, nats in enumerate(of_frames.unbind(1), start=1)}

    def conditionals(self, x: Tensor, label: Tensor | None = None, cond: Tensor | None = None) -> Tensor:
        """log p(value | everything before it) of every sub-pixel: x (b t c h w) → (b t c h w v)."""
        self.check_condition(len(self.check(x)), label, cond)
        return self.of_frames(x, label, self.net.conditionals)

    def stage(
        self,
        k: int,
        b: int,
        drawn: list[Tensor],
        label: Tensor | None = None,
        cond: Tensor | None = None,
        run: Run = as_written,
    ) -> Stage:
        if not self.past:
            return Stage(self.net, self.net.condition(label))
        none = torch.zeros(b, 0, *self.net.shape, dtype=torch.long, device=self.device)
        last = torch.cat([none, *(frame[:, None] for frame in drawn[-self.past :])], 1)
        return Stage(self.net, self.net.condition(label, self.maps(self.before(last)[:, -1], run)))
