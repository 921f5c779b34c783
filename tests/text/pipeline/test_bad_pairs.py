"""Bases, deltas and adapters that do not belong together, or are taken for each other: one line says so."""

import shutil
from typing import Any

import pytest
from bad_folders import Change, Folders, change_tensors, door, edit, refused
from bad_folders import at as at  # a fixture
from bad_folders import originals as originals  # a fixture
from conftest import run_here
from delta_files import EMBEDDING, delta_of, folder_of, read, state_of
from safetensors.torch import save_file


def swap(at: Folders) -> None:
    at["base"], at["delta"] = at["delta"], at["base"]


def whole_as_delta(at: Folders) -> None:
    tuned = {name: (value.float() * 1.01).half() for name, value in state_of(0, 384).items()}
    tuned |= {EMBEDDING: state_of(3, 384)[EMBEDDING]}
    shutil.rmtree(at["delta"])
    folder_of(at["delta"], tuned)


def merged_as_base(at: Folders) -> None:
    assert run_here(*door("delta", at, "delta")).returncode == 0
    shutil.rmtree(at["base"])
    at["made"].rename(at["base"])


def other_size(at: Folders) -> None:
    shutil.rmtree(at["base"])
    wide = {name: value for name, value in state_of(0, 370).items() if "layers.1." not in name}
    folder_of(at["base"], wide, num_hidden_layers=1)


def small_embedding(at: Folders) -> None:
    state = delta_of("vicuna")
    shutil.rmtree(at["delta"])
    folder_of(at["delta"], state)


def rounded(at: Folders) -> None:
    state = {name: value.bfloat16().half() for name, value in read(at["base"]).items()}
    save_file(state, at["base"] / "model.safetensors", metadata={"format": "pt"})


def half_a_file(at: Folders) -> None:
    path = at["delta"] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5000])


DELTA: list[tuple[str, Change, int, tuple[str, ...]]] = [
    ("1 swapped", swap, 4, ("seem swapped", "--base_dir is the model")),
    ("1 the same path", lambda at: at.update(base=at["delta"]), 4, ("hold the same embedding of 384 rows",)),
    ("2 a whole model", whole_as_delta, 4, ("no delta but a whole model", "use it as it is")),
    ("3 merged already", merged_as_base, 4, ("{base} is merged already", "--base_dir needs the original weights")),
    ("4 another size", other_size, 4, ("another size", "{base} has 1 layers of width 64", "{delta} has 2 layers")),
    ("5 rows differ", small_embedding, 4, ("384 embedding rows", "370", "--policy vicuna", "--policy alpaca")),
    ("6 once bfloat16", rounded, 4, ("went through bfloat16", "prepare/checkpoint.py", "--accept_rounded_base")),
    ("7 partly downloaded", half_a_file, 4, ("{delta}/model.safetensors",)),
    ("8 target is the base", lambda at: at.update(made=at["base"]), 2, ("{base} already exists", "nothing is ever")),
    ("an adapter as base", lambda at: at.update(base=at["adapter"]), 4, ("is an adapter", "finetune/merge.py")),
]


@pytest.mark.parametrize(("change", "status", "words"), [row[1:] for row in DELTA], ids=[row[0] for row in DELTA])
def test_delta_says_what_is_wrong(at: Folders, change: Change, status: int, words: Any) -> None:
    """The catalogue of wrong pairs; catches a sum of nonsense, which nothing but its answers would show."""
    change(at)
    before = {path: path.read_bytes() for name in ("base", "delta") for path in at[name].iterdir()}
    command = door("delta", at, "delta")
    if at["made"] == at["base"]:
        at = at | {"made": at["made"].with_name("nothing")}
    refused(at, status, words, *command)
    assert before == {path: path.read_bytes() for path in before}


def other_base(at: Folders) -> None:
    change_tensors("model", lambda tensors: tensors["model.norm.weight"].mul_(1.5))(at)


def adapter_setting(**values: Any) -> Change:
    return lambda at: edit(at["adapter"] / "adapter_config.json", **values)


ADAPTER: list[tuple[str, Change, int, tuple[str, ...]]] = [
    ("9 another base", other_base, 6, ("{model} is not the base", "fingerprint")),
    ("9 another shape", adapter_setting(r=5), 4, ("adapter_model.safetensors", "lora_A is (4, ", "r 5 needs (5, ")),
    ("9 DoRA", adapter_setting(use_dora=True), 4, ("14 missing", "lora_magnitude_vector")),
    ("9 rank 0", adapter_setting(r=0), 4, ("r is 0, expected a whole number of 1 or more",)),
    (
        "9 an adapter as base",
        lambda at: edit(at["adapter"] / "adapter_config.json", base_model_name_or_path=str(at["adapter"])),
        4,
        ("is no checkpoint folder",),
    ),
    (
        "9 zeros",
        change_tensors("adapter", lambda tensors: [value.zero_() for value in tensors.values()]),
        4,
        ("only zeros", "never trained"),
    ),
    ("8 the target is whole", lambda at: at.update(made=at["model"]), 2, ("{model} already holds config.json",)),
]


@pytest.mark.parametrize(("change", "status", "words"), [row[1:] for row in ADAPTER], ids=[row[0] for row in ADAPTER])
def test_merge_says_what_is_wrong(at: Folders, change: Change, status: int, words: Any) -> None:
    """The catalogue of adapters that do not fit; catches updates left out in silence, or added to other weights."""
    change(at)
    command = door("merge", at, "adapter")
    if at["made"] == at["model"]:
        at = at | {"made": at["made"].with_name("nothing")}
    refused(at, status, words, *command)


@pytest.mark.parametrize(("command", "folder"), [("convert", "meta"), ("delta", "delta"), ("merge", "adapter")])
def test_a_full_disk_is_told_in_numbers(
    at: Folders, command: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches hours that end in `no space left on device` (7 of convert, 10 of merge)."""
    full = shutil._ntuple_diskusage(10**9, 10**9 - 10_000, 10_000)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    refused(at, 5, ("kB free", "kB are needed", "another disk"), *door(command, at, folder))


@pytest.mark.parametrize("policy", ["ziya", "add"])
@pytest.mark.parametrize("command", ["generate", "finetune", "chat"])
def test_a_delta_is_no_model(at: Folders, command: str, policy: Any) -> None:
    """Catches a delta that is run or tuned as it is: it loads, and talks nonsense."""
    shutil.rmtree(at["delta"])
    folder_of(at["delta"], delta_of(policy))
    words = (
        "{delta} holds a delta and no model",
        "norms are near zero",
        "prepare/delta.py apply",
        "--delta_dir {delta}",
    )
    refused(at, 4, words, *door(command, at, "delta"))


def test_torch_files_are_named_with_the_way_in(at: Folders) -> None:
    """Catches a downloaded folder, a delta of Ziya's say, that is run as it is and refused without a word of help."""
    words = ("has no model.safetensors", "prepare/checkpoint.py --source {torch}", "prepare/delta.py apply")
    refused(at, 4, words, *door("generate", at, "torch"))


@pytest.mark.parametrize("command", ["round", "finetune", "base"])
def test_an_adapter_is_no_base(at: Folders, command: str) -> None:
    """Catches an adapter folder named as a model, and an advice to download what is there."""
    status = 2 if command == "finetune" else 4  # where it may be gone on with, by another flag
    refused(at, status, ("{adapter}", "is an adapter", "finetune/merge.py"), *door(command, at, "adapter"))
