"""Pictures in Parquet files, with or without labels, as data sets on Hugging Face are.

n rows, counted from 0: a picture each, and its label · c channels · h w rows, columns
"""

import io
import itertools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from checks import check, reason_of, shortened, unexpected
from data import cache
from data.arrays import MOST
from data.pictures import in_blocks, read_picture, shape_of
from data.splits import Dataset, Split, shuffled, sizes

PARTS = {"train": "train", "validation": "val", "test": "test"}  # the first word of a file's name → the part it is of
AT_ONCE = 1 << 16  # labels in memory, beside their numbers
PACKED, SMALL = 100, 1 << 26  # a file may unpack to at most so many times its bytes, or so many bytes


def pyarrow():
    """Return the module; ValueError: it is not installed."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError("dataset=parquet: expected pyarrow, found none: pip install -e '.[parquet]'") from None
    return pyarrow


@contextmanager
def opened(path: Path, **options) -> Iterator:
    """Open a file as a pyarrow.parquet.ParquetFile; ValueError: it is damaged, or claims more than it can hold."""
    module = pyarrow().parquet
    try:
        file = module.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, **options)  # read page by page
        head, size = file.metadata, path.stat().st_size
        unpacked = sum(head.row_group(k).total_byte_size for k in range(head.num_row_groups))
        if not 0 <= head.num_rows <= size or unpacked > max(SMALL, PACKED * size):
            raise ValueError(f"{head.num_rows:,} rows, {unpacked:,} bytes unpacked, in {size:,} bytes")
    except Exception as error:  # of nearly every type
        raise ValueError(f"{path}: expected a whole Parquet file ({reason_of(error)})") from None
    with file:
        yield file


def read_column(path: Path, column: str, at_once: int, **options) -> Iterator[tuple[int, "pyarrow.Array"]]:
    """Yield a column of a file, `at_once` rows at a time, each time with the number of the first of them.

    Raises:
        ValueError: the file is damaged.
    """
    with opened(path, **options) as file:
        row = 0
        try:
            for batch in file.iter_batches(at_once, columns=[column], use_threads=False):
                yield row, batch.column(0)
                row += batch.num_rows
            if row != file.metadata.num_rows:
                raise ValueError(f"{file.metadata.num_rows:,} rows expected")
        except Exception as error:  # of nearly every type
            raise ValueError(f"{path}: row {row}: expected a whole file, found damage ({reason_of(error)})") from None


# -------------------------------------------------------------------------------------------------------------- columns


class Table(NamedTuple):
    """A file and its columns."""

    path: Path
    rows: int
    image: str  # of pictures
    label: str | None


def holds_pictures(kind) -> bool:
    """Tell whether a column of a pyarrow type holds bytes, or structs with a field `bytes`, as on Hugging Face."""
    types = pyarrow().types
    if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return types.is_binary(kind) or types.is_large_binary(kind)


def holds_labels(kind) -> bool:
    """Tell whether a column of a pyarrow type holds integers, texts or truth values."""
    types = pyarrow().types
    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(is_one(kind) for is_one in (types.is_integer, types.is_boolean, types.is_string, types.is_large_string))


def column_of(path: Path, schema, option: str, name: str | None, right: Callable[..., bool], what: str):
    """Find the column of a file that an option names, or for None the only one of a right type: a pyarrow.Field."""
    found = [field for field in schema if name in (None, field.name) and right(field.type)]
    if len(found) != 1:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        expected = f"the name of a column of {what} in {path}, which has {shortened(repr(columns)[1:-1])}"
        raise unexpected(f"dataset.{option}", name, expected)
    return found[0]


def table_of(path: Path, image: str | None, label: str | None) -> Table:
    """Look up the columns of a file that the options `image` and `label` name."""
    with opened(path) as file:
        schema, rows = file.schema_arrow, file.metadata.num_rows
    pictures = column_of(path, schema, "image", image, holds_pictures, "pictures (bytes, or structs with bytes)")
    if label is not None:
        column_of(path, schema, "label", label, holds_labels, "labels (integers, texts, or true and false)")
    return Table(path, rows, pictures.name, label)


def read_pictures(table: Table, shape: tuple[int, int, int]) -> Iterator[np.ndarray]:
    """Read the pictures of a file: (c h w), one after another, as it may repeat a large one in a few bytes.

    Raises:
        ValueError: there is none in a row, or none that can be read.
    """
    channels, height, width = shape
    for row, values in read_column(table.path, table.image, 1):
        if pyarrow().types.is_struct(values.type):
            values = values.flatten()[values.type.get_field_index("bytes")]
        content = values[0].as_py()
        if content is None:
            raise ValueError(f"{table.path}: row {row}: expected a picture, found none")
        try:
            picture = read_picture(io.BytesIO(content), height, width, channels)
        except Exception as error:  # decoders meet damage with errors of nearly every type
            found = f"found none that can be read ({reason_of(error)})"
            raise ValueError(f"{table.path}: row {row}: expected a picture, {found}") from None
        yield picture


def label_values(table: Table) -> Iterator[tuple[list[int | bool | str], np.ndarray]]:
    """Yield the different labels of some rows at a time, and which of them each row has, (k,).

    Raises:
        ValueError: a row has no label, or an integer outside 0..MOST-1.
    """
    for row, values in read_column(table.path, table.label, AT_ONCE, read_dictionary=[table.label]):
        try:
            coded = values.dictionary_encode()
            codes = coded.indices.fill_null(-1).to_numpy()
            used, first, rows = np.unique(codes, return_index=True, return_inverse=True)
            found = [None if code < 0 else coded.dictionary[code].as_py() for code in used.tolist()]
        except Exception as error:  # bytes that are no text, a code of no value
            raise ValueError(f"{table.path}: expected labels in {table.label} ({reason_of(error)})") from None
        for value, at in zip(found, first, strict=True):
            if value is None or (type(value) is int and not 0 <= value < MOST):
                expected = "a label, found none" if value is None else f"labels from 0 to {MOST - 1}, found {value}"
                raise ValueError(f"{table.path}: row {row + at}: expected {expected}")
        yield found, rows


def read_labels(tables: Sequence[Table]) -> tuple[np.ndarray, int, tuple[str, ...] | None]:
    """Read the labels of all rows of some files.

    Returns:
        labels (n,) int64: integers as they are, texts and truth values by their place in sorted order; the number of
        classes; and the classes' names, where they are no integers.

    Raises:
        ValueError: as in `label_values`, and for labels of several types or too many different ones.
    """
    numbers, labels = {}, []  # of each value the order in which it was found; those of all rows
    for table in tables:
        for found, rows in label_values(table):
            labels.append(np.array([numbers.setdefault(value, len(numbers)) for value in found])[rows])
        if len({type(value) for value in numbers}) > 1 or len(numbers) > MOST:
            raise ValueError(f"{table.path}: expected labels of one type, at most {MOST}, found others")
    values, labels = list(numbers), np.concatenate(labels)
    if type(values[0]) is int:
        return np.array(values)[labels], max(values) + 1, None
    names = sorted(values)
    place = {value: k for k, value in enumerate(names)}
    return np.array([place[value] for value in values])[labels], len(names), tuple(map(str, names))


# ---------------------------------------------------------------------------------------------------------------- parts


def files_of(path: Path) -> dict[str, list[Path]]:
    """Find the files of each part: train, and val and test where files are named so.

    Raises:
        FileNotFoundError: there are none.
        ValueError: some files of a folder are named by their part, others not, or none is of train.
    """
    if path.is_file():
        return {"train": [path]}
    files = sorted(file for file in path.glob("[!.]*.parquet") if file.is_file())
    if not files:
        raise FileNotFoundError(f"dataset.path={path}: expected a .parquet file, or a folder of them, found none")
    named = {file: PARTS.get(re.match("[a-z]*", file.name)[0]) for file in files}
    if not any(named.values()):
        return {"train": files}
    for file, part in named.items():
        if part is None:
            raise ValueError(f"{file}: expected a name that begins with {', '.join(PARTS)}, as others there do")
    if "train" not in named.values():
        raise ValueError(f"{files[0]}: expected train-….parquet beside it, found none")
    return {part: of_it for part in PARTS.values() if (of_it := [file for file in files if named[file] == part])}


def spans_of(rows: dict[str, int], val: float, test: float, path: Path) -> dict[str, slice]:
    """Cut rows in which the parts follow each other, in train, val and test; a part that is not there is cut off train.

    Args:
        rows: how many each part has that is there.
    """
    ends = itertools.accumulate(rows.values())
    spans = {part: slice(end - n, end) for (part, n), end in zip(rows.items(), ends, strict=True)}
    counts = dict(zip(("val", "test"), sizes(rows["train"], val, test, path), strict=True))
    for part in ("test", "val"):
        if part not in spans:
            cut = spans["train"].stop - counts[part]
            spans["train"], spans[part] = slice(0, cut), slice(cut, cut + counts[part])
    return spans


def parquet(
    *,
    path: str | os.PathLike | None = None,
    image: str | None = None,
    label: str | None = None,
    size: int | Sequence[int] = 32,
    channels: int = 3,
    val: float = 0.1,
    test: float = 0.1,
    seed: int = 0,
    root: str | os.PathLike | None = None,
) -> Dataset:
    """Load the pictures of a Parquet file, or of all in a folder: 256 levels.

    Args:
        path: the file, or the folder. The pictures are converted once to root/parquet/KEY.npy, in a random order, and
            memory-mapped from there. Files that are named train…, validation… and test… are these parts.
        image: the column of pictures: bytes of a file (PNG, JPEG, …), or structs with a field `bytes` of them; None:
            the only such column.
        label: the column of labels: integers from 0 on, or texts or truth values, which are numbered in sorted order;
            None: no labels.
        size: height and width, or [height, width]; each picture's centre is cropped to these proportions.
        channels: 3 for RGB, 1 for grey.
        val, test: the fractions of the pictures that these parts get, where no file is named as theirs.
        seed: of the order, and so decides which picture is in which part.
        root: see `path`; None is ~/.cache/pixelrnn.

    Raises:
        FileNotFoundError: there is no such file or folder, or no file in it.
        ValueError: an option's value is not as expected, pyarrow is not installed, or a file or a picture is damaged.
    """
    path = cache.source("path", path, "parquet", "FILE.parquet or FOLDER")
    shape = shape_of(size, channels)
    check("dataset.seed", seed, int, 0)
    parts = files_of(path)
    files = [file for of_part in parts.values() for file in of_part]
    first = table_of(files[0], image, label)
    tables = [first, *(table_of(file, first.image, label) for file in files[1:])]
    rows = {part: sum(table.rows for table in tables if table.path in of_part) for part, of_part in parts.items()}
    if 0 in rows.values():
        raise ValueError(f"dataset.path={path}: expected pictures in each part, found {rows}")
    spans = spans_of(rows, val, test, path)
    found, classes, names = (None, None, None) if label is None else read_labels(tables)

    ends = itertools.accumulate(rows.values())
    places = np.concatenate([end - n + shuffled(n, seed) for n, end in zip(rows.values(), ends, strict=True)])
    stamps = [(file.resolve(), *cache.stamp(file)) for file in files]
    target = cache.folder(root, "parquet") / f"{cache.key(stamps, rows, first.image, shape, seed)}.npy"
    pictures = itertools.chain.from_iterable(read_pictures(table, shape) for table in tables)
    cache.once(lambda: cache.store(target, in_blocks(pictures, shape), places), target)
    images = cache.load(target, shape, np.uint8, n=len(places))
    labels = None
    if found is not None:
        labels = np.empty_like(found)
        labels[places] = found
    split = {part: Split(images[span], None if labels is None else labels[span]) for part, span in spans.items()}
    return Dataset("parquet", levels=256, classes=classes, names=names, **split)
