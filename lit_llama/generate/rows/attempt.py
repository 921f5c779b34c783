"""The columns of one attempt, one after another: from its sources to a row, or to the reason why there is none."""

import json
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from lit_llama.errors import CheckpointError, UserError
from lit_llama.generate.engine.request import MAX_SEED
from lit_llama.generate.rows.columns import Column, Validator, load_callable
from lit_llama.generate.rows.fields import as_template
from lit_llama.generate.rows.recipe import Recipe
from lit_llama.generate.rows.sources import Entry
from lit_llama.generate.rows.teacher import Ask, Reply
from lit_llama.text.prompts.template import Sandbox

Values = dict[str, Any]


@dataclass(kw_only=True)
class Attempt:
    """An attempt at a row.

    Attributes:
        number: From 0.
        values: Of sources and columns, by their names.
        lineage: Where the entries of each source stand.
        prompts: Messages that each column put to the teacher.
        texts: Answers that came.
        tokens: Of answers.
        prompt_tokens: Of prompts.
        seeds: Of each column's draws.
        row: What it came to.
        rejected: Name of the filter that rejected it, and why.
    """

    number: int
    values: Values = field(default_factory=dict)
    lineage: dict[str, list[str]] = field(default_factory=dict)
    prompts: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    tokens: int = 0
    prompt_tokens: int = 0
    seeds: dict[str, int] = field(default_factory=dict)
    row: dict[str, Any] | None = None
    rejected: tuple[str, str] | None = None


class Rejected(Exception):
    """Rejection of an attempt, which comes to nothing.

    Args:
        by: Name of the filter.
        why: For people.
    """

    def __init__(self, by: str, why: str) -> None:
        super().__init__(why)
        self.by = by


class Columns:
    """Columns of a recipe, which run one after another.

    Args:
        recipe: It.
        seed: Of all draws.
    """

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self._recipe, self._seed = recipe, seed
        self._validators = {c.name: Validator(c.schema) for c in recipe.columns if c.schema is not None}
        self._callables: dict[str, Callable[..., Any]] = {}
        for column in recipe.columns:
            where = f"{recipe.place}: column {column.name}"
            if column.kind in ("call", "check"):
                self._callables[column.name] = load_callable(column.value, where)
            elif column.kind == "choose":
                self._callables[column.name] = load_callable(column.value["by"], where)
        self._sandbox = Sandbox("the template", strict=True)

    def asks(self) -> list[Ask]:
        """List the features that a teacher needs."""
        kinds = [column for column in self._recipe.columns if column.kind in ("prompt", "user_turn")]
        return [self._ask(column, column.sampling, "", ".") for column in kinds]

    def run(self, attempt: Attempt, drawn: Mapping[str, Sequence[Entry]]) -> Generator[tuple[str, Ask], Reply]:
        """Fill in an attempt; gives each prompt with the name of its column, and wants its reply."""
        values = attempt.values
        values["parameters"] = dict(self._recipe.parameters)
        for source in self._recipe.sources:
            found = [dict(entry.value) for entry in drawn[source.name]]
            attempt.lineage[source.name] = [entry.where for entry in drawn[source.name]]
            values[source.name] = found[0] if source.draw == 1 and found else found
        try:
            for column in self._recipe.columns:
                values[column.name] = yield from self._value(column, attempt)
            attempt.row = self._row(values)
        except Rejected as reason:
            attempt.rejected = (reason.by, str(reason))

    def _value(self, column: Column, attempt: Attempt) -> Generator[tuple[str, Ask], Reply, Any]:
        values, name = attempt.values, column.name
        if column.kind in ("prompt", "user_turn"):
            return (yield from self._answered(column, attempt))
        if column.kind == "sample":
            chance = random.Random(f"{self._seed} {name} {attempt.number}")
            entries, weights = zip(*column.value, strict=True)
            return chance.choices(entries, weights)[0]
        if column.kind == "template":
            return self._rendered(column.value, values, name)
        if column.kind in ("expression", "require"):
            found = json.loads(self._rendered(as_template(column.value), values, name))
            if column.kind == "require" and not found:
                raise Rejected(name, f"{column.value} is {json.dumps(found, ensure_ascii=False)}")
            return found
        if column.kind == "choose":
            return self._chosen(column, attempt)
        found = self._called(column, attempt, _visible(values))
        if column.kind == "check" and (found is False or isinstance(found, str)):
            raise Rejected(name, found or f"{column.value} says no")
        return found

    def _answered(self, column: Column, attempt: Attempt) -> Generator[tuple[str, Ask], Reply, Any]:
        words = self._rendered(column.value, attempt.values, column.name).strip()
        system = self._rendered(column.system, attempt.values, column.name).strip() if column.system else ""
        seed = int.from_bytes(blake2b(f"{self._seed} {column.name}".encode(), digest_size=8).digest(), "big") & MAX_SEED
        ask = self._ask(column, replace(column.sampling, seed=seed), system, words)
        attempt.prompts[column.name] = [dict(message) for message in ask.messages]
        attempt.seeds[column.name] = seed
        reply = yield column.name, ask
        attempt.tokens += reply.tokens
        attempt.prompt_tokens += reply.prompt_tokens
        attempt.texts[column.name] = list(reply.texts)
        if reply.error:
            raise Rejected("failed", reply.error)
        whole = [text.strip() for text, why in zip(reply.texts, reply.finish_reasons, strict=True) if why == "stop"]
        if not whole:
            limit = column.sampling.max_new_tokens
            raise Rejected("cut", f"{column.name} did not end within max_new_tokens {limit}")
        if column.name in self._validators:
            read = [self._validators[column.name].read(text) for text in whole]
            values = [value for value, wrong in read if not wrong]
            if not values:
                raise Rejected("schema", f"{column.name} is {read[0][1]}")
        else:
            values = whole
        return values[0] if column.sampling.n == 1 else values

    def _ask(self, column: Column, sampling: Any, system: str, words: str) -> Ask:
        user_turn = column.kind == "user_turn"
        system = words if user_turn else system
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if not user_turn:
            messages.append({"role": "user", "content": words})
        return Ask(messages=tuple(messages), sampling=sampling, schema=column.schema, user_turn=user_turn)

    def _chosen(self, column: Column, attempt: Attempt) -> Any:
        """The best or worst of several values by a callable's score."""
        given = attempt.values.get(column.value["from"])
        candidates = given if isinstance(given, list) else [given]
        seen = _visible(attempt.values)
        scores = [float(self._called(column, attempt, candidate, seen) or 0) for candidate in candidates]
        best, worst = max(scores), min(scores)
        if column.value["which"] == "worst":
            if best == worst:
                raise Rejected(column.name, f"all {len(scores)} answers have the score {best:g}")
            return candidates[scores.index(worst)]
        if best <= 0:
            raise Rejected(column.name, f"none of {len(scores)} answers has a score above 0")
        return candidates[scores.index(best)]

    def _called(self, column: Column, attempt: Attempt, *arguments: Any) -> Any:
        path = column.value["by"] if column.kind == "choose" else column.value
        try:
            return self._callables[column.name](*arguments)
        except Exception as error:  # of code that somebody wrote
            raise UserError(
                f"{self._recipe.place}: column {column.name}: {path} failed at attempt {attempt.number}: "
                f"{type(error).__name__}: {error}; mend it and run the same command again, nothing is lost"
            ) from error

    def _row(self, values: Values) -> dict[str, Any]:
        output = self._recipe.output
        if "messages" in output:
            said = [
                (message["role"], self._rendered(message["content"], values, "output"))
                for message in output["messages"]
            ]
            return {"messages": [{"role": role, "content": text.strip()} for role, text in said]}
        return {name: self._rendered(template, values, "output").strip() for name, template in output.items()}

    def _rendered(self, template: str, values: Values, name: str) -> str:
        if "{" not in template:
            return template
        try:
            (text,), _ = self._sandbox.render(template, {}, [{"messages": [], "names": values}])
        except CheckpointError as error:
            raise Rejected("template", f"{name}: {error}") from error
        return text


def _visible(values: Values) -> Values:
    """A copy for callables, which may change what they are given."""
    found: Values = json.loads(json.dumps(values, default=str))
    return found


def prompt_and_answer(row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the question and the answer of a row."""
    if "messages" in row:
        asked = "\n".join(message["content"] for message in row["messages"][:-1] if message["role"] != "system")
        return asked, row["messages"][-1]["content"]
    if "chosen" in row:
        return row["prompt"], row["chosen"]
    return "\n".join(filter(None, (row["instruction"], row.get("input", "")))), row["output"]
