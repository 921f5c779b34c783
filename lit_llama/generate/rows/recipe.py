"""A recipe: from which sources, by which columns and filters, rows are made; checked before anything runs.

Its judge is columns behind its own that have the teacher score the row, or compare the two of a pair.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from lit_llama.errors import UserError
from lit_llama.generate.rows.columns import Column, read_columns
from lit_llama.generate.rows.fields import (
    RESERVED,
    check_keys,
    check_name,
    check_names,
    count,
    group,
    load_recipe,
    template_names,
    word,
)
from lit_llama.objects import ObjectError, read_text
from lit_llama.wording import param

_SCORE = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 300},
        "score": {"type": "integer", "minimum": 1, "maximum": 10},
    },
    "required": ["reason", "score"],
    "additionalProperties": False,
}
_BETTER = {
    "type": "object",
    "properties": {"better": {"enum": ["A", "B"]}},
    "required": ["better"],
    "additionalProperties": False,
}
_DRAWN = {"temperature": 0, "max_new_tokens": 160}


@dataclass(frozen=True, kw_only=True)
class Judge:
    """Conditions that a row has to fulfil in the eyes of the teacher.

    Args:
        criterion: An answer is to be this; a template.
        at_least: Score from 1 to 10 that a row needs. Of a pair, the chosen answer has to be better in both orders.
    """

    criterion: str = "correct, complete and to the point"
    at_least: int = 7

    def check(self, where: str) -> None:
        """Raise UserError for a score that is none."""
        if not 1 <= self.at_least <= 10:
            raise UserError(f"{where}.at_least is {self.at_least}, expected a score from 1 to 10")


def judge_columns(judge: Judge, output: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of the columns `judge` and `judged`, and of `judge_turned` where pairs are compared.

    Args:
        judge: What is asked for.
        output: Templates of the row.
    """
    if "chosen" in output:
        asked, chosen, rejected = output["prompt"], output["chosen"], output["rejected"]
        return [
            _column("judge", _comparison(judge, asked, chosen, rejected), _BETTER),
            _column("judge_turned", _comparison(judge, asked, rejected, chosen), _BETTER),
            {"name": "judged", "require": "judge.better == 'A' and judge_turned.better == 'B'"},
        ]
    if "messages" in output:
        *before, last = output["messages"]
        asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in before)
        answer = last["content"]
    else:
        asked, answer = "\n\n".join(filter(None, (output["instruction"], output.get("input")))), output["output"]
    words = (
        f"Task:\n{asked}\n\nAnswer:\n{answer}\n\nHow {judge.criterion} is this answer to the task? Say in one sentence"
    )
    words += " why, and give a score from 1, for an answer that is of no use, to 10, for one that cannot be better."
    return [
        _column("judge", words, _SCORE),
        {"name": "judged", "require": f"judge.score >= {judge.at_least}"},
    ]


def _comparison(judge: Judge, asked: str, first: str, second: str) -> str:
    both = f"Task:\n{asked}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
    return f"{both}Which answer is more {judge.criterion}?"


def _column(name: str, words: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "prompt": words, "schema": schema, "sampling": _DRAWN}


Output = Literal["alpaca", "messages", "preference"]
_KEYS = ("rows", "give_up_after", "parameters", "sources", "columns", "output", "judge", "filters")
_PARTS = {"alpaca": ("instruction", "input", "output"), "preference": ("prompt", "chosen", "rejected")}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Rows or passages that attempts are given.

    Args:
        name: Columns know it by this.
        rows: A file of rows, of any format that prepare/ reads.
        documents: Files of text, Markdown, HTML or PDF, or folders of such.
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
class Filters:
    """Filters of rows; rejections are counted, and their rows are kept beside with the reason.

    Args:
        rouge: Rows whose prompt has this ROUGE-L or more with an earlier one, as Self-Instruct has it; null for any.
        compare: Columns that are compared instead of the prompt, by rouge and near_duplicates.
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
    compare: tuple[str, ...] = ()
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
    """Recipe that `read_recipe` gives.

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
    """Return the names of the recipes that come with the library."""
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
    value = load_recipe(text, place)
    check_keys(value, _KEYS, place, "recipe")
    given = _parameters(value.get("parameters"), parameters or {}, place)
    sources = _sources(value.get("sources"), place, None if seeds is None else str(seeds), documents)
    kind, output = _output(value.get("output"), place)
    listed = value.get("columns")
    if "judge" in value and isinstance(listed, list):
        judge = group(Judge, value["judge"] or {}, f"{place}: judge")
        judge.check(f"{place}: judge")
        listed = [*listed, *judge_columns(judge, output)]
    columns = read_columns(listed, place, {source.name for source in sources}, given)
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
        return read_text(path), recipe
    except ObjectError as error:
        raise UserError(f"{recipe} {error}") from error


def _parameters(value: Any, given: Mapping[str, str], place: str) -> dict[str, str]:
    value = value or {}
    if not isinstance(value, dict):
        raise UserError(f"{place}: parameters: found {word(value)}, expected names with their values")
    if unknown := [name for name in given if name not in value]:
        raise UserError(f"{place} has no parameter {unknown[0]!r}; it has {', '.join(value) or 'none'}")
    found = {**value, **given}
    if missing := [name for name, entry in found.items() if entry is None]:
        raise UserError(
            f"{place} needs the parameter {missing[0]}: give it as {missing[0]}=VALUE with {param('parameters')}"
        )
    return {str(name): str(entry) for name, entry in found.items()}


def _sources(value: Any, place: str, seeds: str | None, documents: Sequence[str] | None) -> list[Source]:
    value = value or {}
    if not isinstance(value, dict):
        raise UserError(f"{place}: sources: found {word(value)}, expected names with their settings")
    for name, given in (("seeds", seeds), ("documents", documents)):
        if given is not None and name not in value:
            raise UserError(f"{place} has no source {name}, so {param(name)} would be of no use")
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
                raise UserError(f"{where}: nothing is named; give files with {param(name)}")
            raise UserError(f"{where}: expected either rows or documents")
        for key in ("draw", "length"):
            count(getattr(source, key), f"{where}.{key}")
        if not 0 <= source.accepted <= source.draw:
            raise UserError(f"{where}.accepted is {source.accepted}, expected 0 to draw, {source.draw}")
        found.append(source)
    return found


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
    from lit_llama.text.inspect.characters import SCRIPTS

    if filters.rouge is not None and not 0 < filters.rouge <= 1:
        raise UserError(f"{place}: filters.rouge is {filters.rouge}, expected a number above 0 and at most 1, or null")
    check_names(set(filters.compare), {column.name for column in columns}, f"{place}: filters.compare")
    if not 0 <= filters.min_characters <= filters.max_characters:
        raise UserError(f"{place}: filters.min_characters is {filters.min_characters}, expected 0 to max_characters")
    if wrong := [name for name in filters.scripts or () if name not in SCRIPTS]:
        raise UserError(f"{place}: filters.scripts has {wrong[0]!r}, expected some of {', '.join(SCRIPTS)}")
