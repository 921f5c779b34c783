"""A folder of preferences: the ids of supervised samples, in three columns, with every row accounted for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import run_here
from test_prepare import Prepare, bytes_of
from test_prepare import prepare as prepare  # a fixture

from lit_llama.errors import DataError
from lit_llama.text.dataset.folder import Split, read_meta
from lit_llama.text.dataset.pairs import CHOSEN, REJECTED, PairSplit
from lit_llama.text.dataset.writer import Samples, read_samples
from lit_llama.text.message import IGNORE_INDEX, Preference
from lit_llama.text.pipeline.pairs import PairWriter, raw_preference
from lit_llama.text.read.reading import read_conversations

TURNS = [{"role": role, "content": f"{role} speaks."} for role in ("user", "assistant")]


def pair(number: int) -> dict[str, Any]:
    """Preferences of one turn, and of several."""
    if number % 3 == 0:
        before = [*TURNS, {"role": "user", "content": f"Question {number}?"}]
        answers = ([{"role": "assistant", "content": f"{word} {number}"}] for word in ("good", "bad 😀"))
        return dict(zip(("prompt", "chosen", "rejected"), (before, *answers), strict=True))
    return {"prompt": f"Question {number}?", "chosen": f"good {number}", "rejected": "bad " * (number % 5 + 1)}


PAIRS = [pair(number) for number in range(60)]


@pytest.fixture
def put_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def sides(folder: Path, split: str) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, chosen and rejected ids, as the datasets library reads them."""
    loaded = datasets.load_from_disk(str(folder))
    assert list(loaded) == ["train", "test"]
    rows = loaded[split]
    assert rows.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert all(str(feature.feature.dtype) == "int32" for feature in rows.features.values())
    return [(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]


def supervised(folder: Path, split: str) -> list[tuple[list[int], int]]:
    """Ids of samples, and where their answer begins."""
    samples = Split(folder, split)
    found = []
    for row in range(len(samples)):
        ids, labels = samples[row]
        found.append((ids.tolist(), int(np.argmax(labels != IGNORE_INDEX))))
    return found


@pytest.mark.parametrize("style", ["chatml", "alpaca", "vicuna", "chat_template"])
@pytest.mark.parametrize("split", ["hash", "shuffle"])
def test_both_answers_have_the_ids_of_supervised_samples(
    style: str, split: str, prepare: Prepare, put_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches an answer without its end token, a blank that belongs to the other side, rows that stand in another split
    than in supervised data, and answers that change places."""
    settings = {"prompt_style": style, "split": split, "train_on": "last", "test_split_size": 0.2}
    if split == "shuffle":
        settings["test_split_size"] = 12
    meta = prepare(put_rows(PAIRS), data_kind="preference", **settings)
    assert (meta["kind"], meta["pairs"], meta["kept"], meta["train_on"]) == ("preference", True, 60, "last")
    assert read_meta(tmp_path / "data", kind="preference") == meta
    plain = {
        side: put_rows([{**_asked(row), **_answered(row[side])} for row in PAIRS], f"{side}.jsonl")
        for side in ("chosen", "rejected")
    }
    for side, path in plain.items():
        prepare(path, folder=tmp_path / side, **settings)
    for name in ("train", "test"):
        pairs = sides(tmp_path / "data", name)
        for number, side in enumerate(plain, 1):
            wanted = supervised(tmp_path / side, name)
            assert [row[0] + row[number] for row in pairs] == [ids for ids, _ in wanted] and len(pairs) > 2
            assert [len(row[0]) for row in pairs] == [begin for _, begin in wanted]
        counts = meta["splits"][name]
        assert counts["rows"] == len(pairs)
        assert counts["tokens"] == sum(map(len, (ids for row in pairs for ids in row)))
        assert counts["trained_tokens"] == sum(len(row[1]) + len(row[2]) for row in pairs)
        assert counts["longest"] == max(len(row[0]) + max(len(row[1]), len(row[2])) for row in pairs)
        mapped = PairSplit(tmp_path / "data", name)
        assert [tuple(ids.tolist() for ids in mapped[row]) for row in range(len(mapped))] == pairs
        assert mapped.prompt_lengths.tolist() == [len(row[0]) for row in pairs]
        assert mapped.stranger(384) is None and mapped.stranger(300) is not None


def _asked(row: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": row["prompt"]}


def _answered(answer: Any) -> dict[str, Any]:
    return {"completion": answer}


def test_the_rows_for_testing_come_to_the_same_folder_again(
    prepare: Prepare, put_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches test rows whose form the reader does not know, or that lose an answer."""
    prepare(put_rows(PAIRS), data_kind="preference")
    again = prepare(
        tmp_path / "data" / "test.jsonl", folder=tmp_path / "again", data_kind="preference", test_split_size=0.0
    )
    assert again["dropped"] == {} and sides(tmp_path / "again", "train") == sides(tmp_path / "data", "test")
    other = prepare(put_rows(PAIRS), folder=tmp_path / "other", data_kind="preference", split_from=tmp_path / "data")
    assert other["splits"] == read_meta(tmp_path / "data", kind="preference")["splits"]
    assert sides(tmp_path / "other", "test") == sides(tmp_path / "data", "test")


def test_a_written_row_is_read_as_the_one_it_was(put_rows: Callable[..., Path]) -> None:
    """Catches calls, tools, inputs and labels that a row for testing does not hold."""
    tool = {"type": "function", "function": {"name": "clock", "parameters": {}}}
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    rows = [
        {"prompt": TURNS[:1], "chosen": [call], "rejected": [TURNS[1]], "tools": [tool]},
        {"instruction": "a", "input": "b", "chosen": "c", "rejected": "d", "system": "e"},
        {"instruction": "a", "input": "b", "output": "c", "label": False},
    ]
    preferences = list(read_conversations([str(put_rows(rows))], data_kind="preference"))
    assert all(isinstance(one, Preference) for one in preferences)
    written = [raw_preference(one.messages, one.tools, (one.rejected, one.wanted)) for one in preferences]
    again = read_conversations([str(put_rows(written))], data_kind="preference")
    assert list(again) == preferences


def test_every_row_without_a_difference_is_dropped_by_name(
    prepare: Prepare, put_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches a pair of which half is too long, or equal when encoded, and a row that is counted twice."""
    odd = [
        {"prompt": "a", "chosen": "word " * 200, "rejected": "b"},
        {"prompt": "a", "chosen": "b", "rejected": "word " * 200},
        {"prompt": "a", "chosen": "word " * 200, "rejected": "more " * 200},
        {"prompt": "a", "chosen": "b", "rejected": " b"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"chosen": [TURNS[0], TURNS[1]], "rejected": [{"role": "user", "content": "x"}, TURNS[1]]},
    ]
    path = put_rows([*odd, *PAIRS])
    meta = prepare(path, data_kind="preference")
    reasons = ["longer than 200 tokens"] * 3 + ["chosen and rejected are the same", "empty rejected answer"]
    reasons.append("the prompts of chosen and rejected differ")
    lost = [json.loads(line) for line in (tmp_path / "data" / "lost.jsonl").open()]
    assert [(entry["where"], entry["reason"]) for entry in lost] == [
        (f"{path}:line {number}", reason) for number, reason in enumerate(reasons, 1)
    ]
    assert (meta["source"]["rows"], meta["kept"]) == (66, 60)
    assert sum(tally["rows"] for tally in meta["dropped"].values()) == 6 and meta["too_long"]["rows"] == 3
    with pytest.raises(DataError, match=r"line 1 has \d+ tokens, more than --max_seq_length 200"):
        prepare(path, folder=tmp_path / "none", data_kind="preference", overflow="error")


def test_single_answers_are_kept_apart_from_pairs(
    prepare: Prepare, put_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches KTO's answers on the wrong side, and a folder that is half one thing and half another."""
    rows = [{"prompt": f"Question {n}?", "completion": f"answer {n}", "label": n % 3 > 0} for n in range(40)]
    meta = prepare(put_rows(rows), data_kind="preference", test_split_size=0.0)
    assert (meta["kind"], meta["pairs"], meta["wanted"], meta["unwanted"]) == ("preference", False, 26, 14)
    found = sides(tmp_path / "data", "train")
    assert [(len(chosen) > 0, len(rejected) > 0) for _, chosen, rejected in found] == [
        (n % 3 > 0, n % 3 == 0) for n in range(40)
    ]
    prepare(put_rows([{**row, "label": True} for row in rows]), folder=tmp_path / "sft", data_kind="sft-chosen",
            test_split_size=0.0)  # fmt: skip
    wanted = [ids for ids, _ in supervised(tmp_path / "sft", "train")]
    assert [prompt + chosen + rejected for prompt, chosen, rejected in found] == wanted
    with pytest.raises(
        DataError, match="60 rows have a chosen and a rejected answer, 40 one answer with a label: prepare"
    ):
        prepare(put_rows([*PAIRS, *rows]), folder=tmp_path / "mixed", data_kind="preference")
    assert not (tmp_path / "mixed" / "meta.json").exists()


def test_a_folder_is_made_once_and_anew_for_another_kind(
    prepare: Prepare, put_rows: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches supervised data that is taken for preferences that were made of the same rows before."""
    path = put_rows(PAIRS)
    meta = prepare(path, data_kind="preference", where="prompt != 'x'", on_error="skip")
    before = bytes_of(tmp_path / "data")
    assert prepare(path, data_kind="preference", where="prompt != 'x'", on_error="skip") == meta
    assert bytes_of(tmp_path / "data") == before
    capsys.readouterr()
    made = prepare(path, data_kind="sft-chosen")
    said = capsys.readouterr().err
    assert "--as is sft-chosen, not preference" in said and "--where is None, not prompt != 'x'" in said
    assert "kind" not in made and read_meta(tmp_path / "data") == made and made["kept"] == 60


def test_a_folder_of_the_other_kind_is_refused_with_its_command(
    prepare: Prepare, put_rows: Callable[..., Path], tmp_path: Path, tiny_folder: Path
) -> None:
    """Catches preferences in supervised training, and the reverse, and a message without the way out."""
    prepare(put_rows(PAIRS), data_kind="preference")
    prepare(put_rows(PAIRS), folder=tmp_path / "sft", data_kind="sft-chosen")
    with pytest.raises(DataError, match=r"data holds preferences, .* finetune/dpo.py --data_dir \S*data, or prepare"):
        read_meta(tmp_path / "data")
    with pytest.raises(
        DataError, match=r"sft holds data for supervised .* finetune/lora.py --data_dir .*--as preference"
    ):
        read_meta(tmp_path / "sft", kind="preference")
    for kind in ("data", "sft"):
        assert read_meta(tmp_path / kind, kind=None)
    run = run_here(
        "finetune/lora.py",
        "--checkpoint_dir",
        tiny_folder,
        "--data_dir",
        tmp_path / "data",
        "--out_dir",
        tmp_path / "o",
    )
    assert run.returncode == 3 and run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "finetune/dpo.py" in run.stderr


def test_the_command_makes_and_shows_preferences(
    put_rows: Callable[..., Path], tmp_path: Path, tiny_folder: Path
) -> None:
    """Catches a flag that the parser does not know, a next command for another kind of folder, and samples that cannot
    be looked at."""
    command = ["prepare/records.py", "--source", put_rows(PAIRS), "--tokenizer_path", tiny_folder]
    command += ["--prompt_style", "chatml", "--destination_path", tmp_path / "data"]
    stopped = run_here(*command)
    assert stopped.returncode == 3 and "--as sft-chosen" in stopped.stderr and "--as preference" in stopped.stderr
    made = run_here(*command, "--as", "preference")
    assert made.returncode == 0 and "ready for finetune/dpo.py --data_dir" in made.stderr
    assert "recognised: 60 chosen and rejected" in made.stderr
    shown = run_here("prepare/show.py", "--data_dir", tmp_path / "data", "--rows", "0")
    assert shown.returncode == 0 and ", chosen: " in shown.stdout and ", rejected: " in shown.stdout
    assert "⟦good" in shown.stdout and "⟦bad" in shown.stdout
    wrong = run_here(*command, "--as", "pairs")
    assert wrong.returncode == 2 and "--as is pairs, expected 'auto', 'sft-chosen', 'preference'" in wrong.stderr


def test_parts_survive_their_columns(tmp_path: Path) -> None:
    """Catches ids of one part in another when a split is divided once more, and rows of which a part is empty."""
    parts = [[IGNORE_INDEX] * 2 + [CHOSEN] * 3 + [REJECTED], [IGNORE_INDEX] + [REJECTED] * 2, [IGNORE_INDEX, CHOSEN]]
    labels = np.array([label for part in parts for label in part], np.int32)
    batch = Samples(np.arange(len(labels), dtype=np.int32), labels, np.array([len(part) for part in parts]))
    writer = PairWriter(tmp_path / "train")
    writer.add(batch)
    writer.close()
    [again] = read_samples(tmp_path / "train", PairWriter)
    for name in ("input_ids", "labels", "lengths"):
        assert getattr(again, name).tolist() == getattr(batch, name).tolist()
    split = PairSplit(tmp_path, "train")
    assert [[ids.tolist() for ids in split[row]] for row in range(3)] == [
        [[0, 1], [2, 3, 4], [5]],
        [[6], [], [7, 8]],
        [[9], [10], []],
    ]
    assert PairWriter.sequences(batch).tolist() == [5, 3, 2]
