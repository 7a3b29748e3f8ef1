"""Imports run one way: kernels ← models ← cli ← commands, with data beside the models."""

import ast
from pathlib import Path

import pytest

from tests.commands import COMMANDS, REPOSITORY


def imported(path: Path) -> set[str]:
    """The top-level packages and modules that a file imports, anywhere in it."""
    nodes = [*ast.walk(ast.parse(path.read_text()))]
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("files", "forbidden"),
    [
        ("kernels/*.py", {"models", "data", "cli", "conf", *COMMANDS}),
        ("models/**/*.py", {"data", "cli", "conf", *COMMANDS}),
        ("data/*.py", {"kernels", "models", "cli", "conf", *COMMANDS}),
        ("cli/*.py", {*COMMANDS}),
        *((f"{name}.py", {*COMMANDS} - {name}) for name in COMMANDS),
        ("checks.py", {"kernels", "models", "data", "cli", "conf", "files"}),
        ("files.py", {"kernels", "models", "data", "cli", "conf", "checks"}),
        ("cli/[mop]*.py", {"hydra", "omegaconf", "conf"}),  # machine, output, progress: bench/ has no Hydra everywhere
    ],
)
def test_imports_run_one_way(files, forbidden):
    paths = [*REPOSITORY.glob(files)]
    assert paths and not {(path.name, name) for path in paths for name in imported(path) & forbidden}


def test_few_files_of_the_models_know_the_layout_of_a_row_kernel():
    texts = {path.name: path.read_text() for path in (REPOSITORY / "models").rglob("*.py")}
    imports = {name for name, text in texts.items() if "from kernels.draw_row" in text or "import draw_row" in text}
    knowing = {name for name, text in texts.items() if "draw_row" in text}
    assert imports == {"triton_row.py", "cpu_row.py", "cpu_maps.py"} and knowing <= imports | {
        "rules.py"
    }  # a docstring names it
    assert "draw_row_cpu" not in texts["triton_row.py"]
    assert "DrawRow" not in texts["cpu_row.py"] and "draw_row_kernel" not in texts["cpu_row.py"]


def test_conf_holds_no_program_but_the_schema():
    assert [path.name for path in (REPOSITORY / "conf").rglob("*.py")] == ["schema.py"]
