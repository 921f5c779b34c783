"""What a tokenizer.json and its neighbours say about beginning and end, and how tokenizer files can be broken."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer
from tokenizers import Tokenizer as Backend

from lit_llama.errors import CheckpointError, DataError
from lit_llama.text.tokenizer import kinds as module
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import HubTokenizer

Change = Callable[[dict[str, Any]], object]
END = {"eos_token": "<|im_end|>"}


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the tiny tokenizer.json, changed, and only those settings that are given."""

    def write(change: Change = lambda raw: None, settings: object = None, config: object = None) -> Path:
        write_tokenizer(tmp_path)
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        change(raw)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        for name, value in (("tokenizer_config.json", settings), ("config.json", config)):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                (tmp_path / name).write_text(json.dumps(value))
        return tmp_path

    return write


def post_processor(*single: str) -> Change:
    """Let the tokenizer add tokens around the text A on its own."""
    ids = {"<|im_start|>": 1, "<|im_end|>": 2}

    def piece(name: str) -> dict[str, Any]:
        return {"Sequence" if name == "A" else "SpecialToken": {"id": name, "type_id": 0}}

    def change(raw: dict[str, Any]) -> None:
        raw["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [piece(name) for name in single],
            "pair": [piece("A"), {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()},
        }

    return change


@pytest.mark.parametrize(
    ("change", "settings", "bos"),
    [
        (lambda raw: None, END, ""),
        (lambda raw: None, END | {"bos_token": "<|im_start|>"}, ""),
        (lambda raw: None, END | {"bos_token": "<|im_start|>", "add_bos_token": True}, "<|im_start|>"),
        (lambda raw: None, END | {"bos_token": {"content": "<|im_start|>"}, "add_bos_token": True}, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END | {"add_bos_token": None}, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END | {"add_bos_token": True}, "<|im_start|>"),
        (post_processor("<|im_start|>", "A"), END | {"add_bos_token": False}, ""),
        (post_processor("A", "<|im_end|>"), END, ""),
    ],
)
def test_whether_a_text_begins_with_a_token(
    change: Change, settings: object, bos: str, changed: Callable[..., Path]
) -> None:
    """Catches a missing or second beginning, and a tokenizer that adds only an end taken for one that adds a start."""
    ours = Tokenizer.from_path(changed(change, settings))
    assert ours.bos == bos
    assert ours.encode("ab") == ours.encode_batch(["ab"])[0] and 1 not in ours.encode("ab")


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (END, None),
        ({"eos_token": {"content": "<|im_end|>", "special": True}}, None),
        (END, {"eos_token_id": 0}),
        (None, {"eos_token_id": 2}),
        (None, {"eos_token_id": [2, 0]}),
        ({"eos_token": None}, {"eos_token_id": 2}),
        ({"eos_token": "</unknown>"}, {"eos_token_id": 2}),
    ],
)
def test_which_token_ends_a_text(settings: object, config: object, changed: Callable[..., Path]) -> None:
    """Catches an end of another model: the answer would never stop."""
    ours = Tokenizer.from_path(changed(settings=settings, config=config))
    assert (ours.eos, ours.eos_id) == ("<|im_end|>", 2)


def test_a_lone_tokenizer_json_is_used_only_where_its_end_is_clear(changed: Callable[..., Path]) -> None:
    """Catches a guess between two ends (<|endoftext|> and <|im_end|>)."""
    folder = changed()
    with pytest.raises(CheckpointError, match="does not say which token ends a text; pass the model folder"):
        Tokenizer.from_path(folder / "tokenizer.json")
    folder = changed(lambda raw: raw["added_tokens"].pop(0))
    ours = Tokenizer.from_path(folder / "tokenizer.json")
    assert isinstance(ours, HubTokenizer) and (ours.eos, ours.bos) == ("<|im_end|>", "")


def test_truncation_and_padding_in_the_file_have_no_effect(changed: Callable[..., Path]) -> None:
    """Catches texts cut to 4 tokens, or filled up, by a setting that somebody left in the file."""
    plain = Tokenizer.from_path(changed(settings=END)).encode_batch(["a long text of words", "b"])

    def change(raw: dict[str, Any]) -> None:
        backend = Backend.from_str(json.dumps(raw))
        backend.enable_truncation(4)
        backend.enable_padding(length=32)
        raw.update(json.loads(backend.to_str()))

    folder = changed(change, END)
    assert len(Backend.from_file(str(folder / "tokenizer.json")).encode("a long text of words").ids) == 32
    assert Tokenizer.from_path(folder).encode_batch(["a long text of words", "b"]) == plain


def last_token_twice(raw: dict[str, Any]) -> None:
    vocabulary = raw["model"]["vocab"]
    vocabulary[list(vocabulary)[-1]] -= 1


def token_that_moves(raw: dict[str, Any]) -> None:
    raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 500, "content": "<x>"})


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda raw: raw["model"].update(dropout=0.1), END, "dropout makes encoding random"),
        (token_that_moves, END, "added token '<x>' does not keep its id 500"),
        (last_token_twice, END, "without duplicate ids"),
        (lambda raw: raw.clear(), END, "not a usable tokenizer.json"),
        (lambda raw: raw.update(model=None), END, "not a usable tokenizer.json"),
        (lambda raw: raw.update(added_tokens=7), END, "not a usable tokenizer.json"),
        (lambda raw: None, [1, 2], "tokenizer_config.json is not a JSON object"),
        (lambda raw: None, END | {"bos_token": "<s>", "add_bos_token": True}, "no token '<s>'"),
        (lambda raw: None, {"eos_token": ["<|im_end|>"]}, "does not say which token ends"),
    ],
)
def test_a_tokenizer_that_would_go_wrong_in_silence_is_refused(
    change: Change, settings: object, message: str, changed: Callable[..., Path]
) -> None:
    """Catches what the package accepts: random ids, moved ids, two tokens of one id; and tracebacks for the rest."""
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_path(changed(change, settings))


def test_a_regex_that_runs_away_is_an_error(
    changed: Callable[..., Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the package's panic, which is no Exception and passes every handler."""
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    monkeypatch.setattr(module, "check_tokenizer", lambda raw: None)  # which refuses the pattern
    ours = Tokenizer.from_path(changed(lambda raw: raw.update(pre_tokenizer=split), END))
    with pytest.raises(DataError, match="Regex search error"):
        ours.encode("a" * 40 + "b")
    capfd.readouterr()


BROKEN_FILES = {
    "tiktoken": b"IQ== 0\nIg== 1\n" * 50,
    "empty": b"",
    "page": b"<!doctype html><html></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 499723\n",
}


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_another_file_under_a_tokenizers_name(kind: str, name: str, tmp_path: Path) -> None:
    """Catches the packages' unhelpful messages for Llama 3's tiktoken file and for failed downloads."""
    (tmp_path / name).write_bytes(BROKEN_FILES[kind])
    message = "not a sentencepiece model .Llama 3 needs tokenizer.json" if name.endswith("l") else "not a usable"
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_path(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    """Catches a bare OSError of a package: the message says what was looked for."""
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json and no tokenizer\.model"):
        Tokenizer.from_path(tmp_path)
    with pytest.raises(CheckpointError, match=r"no\.model does not exist; expected a tokenizer\.model, a"):
        Tokenizer.from_path(tmp_path / "no.model")
