"""JSON objects and YAML of files from elsewhere: size, depth and references are bounded before anything is built.

A few bytes of YAML stand for gigabytes where each line refers twice to the one before, and fifty thousand brackets
exhaust the stack of a parser that calls itself for each. Both are found among the parser's events, which hold nothing.
"""

import json
import math
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lit_llama.errors import UserError

LARGEST = 32 << 20
"""Bytes of a file; the largest in use, the index of a model in 160 shards, has 9 MB."""
_LARGEST_YAML = 8 << 20
_DEEPEST = 64
_NODES = 200_000
"""Values of a YAML text, those that references stand for counted each time."""


class ObjectError(ValueError):
    """Reason why a text is no JSON object, or no YAML that is read. The message goes behind the name of the file."""


def read_text(path: Path, largest: int = LARGEST) -> str:
    """Read the text of a file.

    Raises:
        ObjectError: It is no regular file, larger than any of its kind, or not UTF-8.
        OSError: It cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ObjectError("is a folder, a pipe or a device, expected a file")
    if status.st_size > largest:
        raise ObjectError(f"has {status.st_size:,} bytes, expected at most {largest:,}: it is something else")
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ObjectError(f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from error


def read_object(path: Path, failure: type[UserError], hint: str = "") -> dict[str, Any]:
    """Read the JSON object that a file holds.

    Args:
        path: The file.
        failure: What to raise.
        hint: The way out, for the message.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return as_object(read_text(path))
    except ObjectError as error:
        raise failure(f"{path} {error}{f'; {hint}' if hint else ''}") from error


def as_object(text: str | bytes) -> dict[str, Any]:
    """Parse the JSON object that a text holds.

    Raises:
        ObjectError: It holds none, or one that is nested too deep.
    """
    value = as_json(text)
    if not isinstance(value, dict):
        raise ObjectError(f"is not a JSON object but {_short(value)}")
    return value


def as_json(text: str | bytes) -> Any:
    """Parse the JSON value that a text holds.

    Raises:
        ObjectError: It holds none, or one that is nested too deep.
    """
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ObjectError("is not JSON that is read: it is nested too deep") from error
    except ValueError as error:
        # The rest of a message about a number of thousands of digits is a hint for programmers.
        raise ObjectError(f"is not JSON: {str(error).split('; use sys.')[0]}") from error
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        if (depth := depth + 1) > _DEEPEST:
            raise ObjectError(f"is nested more than {_DEEPEST} deep")
    return value


Form = type[Any] | tuple[type[Any], ...] | Mapping[str, Any]
"""What a value has to be: of a type, where float means any finite number; or an object with such values, of which
`*` stands for all other names."""


def check_form(value: Any, form: Form, place: str, failure: type[UserError]) -> None:
    """Compare a JSON value with its form; what is null or not there is left to whoever reads it.

    Args:
        value: The value.
        form: What it has to be.
        place: Its file, and the names that lead to it.
        failure: What to raise.
    """
    if value is None:
        return
    if not isinstance(form, Mapping):
        kinds = form if isinstance(form, tuple) else (form,)
        if not any(_is_of(value, kind) for kind in kinds):
            words = " or ".join(_WORDS.get(kind, kind.__name__) for kind in kinds)
            raise failure(f"{place} is {_short(value)}, expected {words}")
        return
    if not isinstance(value, dict):
        raise failure(f"{place} is {_short(value)}, expected an object")
    for name, inner in value.items():
        if name in form or "*" in form:
            check_form(inner, form.get(name, form.get("*")), f"{place}: {name}", failure)


_WORDS: Mapping[type[Any], str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _is_of(value: Any, kind: type[Any]) -> bool:
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind in (int, float) and isinstance(value, int):
        return abs(value) < 2**63
    return isinstance(value, kind) and (kind is not float or math.isfinite(value))


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield from (inner for inner in (value.values() if isinstance(value, dict) else value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_yaml(path: Path, failure: type[UserError]) -> dict[str, Any]:
    """Read the mapping that a YAML file holds.

    Args:
        path: The file.
        failure: What to raise.

    Raises:
        OSError: It cannot be read.
    """
    try:
        value = load_yaml(read_text(path))
    except ObjectError as error:
        raise failure(f"{path} {error}") from error
    if not isinstance(value, dict):
        raise failure(f"{path} is not a mapping of names to values but {_short(value)}")
    return value


def load_yaml(text: str, loader: Any = None) -> Any:
    """Parse the value that a YAML text holds.

    Args:
        text: The text.
        loader: A class of loaders that know no other types than YAML's own; that of the package if None.

    Raises:
        ObjectError: It is no YAML, or one that is too large, nested too deep, or refers to itself.
    """
    import yaml

    try:
        check_yaml(text)
        return yaml.load(text, loader or _loader())
    except (UserError, ObjectError):
        raise
    except yaml.YAMLError as error:
        raise ObjectError(f"is no YAML: {' '.join(str(error).split())}") from error
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise ObjectError(
            "is no YAML: a value is none of its type, as behind a tag such as !!int or in a date that no calendar has "
            f"({str(error).split('; use sys.')[0] or type(error).__name__})"
        ) from error


def check_yaml(text: str) -> None:
    """Raise ObjectError for a YAML text that is too large, nested too deep, or refers to itself."""
    import yaml

    if len(text) > _LARGEST_YAML:
        raise ObjectError(f"has {len(text):,} characters, expected at most {_LARGEST_YAML:,}: it is something else")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ObjectError("is not UTF-8") from error
    sizes: dict[str, int] = {}
    begun: list[tuple[str | None, int]] = []
    """Anchors of the collections around, and how many values there were before each."""
    found = 0
    for event in yaml.parse(text, _loader()):
        if isinstance(event, yaml.AliasEvent):
            if any(anchor == event.anchor for anchor, _ in begun):
                raise ObjectError(
                    f"refers to itself: *{event.anchor} on line {_line(event)} stands inside &{event.anchor}"
                )
            found += sizes.get(str(event.anchor), 1)
        elif isinstance(event, yaml.ScalarEvent):
            found += 1
            if "\0" in event.value:
                raise ObjectError(f"holds a character of the code 0 on line {_line(event)}")
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            begun.append((event.anchor, found))
            found += 1
            if len(begun) > _DEEPEST:
                raise ObjectError(f"is nested more than {_DEEPEST} deep, on line {_line(event)}")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = begun.pop()
            if anchor:
                sizes[anchor] = found - before
        if found > _NODES:
            raise ObjectError(f"stands for more than {_NODES:,} values by line {_line(event)}, expected fewer")


def _loader() -> Any:
    """Loader of YAML's own types in C, where PyYAML has that: it takes a tenth of the time."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
