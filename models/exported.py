"""Exported models: the weights, and what rebuilds them, in one safetensors file; nothing in it can be run.

The texts in its header:

    format       "pixelrnn-1"
    model        the config that `models.build` takes
    run          config, step and best validation of the run that trained it; null: it was saved from Python
    sha256       over those texts and the weights

model and run are JSON. `models.checkpoint.read` reads such a file like a checkpoint. The checksum finds damage; it is
no signature, as whoever changes a file on purpose can compute another.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

import models
from checks import one_of, reason_of
from files import write_atomically, write_text
from models.untrusted import check_header, check_values

FORMAT = "pixelrnn-1"
NAME = "model.safetensors"  # in a folder that `save_pretrained` wrote


def checksum(texts: dict[str, str], weights: dict[str, Tensor]) -> str:
    """SHA-256 of the header's other texts and of weights on the CPU."""
    out = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name, weight in sorted(weights.items()):
        out.update(json.dumps([name, str(weight.dtype), list(weight.shape)]).encode())
        out.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy())
    return out.hexdigest()


def content(model: dict[str, Any], weights: dict[str, Tensor], run: dict[str, Any] | None) -> bytes:
    """Make an exported model: the config of a model, its state, and what the header says of its run."""
    copies = {name: weight.detach().cpu().contiguous().clone() for name, weight in weights.items()}
    texts = {"format": FORMAT, "model": json.dumps(model), "run": json.dumps(run)}
    return safetensors.torch.save(copies, texts | {"sha256": checksum(texts, copies)})


def write(path: Path, model: dict[str, Any], weights: dict[str, Tensor], run: dict[str, Any] | None) -> None:
    """Write an exported model atomically; arguments as of `content`."""
    made = content(model, weights, run)
    write_atomically(path, lambda file: file.write(made))


def read(path: Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read an exported model, as the part of a checkpoint that it is.

    Returns model, weights, ema (None), and of its run config, step and best_val; config is None where there was none.

    Raises:
        ValueError: the file is damaged, or is no exported model; one line that names it.
    """
    try:
        check_header(path)
        with safetensors.safe_open(path, framework="pt") as file:
            texts = file.metadata() or {}
            if texts.get("format") != FORMAT:
                raise ValueError(f"another format than {FORMAT}")
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        found = texts.pop("sha256", None)
        if found != checksum(texts, weights):
            raise ValueError("contents of another checksum than it names")
        model, run = json.loads(texts["model"]), json.loads(texts["run"])
        check_values([model, run], path.stat().st_size)
        run = {} if run is None else {name: run[name] for name in ("config", "step", "best_val")}
    except Exception as error:  # a reader meets damage with errors of nearly every type
        raise ValueError(f"{path}: expected an exported model, found {reason_of(error)}") from None
    weights = {name: weight.to(device) for name, weight in weights.items()}
    return {"model": model, "weights": weights, "ema": None, "config": None, **run}


def save_pretrained(model: "models.base.ImageModel", folder: Path, run: dict[str, Any] | None = None) -> None:
    """Write model.safetensors and config.json into a folder, which is made if need be.

    Raises:
        ValueError: the model is of a class of the caller's own, which nobody else could rebuild.
    """
    if model.config["_target_"] not in [f"models.{name}" for name in models.__all__]:
        raise ValueError(f"model: expected {one_of(models.__all__)}, found {type(model).__name__}")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / NAME, model.config, model.state_dict(), run)
    text = json.dumps(model.config, indent=1) + "\n"  # what model hubs show, and count downloads by
    write_text(folder / "config.json", text)


def hub() -> ModuleType:
    """Import huggingface_hub; the ImportError where it is not installed says how to install it."""
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError("expected huggingface_hub, found none: pip install -e '.[hub]'") from None
    return huggingface_hub


def push_to_hub(model: "models.base.ImageModel", name: str, card: Path | None, **options) -> str:
    """Publish a model as NAME on the Hugging Face hub; options as of `HfApi.create_repo`. Returns the address."""
    api = hub().HfApi(token=options.pop("token", None))
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, Path(folder))
        if card is not None:
            (Path(folder) / "README.md").write_bytes(card.read_bytes())
        address = api.create_repo(name, exist_ok=True, **options)
        api.upload_folder(repo_id=name, folder_path=folder)
    return str(address)


def fetched(name: str, **options) -> Path:
    """Return the file of a model: of a folder, or of one by that name on the hub; options as of `hf_hub_download`."""
    if Path(name).exists():
        return Path(name) / NAME if Path(name).is_dir() else Path(name)
    return Path(hub().hf_hub_download(name, NAME, **options))
