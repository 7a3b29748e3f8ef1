"""Operations that the models call; each is a plain function of tensors, documented in its own file."""

from kernels.diagonal_lstm import diagonal_lstm

__all__ = ["diagonal_lstm"]
