"""The docs do what they show: their Python blocks run, their commands with a tiny model and few steps, the notebook.

Commands are run where a block's language is sh. Where a block without a language follows a Python block at once, it is
what that prints.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from bench import compare
from tests.commands import REPOSITORY, SHORT
from tests.test_docs import DOCS, PAGES

pytestmark = pytest.mark.slow  # commands, run to their end

RUNNABLE = [page for page in PAGES if re.search("^```(python|sh)$", page.read_text(), re.MULTILINE)]
QUICK = {"train": [*SHORT, "steps=2", "evaluate_images=20"], "sample": ["n=2"], "evaluate": [], "compress": []}
PRINTED = re.compile("\n\n```\n(.*?)```", re.DOTALL)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_run(page, call, capsys, monkeypatch, tmp_path):
    def command(line: str) -> None:
        match shlex.split(line, comments=True):
            case ["python", "-m", "bench.compare", *arguments]:
                assert compare.main(arguments) == 0
            case ["python", script, *arguments]:
                name = script.removesuffix(".py")
                status, _, err = call(name, *arguments, *QUICK[name])
                assert status == 0, f"{line}\n{err}"
            case _:
                raise AssertionError(f"{line}: expected a command of the project")

    def commands(example: Example) -> None:
        for line in example.parsed.splitlines():
            command(line)

    monkeypatch.setenv("HOME", str(tmp_path))  # for converted images
    if page.name == "README.md" and page.parent == REPOSITORY:
        command("python train.py")  # its Python block loads the newest run
    document = Sybil([PythonCodeBlockParser(), CodeBlockParser("sh", commands)]).parse(page)
    for example in document.examples():
        capsys.readouterr()
        example.evaluate()
        if printed := PRINTED.match(document.text, example.end):
            assert capsys.readouterr().out == printed[1]


def test_the_notebook_runs_in_another_folder(tmp_path):
    """Its cells in a process of their own, one after the other: what Jupyter adds to this is the display of values."""
    text = (DOCS / "quickstart.ipynb").read_text()
    assert len(text) < 80_000  # its pictures are small
    code = ["".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    program = "\n".join(code).replace("steps = 300\n", "steps = 2\n")
    assert "steps = 2\n" in program
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "library"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", program]
    process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
