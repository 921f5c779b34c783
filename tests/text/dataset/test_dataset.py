"""The data folder against `datasets`, and batches against a slow loop."""

import itertools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import multiprocess
import numpy as np
import pytest
from conftest import Sample, write_splits

from lit_llama.errors import DataError
from lit_llama.text.dataset.batches import (
    collate,
    epoch_order,
    largest_group,
    micro_batches,
    share_out,
    shared_micro_batches,
    step_plan,
)
from lit_llama.text.dataset.folder import FORMAT, Split, data_fingerprint, read_meta
from lit_llama.text.message import IGNORE_INDEX


def draw_samples(count: int, seed: int = 0) -> list[Sample]:
    """Rows of 2 to 30 tokens whose labels are partly masked; every token is another."""
    draw = random.Random(seed)
    samples, start = [], 0
    for row in range(count):
        ids = list(range(start, start + draw.randrange(2, 31)))
        start += len(ids)
        masked = draw.randrange(len(ids))
        samples.append(Sample(ids, [IGNORE_INDEX] * masked + ids[masked:], row))
    return samples


TRAIN, TEST = draw_samples(2345), draw_samples(3, seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows than one Arrow record batch holds (1000)."""
    path = tmp_path_factory.mktemp("data")
    write_splits(path, {"train": TRAIN, "test": TEST})
    return path


@pytest.fixture(scope="module")
def split(folder: Path) -> Split:
    return Split(folder, "train")


def test_datasets_opens_the_folder_with_the_same_rows(folder: Path) -> None:
    """Catches a folder that only we can read, or whose columns have other names, types or orders."""
    opened = datasets.load_from_disk(str(folder))
    assert isinstance(opened, datasets.DatasetDict) and set(opened) == {"train", "test"}
    for name, samples in (("train", TRAIN), ("test", TEST)):
        assert opened[name].column_names == ["input_ids", "labels"]
        assert opened[name]["input_ids"][:] == [sample.input_ids for sample in samples]
        assert opened[name]["labels"][:] == [sample.labels for sample in samples]


def test_split_equals_datasets_across_chunks(folder: Path, split: Split) -> None:
    """Catches a row read with the offset of another chunk."""
    opened = datasets.load_from_disk(str(folder / "train"))
    assert opened.data.column("input_ids").num_chunks > 2, "the test needs more than one chunk"
    assert len(split) == len(opened) == len(TRAIN)
    for row, wanted in enumerate(opened):
        ids, labels = split[row]
        assert ids.tolist() == wanted["input_ids"] and labels.tolist() == wanted["labels"]
        assert split.lengths[row] == len(ids)
    assert split.trained_tokens() == sum(i != IGNORE_INDEX for sample in TRAIN for i in sample.labels[1:])


def test_split_copies_nothing(split: Split) -> None:
    """Catches a copy of the whole data set in memory: two looks at a row are the same memory, mapped and read-only."""
    for row in (0, 999, 1000, 2344):
        for first, second in zip(split[row], split[row], strict=True):
            assert np.shares_memory(first, second)
            assert not first.flags.owndata and not first.flags.writeable
    lasts = [split[row][0].__array_interface__["data"][0] for row in (0, 1)]
    assert lasts[1] - lasts[0] == 4 * len(TRAIN[0].input_ids), "neighbours lie end to end as int32"


def test_the_same_samples_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    """Catches a clock, a random fingerprint or a path that is written into the folder."""
    write_splits(tmp_path, {"train": TRAIN, "test": TEST})
    written = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert written == {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_writing_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the pool that `datasets` spawns even for num_proc=1: seconds lost, and an error in a plain script."""

    def spawn(*_: object) -> None:
        raise AssertionError("a pool is started")

    monkeypatch.setattr(multiprocess, "get_context", spawn)
    write_splits(tmp_path, {"test": TEST})
    assert len(Split(tmp_path, "test")) == len(TEST)


def test_collate_equals_a_slow_loop() -> None:
    """Catches a target taken from the next sample, a shift of zero or two, and a masked target that is selected."""
    draw = random.Random(0)
    for _ in range(50):
        samples = draw.sample(TRAIN, draw.randrange(1, 6))
        inputs, lengths, select, targets = [], [], [], []
        for sample in samples:
            lengths.append(len(sample.input_ids) - 1)
            for position in range(len(sample.input_ids) - 1):
                if sample.labels[position + 1] != IGNORE_INDEX:
                    select.append(len(inputs))
                    targets.append(sample.labels[position + 1])
                inputs.append(sample.input_ids[position])
        batch = collate([(np.array(s.input_ids, np.int32), np.array(s.labels, np.int32)) for s in samples])
        assert (batch.input_ids.tolist(), batch.lengths) == (inputs, lengths)
        assert (batch.select.tolist(), batch.targets.tolist()) == (select, targets)
        assert batch.input_ids.dtype == batch.targets.dtype == np.int64


@pytest.mark.parametrize("budget", [1, 20, 30, 64, 257, 10_000])
@pytest.mark.parametrize("count", [1, 7, 64])
def test_micro_batches_hold_every_row_once_within_the_budget(split: Split, budget: int, count: int) -> None:
    """Catches a row lost at the end or trained twice, and a batch that does not fit into memory."""
    rows = random.Random(count).sample(range(len(split)), count)
    batches = list(micro_batches(split, rows, budget))
    found = []
    for batch in batches:
        assert sum(batch.lengths) == len(batch.input_ids)
        assert sum(length + 1 for length in batch.lengths) <= budget or len(batch.lengths) == 1
        starts = np.cumsum([0, *batch.lengths])
        found += [batch.input_ids[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert sorted(found) == sorted(TRAIN[row].input_ids[:-1] for row in rows)
    if budget == 1:
        assert len(batches) == count, "a sample over the budget stands alone"
    if budget == 10_000:
        assert len(batches) == 1


def test_micro_batches_do_not_depend_on_the_order_of_the_rows(split: Split) -> None:
    """Catches a resumed step that is cut differently: its sums would differ in the last bits."""
    rows = list(range(990, 1010))
    first, second = list(micro_batches(split, rows, 100)), list(micro_batches(split, rows[::-1], 100))
    assert [batch.input_ids.tolist() for batch in first] == [batch.input_ids.tolist() for batch in second]
    assert first[0].lengths[0] == max(split.lengths[rows]) - 1, (
        "longest first, so that memory is short at once or never"
    )


def test_the_order_of_an_epoch() -> None:
    """Catches rows left out, epochs or seeds of the same order, and an order that a resumed run cannot repeat."""
    orders = {(seed, epoch): epoch_order(500, seed, epoch).tolist() for seed in (0, 1, 42) for epoch in (0, 1, 2)}
    assert all(sorted(order) == list(range(500)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 9
    np.random.seed(3)
    assert epoch_order(500, 42, 1).tolist() == orders[42, 1]


def test_meta_is_read(tmp_path: Path) -> None:
    """Catches a field lost on the way."""
    (tmp_path / "meta.json").write_text(json.dumps({"format": FORMAT, "seed": 42}))
    assert read_meta(tmp_path) == {"format": FORMAT, "seed": 42}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            r"is no finished data folder: it has no meta\.json; make it with prepare/records\.py --destination_path",
        ),
        (b"", r"meta\.json is not JSON"),
        (b"{\xff}", r"meta\.json is not UTF-8"),
        (b"[1]", "is not a JSON object"),
        (b"{}", f"format is None, expected {FORMAT}; prepare the data again"),
        (b'{"format": 99}', f"format is 99, expected {FORMAT}"),
    ],
)
def test_a_folder_without_a_usable_meta_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    """Catches training on an interrupted or foreign folder, and tracebacks for a broken one."""
    if content is not None:
        (tmp_path / "meta.json").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_meta(tmp_path)
    with pytest.raises(DataError, match="nowhere does not exist; make it with"):
        read_meta(tmp_path / "nowhere")


def test_raw_data_in_place_of_a_data_folder_is_sent_to_prepare(tmp_path: Path) -> None:
    """Catches advice to download Alpaca for a file of chats, and a command that a blank in a path breaks."""
    rows = tmp_path / "my rows.jsonl"
    rows.write_text("{}")
    for wrong in (rows, tmp_path):
        with pytest.raises(DataError, match=r"prepare/records.py --source '.*/my rows.jsonl' --destination_path '"):
            read_meta(wrong)
    (tmp_path / "book.txt").write_text("a")
    with pytest.raises(DataError, match=r"python prepare/text.py --source \S*/book.txt"):
        read_meta(tmp_path / "book.txt")


def remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def truncate(folder: Path) -> None:
    [path] = folder.glob("*.arrow")
    path.write_bytes(path.read_bytes()[:200])


def other_columns(folder: Path) -> None:
    remove(folder)
    datasets.Dataset.from_dict({"input_ids": [[1, 2]]}).save_to_disk(folder)


def other_offsets(folder: Path) -> None:
    """The place where the second sample begins lies far beyond the file."""
    [path] = folder.glob("*.arrow")
    samples = [len(sample.input_ids) for sample in TEST]
    begins = np.cumsum([0, *samples]).astype(np.int32).tobytes()
    data = path.read_bytes()
    assert begins[:8] in data
    path.write_bytes(data.replace(begins[:8], begins[:4] + (2**30).to_bytes(4, "little")))


def other_lengths(folder: Path) -> None:
    remove(folder)
    datasets.Dataset.from_dict({"input_ids": [[1, 2]], "labels": [[1]]}).save_to_disk(folder)


@pytest.mark.parametrize(
    "spoil",
    [
        remove,
        truncate,
        other_columns,
        other_lengths,
        lambda folder: (folder / "state.json").write_text("{}"),
        lambda folder: (folder / "state.json").write_text('{"_data_files": ["x"]}'),
        lambda folder: (folder / "state.json").write_text("[]"),
        other_offsets,
    ],
)
def test_a_spoiled_split_is_refused(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    """Catches Arrow's tracebacks, and labels that belong to other ids."""
    write_splits(tmp_path, {"test": TEST})
    spoil(tmp_path / "test")
    with pytest.raises(DataError, match=str(tmp_path / "test")):
        Split(tmp_path, "test")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    """Catches a mean over nothing later on."""
    write_splits(tmp_path, {"test": []})
    with pytest.raises(DataError, match="prepare the data again"):
        Split(tmp_path, "test")


def test_samples_are_read_without_datasets_and_pandas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 75 MB and a second that every run would take for them."""
    write_splits(tmp_path, {"test": TEST})
    for name in ("datasets", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    assert len(Split(tmp_path, "test")) == len(TEST)


def test_int64_columns_that_datasets_wrote_itself_are_read(tmp_path: Path) -> None:
    """Catches a reader that takes the bytes of any integer for int32."""
    table = {"input_ids": [[2**31 + 5, 7], [8]], "labels": [[-100, 7], [8]]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "test")
    split = Split(tmp_path, "test")
    assert [tuple(column.tolist() for column in split[row]) for row in range(2)] == [
        ([2**31 + 5, 7], [-100, 7]),
        ([8], [8]),
    ]


@pytest.mark.parametrize(("batch_size", "budget"), [(16, 100), (7, 2048), (500, 64)])
def test_the_step_plan_is_what_training_will_do(split: Split, batch_size: int, budget: int) -> None:
    """A number of steps that leaves out the last one, or a fill that training does not have."""
    plan = step_plan(split.lengths, batch_size=batch_size, micro_batch_tokens=budget, seed=3)
    order = epoch_order(len(split), 3, 0).tolist()
    steps = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    batches = [batch for rows in steps for batch in micro_batches(split, rows, budget)]
    tokens = sum(len(batch.input_ids) + len(batch.lengths) for batch in batches)  # each sample is one place shorter
    assert plan["steps_per_epoch"] == len(steps) <= 500
    assert plan["micro_batches_per_step"] == len(batches) / len(steps)
    assert plan["fill"] == tokens / (len(batches) * budget)


def test_a_fingerprint_is_of_every_byte_of_both_splits(tmp_path: Path) -> None:
    """Catches data that is prepared again with other rows under the same name, or swapped splits."""
    one, two = [Sample([1, 2, 3], [1, 2, 3])], [Sample([1, 2, 4], [1, 2, 4])]
    for name, splits in {"a": (one, two), "again": (one, two), "swapped": (two, one), "other": (one, one)}.items():
        write_splits(tmp_path / name, dict(zip(("train", "test"), splits, strict=True)))
    found = {name: data_fingerprint(tmp_path / name) for name in ("a", "again", "swapped", "other")}
    assert found["a"] == found["again"] and len(set(found.values())) == 3


@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize(("batch_size", "budget", "steps"), [(16, 60, 147), (16, 60, 300), (7, 100, 5), (3000, 90, 2)])
def test_the_largest_micro_batch_is_that_of_the_steps(
    split: Split, batch_size: int, budget: int, steps: int, shares: int
) -> None:
    """Against all micro-batches of all steps, one by one; catches a cut that differs, a last batch that is filled up,
    and steps that the run never makes."""
    per_epoch, sizes = -(-len(split) // batch_size), []
    for step in range(steps):
        epoch, position = divmod(step, per_epoch)
        rows = epoch_order(len(split), 3, epoch)[position * batch_size :][:batch_size].tolist()
        for share in share_out(split.lengths, rows, shares):
            sizes += [(len(batch.input_ids) + len(batch.lengths)) for batch in micro_batches(split, share, budget)]
    rows = largest_group(
        split.lengths, batch_size=batch_size, micro_batch_tokens=budget, seed=3, steps=steps, shares=shares
    )
    assert int(split.lengths[rows].sum()) == max(sizes) and len(set(rows)) == len(rows)
    (batch,) = micro_batches(split, rows, max(sizes))
    assert sum(batch.lengths) == max(sizes) - len(rows)


@pytest.mark.parametrize("shares", [1, 2, 3, 8])
def test_samples_are_shared_out_evenly(split: Split, shares: int) -> None:
    """Catches samples that are lost or doubled, shares that depend on the order of the rows, and a share that is
    larger than another by more than its last and smallest sample."""
    rows = epoch_order(len(split), 3, 0)[:50].tolist()
    divided = share_out(split.lengths, rows, shares)
    assert sorted(row for share in divided for row in share) == sorted(rows)
    assert divided == share_out(split.lengths, rows[::-1], shares)
    tokens = [int(split.lengths[share].sum()) for share in divided]
    for share, size in zip(divided, tokens, strict=True):
        assert size - int(split.lengths[share[-1]]) <= min(tokens)


def test_a_share_is_filled_up_without_a_loss(split: Split) -> None:
    """Two samples for three processes; catches a process with fewer passes than the others."""
    cut = [list(shared_micro_batches(split, [0, 1], 1, share, 3, even=True)) for share in range(3)]
    assert [len(batches) for batches in cut] == [1, 1, 1]
    assert cut[2][0].lengths == [1] and len(cut[2][0].targets) == 0
