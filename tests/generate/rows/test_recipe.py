"""Recipes are checked whole before anything runs, and each mistake is named with its place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_llama.errors import UserError
from lit_llama.generate.rows.recipe import read_recipe, shipped

GOOD: dict[str, Any] = {
    "rows": 5,
    "sources": {"seeds": {"rows": "x.jsonl"}},
    "columns": [
        {"name": "kind", "sample": {"a": 3, "b": 1}},
        {"name": "text", "prompt": "Say {{ kind }} {{ seeds.instruction }}", "sampling": {"max_new_tokens": 9}},
    ],
    "output": {"alpaca": {"instruction": "{{ kind }}", "output": "{{ text }}"}},
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The good recipe with one value changed, or taken out by None."""
    recipe = yaml.safe_load(yaml.safe_dump(GOOD))
    place: Any = recipe
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    for key in keys:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return recipe


@pytest.fixture
def read(tmp_path: Path) -> Callable[[Any], Any]:
    def write_and_read(recipe: Any) -> Any:
        path = tmp_path / "mine.yaml"
        path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
        return read_recipe(path)

    return write_and_read


def test_a_good_recipe(read: Callable[[Any], Any]) -> None:
    recipe = read(GOOD)
    assert (recipe.name, recipe.rows, recipe.kind) == ("mine", 5, "alpaca")
    assert recipe.columns[0].value == [("a", 3), ("b", 1)] and recipe.columns[1].sampling.max_new_tokens == 9
    assert recipe.digest == read(changed("rows", 9)).digest != read(changed("columns/0/sample", ["a"])).digest


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("row", 3, "recipe has no 'row'; did you mean rows?"),
        ("rows", 0, "rows is 0, expected 1 or more"),
        ("columns/1/promt", "x", "columns[1] (text): a column has no 'promt'; did you mean prompt?"),
        ("columns/1/prompt", "{{ knd }}", "columns[1] (text): there is no column or source knd; did you mean kind?"),
        ("columns/1/prompt", "{{ kind", "columns[1] (text): the template is wrong"),
        ("columns/1/prompt", "{{ text }}", "a circle: text needs text"),
        ("columns/1/sampling/temperature", -1, "sampling: temperature is -1"),
        ("columns/1/sampling/temprature", 1, "did you mean temperature?"),
        ("columns/1/name", "kind", "there is a column or source kind already"),
        ("columns/1/name", "no name", "'no name' is no name"),
        ("columns/1/template", "x", "found template and prompt, expected exactly one of"),
        ("columns/0/sample", {"a": 0}, "the weight of 'a' is 0"),
        ("columns/0/sample", [], "sample is a list, expected values"),
        ("columns/0/schema", {}, "schema is not for a column that is a sample"),
        ("columns/1/schema", {"type": "integer", "minimum": 5, "maximum": 3}, "columns[1] (text): the JSON schema"),
        ("sources/seeds/draws", 3, "sources.seeds: a source has no 'draws'; did you mean draw?"),
        ("sources/seeds/order", "sorted", "sources.seeds.order is 'sorted', expected"),
        ("sources/seeds/accepted", 2, "sources.seeds.accepted is 2, expected 0 to draw, 1"),
        ("sources/seeds/rows", None, "nothing is named; give files with --seeds"),
        ("output", {"alpaca": {"instruction": "x"}}, "output.alpaca has no output"),
        ("output", {"messages": [{"role": "user", "content": "x"}]}, "ends with the user, expected the assistant"),
        ("output/alpaca/output", "{{ txt }}", "output.output: there is no column or source txt; did you mean text?"),
        ("filters", {"rouge": 2}, "filters.rouge is 2"),
        ("filters", {"refusals": "no"}, "filters.refusals is 'no', expected bool"),
        ("filters", {"scripts": ["Latn"]}, "filters.scripts has 'Latn'"),
        ("judge", {"at_lest": 3}, "judge: a judge has no 'at_lest'; did you mean at_least?"),
        ("judge", {"at_least": 11}, "judge.at_least is 11, expected a score from 1 to 10"),
        ("judge", {"criterion": "{{ knd }}"}, "(judge): there is no column or source knd; did you mean kind?"),
        ("columns", None, "columns: found nothing"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(read: Callable[[Any], Any], path: str, value: Any, says: str) -> None:
    with pytest.raises(UserError) as error:
        read(changed(path, value))
    assert says in str(error.value) and "mine.yaml" in str(error.value)


def test_circles_and_columns_below(read: Callable[[Any], Any]) -> None:
    recipe = changed("columns/0", {"name": "kind", "template": "{{ text }}"})
    with pytest.raises(UserError, match="a circle: kind needs text needs kind"):
        read(recipe)
    recipe["columns"][1]["prompt"] = "x"
    with pytest.raises(UserError, match=r"columns\[0\] \(kind\) uses text, which stands below it"):
        read(recipe)


def test_callables_are_looked_up(read: Callable[[Any], Any]) -> None:
    for path, says in (
        ("json:nothing", "json has no callable nothing"),
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("json", "expected a callable as package.module:name"),
        ("/nowhere/x.py:f", "there is no file /nowhere/x.py"),
    ):
        with pytest.raises(UserError, match=says):
            read(changed("columns/0", {"name": "kind", "check": path}))


def test_yaml_that_is_none(read: Callable[[Any], Any]) -> None:
    for text, says in (("a: [", "is no YAML"), ("- 1", "holds a list"), ("rows: 1\nrows: 2\n", "line 1: the key rows")):
        with pytest.raises(UserError, match=says):
            read(text)
    with pytest.raises(UserError, match="is no recipe and no file; did you mean magpie"):
        read_recipe("magpi")


def test_recipes_that_ship_are_sound() -> None:
    assert len(shipped()) == 8
    for name in shipped():
        text = (Path(__file__).parents[3] / f"lit_llama/generate/rows/recipes/{name}.yaml").read_text()
        given: dict[str, Any] = {"seeds": "x"} if "seeds:" in text else {}
        given |= {"documents": ["x"]} if "documents: null" in text else {}
        assert read_recipe(name, **given).columns
    with pytest.raises(UserError, match="has no source seeds"):
        read_recipe("magpie", seeds="x")
    with pytest.raises(UserError, match="has no parameter 'criteria'; it has criterion"):
        read_recipe("preference-pairs", seeds="x", parameters={"criteria": "y"})
