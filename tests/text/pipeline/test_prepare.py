"""From rows of any kind to a data folder: every row accounted for, the same bytes twice, all of it or nothing."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextvars import Context
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT

from lit_llama.errors import DataError, ResourceError, UserError
from lit_llama.folder.publish import publish
from lit_llama.text.config import PrepareConfig
from lit_llama.text.dataset.folder import Split, read_meta
from lit_llama.text.dataset.split import hash_side, shuffle_split
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.text.pipeline import reject_log as losses
from lit_llama.text.pipeline.executors import blocks
from lit_llama.text.pipeline.prepare import Texts
from lit_llama.text.pipeline.records import prepare_records
from lit_llama.text.read.formats.sources import read_questions
from lit_llama.text.tokenizer.base import Tokenizer

Prepare = Callable[..., dict[str, Any]]
LONG = "many words " * 60


def row(number: int) -> dict[str, Any]:
    """Chats, instructions, and rows from which nothing is learned."""
    if number % 10 == 3:
        return {"instruction": f"Question {number}", "output": " "}
    if number % 10 == 6:
        return {"instruction": f"Question {number}", "output": LONG}
    turns = [("user", f"Question {number}"), ("assistant", f"answer {number}")] * (1 + number % 3)
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROWS = [row(number) for number in range(120)]
EMPTY, TOO_LONG = ([n for n in range(120) if n % 10 == end] for end in (3, 6))


RULES: dict[str, Any] = {
    **{"max_seq_length": 200, "mask_inputs": True, "train_on": "all", "overflow": "drop"},
    **{"split": "hash", "test_split_size": 0.2, "seed": 1, "near_duplicates": 1000},
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def prepare(tiny_folder: Path, tmp_path: Path) -> Prepare:
    """prepare_records with small defaults, into the folder `data`."""

    def run(*sources: Path | str, folder: Path = tmp_path / "data", **changes: Any) -> dict[str, Any]:
        settings = {"tokenizer_path": tiny_folder, "prompt_style": "chatml"} | RULES | changes
        return prepare_records(PrepareConfig(source=[*map(str, sources)], destination_path=folder, **settings))

    return run


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All files below a folder but what is on its way there, and when they were written."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and "/." not in str(path))
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {name: content for name, (_, content) in contents(folder).items()}


def answers(folder: Path, split: str, tokenizer: Tokenizer) -> list[str]:
    """The trained words of every sample."""
    labels = [column[1].tolist() for column in map(Split(folder, split).__getitem__, range(len(Split(folder, split))))]
    return [tokenizer.decode([label for label in row if label != IGNORE_INDEX]) for row in labels]


@pytest.mark.parametrize("split", ["hash", "shuffle"])
@pytest.mark.parametrize("chunk", [7, 2000])
def test_every_row_is_kept_or_dropped_with_its_place(
    split: str, chunk: int, prepare: Prepare, rows: Path, tmp_path: Path, tiny_folder: Path, monkeypatch: Any
) -> None:
    """Catches rows lost between chunks or splits, and a place that is not the line in the file."""
    monkeypatch.setattr(blocks, "ROWS", chunk)
    monkeypatch.setattr(losses, "FIRST", 9)
    meta = prepare(rows, split=split)
    assert meta == read_meta(tmp_path / "data")
    reasons = {"empty output": EMPTY, "longer than 200 tokens": TOO_LONG}
    assert meta["dropped"] == {
        reason: {"rows": 12, "first": [f"{rows}:line {n + 1}" for n in numbers[:9]]}
        for reason, numbers in reasons.items()
    }
    lost = sorted((n, reason) for reason, numbers in reasons.items() for n in numbers)
    wanted = [{"where": f"{rows}:line {n + 1}", "what": "dropped", "reason": reason} for n, reason in lost]
    assert [json.loads(line) for line in (tmp_path / "data" / "lost.jsonl").open()] == wanted
    assert (meta["source"]["rows"], meta["kept"], meta["in_parts"]) == (120, 96, 0)
    assert meta["cut"] == {"rows": 0, "first": []}
    tokenizer = Tokenizer.from_path(tiny_folder)
    found = [text for name in ("train", "test") for text in answers(tmp_path / "data", name, tokenizer)]
    usable = [n for n in range(120) if n not in EMPTY + TOO_LONG]
    assert Counter(found) == Counter(f"answer {n}" * (1 + n % 3) for n in usable)
    report = json.loads((tmp_path / "data" / "report.json").read_text("utf-8"))
    assert report["accounting"]["adds_up"] and not [w for w in report["warnings"] if "add up" in w["what"]]


@pytest.mark.parametrize("split", ["hash", "shuffle"])
def test_the_sides_are_those_of_the_rule(
    split: str, prepare: Prepare, rows: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    """Catches sides of the kept rows in place of all rows, and a test.jsonl in another order than the split."""
    prepare(rows, split=split)
    usable = [n for n in range(120) if n not in EMPTY + TOO_LONG]
    if split == "hash":
        side = {n: hash_side(f"Question {n}", 0.2, 1) for n in usable}
        orders = [[n for n in usable if side[n] == name] for name in ("train", "test")]
    else:
        orders = [[n for n in order if n in usable] for order in shuffle_split(120, 24, 1)]
    tokenizer = Tokenizer.from_path(tiny_folder)
    for name, order in zip(("train", "test"), orders, strict=True):
        assert answers(tmp_path / "data", name, tokenizer) == [f"answer {n}" * (1 + n % 3) for n in order]
    held_out = read_questions(tmp_path / "data" / "test.jsonl")
    assert [example.response for example in held_out] == [f"answer {n}" for n in orders[1]]
    made = datasets.load_from_disk(str(tmp_path / "data"))
    assert {name: len(made[name]) for name in made} == {"train": len(orders[0]), "test": len(orders[1])}


def test_adding_rows_moves_none_and_duplicates_stay_together(prepare: Prepare, tmp_path: Path) -> None:
    """Catches test rows that were trained before the data grew, and a repeated question on both sides."""
    questions = [f"What is {n}?" for n in range(150)]
    old = [{"instruction": question, "output": f"It is {n}."} for n, question in enumerate(questions)]
    twins = [{"instruction": f"  {q.upper()}", "output": "Who knows."} for q in questions[:50]]
    held_out = []
    for name, data in (("old", old), ("new", [*twins, *old[75:], *old[:75]])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(data))
        meta = prepare(path, folder=tmp_path / name)
        asked = [json.loads(line)["instruction"] for line in (tmp_path / name / "test.jsonl").open()]
        held_out.append({" ".join(text.lower().split()) for text in asked})
    assert held_out[0] == held_out[1] and len(held_out[0]) > 15
    assert meta["test_rows_also_in_train"] == 0


@pytest.mark.parametrize("overflow", ["split", "truncate_prompt"])
def test_all_parts_of_a_row_stand_on_the_side_of_the_whole(overflow: str, prepare: Prepare, tmp_path: Path) -> None:
    """Catches a chat whose first half is trained and whose second half is tested, or that moves when it is cut."""
    draw = random.Random(0)
    chats = []
    for n in range(60):
        turns = [(f"chat {n}, turn {i} {draw.random()}", f"{n}:{i}") for i in range(6)]
        pairs = [(("user", asked), ("assistant", said)) for asked, said in turns]
        chats.append({"messages": [{"role": r, "content": c} for pair in pairs for r, c in pair]})
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(chats))
    meta = prepare(path, max_seq_length=120, overflow=overflow)
    assert meta["in_parts"] == 60 or meta["cut"]["rows"] == 60
    test = [json.loads(line)["messages"] for line in (tmp_path / "data" / "test.jsonl").open()]
    found = {int(turns[-1]["content"].split(":")[0]) for turns in test}
    wanted = {n for n in range(60) if hash_side(chats[n]["messages"][0]["content"], 0.2, 1) == "test"}
    assert found == wanted and 3 < len(wanted) < 30


def test_divided_sources_stay_as_they_are_divided(prepare: Prepare, tmp_path: Path) -> None:
    """Catches rows of a test set that are trained, and a file of neither name put on either side in silence."""
    (tmp_path / "in").mkdir()
    for name in ("train", "test"):
        data = [{"instruction": f"{name} {n}", "output": "x"} for n in range(9)]
        (tmp_path / "in" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    meta = prepare(tmp_path / "in", split="given")
    assert {name: counts["rows"] for name, counts in meta["splits"].items()} == {"train": 9, "test": 9}
    assert all(example.asked.startswith("test") for example in read_questions(tmp_path / "data" / "test.jsonl"))
    with pytest.raises(DataError, match=r"train\.jsonl:line 1: --split given, but the sources do not say"):
        prepare(tmp_path / "in" / "train.jsonl", split="given")


def test_plain_text_comes_in_windows(prepare: Prepare, tmp_path: Path) -> None:
    """Catches documents repeated for each of their windows, and windows of one document on both sides."""
    data = [{"text": f"Book {n}. " + " ".join(f"w{n}x{i}" for i in range(150))} for n in range(30)]
    path = tmp_path / "books.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    meta = prepare(path, max_seq_length=100, overflow="split")
    assert meta["in_parts"] == 30 and meta["kept"] == 30
    windows = [json.loads(line)["text"] for line in (tmp_path / "data" / "test.jsonl").open()]
    books = {n for n in range(30) if hash_side(data[n]["text"], 0.2, 1) == "test"}
    assert "".join(windows).replace(" ", "") == "".join(data[n]["text"] for n in sorted(books)).replace(" ", "")
    with pytest.raises(DataError, match="plain text asks nothing"):
        read_questions(tmp_path / "data" / "test.jsonl")


def test_a_split_without_rows_says_where_they_went(prepare: Prepare, rows: Path) -> None:
    """Catches a test loss of nothing, and an error without a way out."""
    with pytest.raises(
        DataError, match=r"train split.*of 120 rows 108 longer than 20 tokens, 12 empty output; raise --max_seq_l"
    ):
        prepare(rows, max_seq_length=20, test_split_size=0.001)
    with pytest.raises(UserError, match=r"--test_split_size is 200, expected a share such as 0.05"):
        prepare(rows, test_split_size=200)


def test_a_row_that_cannot_be_used_stops_or_is_dropped(prepare: Prepare, tmp_path: Path) -> None:
    """Catches --on_error skip that stops at what only the style finds out."""
    bad = [{"question": "x"}, {"messages": [{"role": "tool", "content": "x"}]}]
    system = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    rows = [*ROWS[:30], *bad, {"messages": system}, *ROWS[30:]]
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"bad.jsonl:line 31: no schema fits"):
        prepare(path)
    meta = prepare(path, on_error="skip", prompt_style="alpaca")
    lost = {place: reason for reason, tally in meta["dropped"].items() for place in tally["first"]}
    assert [lost[f"{path}:line {n}"].split(" ")[0] for n in (31, 32, 33)] == ["no", "found", "the"]
    assert meta["source"]["rows"] == 123 == meta["kept"] + len(lost)


# The same twice, all or nothing


def test_another_process_place_locale_and_time_zone_give_the_same_bytes(
    prepare: Prepare, rows: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches an order of a set, a clock, a locale's way with numbers, and a path of the moment in the contents."""
    prepare(rows, split="shuffle")
    wanted = bytes_of(tmp_path / "data")
    flags = ["--source", rows, "--destination_path", tmp_path / "other" / "data", "--tokenizer_path", tiny_folder]
    flags += ["--prompt_style", "chatml", "--max_seq_length", 200, "--split", "shuffle", "--test_split_size", 0.2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / "prepare" / "records.py", *flags, "--seed", 1]
    subprocess.run([*map(str, command)], env=environment, cwd=tmp_path, check=True, capture_output=True)
    found = bytes_of(tmp_path / "other" / "data")
    told = {"meta.json", "report.json", "report.html"}  # of where the folder is, and of the steps of training
    for made in (found, wanted):
        lines = made["SHA256SUMS"].decode().splitlines()
        made["SHA256SUMS"] = "\n".join(line for line in lines if line.partition("  ")[2] not in told).encode()
    assert {n: b for n, b in found.items() if n not in told} == {n: b for n, b in wanted.items() if n not in told}


KILLED = """
import os, signal, sys
from pathlib import Path
from lit_llama.folder import publish as folder
from lit_llama.text.dataset import writer as sides
from lit_llama.text.dataset import writer as arrow
from lit_llama.text.inspect import report
from lit_llama.text.config import PrepareConfig
from lit_llama.text.pipeline.records import prepare_records

step, at, rules, source, destination, tokenizer = sys.argv[1:]
owner = {"add": arrow.SplitWriter, "close": sides.Sides, "write_json": report, "_move": folder}[step]
original, calls = getattr(owner, step), []

def dying(*arguments):
    calls.append(step)
    if len(calls) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*arguments)

setattr(owner, step, dying)
settings = {"source": source, "destination_path": Path(destination), "tokenizer_path": Path(tokenizer)}
prepare_records(PrepareConfig(**settings, prompt_style="chatml", **eval(rules)))
"""


@pytest.mark.parametrize(
    ("step", "at", "older"),
    [
        *[("add", 1, True), ("add", 2, False), ("close", 1, True), ("write_json", 1, False)],
        *[("_move", 1, True), ("_move", 3, False), ("_move", 8, True)],
    ],
)
def test_a_killed_run_leaves_nothing_that_looks_whole(
    step: str, at: int, older: bool, prepare: Prepare, rows: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Catches half a folder that trains, old and new files mixed under one meta.json, and garbage for ever."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "raw.txt").write_text("mine")
    if older:
        prepare(rows)
    before = bytes_of(folder)
    rules = RULES | {"seed": 2}
    command = [sys.executable, "-c", KILLED, step, at, rules, rows, folder, tiny_folder]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([*map(str, command)], env=environment, timeout=120).returncode == -signal.SIGKILL
    if (folder / "meta.json").exists():
        assert older and bytes_of(folder) == before
    else:
        with pytest.raises(DataError, match="is no finished data folder"):
            read_meta(folder)
    made = prepare(rows, seed=2)
    fresh = prepare(rows, folder=tmp_path / "fresh" / "data", seed=2)
    assert made["splits"] == fresh["splits"] and (folder / "raw.txt").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"data", "rows.jsonl", "fresh"}
    assert not list(folder.glob(".*")), "what it left is cleared away"


def test_two_runs_at_once_do_not_mix(prepare: Prepare, rows: Path, tmp_path: Path) -> None:
    """Catches the files of two runs in one folder: the second one is refused while the first is at work."""
    meta = prepare(rows)
    whole = contents(tmp_path / "data")
    with publish(tmp_path / "data", "meta.json", replace=True):
        with pytest.raises(ResourceError, match=r"another run is at work on .*data"):
            Context().run(prepare, rows, seed=3)
        assert prepare(rows) == meta, "what is there already can be used meanwhile"
        assert contents(tmp_path / "data") == whole
        (next(tmp_path.glob("data/.data.partial-*")) / "meta.json").write_bytes(whole["meta.json"][1])
    assert prepare(rows, seed=3)["seed"] == 3


def test_a_full_disk_is_an_error_that_changes_nothing(prepare: Prepare, rows: Path, tmp_path: Path) -> None:
    """Catches a folder whose last part is missing."""
    prepare(rows)
    whole = contents(tmp_path / "data")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(ResourceError, match="data cannot be written: File too large"):
            prepare(rows, seed=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert contents(tmp_path / "data") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"data", "rows.jsonl"}


def test_memory_does_not_grow_with_what_was_written(tmp_path: Path) -> None:
    """Catches words of rows kept in memory."""
    texts = Texts(tmp_path)
    values = [[{"role": "user", "content": f"{n} \ud800 北京 " * 50}] for n in range(300)]
    for number, value in enumerate(values):
        texts.add(value)
        if number % 50 == 0:
            assert texts[number // 2] == values[number // 2]
    assert [texts[number] for number in range(299, -1, -1)] == values[::-1] and len(texts) == 300
    assert not list(tmp_path.iterdir()), "the file has no name, so that nothing is left of it"


PEAK = """
import json, re, sys
from pathlib import Path
from lit_llama.text.config import PrepareConfig
from lit_llama.text.pipeline.records import prepare_records

folder, rows, split, tokenizer = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
with (folder / "rows.jsonl").open("w") as file:
    for n in range(rows):
        answer = "yes and no " * 9 if n % 4 else ""
        file.write(json.dumps({"instruction": f"{n // 99} {n % 99} ?", "output": answer}) + "\\n")
config = PrepareConfig(
    source=str(folder / "rows.jsonl"),
    destination_path=folder / "data",
    tokenizer_path=tokenizer,
    prompt_style="plain",
    max_seq_length=100,
    split=split,
    test_split_size=0.1,
    seed=1,
    near_duplicates=0,
)
prepare_records(config)
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.parametrize("split", ["hash", "shuffle"])
def test_memory_hardly_grows_with_the_rows(split: str, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches tokens, words or places of rows that are kept: 100 bytes of each are allowed, and 8 MB of noise."""
    peaks = []
    for rows in (20_000, 60_000):
        (folder := tmp_path / str(rows)).mkdir()
        command = [sys.executable, "-c", PEAK, folder, rows, split, tiny_folder]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout) * 1024)
    assert peaks[1] - peaks[0] < 100 * 40_000 + 8_000_000, peaks
