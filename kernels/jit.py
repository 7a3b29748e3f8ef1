"""Triton, or where it is not installed (it is for Linux alone) what lets the kernels' files be read without it."""

from types import SimpleNamespace

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=None)

    def jit(kernel):
        return kernel


__all__ = ["cdiv", "jit", "next_power_of_2", "tl", "triton"]


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is n or more."""
    return 1 << (n - 1).bit_length()


def cdiv(n: int, size: int) -> int:
    """How many parts of `size` hold n."""
    return -(-n // size)
