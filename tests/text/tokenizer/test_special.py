"""What the JSON files beside a tokenizer say, and sentencepiece models changed byte by byte."""

import json
from pathlib import Path

import pytest
import sentencepiece

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.special import (
    AddedToken,
    added_tokens,
    as_controls,
    named_tokens,
    read_object,
    spelling_of,
)


def write(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_both_ways_to_add_a_token_count(tmp_path: Path) -> None:
    """Catches a token read from one file only, and a role that makes it special read from another."""
    assert added_tokens(tmp_path) == []
    folder = write(
        tmp_path,
        added_tokens={"<human>": 40, "[PAD]": 41, "<bot>": 39, "<tool>": 42},
        tokenizer_config={
            "pad_token": "[PAD]",
            "added_tokens_decoder": {
                "2": {"content": "</s>", "special": True},
                "40": {"content": "<human>", "special": False},
                "50": {"content": "<plain>", "special": False},
            },
        },
        special_tokens_map={"additional_special_tokens": [{"content": "<bot>", "lstrip": False}]},
    )
    assert added_tokens(folder) == [
        AddedToken("</s>", 2, True),
        AddedToken("<bot>", 39, True),
        AddedToken("<human>", 40, False),
        AddedToken("[PAD]", 41, True),
        AddedToken("<tool>", 42, False),
        AddedToken("<plain>", 50, False),
    ]


@pytest.mark.parametrize(
    ("added", "decoder", "message"),
    [
        ({"<a>": 5, "<b>": 5}, {}, "'<b>' has the id 5, but '<a>' has the id 5"),
        ({"<a>": 5}, {"5": {"content": "<b>"}}, "'<b>' has the id 5, but '<a>' has the id 5"),
        ({"<a>": 5}, {"6": {"content": "<a>"}}, "'<a>' has the id 6, but '<a>' has the id 5"),
        ({"<a>": "5"}, {}, "'<a>' has the id '5', expected"),
        ({"<a>": True}, {}, "has the id True"),
        ({"<a>": -1}, {}, "has the id -1"),
        ({"<a>": 1 << 40}, {}, "has the id 1099511627776"),
        ({"": 5}, {}, "expected a spelling"),
        ({}, {"x": {"content": "<a>"}}, "has the id 'x'"),
        ({}, {"5": 7}, "expected a spelling"),
        ({}, [1], r"added_tokens_decoder is \[1\], expected an object"),
        ([1], {}, r"added_tokens\.json is not a JSON object"),
    ],
)
def test_entries_that_contradict_each_other(added: object, decoder: object, message: str, tmp_path: Path) -> None:
    """Catches a template that is encoded with whichever of two ids was read last, and tracebacks."""
    with pytest.raises(CheckpointError, match=message):
        added_tokens(write(tmp_path, added_tokens=added, tokenizer_config={"added_tokens_decoder": decoder}))


def test_named_tokens_are_given_with_their_files(tmp_path: Path) -> None:
    """Catches an object taken for no token, null for one, and the order of the files turned round."""
    folder = write(
        tmp_path,
        tokenizer_config={"bos_token": "", "eos_token": None, "pad_token": {"content": "<p>"}},
        special_tokens_map={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
    )
    settings, names = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    assert named_tokens(folder, "bos_token") == [(settings, ""), (names, "<s>")]
    assert named_tokens(folder, "eos_token") == [(names, "</s>")]
    assert named_tokens(folder, "pad_token") == [(settings, "<p>")]
    assert [spelling_of(value) for value in ("a", {"content": "b"}, {"content": 7}, 7, None)] == ["a", "b", "", "", ""]


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    """Catches an error for the many folders that have none of these files."""
    assert read_object(tmp_path / "x.json") == {}


def test_a_word_made_control_is_out_of_reach_and_nothing_else_changes(trained_model: Path) -> None:
    """Catches a byte too many or too few in the copied model: other pieces, scores or settings."""
    before = sentencepiece.SentencePieceProcessor(model_file=str(trained_model))
    raw = before.serialized_model_proto()
    assert as_controls(raw, set()) == raw
    word = before.encode("instruction")[-1]
    assert not before.is_control(word)
    after = sentencepiece.SentencePieceProcessor()
    after.load_from_serialized_proto(as_controls(raw, {word}))
    assert word not in after.encode("instruction") and after.decode(after.encode("instruction")) == "instruction"
    assert after.is_control(word) and after.vocab_size() == before.vocab_size()
    for i in set(range(before.vocab_size())) - {word}:
        assert (after.id_to_piece(i), after.get_score(i)) == (before.id_to_piece(i), before.get_score(i))
        assert (after.is_control(i), after.is_byte(i)) == (before.is_control(i), before.is_byte(i))
