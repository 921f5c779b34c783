"""One raw row, JSON read strictly, and conditions on fields of rows.

What another program would take for something else is refused. A condition such as `score >= 4 and lang == "en"` is of
Python's grammar, and never run.
"""

import ast
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lit_llama.errors import DataError, UserError
from lit_llama.wording import param

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


Value = str | float | bool
_OPERATORS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_MIRRORED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.Gt, ast.LtE: ast.GtE, ast.Gt: ast.Lt, ast.GtE: ast.LtE
}  # fmt: skip
_TRUTH: dict[str, bool] = {"true": True, "false": False}
_NAMED = 100
_LISTED = 100  # fields that are remembered for an error
_ABSENT = object()
_LONGEST = 2000  # characters; Python's parser takes longer for deeper ones
_EXAMPLE = "score >= 4 and lang == 'en'"


@dataclass(frozen=True)
class Comparison:
    """One field against one value.

    Args:
        path: The field, and those within it.
        compare: The comparison.
        value: What it is compared with.
    """

    path: tuple[str, ...]
    compare: Callable[[Any, Any], bool]
    value: Value

    @property
    def name(self) -> str:
        """The field as it is written."""
        return ".".join(self.path)

    def holds(self, found: Any) -> bool:
        """Whether it holds for what stands in the field; nothing holds for what is missing.

        Raises:
            RowError: What stands there cannot be compared with the value.
        """
        if missing(found) or (found == "" and self.value != ""):
            return False
        read = _as_kind(found, self.value)
        if read is None:
            raise RowError(
                f"field {self.name} is {kind(found)}", hint=f"{param('where')} compares it with {_named(self.value)}"
            )
        return bool(self.compare(read, self.value))


def _as_kind(found: Any, value: Value) -> Value | None:
    """What stands in a field as a value of the kind of another, as CSV has all as text; None if it is none."""
    if isinstance(value, bool):
        return found if isinstance(found, bool) else _TRUTH.get(str(found).strip().lower())
    if isinstance(value, str):
        return found if isinstance(found, str) else None
    if isinstance(found, bool):
        return None
    try:
        number = float(found) if isinstance(found, str) else found + 0  # a number of Parquet, too
        return number if number == number else None
    except (TypeError, ValueError):
        return None


def _named(value: Value) -> str:
    if isinstance(value, bool):
        return "true or false"
    return f"the text {shown(value)}" if isinstance(value, str) else f"the number {value:g}"


class Where:
    """Condition on rows: those are kept for which every comparison holds.

    Args:
        text: The condition.
        renamed: Our names of fields by those in the data, where they differ.

    Raises:
        UserError: The condition is none; the message names it.
    """

    def __init__(self, text: str, renamed: Mapping[str, str]) -> None:
        self.text = text if len(text) <= _NAMED else f"{text[:_NAMED]}..."  # it is the reason of many rows
        self._comparisons = parse(text)
        self._renamed = renamed
        self.begin()

    def begin(self) -> None:
        """Begin anew, with no row seen."""
        self._unseen = {comparison.path for comparison in self._comparisons}
        self._fields: dict[str, None] = {}

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is kept.

        Raises:
            RowError: A field cannot be compared.
        """
        if self._unseen:
            self._unseen -= {path for path in self._unseen if self._value(row, path) is not _ABSENT}
            if len(self._fields) < _LISTED:
                self._fields.update({name: None for name in row})
                for path in self._unseen:  # the fields beside one that is nested
                    for depth in range(1, len(path)):
                        there = self._value(row, path[:depth])
                        inner = there if isinstance(there, Mapping) else {}
                        self._fields.update({".".join((*path[:depth], str(name))): None for name in inner})
        found = ((comparison, self._value(row, comparison.path)) for comparison in self._comparisons)
        return all(comparison.holds(None if value is _ABSENT else value) for comparison, value in found)

    def _value(self, row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        """What stands in a field, `_ABSENT` where the row has none."""
        first, *inner = path
        value = row.get(first, row.get(self._renamed.get(first, first), _ABSENT))
        for name in inner:
            value = value.get(name, _ABSENT) if isinstance(value, Mapping) else _ABSENT
        return value

    def check(self) -> None:
        """Raise DataError if a field was in no row."""
        for name in sorted(map(".".join, self._unseen)):
            raise DataError(
                f"{self.text!r}: no row has a field {name}, but {listed(list(self._fields))}", parameter="where"
            )


def parse(text: str) -> list[Comparison]:
    """Parse the comparisons of a condition.

    Raises:
        UserError: It is no condition; the message names it.
    """
    if len(text) > _LONGEST:
        raise UserError(
            f"has {len(text)} characters, expected at most {_LONGEST}, such as {_EXAMPLE!r}", parameter="where"
        )
    try:
        tree = ast.parse(text.strip(), mode="eval")
        return list(_comparisons(tree.body, text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, UserError):
            raise
        hint = "; write == for equal" if re.search(r"(?<![=!<>])=(?!=)", text) else ""
        hint = "; write and in place of it" if "&" in text else hint
        raise _wrong(text, f"it cannot be read{hint}") from None


def _wrong(text: str, why: str) -> UserError:
    return UserError(
        f"{text!r}: {why}",
        parameter="where",
        remedy="expected comparisons of a field with a number, a text in quotes, true or false, joined by and, such "
        f"as {_EXAMPLE!r}",
    )


def _comparisons(node: ast.expr, text: str) -> Iterator[Comparison]:
    if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
        for part in node.values:
            yield from _comparisons(part, text)
        return
    if not isinstance(node, ast.Compare):
        raise _wrong(text, f"{_written(node)} is no comparison")
    if len(node.ops) != 1:
        raise _wrong(text, f"{_written(node)} has several comparisons in one")
    left, sign, right = node.left, type(node.ops[0]), node.comparators[0]
    if sign not in _OPERATORS:
        raise _wrong(text, f"{_written(node)} has none of the signs == != < <= > >=")
    if (path := _path(left)) is None:
        left, right, sign = right, left, _MIRRORED.get(sign, sign)
        path = _path(left)
    value = _value(right)
    if path is None or value is None:
        raise _wrong(text, f"{_written(node)} does not compare a field with a value")
    if isinstance(value, bool) and sign not in (ast.Eq, ast.NotEq):
        raise _wrong(text, f"{_written(node)} asks which of true and false is larger")
    yield Comparison(path, _OPERATORS[sign], value)


def _written(node: ast.expr) -> str:
    return shown(ast.unparse(node))


def _path(node: ast.expr) -> tuple[str, ...] | None:
    """A field as NAME, NAME.NAME or row["NAME"]; None if it is none."""
    if isinstance(node, ast.Name):
        return None if node.id in _TRUTH else (node.id,)
    if isinstance(node, ast.Attribute):
        before = _path(node.value)
        return (*before, node.attr) if before else None
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        if isinstance(node.value, ast.Name) and node.value.id == "row":
            return (node.slice.value,)
        before = _path(node.value)
        return (*before, node.slice.value) if before else None
    return None


def _value(node: ast.expr) -> Value | None:
    """A number, a text, true or false; None if it is none of them."""
    if isinstance(node, ast.Name):
        return _TRUTH.get(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        number = _value(node.operand)
        return -number if isinstance(number, int | float) and not isinstance(number, bool) else None
    if isinstance(node, ast.Constant) and isinstance(node.value, str | int | float):
        return node.value
    return None
