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

from models.base import AutoregressiveModel
from models.layers import MaskedConvScan, check


class RowScan:
    """Logits from cached activations: rows above are finished, so a sub-pixel costs one step along the row."""

    def __init__(self, model: AutoregressiveModel, b: int):
        self.scale, self.head = model.scale, model.head.scan(b)
        columns = model.width + model.stem.extra
        self.outside = range(model.width, columns)
        self.body = model.body.scan(b, columns)
        self.stem = MaskedConvScan(model.stem, b, model.height, columns, self.body.inputs)

    def begin_row(self, i: int) -> None:
        if i > 0:  # the row above has no pixels in the extra columns, but features
            for j in self.outside:
                for g in range(self.stem.colours):
                    self.stem.step(j, g)
                    self.body.step(j, g)
        self.stem.begin_row(i)
        self.body.begin_row()

    def logits(self, i: int, j: int, g: int) -> Tensor:
        self.stem.step(j, g)
        return self.head.step(self.body.step(j, g), g)

    def put(self, i: int, j: int, g: int, values: Tensor) -> None:
        self.stem.put(j, g, self.scale(values))


class FullForward:
    """Logits from the whole network, run anew for each sub-pixel: what the row scan is compared with."""

    def __init__(self, model: AutoregressiveModel, b: int):
        self.model = model
        self.x = torch.zeros(b, *model.shape, dtype=torch.long, device=model.stem.weight.device)

    def begin_row(self, i: int) -> None:
        pass

    def logits(self, i: int, j: int, g: int) -> Tensor:
        return self.model.parameters_at(self.x)[:, i, j, g]

    def put(self, i: int, j: int, g: int, values: Tensor) -> None:
        self.x[:, g, i, j] = values


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
    model: AutoregressiveModel, method: str, rule: Callable, b: int, tell: Callable = lambda: None
) -> Tensor:
    """Visit all sub-pixels of b images in order and return what the rule chose (b c h w) int64.

    Args:
        method: "cached" (the row scan) or "naive" (the whole network for each sub-pixel).
        rule: called as rule(i, j, g, logits (b v)), answers with values (b,).
        tell: called after each row.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method={method!r} is not allowed: {' or '.join(METHODS)} is")
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), threads_for(model, method, b):
            x = torch.zeros(b, *model.shape, dtype=torch.long, device=model.stem.weight.device)
            evaluator = METHODS[method](model, b)
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


def noise(seed: int, images: range, shape: tuple[int, int, int]) -> Tensor:
    """Uniform numbers in [0, 1) for images of `shape` (c h w): (n c h w) float32.

    Those of image k depend on `seed` and k alone: a counter-based generator has the pair as its key.
    """
    draws = [
        np.random.Generator(np.random.Philox(key=np.array([seed, k], dtype=np.uint64))).random(shape, dtype=np.float32)
        for k in images
    ]
    return torch.from_numpy(np.stack(draws))


def sample(
    model: AutoregressiveModel,
    n: int,
    *,
    seed: int = 0,
    method: str = "cached",
    temperature: float = 1.0,
    uniforms: Tensor | None = None,
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
        uniforms: the noise, (n c h w) in [0, 1), instead of numbers from `seed`.
        known: (x (n c h w), mask (n c h w)); sub-pixels where the mask is true are kept, the others drawn.
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
    if uniforms is not None and tuple(uniforms.shape) != (n, *model.shape):
        raise ValueError(f"uniforms are {tuple(uniforms.shape)}: {(n, *model.shape)} is allowed")
    if uniforms is not None and not ((uniforms >= 0) & (uniforms < 1)).all():
        raise ValueError(f"uniforms reach from {uniforms.min()} to {uniforms.max()}: [0, 1) is allowed")
    if known is not None:
        x, mask = known
        if len(x) != n or mask.shape != x.shape:
            raise ValueError(
                f"known images are {tuple(x.shape)}, their mask {tuple(mask.shape)}: {n} of each are needed"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"the mask of known sub-pixels is {mask.dtype}: torch.bool is allowed")
        model.check(x)
    device, out = model.stem.weight.device, []
    for start in range(0, n, batch_size):
        images = range(start, min(start + batch_size, n))
        part = slice(images.start, images.stop)
        numbers = noise(seed, images, model.shape) if uniforms is None else uniforms[part]
        rule = Draw(numbers.to(device), temperature)
        if known is not None:
            rule = Keep(x[part].to(device), mask[part].to(device), rule)
        drawn = pixel_loop(model, method, rule, len(images), partial(tell, len(images)))
        out.append(drawn.to("cpu", torch.uint8 if model.levels <= 256 else torch.int64))
    return torch.cat(out)
