"""Checks of a checkpoint that may come from anybody: that it claims no more than its file holds, and runs nothing.

`torch.load(weights_only=True)` runs none of a file's code, but calls functions of torch's that take any amount of
memory, and a few hundred bytes of lists within lists print as millions. So each of these comes before what it guards.
"""

import math
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from torch import Tensor

from checks import reason_of

LARGEST_DESCRIPTION = 1 << 22  # bytes of what describes the tensors, some 150 a tensor
MOST_VALUES = 1 << 18
DEEPEST = 32
NAMES = re.compile(r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch [A-Z]\w+Storage")


def check_archive(path: Path) -> None:
    """Raise ValueError, which names the file, unless it is an archive of torch.save of tensors and plain values."""
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            for record in records:  # torch.save compresses none, so they are no larger than the file
                if record.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"a compressed record {record.filename}")
            if sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("records that are larger than the file")
            damaged = archive.testzip()  # compares every record with its checksum, which torch.load does not
            if damaged:
                raise ValueError(f"its record {damaged} damaged")
            for record in records:
                if record.filename.lower().endswith(".pkl"):  # torch finds its own in any letters
                    check_pickle(archive.read(record))
    except zipfile.BadZipFile:
        raise ValueError(f"{path}: expected a checkpoint, found a file of another kind, or one cut short") from None
    except Exception as error:  # a reader meets damage with errors of nearly every type
        raise ValueError(f"{path}: expected a whole checkpoint, found {reason_of(error)}") from None


def check_header(path: Path) -> None:
    """Raise ValueError for a safetensors file with a header of more bytes than any model's has."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_DESCRIPTION:
        raise ValueError(f"a description of {size:,} bytes")


def check_pickle(content: bytes) -> None:
    """Raise ValueError for a pickle that names anything but tensors, their storages and dicts."""
    if len(content) > LARGEST_DESCRIPTION:
        raise ValueError(f"a description of {len(content):,} bytes")
    for operation, argument, _ in pickletools.genops(content):
        name = argument if operation.name == "GLOBAL" else operation.name
        if operation.name in ("GLOBAL", "STACK_GLOBAL", "INST") and not NAMES.fullmatch(name):
            raise ValueError(f"{name} in it")


def check_values(checkpoint: object, size: int) -> None:
    """Raise ValueError for values too many, too deep or of another kind, or more numbers than `size` bytes hold."""
    todo, seen, storages = [(checkpoint, 0)], 0, {}
    while todo:
        value, depth = todo.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise ValueError("too many values, or values too deep in others")
        if isinstance(value, dict):
            todo += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list | tuple | set):
            todo += [(inner, depth + 1) for inner in value]
        elif isinstance(value, Tensor):
            storage, claimed = value.untyped_storage(), value.numel() * value.element_size()
            storages[storage.data_ptr()] = storage.nbytes()
            if claimed > storage.nbytes():
                raise ValueError(f"a tensor of {claimed:,} bytes in a storage of {storage.nbytes():,}")
        elif isinstance(value, int):
            if value.bit_length() > 64:
                raise ValueError("an integer of more than 64 bits")
        elif not isinstance(value, str | float | None):
            raise ValueError(f"a {type(value).__name__} in it")
    if sum(storages.values()) > size:
        raise ValueError(f"tensors of {sum(storages.values()):,} bytes in a file of {size:,}")


def check_claims(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """Raise ValueError for a model larger than these weights, before it is built and takes time and memory.

    Each layer has at least one tensor, and some weight has at least as many numbers as each product below.
    """
    limits = [(("layers",), len(weights)), (("base_layers",), len(weights))]
    numbers = sum(weight.untyped_storage().nbytes() for weight in weights.values())  # at most one of a byte each
    products = ["hidden hidden", "base_hidden base_hidden", "head_features", "classes hidden", "map_features hidden"]
    products += ["channels hidden", "mixtures channels", "doublings"]
    if config.get("input") == "embedding":
        products.append("levels input_features")
    if config.get("head", "softmax") == "softmax":
        products.append("levels channels")
    limits += [(tuple(product.split()), numbers) for product in products]
    for names, limit in limits:
        values = [config.get(name) for name in names]
        if all(isinstance(value, int) for value in values) and math.prod(values) > limit:
            raise ValueError(f"{' · '.join(names)} = {math.prod(values)}, more than its weights hold")
