"""A model of a folder as a teacher: schemas are kept to, users' turns begin where users do, killed runs go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_here

from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import LLM, load
from lit_llama.generate.rows.teacher import Ask, LocalTeacher, opening_ids
from lit_llama.text.prompts.encode import prompt_ids


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return load(tiny_folder, precision="32-true")


def test_a_users_turn_begins_where_users_begin(llm: LLM) -> None:
    for system in ([], [{"role": "system", "content": "WORDS"}]):
        ids = opening_ids(llm, system)
        whole = prompt_ids(llm.tokenizer, llm.require_style(), [*system, {"role": "user", "content": "hi"}])
        assert whole[: len(ids)] == ids
        assert llm.tokenizer.decode(whole[len(ids) :]).startswith("hi")


def test_answers_keep_to_their_schema_and_long_prompts_are_replies(llm: LLM) -> None:
    teacher = LocalTeacher(llm=llm, name="t", identity="i")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    sampling = Sampling(temperature=1.0, max_new_tokens=60, n=2)
    teacher.add((0, "a"), Ask(messages=({"role": "user", "content": "hi"},), sampling=sampling, schema=schema))
    teacher.add((1, "a"), Ask(messages=({"role": "user", "content": "long " * 300},), sampling=sampling))
    found = {}
    while len(found) < 2:
        found.update(teacher.wait())
    assert [json.loads(text)["a"] in (1, 2) for text in found[0, "a"].texts] == [True, True]
    assert "more than" in found[1, "a"].error and found[0, "a"].prompt_tokens > 0


def test_a_run_that_is_killed_ends_with_the_same_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    sampling = {"temperature": 1, "min_new_tokens": 8, "max_new_tokens": 9}
    recipe = {
        "rows": 80,
        "columns": [
            {"name": "n", "sample": [1, 2, 3]},
            {
                "name": "q",
                "prompt": "ask {{ n }}",
                "sampling": sampling,
            },
        ],
        "output": {"alpaca": {"instruction": "{{ n }}", "output": "{{ q }}"}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))

    def command(out: str) -> list[str]:
        flags = ["--recipe", tmp_path / "r.yaml", "--checkpoint_dir", tiny_folder, "--out_dir", tmp_path / out]
        return ["generate/rows.py", *map(str, flags), "--precision", "32-true"]

    whole = run_here(*command("whole"))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.Popen([sys.executable, *command("cut")], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    lines = tmp_path / "cut/rejected.jsonl"
    while killed.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert run_here(*command("cut")).returncode == whole.returncode
    for name in ("rows.jsonl", "rejected.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
