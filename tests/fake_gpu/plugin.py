"""Tests on the fake GPU: `python -m pytest -p tests.fake_gpu.plugin --assert=plain tests/test_gpu.py`.

Numbers mean nothing there. So the tests' own assertions are left out, and comparisons find everything equal: every test
runs to its end, past what would have failed. What fails is code that a GPU's driver, Triton or torch would not have
taken.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

import torch

from tests.fake_gpu import fake_cuda

TESTS = Path(__file__).parent.parent


class WithoutAssertions(SourceFileLoader):
    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=1)


class Finder(MetaPathFinder):
    """Finds the modules of tests."""

    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path, target)
        if spec and spec.origin and Path(spec.origin).is_relative_to(TESTS) and spec.origin.endswith(".py"):
            spec.loader = WithoutAssertions(name, spec.origin)
            return spec
        return None


def pytest_configure(config) -> None:
    sys.meta_path.insert(0, Finder())
    torch.equal = lambda *_: True
    torch.testing.assert_close = lambda *_, **__: None


fake_cuda.install()
