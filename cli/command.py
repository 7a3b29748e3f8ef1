"""Run a command under Hydra: a mistake ends in one line and exit status 2, and a signal stops it between two steps."""

import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import fields
from pathlib import Path

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from checks import check_one_of, reason_of
from cli.machine import is_first, one_of_several
from conf import schema
from files import naming, write_atomically

CONF = Path(schema.__file__).resolve().parent
ROOT = CONF.parent
MISTAKES = (ValueError, OSError, HydraException, OmegaConfBaseException)


class Stopped(Exception):
    """The command was stopped on purpose, or cannot go on; the text is printed last, `status` is the exit status."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class StopSignal:
    """Note in `caught` that SIGINT or SIGTERM asks the command to save and stop; a second one ends it at once.

    Not where torchrun started the process: there a Ctrl-C arrives twice, from the terminal and from torchrun, which
    kills what has not ended after half a minute.
    """

    def __enter__(self) -> "StopSignal":
        self.caught = 0
        numbers = signal.SIGINT, signal.SIGTERM
        self.before = {number: signal.signal(number, self.catch) for number in numbers}
        return self

    def __exit__(self, *_) -> None:
        self.restore()

    def catch(self, number: int, frame) -> None:
        """Note the signal's number; the next one has the effect that it had before."""
        self.caught = number
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            self.restore()

    def restore(self) -> None:
        """Set the handlers of before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line, with its cause if it is Hydra's, without Hydra's lists of folders."""
    texts = [str(error)]
    if isinstance(error, HydraException) and error.__cause__ is not None:
        texts.append(str(error.__cause__))
    lines = []
    for text in texts:
        for line in text.splitlines():
            line = line.strip()
            if line.startswith("To append to your config"):
                line = "--help lists the keys."
            if line.startswith(("Config search path", "provider=", "full_key:", "object_type=", "Set the env")):
                continue
            lines.append(line)
    if isinstance(error, OverrideParseException):
        lines = [f"{error.override}: expected KEY=VALUE ({lines[0]})"]
    if isinstance(error, OSError) and error.strerror and error.filename:
        lines = [f"{error.filename}: {error.strerror}"]
    return " ".join(line for line in lines if line) or type(error).__name__


def run(
    name: str, main: Callable[[DictConfig], float | None], prepare: Callable[[list[str]], list[str]] = list
) -> None:
    """Compose conf/NAME.yaml with the command line, call main(cfg), and end the process.

    The exit status is 0, or 2 after a mistake of the user's (one line on stderr), or that of `Stopped`.
    HYDRA_FULL_ERROR=1 shows the traceback instead of the line.

    Args:
        name: of the command and of its config.
        main: the command; it raises one of MISTAKES for a mistake of the user's.
        prepare: maps the command line's arguments to those that Hydra sees.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    show_traceback = before == "1"

    keys = [field.name for field in fields(schema.SCHEMAS[name])]

    def task(cfg: DictConfig) -> float | None:
        try:
            for key in cfg:
                check_one_of("KEY", key, keys)
            with memory_named():
                return main(cfg)
        except Exception as error:
            folder = Path(HydraConfig.get().runtime.output_dir)
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                said = {"overrides": list(HydraConfig.get().overrides.task), "error": one_line(error)}
                write_atomically(folder / "failed.json", lambda file: file.write(json.dumps(said, indent=1).encode()))
                raise  # a sweep's other runs go on first
            if not isinstance(error, (*MISTAKES, Stopped)):
                raise
            drop_if_empty(folder)
            if show_traceback:
                raise
            leave(error)

    try:
        os.environ["HYDRA_FULL_ERROR"] = "1"  # so Hydra raises its errors and does not print them
        schema.register()
        paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        # A launcher's processes find this code by its modules' names.
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(filter(None, paths)))
        check_command_line(sys.argv[1:], keys)
        sys.argv[1:] = prepare(sys.argv[1:])
        with naming(Path.cwd()):  # what Hydra writes may be below it
            hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    except (*MISTAKES, Stopped) as error:
        if show_traceback:
            raise
        leave(error)
    except KeyboardInterrupt:
        leave(Stopped("interrupted", 130))
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def memory_named() -> Iterator[None]:
    """Say in one line that there is not enough memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise Stopped(f"error: not enough memory ({reason_of(error)})", 2) from error
        raise


def check_command_line(argv: list[str], keys: list[str]) -> None:
    """Raise ValueError for a key that is given as --KEY=VALUE or --KEY VALUE, an unknown option, and =VALUE."""
    for argument in argv:
        key, _, value = argument.lstrip("-").partition("=")
        if not key:
            raise ValueError(f"{argument}: expected KEY=VALUE")
        if argument.startswith("-") and key.replace("-", "_").split(".")[0] in keys:
            raise ValueError(f"{argument}: expected {key.replace('-', '_')}={value or 'VALUE'}, without dashes")
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            get_args_parser().parse_args(argv)
    except SystemExit:  # of argparse, after its usage of many lines
        raise ValueError(f"{said.getvalue().strip().rpartition('error: ')[2]}; --help lists what there is") from None


def drop_if_empty(folder: Path) -> None:
    """Remove the folder of a run that failed before it wrote anything."""
    if folder != Path.cwd():
        with suppress(OSError):  # it is not empty, or Hydra did not make it
            folder.rmdir()


def leave(error: BaseException) -> None:
    """Print the error's line and exit; of processes that train together the first prints, as all stop for the same.

    But a file may be missing on one machine only.
    """
    text, status = (str(error), error.status) if isinstance(error, Stopped) else (f"error: {one_line(error)}", 2)
    if not one_of_several() or is_first() or isinstance(error, OSError):
        print(text, file=sys.stderr)
    sys.exit(status)
