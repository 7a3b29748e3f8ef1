"""The loop over pixels, a row at a time: one for drawing, keeping known pixels, and scoring.

Legend: b batch · c channel (colour) · h w rows, columns · v levels.

Sub-pixels are visited in raster order, red before green before blue. At each an evaluator says the logits (b v), and a
rule answers with values (b,). `Cached` computes every activation once, `Naive` runs the network again for each
sub-pixel; both draw the same images from the same noise.

What depends on the number of the row is loaded before it and stored after it. In between, rule and cached evaluator
read and write only static memory (`tests/test_one_row.py`), and do the same in every row but the first: a GPU captures
one row as a CUDA graph and replays it for the others.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

import kernels
from checks import check_one_of, unexpected
from kernels.jit import triton
from models.base import AutoregressiveModel
from models.cuda_graph import captured, in_turn, on
from models.sampling.cached import Cached
from models.sampling.cpu_row import CpuRow
from models.sampling.naive import Naive
from models.sampling.rules import Rule
from models.sampling.triton_row import TritonRow

METHODS = ("cached", "naive")


def backend_of_rows(model: AutoregressiveModel, rule: Rule, backend: str | None = None) -> str:
    """Who computes a row of the cached sampler: "torch", "triton" or "cpu", one compiled function.

    Where neither `backend` nor `kernels.use` says otherwise, float64 is torch's: on a GPU the kernel has no matrix
    instructions for it, and many small products in torch are quicker; nor has the GPU's kernel every rule.

    Raises:
        ValueError: that cannot be, on the model's device or with the rule.
    """
    asked, dtype, kind = backend or kernels.in_use(), model.stem.weight.dtype, model.device.type
    if asked:
        check_one_of("backend", asked, kernels.BACKENDS)
    if asked is None and kind == "cpu":
        return "cpu" if dtype == torch.float32 else "torch"
    if asked == "cpu":
        if kind != "cpu" or dtype not in (torch.float32, torch.float64):
            raise unexpected("backend", asked, f"torch with {dtype} on {kind}: compiled rows are for float32 on a CPU")
        return asked
    backend = kernels.backend_for(model.stem.weight, backend)
    if backend == "triton" and not asked and (rule.choice() is None or dtype == torch.float64):
        return "torch"
    if backend == "triton" and not (triton and (kind == "cuda" or triton.knobs.runtime.interpret)):
        needed = "Triton's kernels are for cuda, or its interpreter (TRITON_INTERPRET=1)"
        needed = "Triton is not installed" if kind == "cuda" else needed
        others = "torch or cpu" if kind == "cpu" else "torch"
        raise unexpected("backend", backend, f"{others} on {kind}: {needed}")
    if backend == "triton" and kind != "cuda" and dtype == torch.bfloat16:
        raise unexpected("backend", backend, "torch with bfloat16: Triton's interpreter has none")
    if backend == "triton" and rule.choice() is None:
        raise unexpected("backend", backend, f"torch with {type(rule).__name__}: the kernel has no such rule")
    return backend


def exact_convolutions():
    """Convolutions of float32 in float32: cuDNN rounds their inputs to 10 bits otherwise, and pixels would differ."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@contextmanager
def threads_for(model: AutoregressiveModel, backend: str | None, b: int) -> Iterator[None]:
    """Use one thread where the products of rows by torch are small: sharing them costs more than it saves.

    It costs most where another program keeps a core busy: each of some thousand products then waits for it.
    """
    largest = b * max(parameter.numel() for parameter in model.body.parameters())  # multiply-adds of one product
    before = torch.get_num_threads()
    if backend == "torch" and model.device.type == "cpu" and largest < 5 * 2**18:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class PixelLoop:
    """Visits all sub-pixels of b images in order, one batch after another.

    Buffers and weights are laid out once. So are a GPU's two CUDA graphs: the first row of an image, and any other.

    Args:
        method: "cached" or "naive".
        rule: chooses the values.
        condition: from `model.condition`, where the model is conditioned on something.
        backend: who computes the cached sampler's rows, "torch", "triton" or "cpu"; None: see `backend_of_rows`.
        graph: on a GPU, capture the cached sampler's rows as CUDA graphs.
    """

    def __init__(
        self,
        model: AutoregressiveModel,
        method: str,
        rule: Rule,
        b: int,
        condition: Tensor | None = None,
        backend: str | None = None,
        graph: bool = True,
    ):
        check_one_of("method", method, METHODS)
        self.model, self.method, self.rule, self.b = model, method, rule, b
        self.backend = backend_of_rows(model, rule, backend) if method == "cached" else None
        self.capture = graph and method == "cached" and model.device.type == "cuda"
        self.rows: dict[bool, Callable[[], None]] = {}  # the first row, and any other
        self.stream = torch.cuda.Stream(model.device) if self.capture else None
        with self.drawing():
            self.values = torch.zeros(b, model.channels, model.width, dtype=torch.long, device=model.device)
            if method == "naive":
                self.evaluator = Naive(model, b, condition)
            elif self.backend == "torch":
                self.evaluator = Cached(model, b, condition)
            elif self.backend == "cpu":
                self.evaluator = CpuRow(model, b, condition)
            else:
                self.evaluator = TritonRow(model, b, condition, rule, self.values)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw in eval mode on the model's device; restore each module's mode and the current device."""
        in_training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        threads = threads_for(self.model, self.backend, self.b)
        try:
            with torch.inference_mode(), exact_convolutions(), threads, on(self.model.device), in_turn(self.stream):
                yield
        finally:
            for module in in_training:
                module.training = True

    def row(self, first: bool) -> None:
        """Run the loaded row.

        Where rows are captured, the first run of each kind stays eager, on the stream that captures it later.
        """
        if first not in self.rows:
            self.rows[first] = partial(self.evaluator.row, self.rule, self.values, first)
        elif self.capture and isinstance(self.rows[first], partial):
            self.rows[first] = captured(self.rows[first], self.stream)
        self.rows[first]()

    def run(self, tell: Callable[[], None] = lambda: None) -> Tensor:
        """The values that the rule chooses (b c h w) int64; `tell` is called after each row."""
        x = torch.empty(self.b, *self.model.shape, dtype=torch.long, device=self.model.device)
        with self.drawing():
            if self.backend == "cpu" and self.rule.choice():
                self.evaluator.images(self.rule, x, tell)
                return x
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
