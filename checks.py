"""Checks of arguments, with one wording for all parts of the project: "NAME=VALUE: expected …"."""

import difflib
import math
from collections.abc import Collection

KINDS = {int: "an integer", float: "a number", bool: "true or false"}


def unexpected(name: str, value: object, expected: str) -> ValueError:
    """The error to raise for an argument `name` that is not as expected."""
    return ValueError(f"{name}={shortened(repr(value))}: expected {expected}")


def check(name: str, value: object, kind: type, low: float, high: float = math.inf) -> None:
    """Raise ValueError unless `value` is an int, float or bool, as `kind` says, from `low` to `high`."""
    right = isinstance(value, kind) or (kind is float and isinstance(value, int))
    if isinstance(value, bool) != (kind is bool) or not right or not low <= value <= high or value == math.inf:
        limits = "" if kind is bool else f" of at least {low}" if high == math.inf else f" from {low} to {high}"
        raise unexpected(name, value, KINDS[kind] + limits)


def shortened(text: str) -> str:
    """Return a text of at most 300 characters, with … in place of the rest."""
    return text if len(text) <= 300 else f"{text[:299]}…"


def reason_of(error: BaseException) -> str:
    """Return the first line of an error's text, shortened; its type, where it has none."""
    return shortened((str(error).splitlines() or [type(error).__name__])[0])


def check_one_of(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise unexpected(name, value, one_of(allowed) + nearest(value, allowed))


def nearest(value: object, allowed: Collection[str]) -> str:
    """Ask whether the most similar of some names was meant; nothing where none is similar."""
    found = difflib.get_close_matches(str(value), allowed, 1)
    return f"; did you mean {found[0]}?" if found else ""


def one_of(names: Collection[str]) -> str:
    """Join names as in a sentence: a, b or c."""
    *before, last = names
    return f"{', '.join(before)} or {last}" if before else last
