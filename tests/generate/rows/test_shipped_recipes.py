"""Every recipe that ships yields rows with a real model, small as it is, and the rows are what the recipe says."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from lit_llama.generate.llm import LLM, load
from lit_llama.generate.rows.attempt import Attempt
from lit_llama.generate.rows.recipe import Recipe, read_recipe, shipped
from lit_llama.generate.rows.run import Limits, RowMaker
from lit_llama.generate.rows.teacher import LocalTeacher
from lit_llama.text.dataset.split import normalised

SEEDS = [
    ("What is the capital of Australia?", "", "Canberra"),
    ("How do I boil an egg?", "", "Put it into boiling water for ten minutes, then into cold water."),
    ("Rewrite the sentence in the past tense.", "She walks to the market.", "She walked to the market."),
    ("What is 3 plus 4?", "", "7"),
    ("Name five animals that live in Africa.", "", "Lion, elephant, giraffe, zebra, hippopotamus"),
    ("Give three tips for staying healthy.", "", "Eat fruit, move every day, and sleep enough."),
    ("What is the capital of France?", "", "Paris"),
    ("What is the difference between a frog and a toad?", "", "Frogs have smooth wet skin, toads have dry skin."),
]
PASSAGE = """# The Rhine

The Rhine is one of the major rivers of Europe. It begins in the Swiss Alps and ends in the North Sea.

The river is about 1,233 km long. Its largest city is Cologne, which has more than one million people.
"""
Values = Mapping[str, Any]


def same_question(row: Values, values: Values) -> bool:
    return (row["instruction"], row["input"]) == (values["seeds"]["instruction"], values["seeds"]["input"])


def is_new(row: Values, values: Values) -> bool:
    return normalised(row["instruction"]) not in {normalised(asked) for asked, _, _ in SEEDS}


HOLDS: Mapping[str, Callable[[Values, Values], bool]] = {
    "self-instruct": lambda row, values: is_new(row, values) and len(values["seeds"]) == 8,
    "evol-instruct": is_new,
    "magpie": is_new,
    "questions-from-documents": lambda row, values: (
        values["evidence"] in row["input"] and row["input"] in PASSAGE and row["instruction"].endswith("?")
    ),
    "answers": same_question,
    "best-of-n": lambda row, values: same_question(row, values) and len(values["answers"]) > 1,
    "paraphrase": lambda row, values: row["output"] == values["seeds"]["output"] and is_new(row, values),
    "preference-pairs": lambda row, values: (
        {row["chosen"], row["rejected"]} == {values["first"], values["second"]} and row["chosen"] != row["rejected"]
    ),
}


@pytest.fixture(scope="module")
def llm(real_folder: Path) -> LLM:
    return load(real_folder)


def short(recipe: Recipe, most: int) -> Recipe:
    """The recipe with answers of fewer tokens, for which a test need not wait."""
    columns: list[Any] = []
    for column in recipe.columns:
        sampling = dataclasses.replace(column.sampling, max_new_tokens=min(column.sampling.max_new_tokens, most))
        columns.append(dataclasses.replace(column, sampling=sampling))
    return dataclasses.replace(recipe, columns=columns)


@pytest.mark.real
@pytest.mark.parametrize("name", shipped())
def test_the_recipe_yields_rows(name: str, llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llama.generate.rows.run.WINDOW", 3)
    seeds, passage = tmp_path / "seeds.jsonl", tmp_path / "passage.md"
    rows = [{"instruction": asked, "input": given, "output": answer} for asked, given, answer in SEEDS]
    seeds.write_text("".join(f"{json.dumps(row)}\n" for row in rows * 8))
    passage.write_text(PASSAGE)
    given: dict[str, Any] = {"questions-from-documents": {"documents": [str(passage)]}, "magpie": {}}.get(
        name, {"seeds": seeds}
    )
    most = 120 if name == "magpie" else 64  # answers to what the model asks itself are longer, and no cut one counts
    maker = RowMaker(short(read_recipe(name, **given), most), LocalTeacher(llm=llm, name="t", identity="t"), seed=1)
    accepted: list[Attempt] = []
    maker.run(None, Limits(rows=1, attempts=160), lambda attempt: attempt.rejected or accepted.append(attempt))
    assert accepted, maker.tally
    for attempt in accepted:
        assert attempt.row is not None and HOLDS[name](attempt.row, attempt.values), attempt.row
