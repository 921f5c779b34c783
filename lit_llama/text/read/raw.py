"""One raw row, and JSON read strictly: what another program would take for something else is refused."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lit_llama.errors import DataError

LONGEST = 1 << 26
"""Most characters of a row. More is a quote that is never closed, or a whole file that was taken for one row."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row as it stands in the file: an object, or the error that concerns this row only.

    Args:
        where: File and line or row.
        value: The object.
        error: Why there is none, with the place.
        reason: The same without the place, to count by.
    """

    where: str
    value: dict[str, Any] | None = None
    error: DataError | None = None
    reason: str = ""

    @classmethod
    def of(cls, where: str, value: Any) -> "RawRow":
        """Build a row: an object, or the list of messages of a conversation."""
        if isinstance(value, dict):
            return cls(where, value)
        if holds_messages(value):
            return cls(where, {"messages": value})
        hint = "; the values of a row need names: pandas writes them with orient='records'"
        return cls.bad(where, f"found {kind(value)}, expected an object", hint if isinstance(value, list) else "")

    @classmethod
    def bad(cls, where: str, reason: str, hint: str = "") -> "RawRow":
        """Build a row that cannot be used, while others can."""
        return cls(where, None, DataError(f"{where}: {reason}{hint}"), reason)


def kind(value: Any) -> str:
    """Name the kind of a value, in words of JSON; what JSON has no word for comes from Parquet."""
    names = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "an object",
        bytes: "binary",
    }
    if missing(value):
        return "null"
    return names.get(type(value)) or f"of type {type(value).__name__}"


def missing(value: Any) -> bool:
    """Whether a field says nothing: null, or the NaN that pandas writes for it."""
    return value is None or (isinstance(value, float) and value != value)


def holds_messages(value: Any) -> bool:
    """Whether a value is a list of objects that each say who speaks."""
    return isinstance(value, list) and bool(value) and all(is_message(entry) for entry in value)


def is_message(value: Any) -> bool:
    """Whether a value is an object that says who speaks, and what."""
    if not isinstance(value, dict) or not any(isinstance(value.get(name), str) for name in ("role", "from")):
        return False
    return any(name in value for name in ("content", "value", "parts", "tool_calls", "function_call"))


def shown(value: Any, longest: int = 60) -> str:
    """Show a value in a message: short, on one line, printable everywhere."""
    text = repr(value[: longest + 1] if isinstance(value, str) else value)
    return text if len(text) <= longest else f"{text[:longest]}..."


def listed(names: Sequence[Any], most: int = 12) -> str:
    """List names in a message, as they are where they can be printed."""
    words = [str(name) if str(name).isprintable() and str(name) else shown(name) for name in names[:most]]
    return ", ".join(words) + (f" and {len(names) - most} more" if len(names) > most else "") or "nothing"


class NotStrictError(ValueError):
    """JSON that programs read differently, or not at all."""


def _refuse(constant: str) -> NoReturn:
    raise NotStrictError(f"{constant} is not JSON; write null for it")


def _missing(constant: str) -> None:
    if constant != "NaN":  # as pandas writes what is missing
        _refuse(constant)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise NotStrictError(f"the number {shown(digits)} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotStrictError(f"an object has the field {shown(twice)} twice")
    return found


STRICT = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_missing, parse_float=_finite)
"""For rows. NaN, which is no JSON, is null."""
STRICTEST = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite)
"""For JSON that a model reads or writes."""
LENIENT = json.JSONDecoder(parse_int=len)
"""Finds the end of a value that is refused; numbers of any length do."""


def explain(error: ValueError | RecursionError) -> str:
    """Explain what STRICT, or the module below it, complains of, other than wrong syntax."""
    if isinstance(error, RecursionError):
        return "is nested too deep"
    if isinstance(error, NotStrictError):
        return str(error)
    return str(error).split(";")[0]  # an integer of more digits than Python converts, and a hint for programmers


class RowError(ValueError):
    """Reason why a row is no conversation.

    Args:
        reason: To count by: the same for the same mistake in another row.
        at: Which part of the row.
        hint: The way out.
        unusable: Nothing is wrong with the row, but there is nothing to learn from it.
    """

    def __init__(self, reason: str, at: str = "", hint: str = "", unusable: bool = False) -> None:
        super().__init__((f"{at}: " if at else "") + reason + (f"; {hint}" if hint else ""))
        self.reason = reason
        self.unusable = unusable


def check_text(value: str, name: str, at: str = "") -> None:
    """Raise RowError if a text does not fit into a file."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"field {name} holds a lone surrogate", at, f"it is character {error.start}") from error
