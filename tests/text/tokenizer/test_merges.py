"""A tokenizer of vocab.json and merges.txt against transformers, which turns the same two files into its own."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_tokenizer import mixed_texts
from tokenizer_files import in_transformers
from tokenizer_zoo import write_shape

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.base import Tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The two files, whose vocabulary holds <|endoftext|> as GPT-2's does."""
    whole = json.loads((write_shape(tmp_path / "whole", "byte level") / "tokenizer.json").read_text())["model"]
    folder = tmp_path / "merges"
    folder.mkdir()
    vocabulary = {**whole["vocab"], "<|endoftext|>": len(whole["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in whole["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    "names",
    [
        {"tokenizer_class": "GPT2Tokenizer"},
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True, "eos_token": "<|im_end|>"},
        {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "bos_token": None},
    ],
    ids=["GPT-2", "GPT-2 with a blank", "Qwen 2"],
)
def test_ids_equal_those_of_transformers(names: dict[str, Any], folder: Path) -> None:
    """Catches another way of cutting text than the class has, and an end that is only a word."""
    size = len(json.loads((folder / "vocab.json").read_text()))
    added = {str(size): {"content": "<tool_call>", "special": False, "lstrip": False, "rstrip": False}}
    (folder / "tokenizer_config.json").write_text(json.dumps({**names, "added_tokens_decoder": added}))
    ours, theirs = Tokenizer.from_path(folder), in_transformers(folder)
    texts = [*mixed_texts(200), "e\u0301 1234\r\n it's", "a<tool_call>b"]
    assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id and ours.size == len(theirs)
    assert (
        ours.eos_id not in ours.encode(f"a{ours.eos}") and ours.decode([ours.eos_id, *ours.encode("a")]).strip() == "a"
    )


def test_what_the_two_files_do_not_say_is_refused(folder: Path) -> None:
    """Catches a text cut as GPT-2 would cut it for a model that cuts it otherwise, and half a file."""
    settings = folder / "tokenizer_config.json"
    settings.write_text('{"tokenizer_class": "BlenderbotTokenizer"}')
    with pytest.raises(CheckpointError, match=r"the class BlenderbotTokenizer, whose .*save_pretrained"):
        Tokenizer.from_path(folder)
    settings.write_text("{}")
    with (folder / "merges.txt").open("a") as file:
        file.write("a b c\n")
    with pytest.raises(CheckpointError, match=r"merges\.txt:line \d+ is 'a b c', expected two tokens"):
        Tokenizer.from_path(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json and no tokenizer\.model, nor vocab\.json"):
        Tokenizer.from_path(folder)
