"""How fast it is: `python -m bench.sampling` and `python -m bench.training`, in the repository's root."""

from contextlib import suppress

with suppress(ImportError):  # before `kernels.jit`, which without a GPU would do without it
    import triton  # noqa: F401
