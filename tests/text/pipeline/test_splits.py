"""Which rows are for testing: of few rows, of rows that open alike, of sources that are divided; or none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_rows import Put

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import PrepareConfig
from lit_llama.text.dataset.folder import Split
from lit_llama.text.dataset.split import choose, far_from, few_sides, hash_side, held_rows, usable
from lit_llama.text.pipeline.records import prepare_records
from lit_llama.text.read.formats.sources import Division
from lit_llama.text.read.reading import read_conversations

Prepare = Callable[..., dict[str, Any]]
Row = dict[str, Any]


@pytest.fixture
def prepare(tiny_folder: Path, tmp_path: Path) -> Prepare:
    """prepare_records with the defaults of the door, into the folder `data`."""

    def run(*sources: Path, folder: str = "data", **changes: Any) -> dict[str, Any]:
        settings: dict[str, Any] = {"max_seq_length": 400, "prompt_style": "chatml", "source": [*map(str, sources)]}
        settings |= {"destination_path": tmp_path / folder, "tokenizer_path": tiny_folder}
        return prepare_records(PrepareConfig(**settings, **changes))

    return run


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def pairs(count: int) -> list[Row]:
    return [{"instruction": f"What follows {n}?", "input": "", "output": f"It is {n + 1}."} for n in range(count)]


def held_out(folder: Path) -> list[Row]:
    return [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]


def sizes(meta: dict[str, Any]) -> tuple[int, int]:
    return meta["splits"]["train"]["rows"], meta["splits"]["test"]["rows"]


SAME: dict[str, Callable[[int], Row]] = {
    "three": lambda n: pairs(3)[n % 3],
    "one question": lambda n: {"instruction": "Write a slogan.", "input": "", "output": f"Slogan {n}!"},
    "one greeting": lambda n: {
        "messages": [
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": f"Where is order {n}?"},
            {"role": "assistant", "content": "On its way."},
        ]
    },
}


@pytest.mark.parametrize("name", SAME)
def test_rows_that_open_alike_and_few_rows_are_split(name: str, prepare: Prepare, put: Put, tmp_path: Path) -> None:
    """Catches data that no seed can split, a row in both splits or in none, and test.jsonl beside another split."""
    count = 3 if name == "three" else 40
    rows = [SAME[name](n) for n in range(count)]
    meta = prepare(put("a.jsonl", lines(rows)))
    train, test = sizes(meta)
    assert train + test == count and 0 < test <= max(1, count // 4)
    found = held_out(tmp_path / "data")
    assert len(found) == test and all(row in rows for row in found)
    assert len((tmp_path / "data" / "test_keys.txt").read_text().split()) == test
    for side, wanted in (("train", train), ("test", test)):
        split = Split(tmp_path / "data", side)
        assert len(split) == wanted and split.lengths.sum() == meta["splits"][side]["tokens"]
    assert sum("the test split is" in remark for remark in meta["remarks"]) == 1
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["findings"]["splits"]["test"]["rows"] == test
    assert any("test split is" in warning["what"] for warning in report["warnings"])
    assert meta["test_rows_also_in_train"] == 0


def test_rows_move_from_test_to_train_as_well(prepare: Prepare, put: Put, tmp_path: Path) -> None:
    """Catches a train split that stays empty, and test.jsonl with rows that train."""
    rows = pairs(3)
    share = 0.99
    assert {hash_side(row["instruction"], share, 42) for row in rows} == {"test"}
    meta = prepare(put("a.jsonl", lines(rows)), test_split_size=share)
    assert sizes(meta) == (1, 2) and len(held_out(tmp_path / "data")) == 2


def test_windows_of_one_row_stay_together(prepare: Prepare, put: Put, tmp_path: Path, tiny_folder: Path) -> None:
    """Catches parts of one document on both sides, where rows are divided a second time."""
    rows = [{"text": f"{word} " * 300} for word in ("red", "blue", "green")]
    config = PrepareConfig(
        source=str(put("a.jsonl", lines(rows))),
        destination_path=tmp_path / "data",
        tokenizer_path=tiny_folder,
        prompt_style="plain",
        max_seq_length=50,
        mask_inputs=False,
        overflow="split",
        test_split_size=1e-9,
        seed=1,
    )
    meta = prepare_records(config)
    words = {word for row in held_out(tmp_path / "data") for word in row["text"].split()}
    assert len([word for word in ("red", "blue", "green") if word in words]) == 1
    assert sizes(meta)[1] > 3


def test_what_cannot_be_split_says_what_can_be_done(prepare: Prepare, put: Put, tmp_path: Path) -> None:
    """Catches advice that does not help: no seed splits one row, or copies of one."""
    for name, rows, what in (("one", pairs(1), "there is one usable row"), ("same", pairs(1) * 5, "are all the same")):
        path = put(f"{name}.jsonl", lines(rows))
        with pytest.raises(DataError, match=f"{what}, which cannot be .* --test_split_size 0 trains on all"):
            prepare(path)
        assert sizes(prepare(path, test_split_size=0)) == (len(rows), 0)
        assert held_out(tmp_path / "data") == []
    with pytest.raises(DataError, match="but there is 1 row: expected 0 to train on all"):
        prepare(path.with_name("one.jsonl"), split="shuffle")


@pytest.mark.parametrize("split", ["hash", "shuffle"])
def test_all_rows_train_where_that_is_asked_for(split: str, prepare: Prepare, put: Put, tmp_path: Path) -> None:
    """Catches a row held out all the same, and a data folder that the datasets library cannot open."""
    import datasets

    assert sizes(prepare(put("a.jsonl", lines(pairs(12))), split=split, test_split_size=0)) == (12, 0)
    opened = datasets.load_from_disk(str(tmp_path / "data"))
    assert {name: len(rows) for name, rows in opened.items()} == {"train": 12, "test": 0}
    assert (tmp_path / "data" / "report.html").read_text()


def test_a_share_comes_to_a_row_and_a_drawn_row_that_is_dropped_is_replaced(prepare: Prepare, put: Put) -> None:
    """Catches a shuffle that holds out no row of a few, or only one that came to no sample."""
    rows = pairs(4)
    assert sizes(prepare(put("a.jsonl", lines(rows)), split="shuffle")) == (3, 1)
    for row in rows:  # whichever was drawn
        worse = [other | {"output": " "} if other is row else other for other in rows]
        assert sizes(prepare(put("b.jsonl", lines(worse)), split="shuffle")) == (2, 1)


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), st.floats(0.001, 0.999))
def test_both_splits_have_rows_and_equal_hashes_one_side(numbers: list[int], share: float) -> None:
    """Catches an empty side, equal rows on two, and a row below the share that is not for testing."""
    test = few_sides(np.array(numbers, np.uint64), share)
    if test is None:
        assert len(set(numbers)) == 1
        return
    assert 0 < test.sum() < len(numbers)
    assert len({(number, bool(side)) for number, side in zip(numbers, test, strict=True)}) == len(set(numbers))
    below = [number < share * 2**64 for number in numbers]
    if sum(below) > 0 and not all(number < share * 2**64 for number in numbers):
        assert test.tolist() == below


@given(st.integers(2, 400), st.data())
def test_a_side_without_usable_rows_gets_one(rows: int, data: st.DataObject) -> None:
    """Catches rows lost or doubled on the way."""
    order = np.array(data.draw(st.permutations(range(rows))))
    cut = data.draw(st.integers(1, rows - 1))
    kept = data.draw(st.lists(st.integers(0, rows - 1), unique=True, min_size=2))
    (train, test), _ = usable((order[:cut], order[cut:]), kept)
    assert sorted([*train, *test]) == list(range(rows))
    assert set(train) & set(kept) and set(test) & set(kept)


def test_sizes_are_rows_or_shares() -> None:
    """Catches a share of few rows that comes to none, and a usual number that leaves few rows to train on."""
    assert [held_rows(rows, 0.05)[0] for rows in (1, 10, 39, 40, 1000)] == [1, 1, 1, 2, 50]
    assert [held_rows(1000, size)[0] for size in (30, 0)] == [30, 0]
    assert [held_rows(rows, 2000, 0.1)[0] for rows in (3, 1000, 19_999, 20_000, 51_759)] == [1, 100, 1999, 2000, 2000]
    assert "100 of 1000 rows are for testing, not the usual 2000" in held_rows(1000, 2000, 0.1)[1]


def test_a_test_split_far_from_its_share_is_said() -> None:
    """Catches 57 of 60 rows held out in silence since they open alike."""
    assert "57 of 60 rows are for testing, though --test_split_size is 0.05" in far_from(0.05, {"train": 3, "test": 57})
    assert not far_from(0.05, {"train": 940, "test": 60}) and not far_from(0.5, {"train": 1, "test": 1})


# Sources that are divided

DIVIDED: dict[str, tuple[str, str]] = {
    "beginnings": ("train.jsonl", "test.jsonl"),
    "endings": ("gsm8k_train.jsonl", "gsm8k-test.jsonl"),
    "folders": ("train/a.jsonl", "test/a.jsonl"),
    "validation": ("x.train.jsonl", "x.valid.jsonl"),
    "shards": ("train-00000-of-00001.jsonl", "eval-00000-of-00001.jsonl"),
}


@pytest.mark.parametrize("name", DIVIDED)
def test_a_given_split_is_taken(name: str, prepare: Prepare, tmp_path: Path) -> None:
    """Catches test rows that train, in silence, because nobody asked for --split given."""
    for file, first in zip(DIVIDED[name], (0, 20), strict=True):
        (tmp_path / "in" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / file).write_text(lines(pairs(26)[first : first + (20 if not first else 6)]))
    meta = prepare(tmp_path / "in")
    assert (meta["split"], sizes(meta)) == ("given", (20, 6))
    assert held_out(tmp_path / "data") == pairs(26)[20:]
    assert any(remark.startswith("split as the sources are divided") for remark in meta["remarks"])
    anew = prepare(tmp_path / "in", split="shuffle", test_split_size=4)
    assert sizes(anew) == (22, 4) and "are split anew, as asked for" in anew["remarks"][0]


def test_the_question_is_put_where_a_division_is_no_answer(prepare: Prepare, tmp_path: Path) -> None:
    """Catches rows of a third file merged into one of the splits, and a size that is asked for and not used."""
    (tmp_path / "in").mkdir()
    for file in ("train", "test", "more"):
        (tmp_path / "in" / f"{file}.jsonl").write_text(lines(pairs(6)))
    with pytest.raises(UserError, match=r"but \S*more.jsonl may be for either: give --split hash \(or shuffle\)"):
        prepare(tmp_path / "in")
    (tmp_path / "in" / "more.jsonl").unlink()
    with pytest.raises(UserError, match=r"--test_split_size 0.2 asks for a split, but the sources are divided"):
        prepare(tmp_path / "in", test_split_size=0.2)
    assert "--test_split_size 0.2 is not used" in " ".join(
        prepare(tmp_path / "in", split="given", test_split_size=0.2)["remarks"]
    )
    lone = choose("auto", None, Division.of([]), other=False)
    assert (lone.split, lone.test_split_size, lone.remarks) == ("hash", 0.05, [])


def test_names_that_only_look_like_a_split_are_none(put: Put) -> None:
    """Catches "training" or "contest" taken for a side."""
    sources = [put(name, lines(pairs(2))) for name in ("training.jsonl", "contest.jsonl", "testing_train_set.jsonl")]
    assert not read_conversations([str(path) for path in sources]).division


@pytest.mark.parametrize(
    ("split", "size"),
    [("hash", 1), ("hash", 200), ("hash", -0.1), ("shuffle", 4.5), ("shuffle", -1), ("hash", float("nan"))],
)
def test_a_size_that_is_none_is_a_usage_error(split: Any, size: float) -> None:
    """Catches 4.5 rows, a number for a hash, and what is below nothing."""
    with pytest.raises(UserError, match=f"--test_split_size is {size:g}, expected a "):
        choose(split, size, Division(), other=False)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_no_generator_takes_is_a_usage_error(seed: int, prepare: Prepare, put: Put) -> None:
    """Catches a traceback of numpy or torch behind all the work."""
    with pytest.raises(UserError, match=rf"--seed is {seed}, expected 0 to 18446744073709551615"):
        prepare(put("a.jsonl", lines(pairs(9))), seed=seed)
    assert sizes(prepare(put("a.jsonl", lines(pairs(9))), split="shuffle", seed=2**64 - 1)) == (8, 1)
