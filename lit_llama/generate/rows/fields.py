"""Values of a recipe, each held against what it has to be; errors name its place.

Names that its templates and expressions use are found without running them.
"""

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from lit_llama.errors import UserError
from lit_llama.objects import ObjectError, load_yaml

_GLOBALS = {"namespace", "dict", "raise_exception", "strftime_now", "range", "lipsum", "cycler", "joiner"}


def template_names(source: str, where: str) -> set[str]:
    """Return the names that a template reads and does not set itself.

    Raises:
        UserError: Its syntax is wrong.
    """
    from jinja2 import Environment, TemplateError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return set(meta.find_undeclared_variables(environment.parse(source))) - _GLOBALS
    except TemplateError as error:
        raise UserError(f"{where}: the template is wrong: {error}") from error


def expression_names(source: str, where: str) -> set[str]:
    """Return the names that an expression reads.

    Raises:
        UserError: Its syntax is wrong.
    """
    return template_names(as_template(source), where)


def as_template(expression: str) -> str:
    """Return a template that writes the value of an expression as JSON."""
    return "{{ (" + expression + ") | tojson }}"


RESERVED = ("parameters", "row")
"""Names that no column or source may have."""


def load_recipe(text: str, place: str) -> dict[str, Any]:
    """Read a recipe's text."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice, of which the last would silently win."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise UserError(f"{place}: line {node.start_mark.line + 1}: the key {twice[0]} stands there twice")
            return super().construct_mapping(node, deep)

    try:
        value = load_yaml(text, Loader)
    except ObjectError as error:
        raise UserError(f"{place} {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{place} holds {word(value)}, expected a recipe with columns and output")
    return value


def check_keys(value: Any, keys: Sequence[str], place: str, what: str) -> None:
    """Raise UserError for a key that is not known there."""
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {word(value)}, expected the settings of a {what}")
    for key in value:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, 1)
            raise UserError(
                f"{place}: a {what} has no {key!r}"
                + (f"; did you mean {close[0]}?" if close else f": {', '.join(keys)}")
            )


def check_names(names: set[str], known: set[str], where: str) -> None:
    """Raise UserError for a name that is not known there."""
    for name in sorted(names - known):
        close = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {close[0]}?" if close else f"; known there are {', '.join(sorted(known - {*RESERVED}))}"
        raise UserError(f"{where}: there is no column or source {name}{hint}")


def check_name(name: Any, where: str) -> None:
    """Raise UserError for what cannot be the name of a column or source."""
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_") or name in RESERVED:
        raise UserError(f"{where}: {name!r} is no name for a column or source: letters, digits and _ make one")


def count(value: Any, where: str) -> int:
    """Read a number of 1 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{where} is {value!r}, expected 1 or more")
    return value


def group(kind: type[Any], settings: Any, where: str, **more: Any) -> Any:
    """Read a frozen group of settings out of a mapping, each value of the kind that it has to be."""
    names = {item.name: item for item in fields(kind) if item.name not in more}
    check_keys(settings, list(names), where, kind.__name__.lower())
    values: dict[str, Any] = {}
    for key, value in settings.items():
        value = tuple(value) if isinstance(value, list) else value
        expected = _spelled(names[key].type)
        if not _is_of(value, expected):
            raise UserError(f"{where}.{key} is {value!r}, expected {_EXPECTED.get(expected, expected)}")
        values[key] = value
    return kind(**values, **more)


_EXPECTED = {"tuple[str, ...] | None": "a list of texts, or null", "tuple[str, ...]": "a list of texts"}


def _spelled(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("typing.")


def _is_of(value: Any, kind: str) -> bool:
    if value is None:
        return "None" in kind
    if kind.startswith("tuple"):
        return isinstance(value, tuple) and all(isinstance(entry, str) for entry in value)
    if kind.startswith("Literal"):
        return isinstance(value, str) and f"{value!r}" in kind.replace('"', "'")
    if kind.startswith("bool") or isinstance(value, bool):
        return kind.startswith("bool") and isinstance(value, bool)
    kinds: dict[str, Any] = {"int": int, "float": (int, float), "str": str}
    return isinstance(value, kinds[kind.split(" ")[0]])


def word(value: Any) -> str:
    """Name the kind of a value, in words of JSON."""
    from lit_llama.text.read.raw import kind

    return "nothing" if value is None else kind(value)
