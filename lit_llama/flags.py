"""Flags out of configurations, and lists and mappings on a command line.

A door takes one configuration, and its command line the fields of it.
"""

import difflib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import chain
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lit_llama.wording import param

Door = Callable[..., None]


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
    if not spelled:
        return message
    near = meant(found["value"], re.findall(r"'([^']+)'", spelled))
    return f"{param(found['key'])} is {found['value']}, expected {spelled}{f'; did you mean {near}?' if near else ''}"


def meant(value: str, choices: Sequence[str]) -> str | None:
    """Return the choice that a misspelled value, or one in other letters, is most like."""
    small = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(value.lower(), small, n=1)
    return small[close[0]] if close else None


_KINDS = {"int": "an integer", "float": "a number", "str": "text", "bool": "true or false", "dict": "NAME=VALUE pairs"}


_Held = Literal["text or texts", "texts", "numbers", "pairs", "literal texts"]


def _held(kind: Any) -> _Held | None:
    """What a parameter of this type holds several of.

    In a Sequence[str] every word is a text as it stands; in a list[str], [a,b] is two.
    """
    if get_origin(kind) is Sequence:
        return "literal texts"
    if get_origin(kind) is list:
        return "numbers" if get_args(kind)[0] in (int, float) else "texts"
    if get_origin(kind) is dict:
        return "pairs"
    inside: _Held | None = next(filter(None, map(_held, get_args(kind))), None)
    if inside == "texts" and str in get_args(kind):
        return "text or texts"
    return inside


def gathered(words: Sequence[str], actions: Sequence[Any]) -> list[str]:
    """Return a command line in which all that is said of a list or mapping stands behind one flag, as JSON.

    A shell makes several words of a pattern, and of several equal flags argparse would silently keep the last.
    """
    several = {
        option: kind
        for action in actions
        if (kind := _held(getattr(action, "_typehint", None)))
        for option in action.option_strings
        if not option.endswith("+")
    }
    given: dict[str, list[str]] = {}
    others: list[str] = []
    into = others
    for word in words:
        option, equals, value = word.partition("=")
        if option in several:
            into = given.setdefault(option, [])
            into += [value] if equals else []
        else:
            into = others if re.match("--?[a-zA-Z]", word) else into
            into.append(word)
    return others + [word for option, values in given.items() for word in _flag(option, values, several[option])]


def _flag(option: str, values: Sequence[str], held: _Held) -> list[str]:
    """The flag with all its values; what is no list, mapping or part of one stays as it is."""
    if held == "literal texts" and values:
        return [f"{option}={json.dumps(values)}"]
    if held == "pairs" and values and all(re.match(r"\w+=", value) for value in values):
        pairs = [part.partition("=") for value in values for part in re.split(r",\s*(?=\w+=)", value)]
        return [f"{option}={json.dumps({name: value for name, _, value in pairs})}"]
    if held == "numbers" and values and values != ["null"]:
        return [f"{option}=[{','.join(value.strip('[]') for value in values)}]"]
    alone = held != "texts" or values[:1] == ["null"] or "".join(values).startswith("[")
    if not values or (len(values) == 1 and alone):
        return [option, *values]
    lists = [value[1:-1].split(",") if re.fullmatch(r"\[.*\]", value) else [value] for value in values]
    return [f"{option}={json.dumps([*chain.from_iterable(lists)])}"]
