"""Sampling, completion and scoring: one pixel loop, with rules that choose each value.

Legend: b batch · n images · c channel · h w rows, columns · v levels · g group · i j a row, a column.

The loop visits sub-pixels in raster order, red before green before blue. At each it asks an evaluator for the logits
(b v) and hands them to a rule, which answers with values (b,). Two evaluators have the same calls: `RowScan` computes
every activation once, `FullForward` re-runs the network for each sub-pixel. Noise is injected: one uniform number a
sub-pixel, so that both draw the same images from the same numbers.

What depends on the number of the row is loaded before it and stored after it. In between, rule and row scan read and
write static memory alone (`tests/test_one_row.py`), and do the same in every row but the first: on a GPU one row is
captured as a CUDA graph, and replayed for the others.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial

import numpy as np
import torch
from torch import Tensor

from checks import check, check_one_of, unexpected
from kernels.draw_row import Choice, DrawRow
from kernels.jit import triton
from models.aligned import aligned
from models.base import AutoregressiveModel, ImageModel
from models.layers import Buffers, MaskedConvScan, state_dtype
from models.rules import Draw, Keep, Rule


class RowScan:
    """Logits from cached activations: rows above are finished, so a sub-pixel costs one step along the row."""

    def __init__(
        self, model: AutoregressiveModel, b: int, condition: Tensor | None = None, images_last: bool | None = None
    ):
        images_last = model.device.type == "cpu" if images_last is None else images_last
        buffers = Buffers(b, model.stem.weight, images_last)
        self.scaled = model.scale(torch.arange(model.levels, device=model.device))
        self.head = model.head.scan(buffers)
        self.condition, columns = condition, model.width + model.stem.extra
        self.outside = range(model.width, columns)
        self.body = model.body.scan(buffers, columns, condition)
        self.stem = MaskedConvScan(model.stem, buffers, columns, self.body.inputs, self.body.vertical)

    def load(self, i: int) -> None:
        self.body.load(i, self.condition)

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        self.begin_row(first)
        visit(self, rule, values)

    def begin_row(self, first: bool) -> None:
        """What the rows above give to all pixels of the row in hand."""
        if not first:  # the row above has no pixels in the extra columns, but features
            for j in self.outside:
                for g in range(self.stem.groups):
                    self.stem.step(j, g)
                    self.body.step(j, g)
        self.begin_above(first)

    def begin_above(self, first: bool) -> None:
        self.stem.begin_row(first)
        self.body.begin_row(first)

    def logits(self, j: int, c: int) -> Tensor:
        if c < self.stem.groups:  # one group: all colours of a pixel come from one step
            self.stem.step(j, c)
            self.head.step(self.body.step(j, c), c)
        return self.head.logits(c)

    def put(self, j: int, c: int, values: Tensor) -> None:
        torch.index_select(self.scaled, 0, values, out=self.stem.slots[j][c])
        self.head.put(c, values)


class RowKernel(RowScan):
    """The row scan with all pixels of a row in one launch of a Triton kernel, which asks the rule for nothing."""

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None, rule: Rule, values: Tensor):
        model = aligned(model)
        super().__init__(model, b, condition, images_last=False)
        network = self.stem.packed(), self.body.packed(), model.head.packed()
        join = model.body.residual, model.body.skip
        self.program = DrawRow(*network, *join, Choice(**rule.choice()), values, model.levels)

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        self.begin_above(first)
        self.program.run()


class FullForward:
    """Logits from the whole network, run anew for each sub-pixel: what the row scan is compared with."""

    def __init__(self, model: AutoregressiveModel, b: int, condition: Tensor | None = None):
        self.model, self.condition = model, condition
        self.x = torch.zeros(b, *model.shape, dtype=torch.long, device=model.device)

    def load(self, i: int) -> None:
        self.i = i
        if i == 0:
            self.x.zero_()

    def row(self, rule: Rule, values: Tensor, first: bool) -> None:
        visit(self, rule, values)

    def logits(self, j: int, c: int) -> Tensor:
        parameters = self.model.parameters_at(self.x, self.condition)[:, self.i, j]
        parameters = parameters.to(state_dtype(parameters))
        return self.model.head.logits(parameters, self.x[:, :, self.i, j])[:, c]

    def put(self, j: int, c: int, values: Tensor) -> None:
        self.x[:, c, self.i, j] = values


def visit(evaluator: RowScan | FullForward, rule: Rule, values: Tensor) -> None:
    """Choose the values (b c w) of a row: sub-pixel after sub-pixel, each known to those after it."""
    for j in range(values.shape[2]):
        for g in range(values.shape[1]):
            value = rule(j, g, evaluator.logits(j, g))
            evaluator.put(j, g, value)
            values[:, g, j] = value


METHODS = ("cached", "cached-eager", "cached-graph", "cached-triton", "naive")


def method_for(model: AutoregressiveModel, method: str) -> str:
    """The method by its own name: "cached" is the quickest for the model's device.

    Raises:
        ValueError: there is no such method, or not on this device.
    """
    check_one_of("method", method, METHODS)
    cuda = model.device.type == "cuda"
    if method == "cached":
        return "cached-graph" if cuda else "cached-eager"
    if method == "cached-graph" and not cuda:
        raise ValueError(f"method={method!r} is not allowed on {model.device.type}: it is for cuda")
    if method == "cached-triton" and not (triton and (cuda or triton.knobs.runtime.interpret)):
        needed = "it is for cuda, or Triton's interpreter (TRITON_INTERPRET=1)" if triton else "Triton is not installed"
        raise ValueError(f"method={method!r} is not allowed on {model.device.type}: {needed}")
    return method


def exact_convolutions():
    """Convolutions of float32 in float32: cuDNN rounds their inputs to 10 bits otherwise, and pixels would differ."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@contextmanager
def threads_for(model: AutoregressiveModel, method: str, b: int) -> Iterator[None]:
    """One thread where the products of a row scan are small: sharing them costs more than it saves.

    It costs most where another program keeps a core busy: each of some thousand products then waits for it.
    """
    largest = b * max(parameter.numel() for parameter in model.body.parameters())  # multiply-adds of one product
    before = torch.get_num_threads()
    if method == "cached-eager" and largest < 5 * 2**18:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PixelLoop:
    """Visits all sub-pixels of b images in order, one batch after another.

    Buffers and packed weights are made once. So are a GPU's two CUDA graphs: the first row of an image, and any other.

    Args:
        method: "naive" (the whole network for each sub-pixel), "cached-eager" (the row scan, operation by operation),
            "cached-graph" (the row scan, one row a CUDA graph), "cached-triton" (and all pixels of a row one kernel),
            or "cached" (the quickest for the device).
        rule: what chooses the values.
        condition: what `model.condition` made, where the model is conditioned on something.
    """

    def __init__(self, model: AutoregressiveModel, method: str, rule: Rule, b: int, condition: Tensor | None = None):
        self.model, self.method, self.rule, self.b = model, method_for(model, method), rule, b
        self.capture = model.device.type == "cuda" and self.method in ("cached-graph", "cached-triton")
        self.rows: dict[bool, Callable[[], None]] = {}  # the first row, and any other
        self.stream = torch.cuda.Stream(model.device) if self.capture else None
        with self.drawing():
            self.values = torch.zeros(b, model.channels, model.width, dtype=torch.long, device=model.device)
            if self.method == "cached-triton":
                self.evaluator = RowKernel(model, b, condition, rule, self.values)
            else:
                self.evaluator = (FullForward if self.method == "naive" else RowScan)(model, b, condition)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """In eval mode on the model's device; the model's mode and the current device are afterwards what they were."""
        in_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        threads = threads_for(self.model, self.method, self.b)
        try:
            with torch.inference_mode(), exact_convolutions(), threads, on(self.model.device), in_turn(self.stream):
                yield
        finally:
            for module in in_training:
                module.training = True

    def row(self, first: bool) -> None:
        """Do the row that was loaded.

        Where rows are captured, each kind of row runs as it is the first time, on the stream that captures it:
        libraries allocate, load kernels and choose at their first call, which no graph can hold.
        """
        if first not in self.rows:
            self.rows[first] = partial(self.evaluator.row, self.rule, self.values, first)
        elif self.capture and isinstance(self.rows[first], partial):
            self.rows[first] = captured(self.rows[first], self.stream)
        self.rows[first]()

    def run(self, tell: Callable[[], None] = lambda: None) -> Tensor:
        """What the rule chooses (b c h w) int64; `tell` is called after each row."""
        x = torch.empty(self.b, *self.model.shape, dtype=torch.long, device=self.model.device)
        with self.drawing():
            for i in range(self.model.height):
                self.evaluator.load(i)
                self.rule.load(i)
                self.row(first=i == 0)
                self.rule.store(i)
                x[:, :, i] = self.values
                tell()
        return x

    def again(self, rule: Rule, condition: Tensor | None, tell: Callable[[], None] = lambda: None) -> Tensor:
        """`run` with another rule and condition of the same kinds."""
        self.rule.renew(rule)
        self.evaluator.condition = condition
        return self.run(tell)


def on(device: torch.device):
    """Where `device` is the current one: Triton's launches and CUDA graphs go to that, not to where tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def in_turn(stream: "torch.cuda.Stream | None") -> Iterator[None]:
    """On another stream, if there is one, after all that the current one has to do; that waits for it afterwards."""
    if stream is None:
        yield
        return
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def captured(run: Callable[[], None], stream: "torch.cuda.Stream") -> Callable[[], None]:
    """What replays `run` as a CUDA graph: it reads and writes the same memory each time, and asks the host nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


def noise(seed: int, images: Iterable[int], shape: tuple[int, int, int], stage: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) for images of `shape` (c h w): (n c h w) float32.

    Those of image k depend on `seed`, k and `stage` alone: a counter-based generator has the pair as its key, and each
    stage of a model that draws in several has a stretch of its counter for itself.
    """

    def draw(k: int) -> np.ndarray:
        bits = np.random.Philox(key=np.array([seed, k], dtype=np.uint64), counter=[0, 0, 0, stage])
        return np.random.Generator(bits).random(shape, dtype=np.float32)

    return torch.from_numpy(np.stack([draw(k) for k in images]))


def sample(model: ImageModel, n: int, **arguments) -> Tensor:
    """Draw n images (n c h w), on the CPU: what `batches` yields of the same arguments, all at once."""
    return torch.cat(list(batches(model, n, **arguments)))


def batch_size_for(model: ImageModel) -> int:
    """How many images are drawn side by side where nothing is said: what keeps a device busy, in part of its memory."""
    images, memory = (2048, 2**34) if model.device.type == "cuda" else (256, 2**30)
    kept = max(16 * 4 * net.body.layers * net.body.hidden * net.width for net in model.nets)  # bytes an image, about
    return max(1, min(images, memory // kept))


def batches(
    model: ImageModel,
    n: int,
    *,
    seed: int = 0,
    method: str = "cached",
    bf16: bool = False,
    temperature: float = 1.0,
    label: int | Tensor | None = None,
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
        seed: image k depends on seed and k alone, not on `batch_size` (but for rounding: a product's last bits may
            depend on the batch, and so may, once in some million sub-pixels, a value).
        method: "cached" computes every activation once; "naive" re-runs the network for each sub-pixel.
        bf16: weights and activations in bfloat16; sums, cells and logits stay float32. For GPUs. Conditionals move a
            little, by less than 0.02 in total variation on average in the tests, and some pixels with them.
        temperature: logits are divided by it; 0 takes the likeliest value.
        label: for a model with classes, (n,) integers, or one for all.
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
    check("seed", seed, int, 0, 2**64 - 1)
    check("temperature", temperature, float, 0)
    check("batch_size", batch_size, int, 1)
    check("bf16", bf16, bool, False)
    method = method_for(model.nets[0], method)
    if bf16 and method == "cached-triton" and model.device.type != "cuda":
        raise unexpected("bf16", bf16, "false with method='cached-triton' in Triton's interpreter, which has none")
    label = torch.full((n,), label) if isinstance(label, int) else label
    model.check_condition(n, label, cond)
    if uniforms is not None:
        uniforms = [uniforms] if isinstance(uniforms, Tensor) else uniforms
        check_uniforms(uniforms, [(n, *net.shape) for net in model.nets])
    if known is not None:
        check_known(model, n, *known)
    images = range(n) if images is None else images
    if len(images) != n or any(not isinstance(k, int) or k < 0 for k in images):
        raise unexpected("images", images, f"n={n} integers of at least 0")
    model = deepcopy(model).bfloat16() if bf16 else model
    loops: dict[tuple[int, int], PixelLoop] = {}

    def part(x: Tensor | None, batch: slice) -> Tensor | None:
        return None if x is None else x[batch].to(model.device)

    def numbers_of(batch: slice) -> list[Tensor]:
        if uniforms is not None:
            return [x[batch] for x in uniforms]
        return [noise(seed, images[batch], net.shape, k) for k, net in enumerate(model.nets)]

    slices = [slice(start, min(start + batch_size, n)) for start in range(0, n, batch_size)]
    following = numbers_of(slices[0])
    for batch, after in zip(slices, [*slices[1:], None], strict=True):
        x, numbers, given = None, following, (part(label, batch), part(cond, batch))
        for k, net in enumerate(model.nets):
            rule = Draw(numbers[k].to(model.device), temperature)
            with torch.no_grad():
                stage = model.stage(k, x, *given)
            if known is not None:
                step = model.height // net.height
                rule = Keep(*(part(tensor, batch)[:, :, ::step, ::step] for tensor in known), rule)
            if stage.known is not None:
                rule = Keep(stage.x, stage.known, rule)
            b, told = len(numbers[k]), partial(tell, len(numbers[k]))
            if (k, b) in loops:
                x = loops[k, b].again(rule, stage.condition, told)
            else:
                loops[k, b] = PixelLoop(net, method, rule, b, stage.condition)
                x = loops[k, b].run(told)
        if after is not None:  # while a GPU still draws
            following = numbers_of(after)
        yield x.to("cpu", torch.uint8 if model.levels <= 256 else torch.int64)


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
