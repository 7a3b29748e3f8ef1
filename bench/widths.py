"""Every launch that a hidden width makes: what a check of the kernels compiles, so that no width is left out.

    with StandIn("sm_90") as gpu:
        launch_every_width(range(1, 513))
        launch_row_kernels([16, 128, 512])
    rows = compile_all(gpu.variants, ["sm_90"])

The operations run on the meta device, where tensors have shapes and no memory: only the launches cost time. Most widths
launch what another one did, as far as Triton can tell; such launches are left out before Triton sees them.

Legend: b batch · c channel · h w rows, columns · f = hidden features · v levels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from unittest import mock

import torch

import models
from kernels.cross_entropy import cross_entropy_backward_op, cross_entropy_op
from kernels.gate import gate_backward_op, gate_op
from kernels.jit import triton
from kernels.lstm_scan import lstm_scan_backward_op, lstm_scan_op
from kernels.masked_conv import input_gradient_op, masked_conv_op, weight_gradient_op
from models.rules import Draw, Keep, Record
from models.sampling import RowKernel

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
ROW_FORMS = (16, 16384)  # images: few, and more than the multiprocessors have programs for


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run(operation, *arguments):
    """What an operation computes, without torch's dispatcher: for the meta device that would launch nothing."""
    return operation._init_fn(*arguments)


@contextmanager
def each_once() -> Iterator[None]:
    """Within, a launch does nothing where Triton would compile the same for it as for one before it."""
    from triton.runtime.jit import JITFunction

    seen, before, kept = set(), JITFunction.run, {}

    def what_is_compiled(parameter, x):
        if isinstance(x, torch.Tensor):
            return x.dtype, x.data_ptr() % 16
        if parameter.is_constexpr or not isinstance(x, int):
            return x
        return None if parameter.do_not_specialize else (x == 1, x % 16 == 0)

    def run(kernel, *arguments, **named):
        parameters = kept.setdefault(kernel, {p.name: p for p in kernel.params})
        named_all = dict(zip(kernel.arg_names, arguments, strict=False)) | named
        known = (what_is_compiled(parameters[n], x) if n in parameters else x for n, x in named_all.items() if n != "grid")
        key = kernel, *known
        if key not in seen:
            seen.add(key)
            before(kernel, *arguments, **named)

    with mock.patch.object(JITFunction, "run", run):
        yield


def launch_convolution(empty, rows: int, columns: int, live: int, k: int, f: int, relu: bool, of_image=False) -> None:
    """A masked convolution k → f and its gradients; the image, of which the stem's is, has none."""
    u, d_out = empty(1, 2, 2, k), empty(1, 2, 2, f)
    weight, bias = empty(f, k, rows, columns), empty(f)
    run(masked_conv_op, u, weight, bias, relu, 0, live)
    if not of_image:
        run(input_gradient_op, d_out, u, weight, relu, live)
    run(weight_gradient_op, d_out, u, weight, relu, live)


def launch_scan(empty, f: int, diagonal: bool, extent: int, form: str = "auto") -> None:
    """A scan of f features over two steps of `extent` positions, and its gradients."""
    directions, taps = (2, 2) if diagonal else (1, 3)
    sizes = 1, *((extent, 1) if diagonal else (2, extent)), directions
    weight = empty(directions, 4 * f, taps * f)
    hidden, gates, cells = run(lstm_scan_op, empty(*sizes, 4 * f), weight, diagonal, form)
    run(lstm_scan_backward_op, torch.empty_like(hidden), weight, hidden, gates, cells, diagonal, form)


def launch_every_width(widths: Iterable[int], gpu=None, dtypes=DTYPES) -> None:
    """Launch all kernels but the row kernel, forwards and backwards, as models of these widths do.

    Args:
        widths: f.
        gpu: the `StandIn` that is told what each launch is for.
    """

    def name(text: str, dtype: torch.dtype) -> None:
        if gpu is not None:
            gpu.name = f"{text}, {short(dtype)}"

    with each_once():
        for dtype in dtypes:
            empty = partial(torch.empty, dtype=dtype, device="meta")
            for f in widths:
                for title, (rows, columns, live, k, n, relu) in CONVOLUTIONS.items():
                    name(f"convolution {title}, {k * f} → {n * f}", dtype)
                    launch_convolution(empty, rows, columns, live, k * f, n * f, relu)
                for c in (1, 3):
                    name(f"convolution 7×7 mask A, {c} → {2 * f}", dtype)
                    launch_convolution(empty, 4, 7, 24 + (c > 1), c, 2 * f, False, of_image=True)
                for features in (32, 1024):
                    name(f"convolution 1×1 head, {2 * f} → {features}", dtype)
                    launch_convolution(empty, 1, 1, 1, 2 * f, features, True)
                for pixels in (1, 3, 16):
                    name(f"gate, {f} features", dtype)
                    u = empty(pixels, 2 * f)
                    run(gate_backward_op, run(gate_op, u), u)
                for diagonal in (True, False):
                    for extent in EXTENTS:
                        kind = "diagonal" if diagonal else "row"
                        name(f"{kind} scan, {extent} positions, {f} features", dtype)
                        launch_scan(empty, f, diagonal, extent)
                        for form in ("streamed", "launches"):  # of small scans: as the tests ask for them
                            if f <= 20 and extent <= 32:
                                name(f"{kind} scan, {extent} positions, {f} features, {form}", dtype)
                                launch_scan(empty, f, diagonal, extent, form)


def launch_row_kernels(widths: Iterable[int], gpu=None, dtypes=DTYPES, images=ROW_FORMS, names=MODELS) -> None:
    """Launch the row kernel as models of these widths do when they sample.

    Of each: few images and many, with a layer's skip and without; drawing alone, and all that a rule can ask for.

    Args:
        widths, gpu: as above. A width that is no multiple of 16 a group is launched as the next that is.
    """
    with each_once(), torch.device("meta"), torch.no_grad():
        for name, skip, f, mixtures, dtype in product(names, (False, True), widths, (0, 10), dtypes):
            sizes = {"channels": 3, "levels": 256, "height": 2, "width": 8, "hidden": f, "layers": 2, "skip": skip}
            head = {"head": "logistic_mixture", "mixtures": mixtures} if mixtures else {}
            model = models.build({"_target_": f"models.{name}", **sizes, "head_features": 1024, **head}).to(dtype)
            for b, everything in product(images, (False, True)):
                x, values = torch.empty(b, *model.shape), torch.empty(b, 3, 8, dtype=torch.long)
                rule = Draw(x)
                if everything:
                    rule = Record(model, Keep(x, x > 0, rule), b, conditionals=True)
                if gpu is not None:
                    what = f"{'all rules' if everything else 'draw'}{', skip' if skip else ''}"
                    head_name = "mixture" if mixtures else "softmax"
                    gpu.name = f"row kernel {name}, {f} features, {head_name}, {b} images, {what}, {short(dtype)}"
                RowKernel(model, b, None, rule, values).program.run()
