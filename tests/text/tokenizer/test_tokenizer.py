"""Both kinds of tokenizer against the packages themselves, and what no package guards against."""

import json
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece
from conftest import CORPUS
from tokenizers import Tokenizer as Backend

from lit_llama.errors import CheckpointError, DataError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import SentencePieceTokenizer
from lit_llama.text.tokenizer.stream import Streamer

KINDS = ["tokenizer.json", "trained tokenizer.model", "llama tokenizer.model"]
SCRIPTS = [
    "abc de FG 012 .,;:!?'\"-_()[]{}<|>/\\",
    "éèñçßøæ ÅÖÜ",
    "привет мир",
    "שלום ﷽ سلام",
    "你好世界，北京。",
    "こんにちは カタカナ 한국어",
    "नमस्ते ไทย",
    "😀👍🏽👨‍👩‍👧🇩🇪",
    "\n\r\n\t  \u00a0\u3000\u200b\ufeff\0\x7f",
    "e\u0301 ﬁ Ａ ½ ①",
]


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of several scripts each, the same for the same seed."""
    draw = random.Random(seed)
    letters = [*SCRIPTS, "".join(CORPUS[:4])]
    return [
        "".join("".join(draw.choices(draw.choice(letters), k=draw.randrange(9))) for _ in range(draw.randrange(6)))
        for _ in range(count)
    ]


@pytest.fixture(scope="session", params=KINDS)
def path(request: pytest.FixtureRequest) -> Path:
    """Each kind in turn."""
    name = {KINDS[0]: "tiny_folder", KINDS[1]: "trained_model", KINDS[2]: "llama_tokenizer"}[request.param]
    found: Path = request.getfixturevalue(name)
    return found / "tokenizer.json" if found.is_dir() else found


@pytest.fixture(scope="session")
def ours(path: Path) -> Tokenizer:
    """What is tested, read as a user names it."""
    return Tokenizer.from_path(path.parent if path.suffix == ".json" else path)


def package_ids(path: Path, texts: list[str]) -> list[list[int]]:
    """The ids of the package itself."""
    if path.suffix == ".json":
        backend = Backend.from_file(str(path))
        return [backend.encode(text, add_special_tokens=False).ids for text in texts]
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids: list[list[int]] = [model.encode(text) for text in texts]
    return ids


def test_ids_equal_those_of_the_package(path: Path, ours: Tokenizer) -> None:
    """Catches a prefix, an end or a normalisation of our own, and an order lost in the batch."""
    texts = mixed_texts(3000)
    wanted = package_ids(path, texts)
    assert ours.encode_batch(texts) == wanted
    assert [ours.encode(text) for text in texts[:50]] == wanted[:50]


def test_ids_of_real_rows_equal_those_of_the_package(path: Path, ours: Tokenizer, alpaca_file: Path) -> None:
    """As above, on long answers as people write them."""
    texts = [row["output"] for row in json.loads(alpaca_file.read_bytes())][:300]
    assert ours.encode_batch(texts) == package_ids(path, texts)


def test_text_comes_back(ours: Tokenizer) -> None:
    """Catches a lost blank, newline or byte: the model would learn another text than the file holds."""
    texts = mixed_texts(2000, seed=1)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ours.decode(ids) == text


def test_what_somebody_typed_never_becomes_a_control_token(ours: Tokenizer) -> None:
    """Catches a user who ends the answer, or speaks as the system, by typing the token."""
    controls = list(ours.control)
    assert controls and ours.eos in controls
    forms = ["{}", "a{}b", " {} ", "\n{}\n", "{}{}", "<{}>", "{}user\nx"]
    texts = [form.replace("{}", token) for form in forms for token in [*controls, "<unk>", "<s>", "</s>"]]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert not set(ids) & set(ours.control.values()), text
        assert ours.decode(ids) == text


def test_control_tokens_are_not_text(ours: Tokenizer) -> None:
    """Catches </s> or <|im_end|> in an answer that is shown."""
    ids = ours.encode("ab")
    assert ours.decode([*ours.control.values(), *ids, ours.eos_id]) == ours.decode(ids) == "ab"
    assert ours.decode([]) == "" and ours.encode("") == []


@pytest.mark.parametrize("beyond", [-1, None, 2**31, 2**70])
def test_an_id_outside_the_vocabulary_is_named(beyond: int | None, ours: Tokenizer) -> None:
    """Catches ids that the packages skip in silence, wrap around, or answer with an IndexError."""
    wrong = ours.size if beyond is None else beyond
    with pytest.raises(DataError, match=rf"id {wrong} is outside the tokenizer's vocabulary of {ours.size}"):
        ours.decode([0, wrong])
    ours.decode([ours.size - 1])


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\udc80"])
def test_a_lone_surrogate_is_a_data_error(text: str, ours: Tokenizer) -> None:
    """Catches the TypeError of one package and the RuntimeError of the other."""
    with pytest.raises(DataError, match="lone surrogate"):
        ours.encode_batch(["fine", text])


def test_known_ids_of_llama(llama_tokenizer: Path) -> None:
    """Catches a wrong dummy blank or a wrong end: ids as measured on the original model."""
    ours = Tokenizer.from_path(llama_tokenizer)
    assert isinstance(ours, SentencePieceTokenizer)
    assert (ours.size, ours.control, ours.bos, ours.eos) == (32000, {"<s>": 1, "</s>": 2}, "<s>", "</s>")
    assert ours.eos_id == 2
    assert ours.encode("Hello") == [15043] and ours.encode("\n") == [29871, 13]
    assert ours.encode("你好") == [29871, 30919, 31076] and ours.encode("</s>") == [1533, 29879, 29958]


@pytest.mark.real
def test_ids_equal_those_of_transformers_for_the_real_folder(real_folder: Path, alpaca_file: Path) -> None:
    """Catches a settings file that transformers minds and we do not."""
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(real_folder), Tokenizer.from_path(real_folder)
    texts = mixed_texts(1000, seed=2) + [row["output"] for row in json.loads(alpaca_file.read_bytes())][:100]
    assert ours.encode_batch(texts) == theirs(texts)["input_ids"]
    assert ours.eos_id == theirs.eos_token_id and ours.size == len(theirs) and ours.bos == ""
    for ids in theirs(texts[:50])["input_ids"]:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_the_fingerprint_is_of_the_vocabulary(tmp_path: Path, ours: Tokenizer, path: Path) -> None:
    """Catches a tokenizer of equal size with two tokens exchanged, and a hash that changes with the file's name."""
    copy = tmp_path / f"copy{path.suffix}"
    copy.write_bytes(path.read_bytes())
    if path.suffix == ".json":
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert Tokenizer.from_path(copy).fingerprint() == ours.fingerprint()
    if path.suffix == ".json":
        raw = json.loads(copy.read_text())
        vocabulary = raw["model"]["vocab"]
        vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
        copy.write_text(json.dumps(raw))
        changed = Tokenizer.from_path(copy)
        assert changed.size == ours.size and changed.fingerprint() != ours.fingerprint()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_file(share: float, path: Path, tmp_path: Path) -> None:
    """Catches half a vocabulary that is used as if it were whole."""
    raw = path.read_bytes()
    (tmp_path / path.name).write_bytes(raw[: int(len(raw) * share)])
    with pytest.raises(CheckpointError):
        Tokenizer.from_path(tmp_path / path.name)


def streamed(tokenizer: Tokenizer, ids: Iterable[int]) -> tuple[list[str], str]:
    """What each push gave, and what was left."""
    streamer = Streamer(tokenizer)
    return [streamer.push([token_id]) for token_id in ids], streamer.flush()


def test_streamed_text_equals_the_text_decoded_at_once(ours: Tokenizer) -> None:
    """Catches lost blanks between words, halves of characters, and a last piece that is never given out."""
    texts = mixed_texts(800, seed=3)
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        pieces, rest = streamed(ours, ids)
        assert "".join(pieces) + rest == text
        assert "\ufffd" not in "".join(pieces)
        if not text.endswith(" "):
            assert rest == ""


def test_streamed_text_of_any_ids_equals_the_text_decoded_at_once(ours: Tokenizer) -> None:
    """As above for ids of no sense: broken bytes, control tokens in the middle, blanks at the start."""
    draw = random.Random(4)
    odd = [*ours.control.values(), *ours.encode(" \n 😀é")] * 8
    for _ in range(1500):
        ids = draw.choices([*range(min(ours.size, 3000)), *odd], k=draw.randrange(24))
        pieces, rest = streamed(ours, ids)
        assert "".join(pieces) + rest == ours.decode(ids), ids


def test_a_character_of_many_bytes_comes_out_whole(ours: Tokenizer) -> None:
    """Catches U+FFFD on the screen while a character is half there, and a flush that keeps the broken rest."""
    ids = ours.encode("a🦙")
    assert len(ids) > 2
    pieces, rest = streamed(ours, ids)
    assert [piece for piece in pieces if piece] == ["a", "🦙"] and rest == ""
    pieces, rest = streamed(ours, ids[:-1])
    assert "".join(pieces) == "a" and rest == ours.decode(ids[:-1])[1:] and set(rest) == {"\ufffd"}


def test_a_flushed_stream_is_empty(ours: Tokenizer) -> None:
    """Catches the end of an answer shown twice."""
    streamer = Streamer(ours)
    ids = ours.encode("one two")
    assert streamer.push(ids) + streamer.flush() == "one two"
    assert streamer.flush() == "" and streamer.push([]) == ""
