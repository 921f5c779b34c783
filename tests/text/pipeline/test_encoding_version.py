"""Bytes of prepared data, held by hashes: what is prepared is made anew when `ENCODING` is raised, and only then."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import run_here

from lit_llama.text.config import ENCODING
from lit_llama.text.dataset.folder import SPLITS, Split, read_meta

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "北京?"},
    {"role": "assistant", "content": "<think>A city.</think>Yes 😀"},
    {"role": "user", "content": " and <|im_end|> then"},
    {"role": "assistant", "content": "naïve</s>"},
]
ROWS = [
    *(
        {"instruction": f"Say {n}.", "input": "in words" if n % 3 else "", "output": f"it is {n}. " * (n % 9)}
        for n in range(1, 60)
    ),
    *({"messages": [*CHAT[n % 2 :], *CHAT[1:3] * (n % 4)]} for n in range(20)),
]
TEXTS = [{"text": f"Paragraph {n} of a book.\n\n" * (1 + n)} for n in range(30)]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}{# another #}"
)
BOUND = ("--overflow", "drop", "--max_seq_length", 400)
CASES: dict[str, tuple[Any, ...]] = {
    "alpaca": ("--prompt_style", "alpaca", "--on_error", "skip", *BOUND),
    "chatml": ("--prompt_style", "chatml", *BOUND),
    "vicuna": ("--prompt_style", "vicuna", *BOUND),
    "llama-2": ("--prompt_style", "llama-2", "--on_error", "skip", *BOUND),
    "mistral": ("--prompt_style", "mistral", "--on_error", "skip", *BOUND),
    "chat_template": ("--prompt_style", "chat_template", *BOUND),
    "unmasked": ("--prompt_style", "chatml", "--mask_inputs", "false", *BOUND),
    "last": ("--prompt_style", "chatml", "--train_on", "last", *BOUND),
    "keep thoughts": ("--prompt_style", "chatml", "--thoughts", "keep", *BOUND),
    "drop thoughts": ("--prompt_style", "chatml", "--thoughts", "drop", *BOUND),
    "strip ends": ("--prompt_style", "chatml", "--typed_ends", "strip", *BOUND),
    "prompt cut": ("--prompt_style", "chatml", "--max_seq_length", 150, "--overflow", "truncate_prompt"),
    "answer cut": ("--prompt_style", "chatml", "--max_seq_length", 150, "--overflow", "truncate_response"),
    "turns split": ("--prompt_style", "chatml", "--max_seq_length", 160, "--overflow", "split"),
    "shuffled": ("--prompt_style", "chatml", "--split", "shuffle", "--test_split_size", 7, "--seed", 3),
    "texts": ("--prompt_style", "plain", "--mask_inputs", "false", "--max_seq_length", 64, "--overflow", "split"),
}
EXPECTED = {
    1: {
        "alpaca": "cfa4f374537083f8",
        "chatml": "bc70af4d640043cc",
        "vicuna": "80e6be0a2f8cedc1",
        "llama-2": "2d084a443426602f",
        "mistral": "2f2ada69739ac615",
        "chat_template": "bc70af4d640043cc",
        "unmasked": "84598dd07bdaa80a",
        "last": "7f24220aaf3baa26",
        "keep thoughts": "bc70af4d640043cc",
        "drop thoughts": "c04b0d796e321606",
        "strip ends": "7309968b47f55e4e",
        "prompt cut": "cf511ce6ed7e6146",
        "answer cut": "6277a6714b748aec",
        "turns split": "61316e60831a8f8f",
        "shuffled": "27b115dd7277c46c",
        "texts": "e48f2c9bd098b721",
    },
}
"""For each version of the encoding, the hashes of its cases; one that was released is never changed."""


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE of which every id is known: bytes, three merges, and control tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "s"), ("Ġ", "is"), ("t", "h")]
    vocab = {token: number for number, token in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>", "<|im_start|>", "<|im_end|>")])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def digest(folder: Path) -> str:
    """Hash over ids, labels and raw rows of both splits."""
    found = hashlib.sha256()
    for name in SPLITS:
        split = Split(folder, name)
        for row in range(len(split)):
            for column in split[row]:
                found.update(column.astype("<i4").tobytes() + b"\n")
    found.update((folder / "test.jsonl").read_bytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES)
def test_prepared_bytes_are_those_of_their_version(case: str, tmp_path: Path) -> None:
    """Catches a change of what rows become without a new version: folders that were made before would count as new."""
    write_tokenizer(tmp_path / "tokenizer")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in (TEXTS if case == "texts" else ROWS)))
    paths = ("--source", rows, "--destination_path", tmp_path / "data", "--tokenizer_path", tmp_path / "tokenizer")
    result = run_here("prepare/records.py", *paths, "--near_duplicates", 0, *CASES[case])
    assert result.returncode == 0, result.stderr
    assert len(Split(tmp_path / "data", "train")) > 5
    assert read_meta(tmp_path / "data")["made_of"]["version of the encoding"] == ENCODING
    assert digest(tmp_path / "data") == EXPECTED[ENCODING].get(case), "raise ENCODING, and add its hashes"
