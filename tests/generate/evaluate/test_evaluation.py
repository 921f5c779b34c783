"""Whole evaluations of tiny models: what is measured, what survives a kill, and what is refused."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here, write_adapter

from lit_llama.errors import DataError, LockedError, NumericalError, UserError
from lit_llama.folder.lock import claim
from lit_llama.generate.answer import answer_all
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.evaluate import run as module
from lit_llama.generate.evaluate.evaluation import Evaluation, evaluate, gather_tasks, read_answers
from lit_llama.generate.evaluate.tasks import Task, file_task
from lit_llama.generate.flags import Loading
from lit_llama.generate.llm import load, open_folder
from lit_llama.generate.models import loaded, open_models, short_names

Put = Callable[[str, bytes | str], Path]
ROWS = [
    {
        "instruction": "Extract the order as JSON",
        "input": "two blue lamps",
        "output": '{"item": "lamp", "quantity": 2}',
    },
    {"instruction": "Say hi", "output": '{"item": "x"}'},
    {"instruction": "é" * 20, "output": "[1]"},
]
SHORT = Sampling(max_new_tokens=8)


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and two adapters on it."""
    place = tmp_path_factory.mktemp("adapters")
    made = [write_adapter(place / name, tiny_folder, style="chatml", seed=seed) for seed, name in enumerate("ab")]
    return [tiny_folder, *made]


@pytest.fixture
def task(put: Put) -> Task:
    return file_task(put("rows.jsonl", "\n".join(map(json.dumps, ROWS))))


def run(folders: list[Path], task: Task, out: Path, **more: Any) -> Evaluation:
    return evaluate(open_models(folders, Loading(precision="32-true")), [task], SHORT, out, **more)


def bytes_of(out: Path) -> dict[str, bytes]:
    """All that has to be equal: rows and results, but no times."""
    found = [*out.glob("rows/*"), out / "results.json"]
    return {path.name: path.read_bytes() for path in found}


@pytest.mark.parametrize(
    "loading", [Loading(precision="32-true"), Loading(precision="bf16-true"), Loading(quantize="int8")]
)
def test_adapters_that_share_a_base_answer_as_alone(folders: list[Path], loading: Loading) -> None:
    """Another rounding of an adapter's update, the style of the base, or the adapter of the model before."""
    from lit_llama.text.message import instruct

    examples = [instruct("Say hi"), instruct("Extract", "two lamps")]
    shared = {}
    engines = set()
    for model, llm in loaded(open_models(folders, loading)):
        shared[model.name] = answer_all(llm, examples, SHORT)
        engines.add(id(llm.engine))
    assert len(engines) == 1, "the base is loaded once"
    for name, folder in zip(short_names(folders), folders, strict=True):
        assert shared[name] == answer_all(open_folder(folder, loading).load(), examples, SHORT)
    assert len({tuple(answer.text for answer in answers) for answers in shared.values()}) == 3


def test_what_is_measured_is_what_was_answered(folders: list[Path], task: Task, tmp_path: Path) -> None:
    """Rows of another model or order, a loss per row in place of per token, or a perplexity that is none."""
    found = run(folders[:2], task, tmp_path / "out")
    [summary] = found.results["tasks"]
    metrics = {entry["name"]: entry for entry in summary["metrics"]}
    assert list(metrics) == [
        "exact_match",
        "json_match",
        "stopped",
        "characters",
        "loss",
        "perplexity",
        "bits_per_byte",
    ]
    for place, folder in enumerate(folders[:2]):
        llm = load(folder, precision="32-true")
        answers = answer_all(llm, [item.question for item in task.items], SHORT)
        rows = found.models[place]
        assert [rows.rows[task.name, "answer", row]["answer"] for row in range(3)] == [a.text for a in answers]
        assert metrics["stopped"]["models"][place]["value"] == pytest.approx(sum(a.stopped for a in answers) / 3)
        assert metrics["characters"]["models"][place]["value"] == pytest.approx(sum(len(a.text) for a in answers) / 3)
        scored = [rows.rows[task.name, "likelihood", row] for row in range(3)]
        loss = -sum(row["text"] + row["ends"] for row in scored) / sum(row["tokens"] for row in scored)
        assert metrics["loss"]["models"][place]["value"] == pytest.approx(loss)
        assert metrics["perplexity"]["models"][place]["value"] == pytest.approx(math.exp(loss))
        size = sum(len(row["output"].encode()) for row in ROWS)
        bits = -sum(row["text"] for row in scored) / math.log(2) / size
        assert metrics["bits_per_byte"]["models"][place]["value"] == pytest.approx(bits)
    one, two = metrics["loss"]["models"]
    [difference] = metrics["loss"]["differences"]
    assert difference["value"] == pytest.approx(two["value"] - one["value"])
    assert difference["won"] + difference["lost"] + difference["same"] == 3
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found.results


def test_a_killed_evaluation_goes_on_and_ends_in_the_same_bytes(folders: list[Path], tmp_path: Path, put: Put) -> None:
    """Rows that are lost or asked twice after kill -9, and an end that tells that there was one."""
    rows = put("rows.jsonl", "\n".join(map(json.dumps, ROWS)))
    out, script = tmp_path / "out", tmp_path / "killed.py"
    script.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from lit_llama.generate.engine.request import Sampling\n"
        "from lit_llama.generate.evaluate.evaluation import evaluate\n"
        "from lit_llama.generate.models import open_models\n"
        "from lit_llama.generate.flags import Loading\n"
        "from lit_llama.generate.store import RowStore\n"
        "from lit_llama.generate.evaluate.tasks import file_task\n"
        "add, left = RowStore.add, [8]\n"
        "def killed(self, row):\n"
        "    add(self, row)\n"
        "    left[0] -= 1\n"
        "    left[0] or os.kill(os.getpid(), signal.SIGKILL)\n"
        "RowStore.add = killed\n"
        "folders = [Path(word) for word in sys.argv[3:]]\n"
        "evaluate(open_models(folders, Loading(precision='32-true')), [file_task(Path(sys.argv[1]))],\n"
        "         Sampling(max_new_tokens=8), Path(sys.argv[2]))\n"
    )
    command = [sys.executable, str(script), str(rows), str(out), *map(str, folders[:2])]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == -signal.SIGKILL
    assert not (out / "results.json").exists()
    there = sum(len(path.read_bytes().splitlines()) - 1 for path in out.glob("rows/*"))
    assert there == 8
    with pytest.MonkeyPatch.context() as patch:
        added: list[Any] = []
        add = module.RowStore.add
        patch.setattr(module.RowStore, "add", lambda self, row: (added.append(row), add(self, row)))
        run(folders[:2], file_task(rows), out)
    assert len(added) == 4
    run(folders[:2], file_task(rows), tmp_path / "straight" / "out")
    assert bytes_of(out) == bytes_of(tmp_path / "straight" / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_llama.generate.llm.Opened.load", lambda *_, **__: pytest.fail("loaded for nothing"))
        run(folders[:2], file_task(rows), out)


def test_other_settings_are_refused_until_asked(folders: list[Path], task: Task, tmp_path: Path) -> None:
    run(folders[:1], task, tmp_path / "out")
    models = open_models(folders[:1], Loading(precision="32-true"))
    with pytest.raises(UserError, match=r"sampling\.temperature was 0\.0, is 1\.0; sampling\.seed was 1234, is 5"):
        evaluate(models, [task], Sampling(max_new_tokens=8, temperature=1.0, seed=5), tmp_path / "out")
    again = evaluate(models, [task], Sampling(max_new_tokens=4), tmp_path / "out", anew=True)
    assert max(row["tokens"] for key, row in again.models[0].rows.items() if key[1] == "answer") <= 4
    with claim(tmp_path / "out"), pytest.raises(LockedError, match="another run is at work"):
        run(folders[:1], task, tmp_path / "out")


def test_answers_of_a_file_count_as_a_model(folders: list[Path], task: Task, tmp_path: Path, put: Put) -> None:
    """Answers to other questions that are compared, or a loss of answers that nobody computed."""
    texts = [ROWS[0]["output"], '{"item": "y"}', "[1]"]
    told = [
        {"instruction": row["instruction"], "input": row.get("input", ""), "output": row["output"], "answer": text}
        for row, text in zip(ROWS, texts, strict=True)
    ]
    before = put("before.jsonl", "\n".join(json.dumps(row | {"answer": "?", "stopped": False}) for row in told))
    after = put("after.jsonl", "\n".join(json.dumps(row | {"stopped": True}) for row in told))
    [asked] = gather_tasks(None, [], [before, after])
    found = evaluate([], [asked], SHORT, tmp_path / "out", answers=[before, after]).results["tasks"][0]["metrics"]
    metrics = {entry["name"]: entry for entry in found}
    assert [entry["value"] for entry in metrics["json_match"]["models"]] == [0.0, pytest.approx(2 / 3)]
    assert metrics["json_match"]["differences"][0]["won"] == 2 and metrics["stopped"]["models"][1]["value"] == 1.0
    both = evaluate(
        open_models(folders[:1], Loading(precision="32-true")), [task], SHORT, tmp_path / "both", answers=[after]
    )
    loss = next(entry for entry in both.results["tasks"][0]["metrics"] if entry["name"] == "loss")
    assert loss["models"][0] is None and loss["models"][1] is not None and loss["differences"] == [None]
    after.write_text(after.read_text().replace("Say hi", "Say no"))
    with pytest.raises(DataError, match=r"answer 1 is to 'Say no', but row 1 of rows asks 'Say hi'"):
        evaluate([], [task], SHORT, tmp_path / "other", answers=[after])
    after.write_text(json.dumps({"instruction": "a"}))
    with pytest.raises(DataError, match="answer is None, expected text"):
        gather_tasks(None, [], [after])


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [1]}, r"messages\[0\]: a message is a number"),
        ({"messages": [{"content": "q"}]}, "a message has no role"),
        ({"messages": [{"role": "user", "content": None}]}, "field content is null"),
        ({"messages": "q"}, "expected a list of messages"),
        ({"messages": [{"role": "user", "content": "q"}], "tools": 3}, "field tools holds a number"),
        ({"instruction": 5}, "expected instruction, input and output as text"),
    ],
)
def test_answers_to_no_question_are_named(row: dict[str, Any], said: str, put: Put) -> None:
    """Catches a traceback for the turns of another program."""
    path = put("answers.jsonl", json.dumps(row | {"answer": "x", "output": "y"}))
    with pytest.raises(DataError, match=rf"answers\.jsonl:line 1: .*{said}"):
        gather_tasks(None, [], [path])


def test_chats_in_a_file_of_answers_keep_their_turns(put: Put) -> None:
    """Catches turns, functions or the reference lost on their way out of a file that instruct.py wrote."""
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    path = put("answers.jsonl", json.dumps({"messages": turns, "output": "ref", "answer": "a", "stopped": True}))
    [(question, row)] = read_answers(path)
    assert [*question.prompt] == turns and question.response == "ref" and row == {"answer": "a", "stopped": True}


def test_fields_groups_and_choices_are_told_apart(tiny_folder: Path, tmp_path: Path, put: Put) -> None:
    """A group that counts the rows of another, or a choice by the mean of its tokens."""
    items = [
        {
            "prompt": "Say",
            "choices": [" a", " the request"],
            "answer": number % 2,
            "group": "one" if number < 2 else "two",
        }
        for number in range(4)
    ]
    [task] = gather_tasks(None, [str(put("tasks.yaml", json.dumps([{"name": "c", "items": items}])))], [])
    found = run([tiny_folder], task, tmp_path / "out")
    metrics = {entry["name"]: entry for entry in found.results["tasks"][0]["metrics"]}
    rows = [found.models[0].rows["c", "choices", row] for row in range(4)]
    hits = [
        float(row["texts"].index(max(row["texts"])) == item.right) for row, item in zip(rows, task.items, strict=True)
    ]
    assert metrics["accuracy"]["models"][0]["value"] == sum(hits) / 4 == 0.5
    assert metrics["accuracy.two"]["models"][0]["value"] == sum(hits[2:]) / 2
    odds = [
        math.exp(row["texts"][item.right]) / sum(map(math.exp, row["texts"]))
        for row, item in zip(rows, task.items, strict=True)
    ]
    assert metrics["probability"]["models"][0]["value"] == pytest.approx(sum(odds) / 4)
    assert metrics["probability"]["models"][0]["rows"] == 4


def test_the_door_says_what_it_found_and_what_it_misses(tiny_folder: Path, tmp_path: Path, put: Put) -> None:
    """Progress among the results, or a traceback where something is missing."""
    tasks = put(
        "tasks.yaml", json.dumps([{"name": "mine", "items": ROWS, "metrics": ["rouge_l", "loss"], "max_new_tokens": 4}])
    )
    flags = ("generate/evaluate.py", "--checkpoint_dir", tiny_folder, "--tasks", tasks, "--out_dir", tmp_path / "out")
    result = run_here(*flags, "--show", "1")
    assert result.returncode == 0, result.stderr
    assert "ROUGE-L" in result.stdout and "loss of the reference" in result.stdout and "tokens/s" not in result.stdout
    assert "the same question" in result.stdout and "tokens/s" in result.stderr and "report.html" in result.stderr
    for wrong, named in (
        (("--limit", "0"), "--limit is 0, expected 1 or more"),
        (("--judge_model", "x"), "--judge_model is given without --judge_url"),
        (("--tasks", tasks, tasks), "two tasks are named"),
        (("--batch_size", "0"), "--batch_size is 0, expected 1 or more"),
        (("--out_dir", tiny_folder), ", but no evaluation: name"),
        (("--out_dir", tasks), "is a file, expected a folder"),
    ):
        result = run_here(*flags, *wrong)
        assert result.returncode == 2 and named in result.stderr and result.stdout == "", result
    result = run_here("generate/evaluate.py", "--checkpoint_dir", tiny_folder, "--out_dir", tmp_path / "x")
    assert result.returncode == 2 and "give --data_dir, --tasks or both" in result.stderr
    result = run_here("generate/evaluate.py", "--checkpoint_dir", tiny_folder, "--plan")
    assert result.returncode == 0 and f"Plan of {tiny_folder.name}: 2 layers" in result.stdout
    result = run_here("generate/evaluate.py", "--tasks", tasks, "--out_dir", tmp_path / "x")
    assert result.returncode == 2 and "nobody to evaluate" in result.stderr and not (tmp_path / "x").exists()


def test_a_damaged_model_is_named_and_the_rows_of_others_stay(folders: list[Path], task: Task, tmp_path: Path) -> None:
    """A row of nan, or an hour of answers of other models lost to one bad folder."""
    import shutil

    from safetensors.torch import load_file, save_file

    bad = Path(shutil.copytree(folders[0], tmp_path / "bad"))
    tensors = load_file(bad / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * math.nan
    save_file(tensors, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"bad/.*not finite"):
        run([folders[0], bad], task, tmp_path / "out")
    [first, second] = sorted((tmp_path / "out" / "rows").iterdir())
    assert len(first.read_bytes().splitlines()) == 7 and len(second.read_bytes().splitlines()) == 1


def test_models_of_different_tokenizers_are_compared_by_bytes(tiny_folder: Path, task: Task, tmp_path: Path) -> None:
    """A loss per token of another vocabulary, taken for better."""
    import shutil

    other = Path(shutil.copytree(tiny_folder, tmp_path / "other"))
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(words))
    found = run([tiny_folder, other], task, tmp_path / "out").results
    differences = {entry["name"]: entry["differences"][0] for entry in found["tasks"][0]["metrics"]}
    assert differences["loss"] is None and differences["bits_per_byte"] is not None
    assert any("different tokenizers" in note for note in found["notes"])
