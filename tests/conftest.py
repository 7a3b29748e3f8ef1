import os
import sys

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter; it is asked for before Triton is first imported.
# With one, cuBLAS repeats its sums only if it is told so before its first product.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def count_loops_with_numpy_2_4() -> None:
    """Triton 3.6's interpreter counts loops by int(array of one number), which numpy 2.4 refuses."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


count_loops_with_numpy_2_4()


def prepare_the_language_once() -> None:
    """Triton's interpreter goes through its whole language at each call of a function, at half of a kernel's time.

    All that this changes is there from the first call on.
    """
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    prepare = interpreter._patch_lang

    def prepared(function):
        seen = [x for x in function.__globals__.values() if x is tl or x is tl.core]
        if not seen or any(tl.core.is_builtin(module.load) for module in seen):
            return prepare(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = prepared


prepare_the_language_once()


def pytest_collection_modifyitems(items) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch finds no GPU here"))


@pytest.fixture
def no_hazards():
    """In Triton's interpreter, a launch with a race or an access out of bounds fails the test: see `tests.races`."""
    from kernels.jit import triton
    from tests.races import watched

    if torch.cuda.is_available() or triton is None:
        yield
        return

    with watched(strict=True):
        yield


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call("train", *arguments) → (exit status, stdout, stderr), in an empty folder of its own."""
    from hydra._internal.hydra import Hydra

    from cli import command
    from tests.commands import COMMANDS

    # Hydra composes every config twice, first only to look for hydra.mode in it: half of a short command's time.
    monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)

    def call(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        status = 0
        try:
            command.run(name, *COMMANDS[name])
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def compiled_for(monkeypatch):
    """compiled_for(name) → from then on, rows on a CPU are compiled for one of `kernels.native.CPUS`."""
    from kernels import native

    def compiled_for(name: str) -> None:
        monkeypatch.setenv("PIXELRNN_CPU", name)
        try:
            native.cpu()
        except ValueError:
            pytest.skip(f"this machine is no {name}")

    return compiled_for
