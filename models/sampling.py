"""Sampling, completion and scoring: one pixel loop, with rules that choose each value.

Legend: b batch · n images · c channel · h w rows, columns · v levels · g group · i j a row, a column.

The loop visits sub-pixels in raster order, red before green before blue. At each it asks an evaluator for the logits
(b v) and hands them to a rule, which answers with values (b,). Two evaluators have the same calls: `RowScan` computes
every activation once, `FullForward` re-runs the network for each sub-pixel. Noise is injected: one uniform number a
sub-pixel, so that both draw the same images from the same numbers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from models.base import AutoregressiveModel, ImageModel
from models.layers import MaskedConvScan, check, check_one_of


class RowScan:
    """Logits from cached activations: rows above are finished, so a sub-pixel costs one step along the row."""

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None = None):
        self.scale, self.head = model.scale, model.head.scan(b)
        columns = model.width + model.stem.extra
        self.outside = range(model.width, columns)
        self.body = model.body.scan(b, columns, condition)
        self.stem = MaskedConvScan(model.stem, b, model.height, columns, self.body.inputs, self.body.vertical)

    def begin_row(self, i: int) -> None:
        if i > 0:  # the row above has no pixels in the extra columns, but features
            for j in self.outside:
                for g in range(self.stem.groups):
                    self.stem.step(j, g)
                    self.body.step(j, g)
        self.stem.begin_row(i)
        self.body.begin_row(i)

    def logits(self, i: int, j: int, c: int) -> Tensor:
        if c < self.stem.groups:  # one group: all colours of a pixel come from one step
            self.stem.step(j, c)
            self.head.step(self.body.step(j, c), c)
        return self.head.logits(c)

    def put(self, i: int, j: int, c: int, values: Tensor) -> None:
        self.stem.put(j, c, self.scale(values))
        self.head.put(c, values)


class FullForward:
    """Logits from the whole network, run anew for each sub-pixel: what the row scan is compared with."""

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None = None):
        self.model, self.condition = model, condition
        self.x = torch.zeros(b, *model.shape, dtype=torch.long, device=model.device)

    def begin_row(self, i: int) -> None:
        pass

    def logits(self, i: int, j: int, c: int) -> Tensor:
        parameters = self.model.parameters_at(self.x, self.condition)[:, i, j]
        return self.model.head.logits(parameters, self.x[:, :, i, j])[:, c]

    def put(self, i: int, j: int, c: int, values: Tensor) -> None:
        self.x[:, c, i, j] = values


METHODS = {"cached": RowScan, "naive": FullForward}


class Draw:
    """Draw from the conditional, by inverse CDF of one uniform number a sub-pixel.

    Args:
        uniforms: (b c h w) in [0, 1).
        temperature: logits are divided by it; 0 takes the likeliest value.
    """

    def __init__(self, uniforms: Tensor, temperature: float = 1.0):
        self.uniforms, self.temperature = uniforms, temperature

    def __call__(self, i: int, j: int, g: int, logits: Tensor) -> Tensor:
        if self.temperature == 0:
            return logits.argmax(1)
        likeliest = logits.amax(1, keepdim=True)  # subtracted before the division, which may overflow
        cdf = ((logits - likeliest) / self.temperature).softmax(1).cumsum(1)
        return (cdf[:, :-1] <= self.uniforms[:, g, i, j, None] * cdf[:, -1:]).sum(1)


class Given:
    """Take the values of given images x (b c h w): what scores them."""

    def __init__(self, x: Tensor):
        self.x = x.long()

    def __call__(self, i: int, j: int, g: int, logits: Tensor) -> Tensor:
        return self.x[:, g, i, j]


class Keep:
    """Keep the sub-pixels of x (b c h w) that are `known` (b c h w, true or false); ask another rule for the rest.

    Only known sub-pixels that come before another in the order are evidence for it.
    """

    def __init__(self, x: Tensor, known: Tensor, otherwise: Callable):
        self.x, self.known, self.otherwise = x.long(), known.bool(), otherwise

    def __call__(self, i: int, j: int, g: int, logits: Tensor) -> Tensor:
        at = (slice(None), g, i, j)
        return torch.where(self.known[at], self.x[at], self.otherwise(i, j, g, logits))


class Record:
    """Ask another rule, and add up how likely its choices were: `log_prob` (b,) nats, at temperature 1.

    With `conditionals=True` every conditional is kept too (b c h w v).
    """

    def __init__(self, model: AutoregressiveModel, rule: Callable, b: int, conditionals: bool = False):
        self.rule, new = rule, model.stem.weight.new_zeros
        self.log_prob = new(b)
        self.conditionals = new(b, *model.shape, model.levels) if conditionals else None

    def __call__(self, i: int, j: int, g: int, logits: Tensor) -> Tensor:
        values = self.rule(i, j, g, logits)
        log_probs = logits.log_softmax(1)
        self.log_prob += log_probs.gather(1, values[:, None])[:, 0]
        if self.conditionals is not None:
            self.conditionals[:, g, i, j] = log_probs
        return values


@contextmanager
def threads_for(model: AutoregressiveModel, method: str, b: int) -> Iterator[None]:
    """One thread where the products of a row scan are small: sharing them costs more than it saves.

    It costs most where another program keeps a core busy: each of some thousand products then waits for it.
    """
    largest = b * max(parameter.numel() for parameter in model.body.parameters())  # multiply-adds of one product
    before = torch.get_num_threads()
    if method == "cached" and largest < 2**22:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pixel_loop(
    model: AutoregressiveModel,
    method: str,
    rule: Callable,
    b: int,
    tell: Callable = lambda: None,
    condition: Tensor | None = None,
) -> Tensor:
    """Visit all sub-pixels of b images in order and return what the rule chose (b c h w) int64.

    Args:
        method: "cached" (the row scan) or "naive" (the whole network for each sub-pixel).
        rule: called as rule(i, j, g, logits (b v)), answers with values (b,).
        tell: called after each row.
        condition: what `model.condition` made, where the model is conditioned on something.
    """
    check_one_of("method", method, METHODS)
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), threads_for(model, method, b):
            x = torch.zeros(b, *model.shape, dtype=torch.long, device=model.device)
            evaluator = METHODS[method](model, b, condition)
            for i in range(model.height):
                evaluator.begin_row(i)
                for j in range(model.width):
                    for g in range(model.channels):
                        values = rule(i, j, g, evaluator.logits(i, j, g))
                        evaluator.put(i, j, g, values)
                        x[:, g, i, j] = values
                tell()
    finally:
        for module in in_training:
            module.training = True
    return x.clone()  # a tensor made in inference mode takes part in nothing else


def noise(seed: int, images: range, shape: tuple[int, int, int], stage: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) for images of `shape` (c h w): (n c h w) float32.

    Those of image k depend on `seed`, k and `stage` alone: a counter-based generator has the pair as its key, and each
    stage of a model that draws in several has a stretch of its counter for itself.
    """

    def draw(k: int) -> np.ndarray:
        bits = np.random.Philox(key=np.array([seed, k], dtype=np.uint64), counter=[0, 0, 0, stage])
        return np.random.Generator(bits).random(shape, dtype=np.float32)

    return torch.from_numpy(np.stack([draw(k) for k in images]))


def sample(
    model: ImageModel,
    n: int,
    *,
    seed: int = 0,
    method: str = "cached",
    temperature: float = 1.0,
    label: int | Tensor | None = None,
    cond: Tensor | None = None,
    uniforms: Tensor | list[Tensor] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 64,
    tell: Callable[[int], None] = lambda rows: None,
) -> Tensor:
    """Draw n images.

    Args:
        model: any model of `models`; it is used in eval mode and left in the mode it was in.
        seed: image k depends on seed and k alone, not on `batch_size` (but for rounding: a product's last bits may
            depend on the batch, and so may, once in some million sub-pixels, a value).
        method: "cached" computes every activation once; "naive" re-runs the network for each sub-pixel.
        temperature: logits are divided by it; 0 takes the likeliest value.
        label: for a model with classes, (n,) integers, or one for all.
        cond: for a model with map_features, maps (n d h w).
        uniforms: the noise, (n c h w) in [0, 1), instead of numbers from `seed`; for Multi-Scale, a list of one such
            tensor for each of `model.nets`.
        known: (x (n c h w), mask (n c h w)); sub-pixels where the mask is true are kept, the others drawn. Only those
            before a sub-pixel in the order of drawing are evidence for it.
        batch_size: how many images are drawn side by side; memory grows with it, not with n.
        tell: called after each finished row of a batch with how many rows of images that were.

    Returns:
        (n c h w) uint8, or int64 where the model has more than 256 levels, on the CPU.

    Raises:
        ValueError: for an argument outside what is allowed.
    """
    check("n", n, int, 1)
    check("seed", seed, int, 0, 2**64 - 1)
    check("temperature", temperature, float, 0)
    check("batch_size", batch_size, int, 1)
    check_one_of("method", method, METHODS)
    label = torch.full((n,), label) if isinstance(label, int) else label
    model.check_condition(n, label, cond)
    if uniforms is not None:
        uniforms = [uniforms] if isinstance(uniforms, Tensor) else uniforms
        check_uniforms(uniforms, [(n, *net.shape) for net in model.nets])
    if known is not None:
        check_known(model, n, *known)
    out = []
    for start in range(0, n, batch_size):
        images = range(start, min(start + batch_size, n))

        def part(x: Tensor | None, images: range = images) -> Tensor | None:
            return None if x is None else x[images.start : images.stop].to(model.device)

        x, given = None, (part(label), part(cond))
        for k, net in enumerate(model.nets):
            numbers = noise(seed, images, net.shape, k).to(model.device) if uniforms is None else part(uniforms[k])
            rule = Draw(numbers, temperature)
            with torch.no_grad():
                stage = model.stage(k, x, *given)
            if known is not None:
                step = model.height // net.height
                rule = Keep(*(part(tensor)[:, :, ::step, ::step] for tensor in known), rule)
            if stage.known is not None:
                rule = Keep(stage.x, stage.known, rule)
            x = pixel_loop(net, method, rule, len(images), partial(tell, len(images)), stage.condition)
        out.append(x.to("cpu", torch.uint8 if model.levels <= 256 else torch.int64))
    return torch.cat(out)


def check_uniforms(uniforms: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError unless these are uniform numbers of these shapes."""
    given = [tuple(numbers.shape) for numbers in uniforms]
    if given != shapes:
        raise ValueError(f"uniforms are {', '.join(map(str, given))}: {', '.join(map(str, shapes))} is allowed")
    for numbers in uniforms:
        if not ((numbers >= 0) & (numbers < 1)).all():
            raise ValueError(f"uniforms reach from {numbers.min()} to {numbers.max()}: [0, 1) is allowed")


def check_known(model: ImageModel, n: int, x: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless x and mask are n images of the model and which of their sub-pixels are known."""
    if len(x) != n or mask.shape != x.shape:
        raise ValueError(f"known images are {tuple(x.shape)}, their mask {tuple(mask.shape)}: {n} of each are needed")
    if mask.dtype != torch.bool:
        raise ValueError(f"the mask of known sub-pixels is {mask.dtype}: torch.bool is allowed")
    model.check(x)
