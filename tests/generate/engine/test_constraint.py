"""Constraints: what llguidance lets follow, in the engine, with and without guesses."""

import json
import re
from typing import Any

import pytest
import torch
from conftest import tiny_model

from lit_llama.errors import UserError
from lit_llama.generate.engine.constraint import Constraint, TokenTable
from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.runner import TorchRunner

END = 256
PIECES = [bytes([byte]) for byte in range(256)] + [b"<end>"] + [b'": ', b'{"', b'"}', b'", "', b"name", b"true"]


@pytest.fixture(scope="module")
def table() -> TokenTable:
    return TokenTable(PIECES, [END], [END], lambda text: list(text.encode()))


@pytest.fixture(scope="module")
def runner() -> TorchRunner:
    return TorchRunner(tiny_model(max_position_embeddings=512), 1 << 20)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "kind": {"enum": ["a", "b"]}, "n": {"type": "integer"}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def ask(runner: TorchRunner, constraint: Constraint, seed: int, speculate: bool, most: int = 150) -> tuple[bytes, str]:
    it = Engine(runner, tokens=len(PIECES), config=EngineConfig(speculate=speculate))
    sampling = Sampling(max_new_tokens=most, temperature=1.0, seed=seed, stop_ids=[END])
    steps = list(it.stream(Request(list(b'{"name": "x", "kind": "a"} '), sampling, constraint)))
    it.check()
    text = b"".join(PIECES[token] for step in steps for token in step.ids if token != END)
    return text, str(steps[-1].finish_reason)


@pytest.mark.parametrize("seed", range(2))
def test_an_answer_is_json_of_its_schema(runner: TorchRunner, table: TokenTable, seed: int) -> None:
    """A random model never writes it on its own, so the constraint must hold at every single token."""
    text, reason = ask(runner, Constraint.json_schema(SCHEMA, table), seed, speculate=False)
    assert reason == "stop"
    made = json.loads(text)
    assert {"name", "kind"} <= set(made) <= {"name", "kind", "n"} and made["kind"] in ("a", "b")
    assert len(made["name"]) <= 6
    assert ask(runner, Constraint.json_schema(SCHEMA, table), seed, speculate=True) == (text, reason)


def test_expressions_choices_and_grammars(runner: TorchRunner, table: TokenTable) -> None:
    assert re.fullmatch(rb"[a-c]{3}-[0-9]{2}", ask(runner, Constraint.regex(r"[a-c]{3}-[0-9]{2}", table), 1, True)[0])
    texts = ["yes", 'no "quoted"', "může být"]
    assert ask(runner, Constraint.choice(texts, table), 2, True)[0].decode() in texts
    lark = 'start: item ("," item)+\nitem: /[0-9]/'
    assert re.fullmatch(rb"\d(,\d)+", ask(runner, Constraint.lark(lark, table), 3, True)[0])


def test_white_space_does_not_go_on_for_ever(table: TokenTable) -> None:
    def lets_through(text: str) -> bool:
        matcher = Constraint.json_schema({}, table).matcher()
        return all(matcher.accept(token) for token in text.encode()) and matcher.accept(END)

    value = {"a": [1, {"b": None}], "c": "x"}
    assert all(lets_through(json.dumps(value, indent=indent)) for indent in (None, 1, 2, 4, "\t"))
    assert lets_through(json.dumps(value, separators=(",", ":")))
    assert (
        not lets_through('{"a":\n\n1}') and not lets_through('{"a":   1}') and not lets_through("[\n" + " " * 33 + "]")
    )


def test_an_answer_that_is_cut_says_so(runner: TorchRunner, table: TokenTable) -> None:
    text, reason = ask(runner, Constraint.json_schema(SCHEMA, table), 0, False, most=5)
    assert reason == "length"
    with pytest.raises(json.JSONDecodeError):
        json.loads(text)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda t: Constraint.json_schema({"type": "strin"}, t), "JSON schema cannot be kept to.*strin"),
        (lambda t: Constraint.json_schema({"unevaluatedProperties": False}, t), "unevaluatedProperties"),
        (lambda t: Constraint.json_schema('{"a', t), "JSON schema"),
        (lambda t: Constraint.json_schema({"enum": ["x" * (1 << 20)]}, t), "expected at most 1,048,576"),
        (lambda t: Constraint.regex("(a", t), "regular expression cannot be kept to"),
        (lambda t: Constraint.regex("(a)\\1", t), "backreferences are not supported"),
        (lambda t: Constraint.lark("start: nothing", t), "grammar cannot be kept to"),
        (lambda t: Constraint.choice([], t), "a choice needs texts"),
    ],
)
def test_what_cannot_be_kept_to_is_refused_by_name(table: TokenTable, make: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        make(table)


def test_ids_are_taken_back(table: TokenTable) -> None:
    """Catches: an end that counts as an id of the grammar, or is forgotten."""
    matcher = Constraint.regex("ab", table).matcher()
    row = torch.zeros(300, dtype=torch.bool)
    assert matcher.accept(ord("a")) and not matcher.accept(ord("a"))
    assert matcher.accept(ord("b")) and matcher.accept(END)
    matcher.rollback(2)
    matcher.allow(row)
    assert row.nonzero().flatten().tolist() == [ord("b")]
