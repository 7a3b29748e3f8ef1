"""Sampling: draw images, complete them, or score them, pixel by pixel.

Legend: b batch · n images · c channel · h w rows, columns · v levels · d features of the condition.

`loop` visits the pixels; `cached` and `naive` compute the logits at one, `rules` choose its value, from `noise`. Two
modules do the same as `cached` with whole rows: `triton_row` on a GPU, `cpu_row` on a CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from checks import check, check_one_of, unexpected
from kernels.jit import multiprocessors
from models.base import NO_LABEL, ImageModel, as_written
from models.sampling.cpu_maps import compiled
from models.sampling.loop import METHODS, PixelLoop, backend_of_rows
from models.sampling.noise import noise
from models.sampling.rules import Draw, Given, Guided, Keep, Record, Rule

__all__ = ["Draw", "Given", "Keep", "PixelLoop", "Record", "Rule", "batches", "check_arguments", "noise", "sample"]


def sample(model: ImageModel, n: int, **arguments) -> Tensor:
    """Draw n images (n c h w), on the CPU: those that `batches` yields with the same arguments, all at once."""
    return torch.cat(list(batches(model, n, **arguments)))


def batch_size_for(model: ImageModel) -> int:
    """The number of images drawn side by side by default: enough to keep a device busy, in part of its memory."""
    images, memory = 256, 2**30
    if model.device.type == "cuda":  # two programs of 32 images a multiprocessor, in a quarter of its memory
        images = 64 * multiprocessors(model.device)
        memory = torch.cuda.get_device_properties(model.device).total_memory // 4
    kept = max(16 * 4 * net.body.layers * net.body.hidden * net.width for net in model.nets)  # bytes an image, about
    return max(1, min(images, memory // kept))


def batches(
    model: ImageModel,
    n: int,
    *,
    seed: int = 0,
    method: str = "cached",
    backend: str | None = None,
    bf16: bool = False,
    temperature: float = 1.0,
    guidance: float = 1.0,
    label: int | Sequence[int] | Tensor | None = None,
    cond: Tensor | None = None,
    uniforms: Tensor | list[Tensor] | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    images: Sequence[int] | None = None,
    batch_size: int | None = None,
    tell: Callable[[int], None] = lambda rows: None,
) -> Iterator[Tensor]:
    """Draw n images, a batch at a time.

    Args:
        model: any model of `models`; it is used in eval mode and left in the mode it was in.
        seed: image k depends only on seed and k. With rows by "cpu" it is the same bits for any `batch_size`, number of
            threads and CPU. Else that is but for rounding, and so it is from one backend to another: a product's last
            bits may differ, and so may a value, once in 0.2 to 0.4 million sub-pixels in the runs measured.
        method: "cached" computes every activation once; "naive" runs the network again for each sub-pixel.
        backend: who computes the cached sampler's rows, "triton", "torch" or "cpu", which is compiled; None: as
            `kernels.use` says, else "triton" on an NVIDIA GPU and "cpu" on a CPU, but "torch" for float64.
        bf16: weights and activations in bfloat16; sums, cells and logits stay float32. For GPUs. Conditionals move a
            little, by less than 0.02 in total variation on average in the tests, and some pixels with them.
        temperature: logits are divided by it; 0 takes the likeliest value.
        guidance: above 1, images more like their label than the model's own, and less varied; for a model with
            label_dropout, at twice the work. See `rules.Guided`.
        label: for a model with classes, (n,) integers, or one for all; with label_dropout, NO_LABEL or None is none.
        cond: for a model with map_features, maps (n d h w).
        uniforms: the noise, (n c h w) in [0, 1), instead of numbers from `seed`; for Multi-Scale, a list of one such
            tensor for each of `model.nets`.
        known: (x (n c h w), mask (n c h w)); sub-pixels where the mask is true are kept, the others drawn. Only those
            before a sub-pixel in the order of drawing are evidence for it.
        images: which n of a seed's images to draw, numbers from 0; None: the first n. Image k depends on the seed and
            k, not on what is drawn beside it: `label`, `cond`, `uniforms` and `known` are of these n, in their order.
        batch_size: how many images are drawn side by side; memory grows with it, not with n. None: `batch_size_for`.
        tell: called after each finished row of a batch with how many rows of images that were.

    Yields:
        (batch_size c h w) uint8, or int64 where the model has more than 256 levels, on the CPU.

    Raises:
        ValueError: for an argument outside what is allowed.
    """
    batch_size = batch_size_for(model) if batch_size is None else batch_size
    check("n", n, int, 1)
    check_arguments(seed, method, backend, bf16, temperature, batch_size, guidance)
    label = torch.full((n,), label) if isinstance(label, int) else label
    if isinstance(label, list | tuple) and all(type(k) is int for k in label):
        label = torch.tensor(label)
    model.check_condition(n, label, cond)
    check_guidance(model, guidance, label)
    if uniforms is not None:
        uniforms = [uniforms] if isinstance(uniforms, Tensor) else uniforms
        check_uniforms(uniforms, [(n, *net.shape) for net in model.nets])
    if known is not None:
        check_known(model, n, *known)
    images = range(n) if images is None else images
    if len(images) != n or any(not isinstance(k, int) or k < 0 for k in images):
        raise unexpected("images", images, f"n={n} integers of at least 0")
    model = deepcopy(model).bfloat16() if bf16 else model
    loops: dict[tuple[ImageModel, int], PixelLoop] = {}

    def part(x: Tensor | None, batch: slice) -> Tensor | None:
        return None if x is None else x[batch].to(model.device)

    def numbers_of(batch: slice) -> list[Tensor]:
        if uniforms is not None:
            return [x[batch] for x in uniforms]
        return [noise(seed, images[batch], net.shape, k, model.device) for k, net in enumerate(model.nets)]

    slices = [slice(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    following = numbers_of(slices[0])
    for batch, after in zip(slices, [*slices[1:], None], strict=True):
        drawn, numbers, b = [], following, batch.stop - batch.start
        given = model.labels_for(b, part(label, batch)), part(cond, batch)
        visited, told = b, partial(tell, b)
        if guidance != 1:
            visited, given = 2 * b, with_and_without(*given)
        for k, net in enumerate(model.nets):
            rule: Rule = Draw(numbers[k].to(model.device), temperature)
            by_cpu = method == "cached" and backend_of_rows(net, rule, backend) == "cpu"
            with torch.no_grad():
                stage = model.stage(k, visited, drawn, *given, compiled if by_cpu else as_written)
            if known is not None:
                rule = Keep(*(model.of_stage(k, part(tensor, batch)) for tensor in known), rule)
            if stage.known is not None:
                rule = Keep(stage.x[:b], stage.known[:b], rule)
            if guidance != 1:
                rule = Guided(rule, b, guidance)
            if (net, b) in loops:
                drawn.append(loops[net, b].again(rule, stage.condition, told))
            else:
                loops[net, b] = PixelLoop(net, method, rule, visited, stage.condition, backend)
                drawn.append(loops[net, b].run(told))
        if after is not None:  # while a GPU still draws
            following = numbers_of(after)
        yield model.joined(drawn)[:b].to("cpu", torch.uint8 if model.levels <= 256 else torch.int64)


def with_and_without(label: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Labels (b,) and maps (b d h w) of images that `Guided` visits: (2b,) and (2b d h w)."""
    return torch.cat([label, torch.full_like(label, NO_LABEL)]), None if cond is None else torch.cat([cond, cond])


def check_arguments(
    seed: int,
    method: str,
    backend: str | None,
    bf16: bool,
    temperature: float,
    batch_size: int | None,
    guidance: float = 1.0,
) -> None:
    """Raise ValueError unless `batches` takes these arguments."""
    check("seed", seed, int, 0, 2**64 - 1)
    check_one_of("method", method, METHODS)
    if backend is not None and method == "naive":
        raise unexpected("backend", backend, "None with method='naive', which computes no rows")
    check("bf16", bf16, bool, False)
    check("temperature", temperature, float, 0)
    check("guidance", guidance, float, 0)
    if batch_size is not None:
        check("batch_size", batch_size, int, 1)


def check_guidance(model: ImageModel, guidance: float, label: Tensor | None) -> None:
    """Raise ValueError unless images of these labels can be drawn with this guidance."""
    if guidance != 1 and not model.label_dropout:
        raise unexpected("guidance", guidance, "1, as the model was trained without label_dropout")
    if guidance != 1 and label is None:
        raise unexpected("guidance", guidance, "1 without labels")


def check_uniforms(uniforms: list[Tensor], shapes: list[tuple[int, ...]]) -> None:
    """Raise ValueError unless these are uniform numbers of these shapes."""
    given = [tuple(numbers.shape) for numbers in uniforms]
    if given != shapes:
        raise ValueError(f"uniforms: expected {', '.join(map(str, shapes))}, found {', '.join(map(str, given))}")
    for numbers in uniforms:
        if not ((numbers >= 0) & (numbers < 1)).all():
            raise ValueError(f"uniforms: expected [0, 1), found numbers from {numbers.min()} to {numbers.max()}")


def check_known(model: ImageModel, n: int, x: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless x and mask are n images of the model and which of their sub-pixels are known."""
    if len(x) != n or mask.shape != x.shape:
        found = f"{tuple(x.shape)} and {tuple(mask.shape)}"
        raise ValueError(f"known: expected {n} images and a mask of their shape, found {found}")
    if mask.dtype != torch.bool:
        raise ValueError(f"known: expected a mask of torch.bool, found {mask.dtype}")
    model.check(x)
