"""What users convert that cannot be converted: one line that says what, where, found and the way out."""

import os
from typing import Any

import pytest
import torch
from bad_folders import Change, Folders, change_tensors, door, edit, refused
from bad_folders import at as at  # a fixture
from bad_folders import originals as originals  # a fixture
from conftest import run_here


def lose(folder: str, file: str) -> Change:
    return lambda at: (at[folder] / file).unlink()


def no_checklist(change: Change) -> Change:
    return lambda at: ((at["meta"] / "checklist.chk").unlink(), change(at))


def put(folder: str, **values: Any) -> Change:
    return lambda at: edit(at[folder] / "config.json", **values)


def flip_last(folder: str, file: str) -> Change:
    def run(at: Folders) -> None:
        content = bytearray((at[folder] / file).read_bytes())
        content[len(content) // 2] ^= 1
        (at[folder] / file).write_bytes(content)

    return run


def tiktoken(at: Folders) -> None:
    (at["meta"] / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n" * 50)


CONVERT: list[tuple[str, str, Change, int, tuple[str, ...]]] = [
    (
        "1 missing shard",
        "meta",
        no_checklist(lose("meta", "consolidated.00.pth")),
        4,
        ("found consolidated.01.pth", "missing is consolidated.00.pth"),
    ),
    (
        "1 missing last shard",
        "meta",
        no_checklist(lose("meta", "consolidated.01.pth")),
        4,
        ("dim is 64", "32 rows in 1 shard"),
    ),
    (
        "1 listed shard",
        "meta",
        lose("meta", "consolidated.01.pth"),
        6,
        ("lists consolidated.01.pth, which is missing",),
    ),
    (
        "1 missing part",
        "torch",
        lose("torch", "pytorch_model-00002-of-00002.bin"),
        4,
        ("missing are pytorch_model-00002-of-00002.bin",),
    ),
    (
        "2 checksum",
        "meta",
        flip_last("meta", "consolidated.01.pth"),
        6,
        ("consolidated.01.pth: md5 expected", "got", "download it again"),
    ),
    (
        "3 empty params",
        "meta",
        no_checklist(lambda at: (at["meta"] / "params.json").write_text("")),
        4,
        ("params.json is empty",),
    ),
    (
        "3 no params",
        "meta",
        no_checklist(lose("meta", "params.json")),
        4,
        ("params.json does not exist", "download it again"),
    ),
    (
        "3 other params",
        "meta",
        no_checklist(lambda at: edit(at["meta"] / "params.json", dim=128)),
        4,
        ("dim is 128, but wq has 64 columns",),
    ),
    (
        "4 nothing to do",
        "model",
        lambda at: None,
        4,
        ("already is a checkpoint folder in Hugging Face layout", "use it as it is"),
    ),
    ("4 an adapter", "adapter", lambda at: None, 4, ("is an adapter", "finetune/merge.py")),
    ("8 experts", "torch", put("torch", model_type="gpt_oss"), 4, ("model_type is 'gpt_oss'", "llama, mistral")),
    (
        "8 quantised",
        "torch",
        put("torch", quantization_config={"bits": 4}),
        4,
        ("quantised", "in 4 bits", "--quantize"),
    ),
    (
        "10 no tokenizer",
        "meta",
        no_checklist(lose("meta", "tokenizer.model")),
        4,
        ("tokenizer.model is neither in", "499,723 bytes"),
    ),
    ("10 tiktoken", "meta", no_checklist(tiktoken), 4, ("tokenizer.model",)),
]


@pytest.mark.parametrize(
    ("folder", "change", "status", "words"), [row[1:] for row in CONVERT], ids=[r[0] for r in CONVERT]
)
def test_convert_says_what_is_wrong(at: Folders, folder: str, change: Change, status: int, words: Any) -> None:
    """What goes wrong on the way into the layout; catches tracebacks and messages without a way out."""
    change(at)
    refused(at, status, words, *door("convert", at, folder))


def test_convert_does_nothing_twice(at: Folders) -> None:
    """Catches a whole folder that is written over (5), and one layout laid over another."""
    assert run_here(*door("convert", at, "meta")).returncode == 0
    before = {path.name: path.read_bytes() for path in at["made"].iterdir()}
    done = run_here(*door("convert", at, "meta"))
    assert done.returncode == 2 and "already holds config.json" in done.stderr
    assert before == {path.name: path.read_bytes() for path in at["made"].iterdir()}


def test_a_foreign_global_is_named_with_its_place(at: Folders) -> None:
    """Catches a pickle that runs (6)."""
    canary = at["made"].with_name("canary")

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(canary),)

    torch.save({"model.norm.weight": torch.ones(64), "x": Bomb()}, at["torch"] / "pytorch_model-00002-of-00002.bin")
    words = ("pytorch_model-00002-of-00002.bin", "the global 'posix.mkdir'", "(byte ", "safetensors")
    refused(at, 4, words, *door("convert", at, "torch"))
    assert not canary.exists()


def test_values_too_large_are_counted(at: Folders) -> None:
    """Catches infinities that --dtype float16 would make (9)."""
    change_tensors("model", lambda tensors: tensors["model.norm.weight"].view(-1)[:3].fill_(1e6))(at)
    refused(at, 4, ("3 values of model.norm.weight", "--dtype bfloat16"), *door("round", at, "model"))
