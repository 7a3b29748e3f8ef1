"""A row of images on a CPU: the operations that a network's row is a list of, and the compiled function that runs it.

Legend: tile: images side by side, one in each lane of a vector · n outputs, k inputs of a product · i j a row, a column
· b batch · c colour · h w rows, columns · d features of the condition · v levels.

Each number of the network is a vector with one lane for each image of a tile, and all that a tile needs is in one
stretch of memory, its arena. A row is a list of `Operation`s, each for one column of one layer; a `Stage` does some of
them for one column after another. `models.sampling.cpu_row` makes the list from the one description of a row. An
operation's operands stand in the arena at `at + j · step`, in vectors:

    product     out ← start + bias + weight · x, perhaps ReLU of it; a sum begins with start, then the bias, then one
                input after another, each by a fused multiply-add
    relu · add · copy · zero
    gate · lstm     as in `kernels.gate` and `kernels.lstm`, of gates one after another
    mixture …       logits of all levels from a mixture of logistics: `models.logistic_mixture`
    choose          a value from logits, as the rule says: `kernels.draw_row.Choice`

The kernel knows nothing of architectures, so one compiled function serves all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import choose_cpu_kernel as choosing
from kernels import draw_row_cpu_kernel as kernel
from kernels import native
from kernels.draw_row import Choice
from kernels.draw_row_cpu_kernel import ADDRESSES, BATCH, FIELDS, STAGE, Fields, Tile, blocks
from kernels.jit import cdiv
from kernels.vector import I64, Code, Value


class Place(NamedTuple):
    """Where vectors stand in the arena: the first one at column 0, and how far apart columns are."""

    at: int
    step: int = 0

    def __add__(self, vectors: int) -> Place:
        return Place(self.at + vectors, self.step)

    def column(self, j: int) -> Place:
        """This place at another column: column 0 is then what column j was."""
        return Place(self.at + j * self.step, self.step)


NOWHERE = Place(-1)


class Operation(NamedTuple):
    """One step of a row; `kernels.draw_row_cpu_kernel` says what each kind makes of its numbers."""

    kind: str
    out: Place
    n: int = 0
    x: Place = NOWHERE
    k: int = 0
    start: Place = NOWHERE
    weight: int = 0  # where it stands among the parameters
    bias: int = -1
    more: int = 0
    blocks: int = 0  # of a product: how many are of many outputs; the other blocks are of few


class Stage(NamedTuple):
    """Operations for `count` columns: all for one column, then all for the next, first + step, …

    Or `together`: the first operation for all columns, then the next one. They must not need what a column before made.
    """

    operations: Sequence[Operation]
    first: int = 0
    count: int = 1
    step: int = 1
    together: bool = False


ALIGNED = 16  # parameters begin at multiples of it
OF_MIXTURES = ("mixture_begin", "mixture_logits", "mixture_put")
OPERATIONS = {
    **{name: getattr(kernel, name) for name in ("product", "relu", "add", "copy", "zero", "condition", "gate", "lstm")},
    **{name: getattr(choosing, name) for name in ("choose", "put", *OF_MIXTURES)},
}


def write(code: Code) -> None:
    """Write the function `run` for a softmax: a mixture's operations take as long to compile as most others."""
    write_run(code, [name for name in OPERATIONS if name not in OF_MIXTURES])


def write_with_mixtures(code: Code) -> None:
    """Write the function `run` with all operations."""
    write_run(code, OPERATIONS)


def compiled(lanes: int, double: bool = False, mixture: bool = False) -> Callable:
    """Load the function `run` for tiles of `lanes` images, or compile it."""
    writer = write_with_mixtures if mixture else write
    return native.library(writer, {"run": 8}, lanes, double)["run"]


def compile_ahead() -> None:
    """Compile in a thread what most draws on a CPU need; where there is a GPU, do nothing."""

    def compile_now() -> None:
        with suppress(Exception):  # whoever draws meets it again, and says it
            compiled(native.lanes_of_tile(1 << 20, False))

    if not torch.cuda.is_available():
        Thread(target=compile_now).start()  # no daemon: a process that ends while LLVM compiles might crash


def write_run(code: Code, names: Iterable[str]) -> None:
    """Write the function `run`: stages of operations for one tile."""
    functions = {}
    for name in names:
        body = OPERATIONS[name]

        def operation(code: Code, *arguments: Value, body=body) -> None:
            body(code, Fields(code, arguments[0], Tile(*arguments[1:])))

        functions[name] = code.function(operation, "ppppiiiii")

    def run(code: Code, stages, count, arena, parameters, batch, image, live, i) -> None:
        with code.loop(count) as s:
            stage = code.address(stages, s * len(STAGE), I64)
            operations, number, first, times, step, columns = (code.load_integer(stage, f) for f in range(len(STAGE)))
            with code.loop(times) as time, code.loop(number) as k:
                operation = code.address(code.pointer(operations), k * len(FIELDS), I64)
                arguments = operation, arena, parameters, batch, image, live, i, first + time * step, columns
                cases = [lambda f=f: f(*arguments) for f in functions.values()]
                code.switch(code.load_integer(operation, FIELDS.index("kind")), cases)

    code.function(run, "pipppiii", name="run")


def encode(operation: Operation) -> list[int]:
    """The integers of an operation in memory."""
    o = operation
    fields = [list(OPERATIONS).index(o.kind), *o.out, o.n, o.blocks, *o.x, o.k, *o.start, o.weight, o.bias, o.more]
    assert len(fields) == len(FIELDS)
    return fields


class Parameters:
    """All parameters of a network side by side in memory, laid out for tiles of `lanes` images."""

    def __init__(self, like: Tensor, lanes: int):
        self.like, self.lanes, self.parts, self.size = like, lanes, [], 0
        self.many, self.few = blocks(*native.registers(lanes, like.dtype == torch.float64))

    def add(self, x: Tensor) -> int:
        """Take numbers in; return where they stand."""
        at, x = self.size, x.detach().to(self.like).flatten()
        self.parts.append(F.pad(x, (0, -len(x) % ALIGNED)))
        self.size += len(self.parts[-1])
        return at

    def products(self, weight: Tensor, bias: Tensor | None = None) -> list[dict[str, int]]:
        """Take a product in all layers in: weights (layers n k), biases (layers n).

        Weights are laid out in blocks of outputs (k block): as many of `many` as leave the fewest places of the last
        block of `few` empty.

        Returns:
            For each layer what says in an `Operation` where they stand.
        """
        layers, n, k = weight.shape
        whole = n // self.many if self.many > self.few else 0
        count = min(range(whole, -1, -1), key=lambda count: -(n - count * self.many) % self.few)
        room = count * self.many + cdiv(n - count * self.many, self.few) * self.few
        both = F.pad(weight.detach(), (0, 0, 0, room - n)).split([count * self.many, room - count * self.many], dim=1)
        parts = [x.unflatten(1, (-1, size)).mT.flatten(1) for x, size in zip(both, (self.many, self.few), strict=True)]
        at = self.add(torch.cat(parts, 1))
        at_bias = -1 if bias is None else self.add(F.pad(bias.detach(), (0, room - n)))
        out = []
        for layer in range(layers):
            of_bias = -1 if bias is None else at_bias + layer * room
            out.append({"n": n, "blocks": count, "k": k, "weight": at + layer * room * k, "bias": of_bias})
        return out

    def together(self) -> Tensor:
        return torch.cat(self.parts)


class Arena:
    """Lays out what a tile keeps: `take(n)` vectors, of one column or of several.

    `packed` vectors more are room for a product of packed columns.
    """

    def __init__(self, packed: int):
        self.size, self.packed = 0, packed

    def take(self, n: int, columns: int = 1) -> Place:
        at = Place(self.size, n if columns > 1 else 0)
        self.size += n * columns
        return at


class Batch(NamedTuple):
    """What b images are drawn with, and where what is recorded of them goes: tensors (b c h w), and a condition."""

    values: Tensor  # (b c h w) int64, out
    levels: int
    choice: Choice = Choice()  # of tensors (b c h w), conditionals (b c h w v)
    condition: Tensor | None = None  # (b h w d), or (b 1 1 d) where it is the same everywhere

    def in_memory(self, tiles: Tiles) -> tuple[Tensor, list[Tensor]]:
        """The integers of `BATCH`, and the tensors that they stand for, which must be kept as long."""
        choice, shape, like = self.choice, self.values.shape, tiles.parameters
        numbers, kinds = like.dtype, {"given": torch.int64, "known": torch.bool, "values": torch.int64}
        fields = {**choice._asdict(), "values": self.values, "condition": self.condition}
        fields["temperature"] = like.new_tensor([choice.temperature or 1.0])
        if choice.uniforms is not None:  # those of float64 may become 1 in float32
            fields["uniforms"] = choice.uniforms.to(numbers).clamp(max=1 - torch.finfo(numbers).eps / 2)
        shapes = {"log_prob": shape[:1], "conditionals": (*shape, self.levels), "temperature": (1,)}
        shapes["condition"] = () if self.condition is None else (shape[0], *self.condition.shape[1:])
        kept, out = [], []
        for name in ADDRESSES:
            x = fields[name]
            if x is not None:
                x = x.to(kinds.get(name, numbers)).expand(shapes.get(name, shape)).contiguous()
                in_place = name not in ("values", "log_prob", "conditionals") or x.data_ptr() == fields[name].data_ptr()
                assert in_place, f"{name} of another layout"
                kept.append(x)
            out.append(0 if x is None else x.data_ptr())
        if choice.uniforms is None:
            out.append(choosing.GIVEN)
        else:
            out.append({0.0: choosing.LIKELIEST, 1.0: choosing.DRAWN}.get(choice.temperature, choosing.TEMPERED))
        out += [*shape[2:], shape[1], self.levels, tiles.room]
        if self.condition is not None:
            _, h, w, d = self.condition.shape
            out += [d, h * w * d, w * d if h > 1 else 0]
        return torch.tensor(out + [0] * (len(BATCH) - len(out))), kept


class Tiles:
    """Runs stages for images that are drawn side by side, cut in tiles.

    Args:
        b: how many images.
        arena: what a tile keeps.
        parameters: of the network.
        mixture: whether there are operations of a mixture.
    """

    def __init__(self, b: int, arena: Arena, parameters: Parameters, mixture: bool = False):
        self.b, self.parameters = b, parameters.together()
        double = self.parameters.dtype == torch.float64
        assert (double or self.parameters.dtype == torch.float32) and self.parameters.device.type == "cpu"
        self.lanes = parameters.lanes
        self.count, self.room = cdiv(b, self.lanes), arena.size
        self.size = arena.size + arena.packed + parameters.few  # a block may read beyond the end
        self.arena = self.parameters.new_zeros(self.count, self.size, self.lanes)
        self.function, self.kept = compiled(self.lanes, double, mixture), []

    def program(self, stages: Sequence[Stage]) -> Tensor:
        """Lay stages out in memory, as integers."""
        stages = [stage for stage in stages if stage.operations and stage.count]
        out = []
        for stage in stages:
            operations = torch.from_numpy(np.array([encode(o) for o in stage.operations], dtype=np.int64))
            self.kept.append(operations)
            times = (1, 1, stage.count) if stage.together else (stage.count, stage.step, 1)
            out.append([operations.data_ptr(), len(operations), stage.first, *times])
        return torch.tensor(out, dtype=torch.int64).reshape(-1, len(STAGE))

    def run(self, program: Tensor, batch: Tensor, k: int, i: int) -> None:
        """Run a program for tile k at row i."""
        first, arena = k * self.lanes, self.arena.data_ptr() + k * self.size * self.lanes * self.arena.element_size()
        live, of_batch = min(self.lanes, self.b - first), (self.parameters.data_ptr(), batch.data_ptr())
        self.function(program.data_ptr(), len(program), arena, *of_batch, first, live, i)

    def images_of(self, place: Place, n: int) -> Tensor:
        """Vectors `place`, …, `place + n − 1` as numbers of images: (b n)."""
        return self.arena[:, place.at : place.at + n].mT.flatten(0, 1)[: self.b]
