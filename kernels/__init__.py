"""Operations that the models call; each is a plain function of tensors, documented in its own file."""

from kernels.diagonal_lstm import diagonal_lstm
from kernels.gate import gate
from kernels.masked_conv import masked_conv
from kernels.row_lstm import row_lstm

__all__ = ["diagonal_lstm", "gate", "masked_conv", "row_lstm"]
