"""Tasks: what is read of them, and what is refused in one line that says why."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_llama.errors import DataError, UserError
from lit_llama.generate.evaluate.tasks import read_tasks

Put = Callable[[str, bytes | str], Path]
CHOICE = {"prompt": "2 + 3 =", "choices": [" 5", " 6"], "answer": 0}
PLAIN = {"instruction": "a", "output": "b"}


def tasks(put: Put, *entries: dict[str, Any], **more: Any) -> Any:
    return read_tasks(str(put("tasks.yaml", yaml.safe_dump(list(entries)))), **more)


def test_rows_of_every_kind_are_read(put: Put) -> None:
    """Rows beside the task file sought in the working folder, letters taken for texts, or a limit that is forgotten."""
    put("rows.jsonl", json.dumps({**PLAIN, "contains": ["x", "y"]}) + "\n" + json.dumps({**PLAIN, "contains": "z"}))
    found = tasks(
        put,
        {"name": "file", "rows": "rows.jsonl", "max_new_tokens": 5, "stop": "\n", "metrics": ["contains"]},
        {"name": "choice", "items": [CHOICE, {**CHOICE, "answer": "B"}, {**CHOICE, "answer": " 6"}]},
        {"name": "json", "items": [{"instruction": "a", "output": '{"x": 1}'}], "limit": 1},
        {"name": "asked", "items": [{"instruction": "a"}]},
    )
    assert [[item.wanted for item in found[0].items], found[0].stop] == [[("x", "y"), ("z",)], ("\n",)]
    assert [item.right for item in found[1].items] == [0, 1, 1] and found[1].prompt == "raw"
    assert found[1].parts == ["choices"] and found[0].parts == ["answer"]
    assert {"json_match", "json_fields", "loss"} <= {*found[2].metrics} and "rouge_l" not in found[2].metrics
    assert found[3].metrics == ("stopped", "characters")
    assert len(tasks(put, {"name": "file", "rows": "rows.jsonl"}, limit=1)[0].items) == 1


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"metric": ["loss"]}, "'metric' is no key, expected name.*did you mean metrics"),
        ({"metrics": ["exactmatch"]}, "'exactmatch' is no metric.*did you mean exact_match"),
        ({"metrics": ["accuracy"]}, "accuracy needs choices, but row 0 has none"),
        ({"metrics": ["regex"]}, "needs `pattern`"),
        ({"metrics": ["regex"], "pattern": "("}, "is no regular expression"),
        ({"metrics": ["json_match"]}, "needs JSON, but the reference of row 0 is none: 'b'"),
        ({"metrics": ["loss"], "items": [{"instruction": "a"}]}, "needs a reference, but row 0 has none"),
        ({"metrics": ["loss"], "items": [CHOICE]}, "row 0 has choices"),
        ({"items": []}, "has no rows"),
        ({"items": [{**CHOICE, "answer": 2}]}, "answer is 2, expected 0 to 1, A to B"),
        ({"items": [{**CHOICE, "answer": True}]}, "answer is True"),
        ({"items": [{**CHOICE, "choices": [" 5", " 5"]}]}, "two choices are equal"),
        ({"items": [{"choices": ["a", "b"], "answer": 0}]}, "expected one of prompt, question or instruction"),
        ({"items": ["a"]}, "item 0 is 'a', expected an object"),
        ({"items": [PLAIN, {"hello": "a"}]}, "item 1"),
        ({"rows": "other.jsonl"}, "rows and items, expected one of"),
        ({"prompt": "chatml"}, "prompt is 'chatml', expected chat"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected 1 or more"),
        ({"max_new_tokens": "many"}, "max_new_tokens is 'many', expected a whole number"),
        ({"name": ""}, "a task has no name"),
    ],
)
def test_what_does_not_fit_is_named(put: Put, entry: dict[str, Any], named: str) -> None:
    """A traceback, or a task that measures something else than what was asked for."""
    with pytest.raises(UserError, match=f"(?s)task.*({named})"):
        tasks(put, {"name": "mine", "items": [PLAIN]} | entry)


def test_files_that_are_none_are_named(put: Put, tmp_path: Path) -> None:
    for text, named in (("a: [", "is no YAML"), ("a: 1", "is no list of tasks"), ("[]", "is no list of tasks")):
        with pytest.raises(DataError, match=named):
            read_tasks(str(put("tasks.yaml", text)))
    with pytest.raises(DataError, match="does not exist"):
        read_tasks(str(tmp_path / "absent.yaml"))
    with pytest.raises(UserError, match="two tasks are named 'mine'"):
        tasks(put, {"name": "mine", "items": [PLAIN]}, {"name": "mine", "items": [PLAIN]})


def test_the_regression_set_is_fair() -> None:
    """A right answer that always stands in one place, is always the longest, or is there twice."""
    [task] = read_tasks("regression")
    groups = [item.group for item in task.items]
    assert len(groups) == 60 and all(groups.count(group) == 12 for group in groups) and len({*groups}) == 5
    places = [item.right for item in task.items]
    assert all(places.count(place) == 15 for place in range(4)) and all(len(item.choices) == 4 for item in task.items)
    longest = sum(len(item.choices[item.right]) == max(map(len, item.choices)) for item in task.items)
    shortest = sum(len(item.choices[item.right]) == min(map(len, item.choices)) for item in task.items)
    assert longest < 40 and shortest < 40


def test_what_is_measured_does_not_change_what_is_asked(put: Put) -> None:
    """Rows that are answered again because another measure is taken of them; or kept although they are others."""
    [one] = tasks(put, {"name": "a", "items": [PLAIN], "metrics": ["exact_match"]})
    [two] = tasks(put, {"name": "b", "items": [PLAIN], "metrics": ["rouge_l", "loss"]})
    [three] = tasks(put, {"name": "a", "items": [{**PLAIN, "input": "c"}], "metrics": ["exact_match"]})
    assert one.fingerprint() == two.fingerprint() != three.fingerprint()
