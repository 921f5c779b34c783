"""Conditions on fields of rows, such as `score >= 4 and lang == "en"`: of Python's grammar, and never run."""

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.text.read.raw import RowError, kind, listed, missing, shown

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
            raise RowError(f"field {self.name} is {kind(found)}", hint=f"--where compares it with {_named(self.value)}")
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
        self._unseen = {comparison.path[0] for comparison in self._comparisons}
        self._fields: dict[str, None] = {}

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is kept.

        Raises:
            RowError: A field cannot be compared.
        """
        if self._unseen:
            names = {name: None for name in row}
            self._unseen -= names.keys() | {theirs for theirs, ours in self._renamed.items() if ours in row}
            self._fields.update(names if len(self._fields) < 100 else {})
        return all(comparison.holds(self._value(row, comparison.path)) for comparison in self._comparisons)

    def _value(self, row: Mapping[str, Any], path: tuple[str, ...]) -> Any:
        first, *inner = path
        value = row.get(first, row.get(self._renamed.get(first, first)))
        for name in inner:
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def check(self) -> None:
        """Raise DataError if a field was in no row."""
        for name in self._unseen:
            raise DataError(f"--where {self.text!r}: no row has a field {name}, but {listed(list(self._fields))}")


def parse(text: str) -> list[Comparison]:
    """Parse the comparisons of a condition.

    Raises:
        UserError: It is no condition; the message names it.
    """
    if len(text) > _LONGEST:
        raise UserError(f"--where has {len(text)} characters, expected at most {_LONGEST}, such as {_EXAMPLE!r}")
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
        f"--where {text!r}: {why}; expected comparisons of a field with a number, a text in quotes, true or false, "
        f"joined by and, such as {_EXAMPLE!r}"
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
