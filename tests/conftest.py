import sys

import pytest

from conf import command
from tests.commands import COMMANDS


@pytest.fixture
def call(monkeypatch, tmp_path, capsys):
    """call("train", *arguments) → (exit status, stdout, stderr), in an empty folder of its own."""
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
