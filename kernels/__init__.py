"""Operations that the models call; each is a plain function of tensors, documented in its own file.

Each has two forms: Triton kernels, for NVIDIA's GPUs, and torch, for everything else; the LSTMs have a third, compiled
for CPUs. `backend_for` chooses, and `with kernels.use("torch"):` chooses for every operation within.

The cached sampler's rows are no operation of tensors, but have kernels here too: `draw_row` for GPUs, `draw_row_cpu`
for CPUs. What is compiled for CPUs is written in `vector`, and compiled by `native`.
"""

from kernels.backend import BACKENDS, backend_for, in_use, use
from kernels.cross_entropy import cross_entropy
from kernels.diagonal_lstm import diagonal_lstm
from kernels.gate import gate
from kernels.masked_conv import masked_conv
from kernels.row_lstm import row_lstm

__all__ = [
    "BACKENDS",
    "backend_for",
    "cross_entropy",
    "diagonal_lstm",
    "gate",
    "in_use",
    "masked_conv",
    "row_lstm",
    "use",
]
