"""Settings given as keyword arguments: names, types and choices checked as those of a command line."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from os import PathLike, fspath
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lit_llama.errors import UserError
from lit_llama.flags import meant, plain
from lit_llama.habits import nearest

T = TypeVar("T")


def names_of(kind: type) -> list[str]:
    """Return the names of the fields of a configuration."""
    return [entry.name for entry in fields(kind)]


def check_names(given: Collection[str], known: Collection[str], what: str) -> None:
    """Raise UserError for a name that is not known, with the nearest one.

    Args:
        given: Names.
        known: All there are.
        what: A word for one of them.
    """
    for name in given:
        if name not in known:
            meant = nearest(name, known)
            hint = f"did you mean {meant}?" if meant else f"there are: {', '.join(known)}"
            raise UserError(f"is not {what}", parameter=name, remedy=hint)


def settled(kind: type[T], settings: Mapping[str, Any]) -> T:
    """Build a configuration of settings by name, each checked as a flag is.

    Args:
        kind: A dataclass such as RunConfig.
        settings: Its fields; paths as texts, groups as dictionaries or objects.

    Raises:
        UserError: A name is unknown, or a value not of the type or among the choices of its field.
    """
    import jsonargparse

    hints = get_type_hints(kind)
    check_names(settings, names_of(kind), f"a setting of {kind.__name__}")
    for name, value in settings.items():
        if is_dataclass(group := hints[name]) and isinstance(group, type) and isinstance(value, Mapping):
            check_names(value, names_of(group), f"a setting of {group.__name__}")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        parsed = parser.parse_object({name: written(value) for name, value in settings.items()})
    except jsonargparse.ArgumentError as error:
        raise UserError(plain(str(error))) from None
    return kind(**vars(parser.instantiate(parsed)))


def written(value: Any) -> Any:
    """Return a value as a file of settings would hold it."""
    if isinstance(value, PathLike):
        return fspath(value)
    if is_dataclass(value) and not isinstance(value, type):
        return written(asdict(value))
    if isinstance(value, Mapping):
        return {key: written(inner) for key, inner in value.items()}
    if isinstance(value, Sequence | frozenset | set) and not isinstance(value, str):
        return [written(inner) for inner in value]
    return value


def check_choice(name: str, value: object, kind: Any) -> None:
    """Raise UserError for a value that is not among the choices of its type.

    Args:
        name: Of the parameter.
        value: As given.
        kind: A Literal, or a union of several.
    """
    if value not in (known := _choices(kind)):
        near = meant(value, [choice for choice in known if isinstance(choice, str)]) if isinstance(value, str) else None
        remedy = f"did you mean {near}?" if near else None
        raise UserError(parameter=name, value=value, expected=", ".join(map(repr, known)), remedy=remedy)


def _choices(kind: Any) -> list[object]:
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for part in get_args(kind) for choice in _choices(part)] or [None]
