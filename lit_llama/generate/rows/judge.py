"""The judge of a recipe: columns behind its own that have the teacher score the row, or compare the two of a pair."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_llama.errors import UserError

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
