"""Sources to conversations: a fixed order, every row accounted for, mistakes that stop or are counted."""

import csv
import gzip
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_llama.errors import DataError, UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.text.message import Conversation, Dropped
from lit_llama.text.read.reading import Reader, read_conversations

Put = Callable[[str, bytes | str], Path]


def alpaca(*numbers: object) -> list[dict[str, str]]:
    """Rows of Alpaca."""
    return [{"instruction": f"i{number}", "output": f"o{number}"} for number in numbers]


def pair(user: str, assistant: str) -> tuple[dict[str, str], ...]:
    """A question and its answer."""
    return ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})


def lines(rows: list[Any]) -> str:
    """One object a line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def answers(reader: Reader) -> list[str]:
    """Last messages of what is kept."""
    return [found.messages[-1]["content"] for found in reader if isinstance(found, Conversation)]


def stopped(*sources: Path, **options: Any) -> str:
    """The message of the error that ends the reading."""
    with pytest.raises(DataError) as caught:
        list(read_conversations([str(source) for source in sources], **options))
    return str(caught.value)


def test_several_kinds_and_formats_come_as_one_stream(put: Put) -> None:
    """Catches numbers that begin anew with each file, a place in the wrong file, and a schema taken from row 0."""
    chat = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}
    first = put("a.json", json.dumps([*alpaca(1), chat, {"text": "t"}]))
    second = put("b.jsonl.gz", gzip.compress(f"\n{lines(alpaca(2))}".encode()))
    third = put("c.csv", "prompt,completion\np,q\nr,\n")
    pq.write_table(pa.Table.from_pylist([chat]), put("d.parquet", b""))
    reader = read_conversations([str(first.parent)])
    assert list(reader) == [
        Conversation(pair("i1", "o1"), 0, f"{first}:row 0"),
        Conversation(tuple(chat["messages"]), 1, f"{first}:row 1"),
        Conversation(({"role": "assistant", "content": "t"},), 2, f"{first}:row 2", text=True),
        Conversation(pair("i2", "o2"), 3, f"{second}:line 2"),
        Conversation(pair("p", "q"), 4, f"{third}:line 2"),
        Dropped(5, f"{third}:line 3", "empty completion"),
        Conversation(tuple(chat["messages"]), 6, f"{first.parent / 'd.parquet'}:row 0"),
    ]
    assert reader.rows == 7 and reader.cut_turns == 0
    assert reader.schemas == {"Alpaca": 2, "OpenAI messages": 2, "plain text": 1, "prompt and completion": 2}
    assert reader.files == [
        {"path": str(path), "sha256": sha256_file(path), "rows": rows}
        for path, rows in ((first, 3), (second, 1), (third, 2), (first.parent / "d.parquet", 1))
    ]


def test_each_loop_begins_anew_and_gives_the_same(put: Put) -> None:
    """Catches counts that add up over two loops, and an order that differs."""
    paths = [put("b.jsonl", lines(alpaca(1, 2, ""))), put("a.jsonl", lines([*alpaca(3), {"messages": []}]))]
    reader = read_conversations([str(path) for path in paths])
    first, counts = list(reader), (reader.rows, dict(reader.schemas), reader.files)
    assert list(reader) == first and (reader.rows, dict(reader.schemas), reader.files) == counts
    assert [found.row for found in first] == list(range(5))
    next(iter(reader))
    assert list(reader) == first


def test_the_shared_alpaca_file_is_read_whole(alpaca_file: Path, tmp_path: Path, put: Put) -> None:
    """Catches a changed character in real data, whatever the format: compared with plain json and the library."""
    rows = json.loads(alpaca_file.read_bytes())
    table = pa.Table.from_pylist(rows)
    pq.write_table(table, tmp_path / "a.parquet")
    put("a.jsonl.zst", pa.compress(lines(rows).encode(), "zstd", asbytes=True))
    with (tmp_path / "a.tsv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    datasets.Dataset(table).save_to_disk(str(tmp_path / "saved"))
    for path in (alpaca_file, *(tmp_path / name for name in ("a.parquet", "a.jsonl.zst", "a.tsv", "saved"))):
        found = list(read_conversations([str(path)]))
        assert len(found) == len(rows)
        for row, got in zip(rows, found, strict=True):
            if isinstance(got, Conversation):
                user, assistant = got.messages
                assert (user["content"], user.get("input", "")) == (row["instruction"], row["input"])
                assert assistant == {"role": "assistant", "content": row["output"]}
            else:
                assert not row["output"].strip() or not row["instruction"].strip()


def test_the_first_bad_row_stops_with_its_place(put: Put) -> None:
    """Catches an error without file and row, and rows behind it that are used all the same."""
    good = alpaca(1)[0]
    cases = {
        "null output": (good | {"output": None}, "row 1: field output is null, expected text"),
        "no schema": ({"question": "a", "answer": "b"}, "row 1: no schema fits the fields question, answer; accepted"),
        "way out": ({"question": "a", "answer": "b"}, "try --fields instruction=question,output=answer"),
        "no object": (["a"], "row 1: found a list, expected an object"),
        "role": ({"messages": [{"role": "x", "content": "a"}]}, "row 1: messages[0]: unknown role 'x'"),
    }
    for row, message in cases.values():
        path = put("a.json", json.dumps([good, row, good]))
        reader = iter(read_conversations([str(path)]))
        assert next(reader).where == f"{path}:row 0"
        with pytest.raises(DataError) as caught:
            next(reader)
        assert str(caught.value).startswith(f"{path}:row 1: ") and message in str(caught.value)
    assert "line 2 is not JSON: Expecting value" in stopped(
        put("a.jsonl", json.dumps(good) + "\n{a\n".replace("a", '"a":'))
    )


def test_bad_rows_can_be_dropped_with_their_reasons(put: Put) -> None:
    """Catches a row that is neither kept nor dropped, and reasons that cannot be counted."""
    good = json.dumps(alpaca(1)[0])
    late = {"messages": [{"role": "user", "content": "a"}] * 2}
    rows = [
        good,
        "{",
        good,
        "[]",
        json.dumps(late),
        '{"a": 1}',
        good.replace('"o1"', "NaN"),
        good.replace('"o1"', "3"),
        '{"',
    ]
    path = put("a.jsonl", "\n".join(rows))
    reader = read_conversations([str(path)], on_error="skip")
    found = list(reader)
    assert [entry.row for entry in found] == list(range(len(rows))) and reader.rows == reader.files[0]["rows"] == len(
        rows
    )
    assert [entry.where for entry in found] == [f"{path}:line {number}" for number in range(1, len(rows) + 1)]
    assert Counter(entry.reason for entry in found if isinstance(entry, Dropped)) == {
        "not JSON": 2,
        "found a list, expected an object": 1,
        "found role user behind user, expected assistant": 1,
        "no schema fits the fields a": 1,
        "field output is null, expected text": 1,
        "field output is a number, expected text": 1,
    }


def test_what_leaves_the_rest_unreadable_stops_in_any_case(put: Put) -> None:
    """Catches half a file that passes for the whole because bad rows may be skipped."""
    good = json.dumps(alpaca(1)[0])
    assert "it is cut off" in stopped(put("a.json", f"[{good}, {good[:-5]}"), on_error="skip")
    assert "never closed" in stopped(put("a.csv", 'instruction,output\na,"b\n'), on_error="skip")
    assert "not UTF-8" in stopped(put("a.jsonl", good.encode() + b"\n\xff\n"), on_error="skip")


def test_a_file_that_changes_meanwhile_stops(put: Put) -> None:
    """Catches a hash of other bytes than those that were read."""
    path = put("a.jsonl", lines(alpaca(*range(9))))
    reader = iter(read_conversations([str(path)]))
    next(reader)
    path.write_text(lines(alpaca(1)))
    with pytest.raises(DataError, match="changed while it was read"):
        list(reader)


def test_a_file_that_changes_before_it_is_read_stops(put: Put) -> None:
    """Catches rows under the hash of others: a run with those others would find its folder made already."""
    path = put("a.jsonl", '{"instruction": "a", "output": "b"}\n')
    reader = read_conversations([str(path)])
    reader.identity()
    assert len(list(reader)) == 1
    path.write_text('{"instruction": "x", "output": "b"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl changed while this ran: run the same command again"):
        list(reader)


def test_fields_can_have_other_names(put: Put) -> None:
    """Catches a name that is applied to some rows only, and one that never fits in silence."""
    rows = [{"question": "a", "answer": "b", "hint": "c"}, {"question": "d", "answer": "e"}, *alpaca(1)]
    path = put("a.jsonl", lines(rows))
    names = {"instruction": "question", "output": "answer", "input": "hint"}
    found = list(read_conversations([str(path)], fields=names))
    assert [entry.messages[0].get("input") for entry in found if isinstance(entry, Conversation)] == ["c", None, None]
    assert "--fields system=sytem: no row has a field sytem" in stopped(path, fields=names | {"system": "sytem"})
    with pytest.raises(UserError, match=r"--fields: instrction is none of .*; did you mean instruction"):
        read_conversations([str(path)], fields={"instrction": "question"})
    crossed = {"instruction": "output", "output": "instruction"}
    swapped = list(read_conversations([str(put("b.jsonl", lines(alpaca(1))))], fields=crossed))
    assert isinstance(swapped[0], Conversation) and swapped[0].messages[0]["content"] == "o1"


def tree(count: int) -> dict[str, Any]:
    """A question with answers, the last one the best."""
    replies = [{"text": f"a{n}", "role": "assistant", "rank": count - n, "replies": []} for n in range(count)]
    replies[0]["replies"] = [{"text": "and?", "role": "prompter", "replies": []}]
    return {"prompt": {"text": "q", "role": "prompter", "replies": replies}}


def test_trees_give_the_best_or_every_branch(put: Put) -> None:
    """Catches branches that share a number, and unanswered questions that are cut without a count."""
    path = put("a.jsonl", lines([tree(3), *alpaca(1)]))
    best = read_conversations([str(path)])
    assert answers(best) == ["a2", "o1"] and best.rows == 2 and best.cut_turns == 0
    every = read_conversations([str(path)], tree="all")
    assert answers(every) == ["a0", "a1", "a2", "o1"] and every.rows == 4 and every.cut_turns == 1
    assert [found.row for found in every] == [0, 1, 2, 3] and every.schemas == {"OASST": 1, "Alpaca": 1}
    assert every.files[0]["rows"] == 2


def test_messages_in_a_row_each_are_read_as_trees(tmp_path: Path) -> None:
    """Catches OpenAssistant's tables taken for plain text, message by message."""
    rows = [
        {
            "message_id": f"{n}{kind}",
            "parent_id": parent,
            "text": f"{kind}{n}",
            "role": role,
            "rank": None,
            "lang": "en",
        }
        for n in range(3)
        for kind, parent, role in (("q", None, "prompter"), ("a", f"{n}q", "assistant"))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    reader = read_conversations([str(tmp_path / "train.parquet")])
    assert answers(reader) == ["a0", "a1", "a2"] and reader.files[0]["rows"] == 6 and reader.schemas == {"OASST": 3}


def splits(*sources: Path) -> list[str | None]:
    """The split of each conversation."""
    return [
        found.split for found in read_conversations([str(path) for path in sources]) if isinstance(found, Conversation)
    ]


def test_given_splits_are_kept_where_there_are_two(tmp_path: Path, put: Put) -> None:
    """Catches test rows trained on, and a lone train split that leaves nothing to test on."""
    train, test = put("train-00000-of-00001.json", json.dumps(alpaca(1, 2))), put("test.jsonl.gz", lines(alpaca(3)))
    assert (
        splits(train, test) == ["train", "train", "test"] and splits(train) == [None, None] and splits(test) == [None]
    )
    other = put("more.json", json.dumps(alpaca(4)))
    assert splits(test, other, train) == ["test", None, "train", "train"]
    assert splits(put("dev.json", json.dumps(alpaca(5))), train) == ["validation", "train", "train"]
    assert splits(put("training.json", json.dumps(alpaca(6))), test) == [None, None]
    saved = {name: datasets.Dataset.from_list(alpaca(name)) for name in ("train", "validation", "test")}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "saved"))
    assert splits(tmp_path / "saved") == ["train", "validation", "test"]
    datasets.DatasetDict({"train": saved["train"]}).save_to_disk(str(tmp_path / "lone"))
    assert splits(tmp_path / "lone") == [None]
    reader = read_conversations([str(tmp_path / "lone")])
    list(reader)
    (arrow,) = (tmp_path / "lone").rglob("*.arrow")
    assert reader.files == [{"path": f"{tmp_path / 'lone'}/train", "sha256": sha256_file(arrow), "rows": 1}]


def test_weights_draw_shares_in_a_fixed_order(put: Put) -> None:
    """Catches a row that comes twice or vanishes, shares that are off, and an order that changes with the run."""
    paths = [str(put(f"{name}.jsonl", lines(alpaca(*(f"{name}{n}" for n in range(2000)))))) for name in "abc"]
    options: dict[str, Any] = {"weights": [2, 1, 0.5]}
    found = list(read_conversations(paths, **options))
    assert found == list(read_conversations(paths, **options)) != list(read_conversations(paths, **options, seed=1))
    assert [entry.row for entry in found] == list(range(6000))
    assert len({entry.where for entry in found}) == 6000
    kept = [entry for entry in found if isinstance(entry, Conversation)]
    shares = Counter(Path(entry.where.split(":")[0]).stem for entry in kept)
    assert shares["a"] == 2000 and abs(shares["b"] - 1000) < 100 and abs(shares["c"] - 500) < 100
    assert {entry.reason for entry in found if isinstance(entry, Dropped)} == {"not drawn, by the weight of its source"}
    runs = [len(list(group)) for _, group in itertools.groupby(entry.where.split(":")[0] for entry in found[:2000])]
    assert max(runs) < 30  # interleaved
    assert len(answers(read_conversations(paths, weights=[1, 1, 1]))) == 6000


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]])
def test_weights_that_mean_nothing_are_refused(weights: list[float], put: Put) -> None:
    """Catches a source that is never read, and a division by nothing."""
    paths = [str(put(f"{name}.jsonl", lines(alpaca(1)))) for name in "ab"]
    with pytest.raises(UserError, match="--weights: found"):
        read_conversations(paths, weights=weights)


def test_a_missing_source_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an error that comes after hours of reading the other sources."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.json").write_text("[]")
    with pytest.raises(DataError, match=r"rows.jsn does not exist .*the closest name is rows.json"):
        read_conversations(["rows.json", "rows.jsn"])
    with pytest.raises(UserError, match="no sources"):
        read_conversations([])


def test_speed_is_shown(put: Put) -> None:
    """Shows how long 52,000 rows take; nothing is promised about a shared machine."""
    path = put("a.jsonl", lines(alpaca(*(f"{n} " * 60 for n in range(52_000)))))
    start = time.perf_counter()
    count = sum(1 for _ in read_conversations([str(path)]))
    print(f"{count} rows, {path.stat().st_size / 1e6:.0f} MB: {time.perf_counter() - start:.2f} s")
