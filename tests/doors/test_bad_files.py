"""Damaged files among weights, through the doors: one line that says what, where, found and the way out."""

import json
import os
from collections.abc import Callable

import pytest
from bad_folders import Folders, door, refused
from bad_folders import at as at  # a fixture
from bad_folders import originals as originals  # a fixture

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "pointer": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269062936\n",
    "page": lambda content: b"<!DOCTYPE html>\n<html><body>Sign in</body></html>",
    "cut off": lambda content: content[: len(content) // 2],
    "flipped": lambda content: bytes([content[0] ^ 0x40]) + content[1:],
    "not text": lambda content: b"\xff\xfe" + content,
    "nested": lambda content: b"[" * 100_000,
}
FILES = [
    ("model", "config.json", "generate"),
    ("model", "model.safetensors", "round"),
    ("model", "tokenizer.json", "finetune"),
    ("parts", "config.json", "round"),
    ("parts", "model.safetensors.index.json", "generate"),
    ("parts", "model-00002-of-00002.safetensors", "generate"),
    ("torch", "config.json", "convert"),
    ("torch", "pytorch_model.bin.index.json", "convert"),
    ("torch", "pytorch_model-00002-of-00002.bin", "convert"),
    ("meta", "params.json", "convert"),
    ("meta", "tokenizer.model", "convert"),
    ("meta", "consolidated.01.pth", "convert"),
    ("base", "config.json", "base"),
    ("base", "model.safetensors", "base"),
    ("delta", "tokenizer.json", "delta"),
    ("adapter", "adapter_config.json", "merge"),
    ("adapter", "adapter_model.safetensors", "merge"),
    ("adapter", "meta.json", "generate"),
]


@pytest.mark.parametrize(("folder", "file", "command"), FILES, ids=[f"{folder}/{file}" for folder, file, _ in FILES])
def test_a_damaged_file_is_named(at: Folders, folder: str, file: str, command: str) -> None:
    """Catches tracebacks of parsers, and a failed download that passes for weights, settings or tokenizer."""
    (at["meta"] / "checklist.chk").unlink()
    path = at[folder] / file
    content = path.read_bytes()
    for damage in DAMAGE.values():
        path.write_bytes(damage(content))
        refused(at, 4, (str(path),), *door(command, at, folder))


def test_a_piece_that_is_no_text_is_named(at: Folders) -> None:
    """Catches a UnicodeDecodeError out of a tokenizer.model with one flipped bit, which sentencepiece loads."""
    (at["meta"] / "checklist.chk").unlink()
    path = at["meta"] / "tokenizer.model"
    content = bytearray(path.read_bytes())
    content[content.index("▁".encode())] ^= 0x40
    path.write_bytes(content)
    refused(at, 4, (str(path),), *door("convert", at, "meta"))


@pytest.mark.parametrize("content", ["<!DOCTYPE html><html></html>", "version https://git-lfs.github.com/spec/v1", ""])
def test_a_template_that_leaves_out_the_question_is_refused(at: Folders, content: str) -> None:
    """Catches a page taken for a chat template: the model would answer every question alike, and nobody knew why."""
    (at["model"] / "chat_template.jinja").write_text(content)
    refused(at, 4, ("leaves out the user message", "--prompt_style"), *door("instruct", at, "model"))


@pytest.mark.parametrize("folder", ["parts", "torch"])
@pytest.mark.parametrize("way", ["above", "absolute", "link", "pipe", "folder"])
def test_an_index_cannot_lead_elsewhere(at: Folders, folder: str, way: str) -> None:
    """Catches a file outside the folder that is read because data names it, and a pipe that is waited for."""
    path = at[folder]
    index = next(path.glob("*.index.json"))
    weight_map = json.loads(index.read_text())["weight_map"]
    file = sorted(set(weight_map.values()))[1]
    outside = path.parent / file
    (path / file).rename(outside)
    named = {"above": f"../{file}", "absolute": str(outside)}.get(way, file)
    if way == "link":
        (path / file).symlink_to(outside)
    elif way == "pipe":
        os.mkfifo(path / file)
    elif way == "folder":
        (path / file).mkdir()
    text = json.dumps({"metadata": {}, "weight_map": {k: named if v == file else v for k, v in weight_map.items()}})
    index.write_text(text)
    command = "generate" if folder == "parts" else "convert"
    refused(at, 4, (str(index), named, "no file in"), *door(command, at, folder))


@pytest.mark.parametrize(
    ("command", "folder", "file"),
    [("merge", "adapter", "adapter_model.safetensors"), ("round", "model", "model.safetensors")],
)
def test_a_pipe_is_not_waited_for(at: Folders, command: str, folder: str, file: str) -> None:
    """Catches a command that hangs for ever without a word."""
    (at[folder] / file).unlink()
    os.mkfifo(at[folder] / file)
    refused(at, 4, (file,), *door(command, at, folder))
