"""Samples dealt into splits, and files written as `datasets` writes them."""

import random
from pathlib import Path

import datasets
import numpy as np
import pytest
from conftest import Sample

from lit_llama.text.dataset import writer as arrow
from lit_llama.text.dataset import writer as sides
from lit_llama.text.dataset.writer import Samples, Sides, trained_tokens


def draw(rows: int, seed: int = 0) -> list[Sample]:
    """Samples of raw rows, of which some came to none and some to several; every token is another."""
    chance = random.Random(seed)
    made: list[Sample] = []
    token = 0
    for row in range(rows):
        for _ in range(chance.choice([0, 1, 1, 1, 3])):
            ids = list(range(token, token + chance.randrange(1, 12)))
            masked = chance.randrange(len(ids) + 1)
            made.append(Sample(ids, [-100] * masked + ids[masked:], row))
            token += len(ids)
    return made


def batch_of(samples: list[Sample]) -> Samples:
    ids, labels = ([i for s in samples for i in getattr(s, name)] for name in ("input_ids", "labels"))
    return Samples(
        np.array(ids, np.int32), np.array(labels, np.int32), np.array([len(s.input_ids) for s in samples], np.int64)
    )


def opened(folder: Path) -> dict[str, list[tuple[list[int], list[int]]]]:
    made = datasets.load_from_disk(str(folder))
    assert isinstance(made, datasets.DatasetDict)
    return {name: [(row["input_ids"], row["labels"]) for row in made[name]] for name in made}


def check_counts(writer: Sides, name: str, wanted: list[Sample]) -> None:
    counts = dict(writer.counts[name])
    assert counts == {
        "rows": len(wanted),
        "tokens": sum(len(s.input_ids) for s in wanted),
        "trained_tokens": sum(label != -100 for s in wanted for label in s.labels[1:]),
        "longest": max(len(s.input_ids) for s in wanted),
    }


@pytest.mark.parametrize("size", [1, 7, 100])
def test_samples_stand_in_the_split_they_were_given_in_their_order(size: int, tmp_path: Path) -> None:
    """Catches a sample in two splits or none, another order, and counts that are not those of the files."""
    samples = draw(150)
    names = [random.Random(sample.row).choice(["train", "test"]) for sample in samples]
    writer = Sides(tmp_path, drawn=False)
    for at in range(0, len(samples), size):
        part = samples[at : at + size]
        writer.add(batch_of(part), [s.row for s in part], names[at : at + size])
    writer.close()
    for name, found in opened(tmp_path).items():
        wanted = [sample for sample, side in zip(samples, names, strict=True) if side == name]
        assert found == [(sample.input_ids, sample.labels) for sample in wanted]
        check_counts(writer, name, wanted)


@pytest.mark.parametrize("gathered", [1, 13, 5000])
def test_rows_are_dealt_in_the_order_drawn_with_all_their_samples(
    gathered: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches parts of one row on two sides, a dropped row that shifts all others, and files left behind."""
    monkeypatch.setattr(sides, "_GATHERED", gathered)
    samples = draw(150)
    order = random.Random(1).sample(range(150), 150)
    orders = {"train": order[:120], "test": order[120:]}
    writer = Sides(tmp_path, drawn=True)
    for at in range(0, len(samples), 40):
        part = samples[at : at + 40]
        writer.add(batch_of(part), [s.row for s in part], [""] * len(part))
    dealt = writer.deal(orders)
    writer.close()
    found = opened(tmp_path)
    for name, rows in orders.items():
        numbers = [number for row in rows for number, sample in enumerate(samples) if sample.row == row]
        assert dealt[name].tolist() == numbers
        wanted = [samples[number] for number in numbers]
        assert found[name] == [(sample.input_ids, sample.labels) for sample in wanted]
        check_counts(writer, name, wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"train", "test", "dataset_dict.json"}


def test_a_large_split_goes_on_in_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file name that `datasets` does not find, and a sample lost between two files."""
    monkeypatch.setattr(arrow, "MAX_FILE_SIZE", 200)
    samples = draw(60)
    writer = Sides(tmp_path, drawn=False)
    for sample in samples:
        writer.add(batch_of([sample]), [sample.row], ["train"])
    writer.add(batch_of(samples[:1]), [0], ["test"])
    writer.close()
    files = sorted(path.name for path in (tmp_path / "train").glob("*.arrow"))
    assert len(files) > 3 and files[0] == f"data-00000-of-{len(files):05d}.arrow"
    assert opened(tmp_path)["train"] == [(sample.input_ids, sample.labels) for sample in samples]


def test_the_first_token_is_never_trained() -> None:
    """Catches a count that the loss does not have, and an empty batch that ends in a traceback."""
    samples = draw(100, seed=3)
    wanted = [sum(label != -100 for label in sample.labels[1:]) for sample in samples]
    assert trained_tokens(batch_of(samples)).tolist() == wanted
    assert trained_tokens(batch_of([])).tolist() == []


def test_samples_are_taken_in_any_order() -> None:
    """Catches tokens of a neighbour."""
    samples = draw(50, seed=5)
    order = random.Random(2).choices(range(len(samples)), k=80)
    taken, wanted = batch_of(samples).take(order), batch_of([samples[i] for i in order])
    for name in ("input_ids", "labels", "lengths"):
        assert np.array_equal(getattr(taken, name), getattr(wanted, name))
    assert batch_of(samples).take([]).lengths.tolist() == []
