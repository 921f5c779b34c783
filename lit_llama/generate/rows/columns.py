"""Columns of a recipe: of which kind each is, what it uses, and whether that stands above it."""

import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lit_llama.errors import UserError
from lit_llama.generate.engine.constraint import Constraint, TokenTable
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.rows.fields import (
    RESERVED,
    check_keys,
    check_name,
    check_names,
    expression_names,
    template_names,
    word,
)
from lit_llama.text.read.raw import STRICTEST, explain

_END = 256


class Validator:
    """A JSON schema.

    Args:
        schema: It.

    Raises:
        UserError: It is faulty, nothing satisfies it, or it has parts that a model could not be kept to.
        ResourceError: llguidance is not installed.
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.schema = schema
        self._constraint = Constraint.json_schema(schema, _bytes())

    def read(self, text: str) -> tuple[Any, str]:
        """Read the value of an answer, and why it is none; "" if it is one.

        The order in which an object has its properties is that of the schema: endpoints are free in it.
        """
        try:
            value = STRICTEST.decode(text.strip())
        except (ValueError, RecursionError) as error:
            return None, f"no JSON: {explain(error)}"
        value = _ordered(value, self.schema)
        matcher = self._constraint.matcher()
        for position, byte in enumerate(data := json.dumps(value, ensure_ascii=False).encode("utf-8", "replace")):
            if not matcher.accept(byte):
                found = data[max(0, position - 20) : position + 20].decode("utf-8", "replace")
                return None, f"not of the schema near {found!r}"
        return (value, "") if matcher.accept(_END) else (None, "not of the schema at its end")


@cache
def _bytes() -> TokenTable:
    """A vocabulary of single bytes and an end."""
    tokens = [bytes([byte]) for byte in range(256)]
    return TokenTable([*tokens, b"<end>"], [_END], {_END}, lambda text: list(text.encode()))


def _ordered(value: Any, schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return value
    if isinstance(value, list):
        return [_ordered(entry, schema.get("items")) for entry in value]
    properties = schema.get("properties")
    if not isinstance(value, dict) or not isinstance(properties, Mapping):
        return value
    names = [*(name for name in properties if name in value), *(name for name in value if name not in properties)]
    return {name: _ordered(value[name], properties.get(name)) for name in names}


Kind = Literal["sample", "template", "expression", "prompt", "user_turn", "call", "check", "require", "choose"]
_BESIDE: Mapping[str, tuple[str, ...]] = {"prompt": ("system", "schema", "sampling"), "user_turn": ("sampling",)}
_SAMPLING = {
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_new_tokens", "max_new_tokens", "stop", "n"),
}


@dataclass(frozen=True, kw_only=True)
class Column:
    """A value that every attempt gets.

    Args:
        name: Later columns know it by this.
        kind: How it comes about.
        value: What the recipe says of it: a template, an expression, values with weights, or a callable's import path.
        system: Template of the system message.
        schema: JSON schema of the answer, which then is a value and no text.
        sampling: How the answer is drawn.
    """

    name: str
    kind: Kind
    value: Any
    system: str = ""
    schema: Mapping[str, Any] | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.95, max_new_tokens=512))


def read_columns(value: Any, place: str, sources: set[str], parameters: Mapping[str, str]) -> list[Column]:
    """Read the columns of a recipe, each of which uses only sources and columns above it.

    Args:
        value: The list that the recipe has.
        place: Of the recipe, for messages.
        sources: Names of its sources.
        parameters: Its parameters.

    Raises:
        UserError: One is wrong, names something that is not there, or is part of a circle.
    """
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: columns: found {word(value)}, expected a list of columns")
    columns: list[Column] = []
    needs: list[tuple[str, set[str]]] = []
    for index, settings in enumerate(value):
        where = f"{place}: columns[{index}]"
        if isinstance(settings, dict) and isinstance(settings.get("name"), str):
            where += f" ({settings['name']})"
        column = _column(settings, where, parameters)
        if column.name in {*sources, *(other.name for other in columns)}:
            raise UserError(f"{where}: there is a column or source {column.name} already")
        columns.append(column)
        needs.append((where, _needed(column, where)))
    order = [column.name for column in columns]
    _check_circles(place, {name: names for name, (_, names) in zip(order, needs, strict=True)})
    for index, (where, names) in enumerate(needs):
        known = {*RESERVED, *sources, *order[:index]}
        if later := sorted(names & {*order[index:]}):
            raise UserError(f"{where} uses {later[0]}, which stands below it: columns are made in their order")
        check_names(names, known, where)
    return columns


def _column(settings: Any, where: str, parameters: Mapping[str, str]) -> Column:
    kinds = get_args(Kind)
    check_keys(settings, ("name", *kinds, "system", "schema", "sampling"), where, "column")
    if not isinstance(settings.get("name"), str):
        raise UserError(f"{where}: has no name")
    check_name(settings["name"], where)
    given = [kind for kind in kinds if kind in settings]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(f"{where}: found {found}, expected exactly one of {', '.join(kinds)}")
    kind = cast(Kind, given[0])
    for key in ("system", "schema", "sampling"):
        if key in settings and key not in _BESIDE.get(kind, ()):
            raise UserError(f"{where}: {key} is not for a column that is a {kind}")
    value = _value(kind, settings[kind], where, parameters)
    more: dict[str, Any] = {}
    if "schema" in settings:
        more["schema"] = _schema(settings["schema"], where)
    if "sampling" in settings:
        more["sampling"] = _sampling(settings["sampling"], where)
    if "system" in settings:
        if not isinstance(settings["system"], str):
            raise UserError(f"{where}: system is {word(settings['system'])}, expected a template")
        more["system"] = settings["system"]
    return Column(name=settings["name"], kind=kind, value=value, **more)


def _value(kind: Kind, value: Any, where: str, parameters: Mapping[str, str]) -> Any:
    if kind == "sample":
        return _weights(value, where)
    if kind == "choose":
        check_keys(value, ("from", "by", "which"), f"{where}.choose", "choice")
        if value.get("which", "best") not in ("best", "worst"):
            raise UserError(f"{where}.choose.which is {value['which']!r}, expected best or worst")
        if not isinstance(value.get("from"), str):
            raise UserError(f"{where}.choose: names no column to choose from")
        path = _path(value.get("by"), f"{where}.choose.by", parameters)
        return {"from": value["from"], "by": path, "which": value.get("which", "best")}
    if not isinstance(value, str) or (kind != "user_turn" and not value.strip()):
        raise UserError(f"{where}: {kind} is {word(value)}, expected text")
    return _path(value, f"{where}.{kind}", parameters) if kind in ("call", "check") else value


def _weights(value: Any, where: str) -> list[tuple[Any, float]]:
    pairs: list[tuple[Any, float]] = []
    if isinstance(value, dict | list):
        pairs = list(value.items()) if isinstance(value, dict) else [(entry, 1.0) for entry in value]
    if not pairs:
        raise UserError(f"{where}: sample is {word(value)}, expected values, or values with their weights")
    for entry, weight in pairs:
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < float("inf"):
            raise UserError(f"{where}: sample: the weight of {entry!r} is {weight!r}, expected a number above 0")
    return pairs


def _path(value: Any, where: str, parameters: Mapping[str, str]) -> str:
    """The import path of a callable, which is looked up."""
    if isinstance(value, str) and value.startswith("parameters."):
        name = value.removeprefix("parameters.")
        if name not in parameters:
            raise UserError(f"{where}: there is no parameter {name}")
        value = parameters[name]
    if not isinstance(value, str):
        raise UserError(f"{where} is {word(value)}, expected a callable as package.module:name")
    load_callable(value, where)
    return value


def load_callable(path: str, where: str) -> Callable[..., Any]:
    """Load the object at `package.module:name`, or at `path/to/file.py:name`.

    Raises:
        UserError: Nothing does, or it cannot be called.
    """
    module, _, name = path.rpartition(":")
    if not module or not name:
        raise UserError(f"{where} is {path!r}, expected a callable as package.module:name or file.py:name")
    try:
        if module.endswith(".py"):
            specification = importlib.util.spec_from_file_location(f"recipe_{Path(module).stem}", module)
            if specification is None or specification.loader is None or not Path(module).is_file():
                raise UserError(f"{where}: there is no file {module}")
            found = importlib.util.module_from_spec(specification)
            specification.loader.exec_module(found)
        else:
            found = importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:  # of code that somebody wrote
        raise UserError(f"{where}: {module} cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(found, name, None)
    if not callable(function):
        raise UserError(f"{where}: {module} has no callable {name}")
    return cast(Callable[..., Any], function)


def _schema(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: schema is {word(value)}, expected a JSON schema")
    from lit_llama.generate.rows.columns import Validator

    try:
        Validator(value)
    except UserError as error:
        if type(error) is not UserError:  # llguidance is missing
            raise
        raise UserError(f"{where}: {error}") from error
    return value


def _sampling(value: Any, where: str) -> Sampling:
    check_keys(value, sorted(_SAMPLING), f"{where}.sampling", "sampling")
    default = {
        item.name: getattr(Column(name="", kind="prompt", value="").sampling, item.name) for item in fields(Sampling)
    }
    try:
        return Sampling(**default | value)
    except (UserError, TypeError) as error:
        raise UserError(f"{where}.sampling: {str(error).removeprefix('--')}") from error


def _needed(column: Column, where: str) -> set[str]:
    """Names that a column uses."""
    if column.kind in ("template", "prompt", "user_turn"):
        return template_names(column.value, where) | template_names(column.system, f"{where}.system")
    if column.kind in ("expression", "require"):
        return expression_names(column.value, where)
    return {column.value["from"]} if column.kind == "choose" else set()


def _check_circles(place: str, needs: Mapping[str, set[str]]) -> None:
    for start in needs:
        path = [start]
        while len(path) <= len(needs):
            following = sorted(needs[path[-1]] & needs.keys())
            if start in following:
                raise UserError(f"{place}: columns: a circle: {' needs '.join([*path, start])}")
            if not following:
                break
            path.append(following[0])
