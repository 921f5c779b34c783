"""Flags out of configurations: a door takes one configuration, and its command line the fields of it."""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any, get_type_hints

Door = Callable[..., None]
SPELLED = {"data_kind": "as"}
"""Settings whose flag has another name, as Python keeps that word for itself; files of settings have their own."""


def config_flags(
    place: str,
    kind: type,
    *,
    only: Sequence[str] | None = None,
    without: Sequence[str] = (),
    required: Sequence[str] = (),
    fixed: Mapping[str, Any] | None = None,
    types: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    **defaults: Any,
) -> Callable[[Door], Door]:
    """Give a function the fields of a configuration as flags, in place of one parameter.

    Args:
        place: The parameter, which is of type `kind`.
        kind: A dataclass whose docstring says what each field is.
        only: Fields that are flags of this door, in this order; None for all, in that of the configuration.
        without: Fields that are none.
        required: Fields without a default here.
        fixed: Values of fields that are no flag of this door either.
        types: Types of flags that take less here than the field does.
        texts: Help of flags that differs here.
        defaults: Defaults that differ here.
    """
    kinds = get_type_hints(kind) | dict(types or {})
    fixed = dict(fixed or {})
    flags = {}
    by_name = {entry.name: entry for entry in fields(kind)}
    for entry in map(by_name.__getitem__, by_name if only is None else only):
        if entry.name in (*without, *fixed):
            continue
        default = entry.default if entry.default is not MISSING else inspect.Parameter.empty
        default = defaults.get(entry.name, inspect.Parameter.empty if entry.name in required else default)
        flags[entry.name] = inspect.Parameter(
            entry.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kinds[entry.name]
        )
    return expanded(place, flags, entries(kind) | dict(texts or {}), lambda values: kind(**fixed, **values))


def expanded(
    place: str,
    flags: Mapping[str, inspect.Parameter],
    help_of: Mapping[str, str],
    make: Callable[[Mapping[str, Any]], object],
) -> Callable[[Door], Door]:
    """Give a function flags in place of one of its parameters, which `make` makes of their values, and their help."""

    def decorate(function: Door) -> Door:
        def run(**arguments: Any) -> None:
            made = make({name: arguments.pop(name) for name in flags})
            function(**arguments, **{place: made})

        signature = inspect.signature(function)
        parameters: list[inspect.Parameter] = []
        for parameter in signature.parameters.values():
            parameters += flags.values() if parameter.name == place else [parameter]
        lines = "\n".join(f"    {name}: {help_of[name]}" for name in flags)
        run.__doc__ = re.sub(rf"(?m)^ {{4}}{place}: .*$", lambda _: lines, inspect.getdoc(function) or "")
        run.__name__, run.__qualname__, run.__module__ = function.__name__, function.__qualname__, function.__module__
        run.__wrapped__ = function  # type: ignore[attr-defined]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def entries(kind: type) -> dict[str, str]:
    """Return the description of each field in the docstring of a configuration, in a line."""
    found = re.findall(r"(?m)^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(kind) or "")
    return {name: " ".join(text.split()) for name, text in found}


_WRONG = re.compile(
    r'(?s:.*)Parser key "(?P<key>[\w.]+)":\s.*?(?:Given value|Got value): (?P<value>[^\n]*)\Z', re.DOTALL
)


def plain(message: str) -> str:
    """Return the values that a parameter may have, in one line, where the parser lists what each of its types has
    against a value.
    """
    if not (found := _WRONG.search(message)):
        return message
    kinds = re.findall(r"Expected (?:a )?(typing\.Literal\[.*?\]|<class '\w+'>)", message)
    names = [re.sub(r"typing\.Literal\[(.*)\]|<class '(\w+)'>", r"\1\2", kind) for kind in dict.fromkeys(kinds)]
    spelled = " or ".join(_KINDS.get(name, name) for name in names if name != "NoneType" or len(names) == 1)
    return (
        f"--{SPELLED.get(found['key'], found['key'])} is {found['value']}, expected {spelled}" if spelled else message
    )


_KINDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "dict": "NAME=VALUE pairs"}
