"""Encoded by many and put together by one: the bytes of a single run, or an error that names what is wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_here
from test_prepare import LONG, RULES, Prepare, bytes_of
from test_prepare import prepare as prepare  # a fixture

from lit_llama.errors import DataError, IntegrityError, UserError
from lit_llama.text.dataset import blocks
from lit_llama.text.dataset.folder import read_meta


def row(number: int) -> dict[str, Any]:
    """Chats of many turns, long instructions, empty answers, nearly equal rows and exact twins."""
    if number % 7 == 3:
        return {"instruction": f"Question {number}", "output": " "}
    if number % 7 == 4:
        return {"instruction": f"Question {number // 20} about {LONG[:90]}", "input": LONG[:90], "output": "It is."}
    if number % 7 == 5:
        return {"instruction": f"Question {number // 20}", "output": LONG}
    if turn := number % 5:
        turns = [("user", f"Question {number}, {turn}"), ("assistant", f"answer {turn} ä")] * 6
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    return {"prompt": f"A story of {number // 40} words", "completion": LONG[: 20 + number % 9]}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(blocks, "ROWS", 16)  # 13 blocks, the last one not full
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row(number)) + "\n" for number in range(200)))
    return path


@pytest.fixture
def shards(prepare: Prepare, rows: Path, tmp_path: Path) -> list[Path]:
    """Three shards of the default rules."""
    folders = [tmp_path / f"shard-{index}" for index in range(3)]
    for index, folder in enumerate(folders):
        prepare(rows, folder=folder, shard=f"{index}/3")
    return folders


@pytest.mark.parametrize("of", [1, 3])
@pytest.mark.parametrize("split", ["hash", "shuffle"])
@pytest.mark.parametrize("overflow", ["split", "truncate_prompt", "truncate_response"])
def test_shards_together_are_a_single_run_bit_for_bit(
    of: int, split: str, overflow: str, prepare: Prepare, rows: Path, tmp_path: Path
) -> None:
    """Catches a row lost or moved, a cut text that is told as the whole, and any trace of how it was divided."""
    options: dict[str, Any] = {"split": split, "overflow": overflow, "max_seq_length": 120}
    meta = prepare(rows, **options)
    assert meta["in_parts"] + meta["cut"]["rows"] > 20
    single = bytes_of(tmp_path / "data")
    assert json.loads(single["report.json"])["findings"]["duplicates"]["near"]["rows"] > 0
    shutil.rmtree(tmp_path / "data")
    for index in range(of):
        made = prepare(rows, folder=tmp_path / "parts" / str(index), shard=f"{index}/{of}", **options)
        assert made["of_rows"] == 200 and (of == 1 or made["rows"] < 100)
    folders = [str(tmp_path / "parts" / str(index)) for index in reversed(range(of))]
    assert prepare(rows, shards=folders, **options) == meta
    found = bytes_of(tmp_path / "data")
    assert list(found) == list(single) and [name for name in found if found[name] != single[name]] == []


def test_the_tokenizer_does_nothing_where_shards_have_done_it(
    prepare: Prepare, rows: Path, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches rows that are encoded twice, and an unchanged shard that is made again."""
    monkeypatch.setattr("lit_llama.text.dataset.encoder.Encoder.encode", None)
    monkeypatch.setattr("lit_llama.text.dataset.encoder.Encoder.render", None)
    before = bytes_of(shards[1])
    assert prepare(rows, folder=shards[1], shard="1/3")["shard"] == "1/3" and bytes_of(shards[1]) == before
    assert prepare(rows, shards=[str(shards[0].with_name("shard-*"))])["kept"] > 100


def test_the_doors_divide_and_put_together(rows: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a flag that goes nowhere, and a summary that does not say the way on."""
    (tmp_path / "books.txt").write_text("\n".join(f"A line of {number}." for number in range(90)))
    for door, source in (("records", rows), ("text", tmp_path / "books.txt")):
        flags = ["--source", source, "--tokenizer_path", tiny_folder, "--max_seq_length", 200, "--test_split_size", 0.2]
        flags += ["--documents", "line"] if door == "text" else ["--prompt_style", "chatml"]
        home = tmp_path / door
        for index in range(2):
            done = run_here(
                f"prepare/{door}.py", *flags, "--shard", f"{index}/2", "--destination_path", home / f"s{index}"
            )
            assert done.returncode == 0 and f"shard {index}/2, " in done.stderr, done.stderr
            assert "when all 2 are made, run the same command with --shards" in done.stderr
        done = run_here(f"prepare/{door}.py", *flags, "--shards", home / "s*", "--destination_path", home / "data")
        assert done.returncode == 0, done.stderr
        assert read_meta(home / "data")["source"]["rows"] == (200 if door == "records" else 90)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_seq_length": 190}, r"made with --max_seq_length 200, expected 190: give every run the same flags"),
        ({"prompt_style": "vicuna"}, r"made with --prompt_style chatml, expected vicuna"),
        ({"split": "shuffle"}, r"made with --split hash, expected shuffle"),
        ({"near_duplicates": 5}, r"made with --near_duplicates 1000, expected 5"),
    ],
)
def test_shards_of_other_rules_are_named(
    changes: dict[str, Any], said: str, prepare: Prepare, rows: Path, shards: list[Path]
) -> None:
    """Catches samples of one limit under the name of another."""
    with pytest.raises(DataError, match=f"--shards: .*shard-0 was {said}"):
        prepare(rows, shards=[*map(str, shards)], **changes)


def test_shards_of_other_data_tokenizer_or_code_are_named(
    prepare: Prepare, rows: Path, shards: list[Path], tiny_folder: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Catches rows and ids of two versions in one folder."""
    given = [*map(str, shards)]
    other = tmp_path / "tokenizer"
    shutil.copytree(tiny_folder, other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"x": 1}))
    with pytest.raises(DataError, match="shard-0 was made with another tokenizer: make it again"):
        prepare(rows, shards=given, tokenizer_path=other)
    with monkeypatch.context() as patch:
        patch.setattr("lit_llama.text.dataset.records.ENCODING", -1)
        with pytest.raises(DataError, match="shard-0 was made with another version of the encoding"):
            prepare(rows, shards=given)
    whole = rows.read_text()
    rows.write_text(whole.replace("Question 8,", "Question eight,"))
    with pytest.raises(
        DataError, match=r"shard-0 was made of other sources or other bytes of them \(.*rows.jsonl here"
    ):
        prepare(rows, shards=given)
    assert not (tmp_path / "data").exists()


def test_a_shard_missing_twice_or_of_another_number_is_named(
    prepare: Prepare, rows: Path, shards: list[Path], tmp_path: Path
) -> None:
    """Catches a third of the data, or a third twice, taken for the whole."""
    first, second, third = map(str, shards)
    prepare(rows, folder=tmp_path / "half", shard="1/2")
    (tmp_path / "empty").mkdir()
    for given, said in (
        ([first, third], r"1/3 missing; make it with --shard 1/3"),
        ([third], r"0/3, 1/3 missing"),
        ([first, first, second], r"shard-0 and .*shard-0 both are shard 0/3; name it once"),
        ([first, second, str(tmp_path / "half")], r"half is shard 1/2, .*shard-0 is one of 3"),
        ([first, str(tmp_path / "empty")], r"empty is no finished shard: it has no shard.json; make it with --shard"),
        ([str(tmp_path / "s*.x")], r"matches no folder"),
    ):
        with pytest.raises(DataError, match=said):
            prepare(rows, shards=given)
    for text in ("3/3", "1", "a/b", "-1/3", "1/3/5", "0/0"):
        with pytest.raises(UserError, match=r"--shard is '.*', expected I/N with I from 0 to N - 1"):
            prepare(rows, shard=text)
    with pytest.raises(UserError, match="give one of them"):
        prepare(rows, shard="0/3", shards=[first])
    with pytest.raises(UserError, match=r"shard-0 is a shard; name another folder"):
        prepare(rows, shards=[first, second, third], folder=shards[0])
    prepare(rows)
    with pytest.raises(UserError, match=r"data is a data folder; name another one for the shard"):
        prepare(rows, shard="0/3")


@pytest.mark.parametrize("name", ["samples.arrow", "blocks.jsonl"])
def test_a_damaged_shard_is_refused(name: str, prepare: Prepare, rows: Path, shards: list[Path]) -> None:
    """Catches a copy that was cut off or changed on its way between machines."""
    data = bytearray((shards[2] / name).read_bytes())
    data[len(data) // 2] ^= 1
    (shards[2] / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=f"shard-2/{name} is not what shard.json says"):
        prepare(rows, shards=[*map(str, shards)])


KILLED = """
import os, signal, sys
from pathlib import Path
from lit_llama.text.dataset import blocks
from lit_llama.text.dataset import shards
from lit_llama.text.dataset.config import PrepareConfig
from lit_llama.text.dataset.records import prepare_records

at, rules, source, destination, tokenizer = sys.argv[1:]
original, calls, blocks.ROWS = shards._Writer.add, [], 16

def dying(*arguments):
    calls.append(1)
    if len(calls) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

shards._Writer.add = dying
settings = {"source": source, "destination_path": Path(destination), "tokenizer_path": Path(tokenizer)}
prepare_records(PrepareConfig(**settings, prompt_style="chatml", shard="1/3", **eval(rules)))
"""


def test_a_killed_shard_leaves_nothing_that_looks_whole(
    prepare: Prepare, rows: Path, shards: list[Path], tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches half a shard that is taken for all of it, and garbage for ever."""
    before = bytes_of(shards[1])
    shutil.rmtree(shards[1])
    command = [sys.executable, "-c", KILLED, 3, RULES, rows, shards[1], tiny_folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([*map(str, command)], env=environment, timeout=120).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="shard-1 is no finished shard"):
        prepare(rows, shards=[*map(str, shards)])
    prepare(rows, folder=shards[1], shard="1/3")
    assert bytes_of(shards[1]) == before
    assert prepare(rows, shards=[*map(str, shards)])["kept"] > 100
    assert not list(tmp_path.glob(".*")), "what it left is cleared away"
