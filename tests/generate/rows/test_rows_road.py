"""The road of docs/generate-data.md, its commands as they stand there: seeds, rows, prepared data, LoRA, evaluation."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here

PAGE = ROOT / "docs" / "generate-data.md"
DOORS = ["generate/rows.py", "prepare/records.py", "finetune/lora.py", "generate/evaluate.py"]
SHORT = {
    "generate/rows.py": ["--max_rows", "3"],
    "prepare/records.py": ["--test_split_size", "0.4"],
    "finetune/lora.py": ["--train.max_steps", "1", "--train.learning_rate", "1e-4", "--train.sample_prompts", "0"],
    "generate/evaluate.py": ["--limit", "2"],
}


def commands() -> list[list[str]]:
    """The commands of the road, without `python`."""
    section = PAGE.read_text("utf-8").split("## From 30 seeds to a tuned model")[1].split("\n## ")[0]
    block = section.split("```bash\n")[1].split("```")[0]
    found = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [command[:2] for command in found] == [["python", door] for door in DOORS]
    return [command[1:] for command in found]


def walk(home: Path, real_folder: Path, changes: Mapping[str, list[str]]) -> dict[str, Any]:
    """Run all commands in a folder as a user's; gives the measures of the untuned and the tuned model."""
    (home / "demo").symlink_to(ROOT / "demo")
    (home / "checkpoints").mkdir()
    (home / "checkpoints" / real_folder.name).symlink_to(real_folder)
    for command in commands():
        done = run_here(*command, *changes.get(command[0], ()), cwd=home)
        print(done.stdout)
        assert done.returncode == 0, f"{command}: {done.stderr}"
    (results,) = (home / "out/evaluate").rglob("results.json")
    return json.loads(results.read_text("utf-8"))


def check_rows(home: Path, least: int) -> None:
    """Rows of the folder are distinct, and right by the recipe: the sentence holds what the answer says."""
    rows = [json.loads(line) for line in (home / "out/rows/orders/rows.jsonl").read_text("utf-8").splitlines()]
    held_out = (ROOT / "demo/orders/held-out.jsonl").read_text("utf-8").splitlines()
    assert len(rows) >= least and len({row["input"].casefold() for row in rows}) == len(rows)
    assert not {row["input"] for row in rows} & {json.loads(line)["input"] for line in held_out}
    for row in rows:
        order = json.loads(row["output"])
        assert list(order) == ["item", "quantity", "city"] and isinstance(order["quantity"], int)
        assert re.fullmatch(r"[a-z]{3,9}( [a-z]{3,9})?s", order["item"])
        for value in order.values():
            assert re.search(rf"\b{value}\b", row["input"], re.IGNORECASE)


def right(results: Mapping[str, Any]) -> tuple[list[float], int]:
    """The share of held-out rows that each model reads right, the untuned one first; and how many rows there are."""
    assert [model["name"] for model in results["models"]] == ["smollm2-135m-instruct", "orders"]
    (measure,) = (found for found in results["tasks"][0]["metrics"] if found["name"] == "json_match")
    return [model["value"] for model in measure["models"]], measure["models"][0]["rows"]


@pytest.mark.real
def test_every_command_of_the_road_works(tmp_path: Path, real_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_llama.generate.rows.run.WINDOW", 4)
    results = walk(tmp_path, real_folder, SHORT)
    check_rows(tmp_path, 3)
    shares, asked = right(results)
    assert asked == 2 and all(0 <= share <= 1 for share in shares)


@pytest.mark.real
@pytest.mark.stress
@pytest.mark.timeout(1800)
def test_made_rows_teach_what_the_model_could_not_do(tmp_path: Path, real_folder: Path) -> None:
    """Of 40 orders that people wrote, the tuned model reads far more than the untuned one, which made the rows.

    pytest -s -m stress tests/generate/rows/test_rows_road.py
    """
    (untuned, tuned), asked = right(walk(tmp_path, real_folder, {}))
    check_rows(tmp_path, 200)
    print(f"right of {asked} held-out rows: untuned {untuned:.1%}, tuned {tuned:.1%}")
    assert asked == 40 and tuned >= untuned + 0.4
