"""Tokenizers of folders as GGUF holds them, read back by us and by transformers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_model, write_tokenizer
from gguf_files import SHAPE, read_quickly, write_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lit_llama.conversion.bpe import tokenizer_json
from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.gguf.tokenizer import vocabulary
from lit_llama.conversion.gguf.writer import write_gguf
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import write_folder
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.base import Tokenizer as Ours

QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "",
    " ",
    "Below is an instruction that describes a task.",
    "  two spaces\t\ttabs\n\n\nlines  \n",
    "Zoë's naïve café, 北京 is a city. 😀 e\u0301 Å",
    "3.14159 and 1234567 in 2024, 12x34 HTTPServer/",
    "I'll, WE'VE, they'd: don't!!! [PAD390] <|im_end|>",
]


def split(pattern: str) -> list[Any]:
    regex = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    return [regex, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
PRE: dict[str, tuple[Any, Any, bool]] = {
    "gpt-2": (BYTES, None, False),
    "smollm": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), None, False),
    "llama-bpe": (pre_tokenizers.Sequence(split(LLAMA3)), None, True),
    "qwen2": (pre_tokenizers.Sequence(split(QWEN2)), normalizers.NFC(), False),
    "deepseek-r1-qwen": (pre_tokenizers.Sequence(split(QWEN2)), None, False),
    "tekken": (pre_tokenizers.Sequence(split(TEKKEN)), None, True),
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """A folder whose tokenizer.json and settings are changed, with what a GGUF file says of it."""

    def write(
        change: Callable[[dict[str, Any]], Any] = lambda raw: None, rows: int = 400, **settings: Any
    ) -> tuple[Path, dict[str, Any]]:
        write_tokenizer(tmp_path)
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        change(raw)
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        before = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(before | settings))
        files: dict[str, Path | bytes] = {path.name: path for path in tmp_path.iterdir()}
        return tmp_path, vocabulary(files, {"eos_token_id": 2, "bos_token_id": 1}, rows)

    return write


def tokenizer_with(raw: dict[str, Any], pre: Any, normalizer: Any, whole: bool) -> Tokenizer:
    """Built with the package, as the publisher of a model does."""
    merges = [tuple(merge) for merge in raw["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=raw["model"]["vocab"], merges=merges, ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    names = [token["content"] for token in raw["added_tokens"]]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


@pytest.mark.parametrize("name", PRE)
def test_each_way_to_cut_text_is_recognised(
    written: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path, name: str
) -> None:
    """Catches a tokenizer under another's name; what is read back encodes as the package does."""
    made: list[Tokenizer] = []

    def change(raw: dict[str, Any]) -> None:
        made.append(tokenizer_with(raw, *PRE[name]))
        raw.clear()
        raw.update(json.loads(made[0].to_str()))

    _, metadata = written(change)
    assert metadata["tokenizer.ggml.pre"] == name
    back = Tokenizer.from_str(json.dumps(tokenizer_json(metadata)))
    assert [back.encode(text).ids for text in TEXTS] == [made[0].encode(text).ids for text in TEXTS]
    assert back.get_vocab() == made[0].get_vocab(), "the padding goes again"


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another pattern": (
        lambda raw: raw.update(
            pre_tokenizer=json.loads(
                tokenizer_with(raw, pre_tokenizers.Sequence(split(r"\p{N}{2}")), None, False).to_str()
            )["pre_tokenizer"]
        ),
        "has no name for",
    ),
    "a space before": (lambda raw: raw["pre_tokenizer"].update(add_prefix_space=True), "has no name for"),
    "a normaliser": (lambda raw: raw.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "whole words": (lambda raw: raw["model"].update(ignore_merges=True), "has no name for"),
    "word ends": (lambda raw: raw["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_gguf_has_no_name_for_is_refused(
    written: Callable[..., tuple[Path, dict[str, Any]]], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """Catches a file whose reader cuts text in another way than the model was trained with."""
    with pytest.raises(CheckpointError, match=message):
        written(change)


def test_added_tokens_of_all_files_are_there(written: Callable[..., tuple[Path, dict[str, Any]]]) -> None:
    """Catches a control token that becomes text, a plain one that becomes control, and ids that move."""

    def change(raw: dict[str, Any]) -> None:
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        raw["added_tokens"].append({"id": 384, "content": "<think>", "special": False, **flags})
        raw["added_tokens"].append({"id": 385, "content": "<|tool|>", "special": True, **flags})

    _, metadata = written(change)
    assert metadata["tokenizer.ggml.tokens"][384:388] == ["<think>", "<|tool|>", "[PAD386]", "[PAD387]"]
    assert metadata["tokenizer.ggml.token_type"][382:388] == [1, 1, 4, 3, 5, 5]


def test_more_tokens_than_rows_are_refused(written: Callable[..., tuple[Path, dict[str, Any]]]) -> None:
    """Catches ids without a row, with which llama.cpp does not load the file."""
    with pytest.raises(CheckpointError, match="384 tokens, but the embedding only 380 rows"):
        written(rows=380)


def test_a_beginning_is_put_first_where_the_folder_says_so(
    written: Callable[..., tuple[Path, dict[str, Any]]],
) -> None:
    """Catches a beginning of text twice, or never."""
    assert written()[1]["tokenizer.ggml.add_bos_token"] is False
    metadata = written(add_bos_token=True)[1]
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.bos_token_id"] == 1


def test_every_end_of_text_is_named(written: Callable[..., tuple[Path, dict[str, Any]]], tmp_path: Path) -> None:
    """Catches answers that run on: the end that the template uses, and those of the settings."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    _, metadata = written()
    assert metadata["tokenizer.ggml.eos_token_id"] == 2 and metadata["tokenizer.ggml.eot_token_id"] == 0
    assert "tokenizer.ggml.eom_token_id" not in metadata


@pytest.fixture
def llama(tmp_path: Path, llama_tokenizer: Path) -> Path:
    """A folder with LLaMA's own tokenizer, three tokens more, and an embedding with rows to spare."""
    folder = tmp_path / "llama"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(llama_tokenizer.read_bytes())
    (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": 32000, "<|im_end|>": 32001, "<x>": 32002}))
    special = {"content": "<|im_start|>", "special": True}, {"content": "<|im_end|>", "special": True}
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    settings |= {"added_tokens_decoder": {"32000": special[0], "32001": special[1]}}  # type: ignore[dict-item]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    model = tiny_model(**SHAPE, vocab_size=32032, hidden_size=32, eos_token_id=(2, 32001), bos_token_id=1)
    return write_model(folder, model, "float16")


def test_a_sentencepiece_model_goes_there_and_back(
    llama: Path, tmp_path: Path, alpaca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches scores, bytes or added tokens that are lost; transformers reads the file in its own way."""
    from transformers import AutoTokenizer

    read_quickly(monkeypatch)
    write_gguf(open_folder(llama), tmp_path / "model.gguf")
    write_folder(open_gguf(tmp_path / "model.gguf"), tmp_path / "back")
    ours, original = Ours.from_path(tmp_path / "back"), Ours.from_path(llama)
    texts = [row["output"] for row in json.loads(alpaca_file.read_text("utf-8"))][:300] + TEXTS[:-1]
    wanted = original.encode_batch(texts)
    assert ours.encode_batch(texts) == wanted
    assert ours.control == {"<s>": 1, "</s>": 2, "<|im_start|>": 32000, "<|im_end|>": 32001} and ours.size == 32003
    assert ours.encode("a<x>")[-1] == 32002 and 32001 not in ours.encode("<|im_end|>")
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["add_bos_token"] is True and settings["eos_token"] == "</s>"
    assert json.loads((tmp_path / "back" / "config.json").read_text())["eos_token_id"] == [2, 32001]
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == "{{ messages }}"
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    plain = [text for text in texts if text and not text.startswith(" ")]  # it takes a first space for the dummy one
    for text, ids in zip(plain[:150], original.encode_batch(plain[:150]), strict=True):
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
    assert theirs("<|im_end|>", add_special_tokens=False)["input_ids"][-1] == 32001


def test_the_folder_of_a_llama_opens_in_transformers(llama: Path, tmp_path: Path, alpaca_file: Path) -> None:
    """Catches a tokenizer.model alone, which transformers reads only with more packages."""
    from transformers import AutoTokenizer

    (llama / "added_tokens.json").unlink()
    settings = json.loads((llama / "tokenizer_config.json").read_text())
    del settings["added_tokens_decoder"]
    (llama / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(raw | {"eos_token_id": 2}))
    write_gguf(open_folder(llama), tmp_path / "model.gguf")
    write_folder(open_gguf(tmp_path / "model.gguf"), tmp_path / "back")
    theirs, original = AutoTokenizer.from_pretrained(tmp_path / "back"), Ours.from_path(llama)
    texts = [row["output"] for row in json.loads(alpaca_file.read_text("utf-8"))][:150]
    assert theirs(texts)["input_ids"] == [[1, *ids] for ids in original.encode_batch(texts)]
    assert Ours.from_path(tmp_path / "back").fingerprint() == original.fingerprint()


def test_files_that_contradict_each_other_are_refused(llama: Path) -> None:
    """Catches an id that is one token in the weights and another in the file."""
    (llama / "added_tokens.json").write_text(json.dumps({"<x>": 31999}))
    with pytest.raises(CheckpointError, match=r"^tokenizer.model: the added token '<x>' with id 31999 clashes"):
        vocabulary(open_folder(llama).files, {"eos_token_id": 2}, 32032)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    """Catches a file that no program can talk to."""
    with pytest.raises(CheckpointError, match=r"holds no tokenizer\.json"):
        vocabulary({}, {"eos_token_id": 2}, 400)
