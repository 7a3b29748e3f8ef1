"""The activations that kernels share, as functions of the Triton language."""

from kernels.jit import jit, tl


@jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def tanh(x):
    """Saturates at ±1 instead of overflowing."""
    return 2 * sigmoid(2 * x) - 1
