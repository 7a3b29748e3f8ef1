"""Every launch that a hidden width makes: what a check of the kernels compiles, so that no width is left out.

    with StandIn("sm_90") as gpu:
        launch_every_width(gpu, range(1, 513))
        launch_every_level(gpu, range(2, 1025))
        launch_row_kernels(gpu, [16, 128, 512])
    rows = compile_all(gpu.variants, ["sm_90"])

The operations run on the meta device, where tensors have shapes and no memory: only the launches cost time. Most widths
launch what another one did, as far as Triton can tell; such launches are left out before Triton sees them.

Legend: b batch · c channel · h w rows, columns · k input features · f = hidden features · v levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from unittest import mock

import torch

import models
from bench.stand_in import StandIn
from kernels.cross_entropy import cross_entropy_backward_op, cross_entropy_op
from kernels.gate import gate_backward_op, gate_op
from kernels.lstm_scan import constants, form_of, lstm_scan_backward_op, lstm_scan_op
from kernels.masked_conv import input_gradient_op, masked_conv_op, weight_gradient_op
from models.sampling.rules import Draw, Keep, Record
from models.sampling.triton_row import TritonRow

DTYPES = (torch.bfloat16, torch.float32)
EXTENTS = (1, 2, 4, 8, 16, 32, 64, 65)  # positions of a scan: each number of them that a program may hold, and more
CONVOLUTIONS = {  # name → rows, columns, live taps, inputs and outputs in widths, whether of a ReLU
    "3×3 mask A": (2, 3, 4, 1, 1, False),
    "3×3 mask B": (2, 3, 5, 1, 1, True),
    "2×3": (2, 3, 6, 1, 2, False),
    "1×1 down": (1, 1, 1, 2, 1, True),
    "1×1 up": (1, 1, 1, 1, 2, True),
    "1×3": (1, 3, 2, 1, 2, False),
}
MODELS = ("PixelCNN", "GatedPixelCNN", "RowLSTM", "DiagBiLSTM")
BATCHES = (16, 16384)  # of the row kernel: few images, and more than multiprocessors have programs for


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(operation, *arguments):
    """What an operation computes, without torch's dispatcher, which launches nothing for the meta device."""
    return operation._init_fn(*arguments)


@contextmanager
def each_once() -> Iterator[None]:
    """Within, a launch does nothing where Triton would compile the same for it as for one before it."""
    from triton.runtime.jit import JITFunction

    seen, launch = set(), JITFunction.run

    def what_is_compiled(parameter, x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16
        if parameter.is_constexpr or not isinstance(x, int):
            return x
        return None if parameter.do_not_specialize else (x == 1, x % 16 == 0)

    def run(kernel, *arguments, grid, warmup, **named):
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        known = (what_is_compiled(parameter, given.pop(parameter.name)) for parameter in kernel.params)
        key = kernel, *known, *given.items()
        if key not in seen:
            seen.add(key)
            launch(kernel, *arguments, grid=grid, warmup=warmup, **named)

    with mock.patch.object(JITFunction, "run", run):
        yield


def launch_convolution(
    empty, rows: int, columns: int, live: int, k: int, f: int, relu: bool, of_image: bool = False
) -> None:
    """A masked convolution k → f and its gradients: of an image, which the stem's is, there is none."""
    u, d_out = empty(1, 2, 2, k), empty(1, 2, 2, f)
    weight, bias = empty(f, k, rows, columns), empty(f)
    run(masked_conv_op, u, weight, bias, relu, 0, live)
    if not of_image:
        run(input_gradient_op, d_out, u, weight, relu, live)
    run(weight_gradient_op, d_out, u, weight, relu, live)


def launch_scan(empty, f: int, diagonal: bool, extent: int, form: str, seen: set) -> None:
    """A scan of f features over an image of one row, or column, of `extent` positions, and its gradients.

    Args:
        seen: scans that Triton would compile the same for. To look at each of their launches, one a step, takes long.
    """
    directions, taps, dtype = (2, 2, empty(0).dtype) if diagonal else (1, 3, empty(0).dtype)
    cuts = [form_of(f, taps, extent, dtype.itemsize, backward, form) for backward in (False, True)]
    every = [constants(cut, f, taps, directions, diagonal, torch.float32).items() for cut in cuts]
    key = dtype, f == 1, f % 16 == 0, *map(tuple, every)
    if key in seen:
        return
    seen.add(key)
    sizes = 1, *((extent, 1) if diagonal else (1, extent)), directions
    weight = empty(directions, 4 * f, taps * f)
    hidden, gates, cells = run(lstm_scan_op, empty(*sizes, 4 * f), weight, diagonal, form, False)
    run(lstm_scan_backward_op, torch.empty_like(hidden), weight, hidden, gates, cells, diagonal, form, False)


def launch_every_width(
    gpu: StandIn, widths: Iterable[int], dtypes: Iterable[torch.dtype] = DTYPES, extents: Iterable[int] = EXTENTS
) -> None:
    """Launch convolutions, gates and scans, forwards and backwards, as models of these widths do.

    Args:
        gpu: what records the launches; it is told what each is for.
        widths: f.
        extents: how many positions the images of the scans have.
    """

    def name(text: str, dtype: torch.dtype) -> None:
        gpu.name = f"{text}, {short(dtype)}"

    seen = set()
    with each_once():
        for dtype, f in product(dtypes, widths):
            empty = partial(torch.empty, dtype=dtype, device="meta")
            for title, (rows, columns, live, k, n, relu) in CONVOLUTIONS.items():
                name(f"convolution {title}, {k * f} → {n * f}", dtype)
                launch_convolution(empty, rows, columns, live, k * f, n * f, relu)
            for c in (1, 3):
                name(f"convolution 7×7 mask A, {c} → {2 * f}", dtype)
                launch_convolution(empty, 4, 7, 24 + (c > 1), c, 2 * f, False, of_image=True)
            for pixels in (1, 3, 16):
                name(f"gate, {f} features", dtype)
                u = empty(pixels, 2 * f)
                run(gate_backward_op, run(gate_op, u), u)
            for diagonal, extent in product((True, False), extents):
                small = f <= 20 and extent <= 32  # as the tests ask for them
                for form in ("auto", "streamed", "launches") if small else ("auto",):
                    kind = "diagonal" if diagonal else "row"
                    name(f"{kind} scan, {extent} positions, {f} features, {form}", dtype)
                    launch_scan(empty, f, diagonal, extent, form, seen)


def launch_every_level(gpu: StandIn, levels: Iterable[int], dtypes: Iterable[torch.dtype] = DTYPES) -> None:
    """Launch the cross-entropy of so many levels and its gradient, with targets as images hold them."""
    with each_once():
        for dtype, v in product(dtypes, levels):
            logits = torch.empty(2, v, dtype=dtype, device="meta")
            target = torch.empty(2, dtype=torch.uint8 if v <= 256 else torch.int64, device="meta")
            gpu.name = f"cross-entropy, {v} levels, {short(dtype)}"
            nats, most, log_sum = run(cross_entropy_op, logits, target)
            run(cross_entropy_backward_op, nats, logits, target, most, log_sum)


def launch_row_kernels(
    gpu: StandIn,
    widths: Iterable[int],
    dtypes: Iterable[torch.dtype] = DTYPES,
    names: Iterable[str] = MODELS,
    mixtures: Iterable[int] = (0, 10),
) -> None:
    """Launch a row as models of these widths do when they sample images of three colours.

    Of each: few images and many, layers with a skip and without; drawing alone, and all that a rule can ask for.

    Args:
        gpu: as above.
        widths: f. One that is no multiple of 16 a group is launched as the next that is.
        mixtures: components of the head; 0: a softmax.
    """
    shape = {"channels": 3, "levels": 256, "height": 2, "width": 8}
    with each_once(), torch.device("meta"), torch.no_grad():
        for name, skip, f, m, dtype in product(names, (False, True), widths, mixtures, dtypes):
            head = {"head": "logistic_mixture", "mixtures": m} if m else {}
            sizes = {**shape, "hidden": f, "layers": 2, "skip": skip, "head_features": 1024, **head}
            model = models.build({"_target_": f"models.{name}", **sizes}).to(dtype)
            for b, everything in product(BATCHES, (False, True)):
                x, values = torch.empty(b, *model.shape), torch.empty(b, 3, 8, dtype=torch.long)
                rule = Draw(x)
                if everything:
                    rule = Record(model, Keep(x, x > 0, rule), b, conditionals=True)
                what = f"{'all rules' if everything else 'draw'}{', skip' if skip else ''}"
                likelihood = "mixture" if m else "softmax"
                gpu.name = f"row kernel {name}, {f} features, {likelihood}, {b} images, {what}, {short(dtype)}"
                TritonRow(model, b, None, rule, values).row(None, None, False)
