"""A recipe: from which sources, by which columns and filters, rows are made; checked before anything runs."""

import difflib
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, cast, get_args

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.rows.fields import RESERVED, check_keys, check_name, check_names, count, group, load_yaml, word
from lit_llama.generate.rows.names import expression_names, template_names

Kind = Literal["sample", "template", "expression", "prompt", "user_turn", "call", "check", "require", "choose"]
Output = Literal["alpaca", "messages", "preference"]
_BESIDE: Mapping[str, tuple[str, ...]] = {"prompt": ("system", "schema", "sampling"), "user_turn": ("sampling",)}
_PARTS = {"alpaca": ("instruction", "input", "output"), "preference": ("prompt", "chosen", "rejected")}
_SAMPLING = {
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("min_new_tokens", "max_new_tokens", "stop", "n"),
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows or passages that attempts are given.

    Args:
        name: Columns know it by this.
        rows: A file of rows, of any format that prepare/ reads.
        documents: Files of text, Markdown or HTML, or folders of such.
        length: Characters of a passage, at most.
        draw: Rows for each attempt; more than 1 come as a list.
        accepted: How many of those are rows made before, once there are any.
        order: random; in_turn, again and again; or once, which ends the run after the last one.
    """

    name: str
    rows: str | None = None
    documents: tuple[str, ...] | None = None
    length: int = 2000
    draw: int = 1
    accepted: int = 0
    order: Literal["random", "in_turn", "once"] = "random"


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


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What becomes no row; each is counted, and its rows are kept beside with the reason.

    Args:
        rouge: Rows whose prompt has this ROUGE-L or more with an earlier one, as Self-Instruct has it; null for any.
        rouge_of: Columns that are compared instead of the prompt.
        near_duplicates: Rows that are nearly those of before: 0.8 of their character 5-grams are the same.
        seeds: Rows are compared with the sources, too.
        refusals: Answers that refuse.
        media: Prompts about images, files or links, which the student will never see.
        damaged: Text of a wrong encoding.
        min_characters: Of an answer.
        max_characters: Of an answer.
        scripts: Most letters of prompt and answer are of one of these, such as Latin; null for any.
    """

    rouge: float | None = 0.7
    rouge_of: tuple[str, ...] = ()
    near_duplicates: bool = True
    seeds: bool = True
    refusals: bool = True
    media: bool = True
    damaged: bool = True
    min_characters: int = 1
    max_characters: int = 20_000
    scripts: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What `read_recipe` gives.

    Attributes:
        name: Of its file.
        place: Of its file, for messages.
        rows: Accepted rows that are wanted.
        give_up_after: Attempts in a row that are all rejected, after which nothing more is tried.
        parameters: Texts that templates find as `parameters`.
        output: Templates of the row.
        digest: sha256 of all that decides about rows, but how many.
    """

    name: str
    place: str
    rows: int
    give_up_after: int
    parameters: Mapping[str, str]
    sources: Sequence[Source]
    columns: Sequence[Column]
    kind: Output
    output: Mapping[str, Any]
    filters: Filters
    digest: str


def shipped() -> list[str]:
    """Names of the recipes that come with the library."""
    return sorted(path.name.removesuffix(".yaml") for path in _home().iterdir() if path.name.endswith(".yaml"))


def _home() -> Any:
    return files("lit_llama.generate.rows").joinpath("recipes")


def read_recipe(
    recipe: str | Path,
    *,
    seeds: str | Path | None = None,
    documents: Sequence[str] | None = None,
    parameters: Mapping[str, str] | None = None,
) -> Recipe:
    """Read a recipe and check all of it that can be checked without a model.

    Args:
        recipe: A file, or the name of one that ships.
        seeds: Rows of its source `seeds`.
        documents: Files of its source `documents`.
        parameters: In place of those it has.

    Raises:
        UserError: Something is wrong; the message names the place in the recipe.
    """
    text, place = _text(str(recipe))
    value = load_yaml(text, place)
    check_keys(
        value, ("rows", "give_up_after", "parameters", "sources", "columns", "output", "filters"), place, "recipe"
    )
    given = _parameters(value.get("parameters"), parameters or {}, place)
    sources = _sources(value.get("sources"), place, None if seeds is None else str(seeds), documents)
    columns = _columns(value.get("columns"), place, {source.name for source in sources}, given)
    kind, output = _output(value.get("output"), place)
    names = {*RESERVED, *(source.name for source in sources), *(column.name for column in columns)}
    for where, template in _templates(output):
        check_names(template_names(template, f"{place}: output.{where}"), names, f"{place}: output.{where}")
    filters = group(Filters, value.get("filters") or {}, f"{place}: filters")
    _check_filters(filters, columns, place)
    decided = {key: entry for key, entry in value.items() if key not in ("rows", "give_up_after")}
    asked = [decided, dict(given), seeds and str(seeds), documents and list(documents)]
    return Recipe(
        name=Path(str(recipe)).name.removesuffix(".yaml"),
        place=place,
        rows=count(value.get("rows", 100), f"{place}: rows"),
        give_up_after=count(value.get("give_up_after", 200), f"{place}: give_up_after"),
        parameters=given,
        sources=sources,
        columns=columns,
        kind=kind,
        output=output,
        filters=filters,
        digest=hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest(),
    )


def _text(recipe: str) -> tuple[str, str]:
    if recipe in shipped():
        return _home().joinpath(f"{recipe}.yaml").read_text("utf-8"), recipe
    path = Path(recipe)
    if not path.is_file():
        close = difflib.get_close_matches(recipe, shipped(), 1)
        hint = f"; did you mean {close[0]}?" if close else f"; those that ship are {', '.join(shipped())}"
        raise UserError(f"{recipe} is no recipe and no file{hint}")
    try:
        return path.read_text("utf-8"), recipe
    except UnicodeDecodeError as error:
        raise UserError(f"{recipe} is not UTF-8 at byte {error.start}") from error


def _parameters(value: Any, given: Mapping[str, str], place: str) -> dict[str, str]:
    value = value or {}
    if not isinstance(value, dict):
        raise UserError(f"{place}: parameters: found {word(value)}, expected names with their values")
    if unknown := [name for name in given if name not in value]:
        raise UserError(f"{place} has no parameter {unknown[0]!r}; it has {', '.join(value) or 'none'}")
    found = {**value, **given}
    if missing := [name for name, entry in found.items() if entry is None]:
        raise UserError(f"{place} needs the parameter {missing[0]}: give it as {missing[0]}=VALUE with --parameters")
    return {str(name): str(entry) for name, entry in found.items()}


def _sources(value: Any, place: str, seeds: str | None, documents: Sequence[str] | None) -> list[Source]:
    value = value or {}
    if not isinstance(value, dict):
        raise UserError(f"{place}: sources: found {word(value)}, expected names with their settings")
    for name, given in (("seeds", seeds), ("documents", documents)):
        if given is not None and name not in value:
            raise UserError(f"{place} has no source {name}, so --{name} would be of no use")
    found = []
    for name, settings in value.items():
        where = f"{place}: sources.{name}"
        check_name(name, where)
        settings = dict(settings) if isinstance(settings, dict) else settings
        if name == "seeds" and seeds is not None:
            settings["rows"] = seeds
        if name == "documents" and documents is not None:
            settings["documents"] = list(documents)
        elif isinstance(settings, dict) and isinstance(settings.get("documents"), str):
            settings["documents"] = [settings["documents"]]
        source = group(Source, settings, where, name=name)
        if (source.rows is None) == (source.documents is None):
            if source.rows is None and name in ("seeds", "documents"):
                raise UserError(f"{where}: nothing is named; give files with --{name}")
            raise UserError(f"{where}: expected either rows or documents")
        for key in ("draw", "length"):
            count(getattr(source, key), f"{where}.{key}")
        if not 0 <= source.accepted <= source.draw:
            raise UserError(f"{where}.accepted is {source.accepted}, expected 0 to draw, {source.draw}")
        found.append(source)
    return found


def _columns(value: Any, place: str, sources: set[str], parameters: Mapping[str, str]) -> list[Column]:
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
    """What stands at `package.module:name`, or at `path/to/file.py:name`.

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
    from lit_llama.generate.rows.schema import Validator

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


def _output(value: Any, place: str) -> tuple[Output, Mapping[str, Any]]:
    kinds = get_args(Output)
    check_keys(value, kinds, f"{place}: output", "output")
    if len(value) != 1:
        raise UserError(f"{place}: output: found {len(value)} kinds, expected one of {', '.join(kinds)}")
    (kind, parts), *_ = value.items()
    where = f"{place}: output.{kind}"
    if kind == "messages":
        if not isinstance(parts, list) or not parts:
            raise UserError(f"{where}: found {word(parts)}, expected a list of role and content")
        for index, message in enumerate(parts):
            check_keys(message, ("role", "content"), f"{where}[{index}]", "message")
            if message.get("role") not in ("system", "user", "assistant"):
                raise UserError(f"{where}[{index}].role is {message.get('role')!r}, expected system, user or assistant")
        if parts[-1]["role"] != "assistant":
            raise UserError(f"{where} ends with the {parts[-1]['role']}, expected the assistant")
        parts = {"messages": parts}
    else:
        check_keys(parts, _PARTS[kind], where, f"row of {kind}")
        needed = set(_PARTS[kind]) - {"input"}
        if missing := sorted(needed - parts.keys()):
            raise UserError(f"{where} has no {missing[0]}")
    for name, template in _templates(parts):
        if not isinstance(template, str):
            raise UserError(f"{where}.{name} is {word(template)}, expected a template")
    return kind, parts


def _templates(output: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The templates of a row, each with its place."""
    if "messages" in output:
        return [(f"messages[{i}]", message.get("content")) for i, message in enumerate(output["messages"])]
    return list(output.items())


def _check_filters(filters: Filters, columns: Sequence[Column], place: str) -> None:
    from lit_llama.text.report.characters import SCRIPTS

    if filters.rouge is not None and not 0 < filters.rouge <= 1:
        raise UserError(f"{place}: filters.rouge is {filters.rouge}, expected a number above 0 and at most 1, or null")
    check_names(set(filters.rouge_of), {column.name for column in columns}, f"{place}: filters.rouge_of")
    if not 0 <= filters.min_characters <= filters.max_characters:
        raise UserError(f"{place}: filters.min_characters is {filters.min_characters}, expected 0 to max_characters")
    if wrong := [name for name in filters.scripts or () if name not in SCRIPTS]:
        raise UserError(f"{place}: filters.scripts has {wrong[0]!r}, expected some of {', '.join(SCRIPTS)}")


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
