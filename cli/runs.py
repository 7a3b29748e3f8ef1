"""The runs below runs/: find one, and continue it; and the data that a checkpoint is of."""

import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import data
from checks import one_of, reason_of, unexpected
from cli.command import CONF, Stopped
from conf.schema import Train
from files import write_text
from models.base import ImageModel
from models.checkpoint import check_contents, find, read

PRETRAINED = CONF.parent / "pretrained"
FIRST = "digits-diag_bilstm.safetensors"  # of the pretrained ones, where nobody trained anything yet
LOCK = ".lock"  # in the folder of a run, held by the process that trains it


def find_model(name: str | None) -> Path:
    """Find what `checkpoint` means: a file, the best in a run's folder, pretrained/NAME, or null the newest run.

    Where nothing was trained yet, null is a pretrained model, and it is said.

    Raises:
        FileNotFoundError: as `models.checkpoint.find`.
    """
    if name is not None and not Path(name).exists():
        of_project = PRETRAINED / Path(name).name if Path(name).parent.name == PRETRAINED.name else Path(name)
        ends = [Path(f"{path}.safetensors") for path in (name, of_project)]
        return next((path for path in (*ends, of_project) if path.is_file()), Path(name))
    try:
        return find(name)
    except FileNotFoundError:
        if name is not None or not (PRETRAINED / FIRST).is_file():
            raise
        print("runs/: no trained model yet (`python train.py` makes one), so here is a pretrained one")
        return PRETRAINED / FIRST


def key_of(override: str) -> str:
    """Return the key of a command line argument KEY=VALUE, +KEY=VALUE or ~KEY."""
    return override.split("=")[0].lstrip("+~")


def own_overrides(overrides: list[str]) -> list[str]:
    """Return the arguments that say what a run computes, without those that give its folder or say how it began."""
    return [o for o in overrides if key_of(o) != "resume" and not key_of(o).startswith("hydra.")]


def with_arguments(overrides: list[str]) -> Iterator[tuple[Path, dict]]:
    """Yield last.pt of each run below runs/ that had these arguments, and what it holds, the newest first."""
    wanted = sorted(own_overrides(overrides))
    for path in sorted(Path("runs").rglob("last.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint = check_run(read(path), path)
        except ValueError as error:
            print(f"resume=auto passes over a run: {error}", file=sys.stderr)
            continue
        if sorted(checkpoint["overrides"]) == wanted:
            yield path, checkpoint


def newest_unfinished(overrides: list[str]) -> tuple[Path, dict] | None:
    """Return the first that `with_arguments` yields of a run that has not ended; None: there was never such a run.

    Raises:
        Stopped: all of them have ended.
    """
    ended = None
    for path, checkpoint in with_arguments(overrides):
        if not (path.parent / "summary.json").exists():
            return path, checkpoint
        ended = ended or path.parent
    if ended:
        raise Stopped(f"{ended}: this run has ended; without resume=auto a new one begins", 0)
    return None


def choices(overrides: list[str], argv: list[str]) -> list[str]:
    """Return the GROUP=NAME among a checkpoint's arguments that choose a file of conf/ and are not given again.

    Nothing else of a checkpoint reaches Hydra: its other arguments are in its config (`continued`).
    """
    given = {key_of(argument) for argument in argv}
    pairs = [override.split("=") for override in overrides if re.fullmatch(r"[a-z]+=\w+", override)]
    return [
        f"{group}={name}" for group, name in pairs if group not in given and (CONF / group / f"{name}.yaml").is_file()
    ]


def resumed(argv: list[str]) -> list[str]:
    """Turn resume=FOLDER, or resume=auto, into the arguments with which Hydra composes the run that goes on.

    auto is the newest unfinished run below runs/ that was started with these same arguments. If there is none, in a
    sweep, and with hydra.run.dir, the arguments stay as they are.

    Raises:
        Stopped: auto, and the only such runs have ended.
    """
    keys = {key_of(argument) for argument in argv}
    values = [argument.partition("=")[2].strip("'\"") for argument in argv if key_of(argument) == "resume"]
    if not values or values[-1] in ("", "null") or {"-m", "--multirun", "hydra.run.dir", "hydra.sweep.dir"} & keys:
        return argv
    if values[-1] == "auto":
        found = newest_unfinished(argv)
        if found is None:
            return argv
        path, checkpoint = found
    else:
        path = Path(values[-1]) / "last.pt"
        checkpoint = read_last(path.parent)
    quoted = str(path.parent).replace("\\", "\\\\").replace("'", "\\'")
    return [*choices(checkpoint["overrides"], argv), *argv, f"hydra.run.dir='{quoted}'"]


def named_by_what_differs(argv: list[str]) -> list[str]:
    """Add the argument that keeps what all runs of a sweep have in common out of the names of their folders."""
    if not {"-m", "--multirun"} & {*argv}:
        return argv
    parser = OverridesParser.create()
    given = [parser.parse_override(argument) for argument in argv if not argument.startswith("-")]
    common = [override.key_or_group for override in given if not override.is_sweep_override()]
    return [*argv, f"hydra.job.config.override_dirname.exclude_keys=[{','.join(dict.fromkeys(common))}]"]


def folder_name(overrides: str) -> str:
    """Turn what differs in a run of a sweep, as KEY=VALUE,…, into the end of its folder's name."""
    return "-" + re.sub(r"[^\w.=,+-]", "_", overrides)[:100] if overrides else ""


OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)


def point_to(sweep: Path) -> None:
    """Let the link runs/sweeps/latest name the folder of a sweep there, where links can be made."""
    link = sweep.parent / "latest"
    if sweep.parent.name == "sweeps" and (link.is_symlink() or not link.exists()):
        with suppress(OSError):
            new = sweep.parent / f".latest.{os.getpid()}"
            new.symlink_to(sweep.name)
            new.replace(link)


def continued(cfg: DictConfig, checkpoint: dict, arguments: list[str], path: Path) -> DictConfig:
    """Return the config with which a run goes on: the checkpoint's, changed by this command's own arguments.

    Args:
        cfg: what Hydra composed from conf/ as it is today, and the arguments.
        arguments: those that Hydra was given.
        path: of the checkpoint, for the text of an error.

    Raises:
        ValueError: an argument takes a key away or chooses another experiment, or the checkpoint's config is no config
            of this command.
    """
    handed_on = choices(checkpoint["overrides"], [])
    try:
        before = OmegaConf.merge(OmegaConf.structured(Train), plain(checkpoint["config"]))
    except (OmegaConfBaseException, ValueError) as error:
        raise ValueError(f"{path}: expected the config of a run, found {reason_of(error)}") from None
    after = OmegaConf.merge(cfg, {})
    for key in cfg:  # a key that did not exist then keeps today's value
        if key in checkpoint["config"]:
            after[key] = before[key]
    for argument in own_overrides(arguments):
        key = key_of(argument)
        if argument in handed_on:
            continue
        if argument.startswith("~") or key == "experiment":
            raise ValueError(
                f"{argument}: expected KEY=VALUE with resume=, which changes single keys of a run's config"
            )
        OmegaConf.update(after, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
    if not {"dataset", "dataset.root"} & {key_of(argument) for argument in arguments if argument not in handed_on}:
        check_root(after.dataset, "dataset.root", path)
    return after


def overrides_of(checkpoint: dict, arguments: list[str]) -> list[str]:
    """Return the arguments that a continued run had in all: a checkpoint's, and this command's in their place."""
    own = [argument for argument in own_overrides(arguments) if argument not in checkpoint["overrides"]]
    keys = {key_of(argument) for argument in own}
    return [override for override in checkpoint["overrides"] if key_of(override) not in keys] + own


def read_last(folder: Path) -> dict:
    """Read last.pt of a run's folder; the ValueError of a damaged one says whether best.pt is whole."""
    last, best = folder / "last.pt", folder / "best.pt"
    try:
        return check_run(read(last), last)
    except ValueError as error:
        try:
            step = check_run(read(best), best)["step"]
        except (OSError, ValueError):
            raise error from None
        raise ValueError(f"{error}; {best} of step {step} is whole, and can be copied to its place") from None


def plain(config: object) -> dict:
    """Return the config of a checkpoint if it holds nothing that OmegaConf would work out; ValueError otherwise."""
    if not isinstance(config, dict):
        raise ValueError(f"a {type(config).__name__}")
    todo = [config]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += [*value, *value.values()]
        elif isinstance(value, list):
            todo += value
        elif isinstance(value, str) and "${" in value:
            raise ValueError(f"{value!r}")
    return config


CONTENTS = (  # of a checkpoint, beside what its model needs: key, whether a value is right, what is expected
    ("overrides", lambda value: isinstance(value, list) and all(isinstance(x, str) for x in value), "a list of texts"),
    ("optimizer", lambda value: isinstance(value, dict), "an optimizer's state"),
    ("step", lambda value: type(value) is int and value >= 0, "an integer of at least 0"),
    ("seconds", lambda value: type(value) is float and 0 <= value < math.inf, "a number of at least 0"),
    (
        "best_val",
        lambda value: isinstance(value, dict) and all(type(x) is float for x in value.values()),
        "numbers by name",
    ),
    ("random", lambda value: isinstance(value, dict) and "data" in value, "random states"),
)


def check_run(checkpoint: dict, path: Path) -> dict:
    """Return a checkpoint if it holds what continues a run, raise ValueError otherwise."""
    check_contents(checkpoint, CONTENTS, path)
    return checkpoint


def differences(before: dict, after: dict, name: str = "") -> list[str]:
    """Say which values of two configs differ, each as KEY=NEW (was OLD)."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{name}={after} (was {before})"]
    keys = [*before, *(key for key in after if key not in before)]
    return [
        text
        for key in keys
        for text in differences(before.get(key), after.get(key), f"{name}.{key}" if name else str(key))
    ]


def check_folder(folder: Path, resume: str | None) -> None:
    """Raise ValueError if `folder` holds a run that is not to be continued, or `resume` names another folder."""
    if (folder / "last.pt").exists() and resume is None:
        raise ValueError(f"{folder}: expected no run there, found one; resume={folder} continues it")
    if resume not in (None, "auto") and Path(resume).resolve() != folder.resolve():
        raise unexpected("resume", resume, f"{folder}, the folder of this run")


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a run's folder for this process, and clear away what a killed one left half written.

    Raises:
        ValueError: another process holds it.
    """
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{folder}: expected a folder of one process, found another one that trains there") from None
    try:
        for path in folder.rglob(".*.tmp"):
            path.unlink()
        yield
    finally:
        if [path.name for path in folder.iterdir()] == [LOCK]:  # the run failed before it wrote anything
            (folder / LOCK).unlink()
        lock.release()


def write_config(folder: Path, cfg: DictConfig, overrides: list[str]) -> None:
    """Write a run's config and arguments into its folder's .hydra/, as Hydra itself would."""
    (folder / ".hydra").mkdir(exist_ok=True)
    for name, text in (("config", OmegaConf.to_yaml(cfg)), ("overrides", OmegaConf.to_yaml(overrides))):
        write_text(folder / f".hydra/{name}.yaml", text)


def count_classes(model: DictConfig, dataset: data.Dataset) -> None:
    """Put the data set's number of classes in the place of model.classes=auto; ValueError: it has no labels."""
    if model.get("classes") != "auto":
        return
    if not dataset.classes:
        raise unexpected("model.classes", "auto", f"0, as {dataset.name} has no labels")
    model.classes = dataset.classes


def check_frames(model: DictConfig, dataset: data.Dataset) -> None:
    """Raise ValueError if a model of clips is given images, or one of images clips."""
    clips, of_clips = "frames" in dataset.shape, model.get("_target_") == "models.Video"
    if clips and not of_clips:
        raise unexpected("model", model.get("_target_"), f"model=video, as {dataset.name} has clips")
    if of_clips and not clips:
        raise unexpected("model", "video", f"a model of images, as {dataset.name} has no clips; moving_digits has")


def check_classes(model: ImageModel, dataset: data.Dataset) -> None:
    """Raise ValueError if a model is conditioned on classes that the data set does not have."""
    if model.classes and model.classes != dataset.classes:
        has = f"{dataset.classes} classes" if dataset.classes else "no labels"
        allowed = one_of(["0", str(dataset.classes)] if dataset.classes else ["0"])
        raise unexpected("model.classes", model.classes, f"{allowed}, as {dataset.name} has {has}")


def check_root(dataset: Mapping, option: str, path: Path) -> None:
    """Raise ValueError for a folder of data that only a checkpoint names, and that is not there.

    The checkpoint may come from anybody, and would have it made anywhere.
    """
    root, name = dataset.get("root"), dataset.get("source", dataset.get("name"))
    if name != "digits" and root is not None and not Path(str(root), str(name)).expanduser().is_dir():
        raise ValueError(f"{path}: expected data in {root}/{name}, found no such folder; {option}=FOLDER names another")


def dataset_of(checkpoint: dict, root: str | None, path: Path) -> data.Dataset:
    """Load the data set that the checkpoint in `path` was trained on, from below another folder if `root` names one."""
    if checkpoint["config"] is None:
        raise ValueError(f"{path}: expected a model that was exported from a run, found one without its data set")
    config = dict(checkpoint["config"]["dataset"])
    if root is None:
        check_root(config, "root", path)
    return data.build(config if root is None else {**config, "root": root})
