"""Foreign tokenizers: published shapes pass as they are, hostile ones are refused before they take memory or time."""

import base64
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from conftest import write_tokenizer
from google.protobuf import runtime_version
from tokenizers import Tokenizer as Backend

from lit_llama.errors import CheckpointError, ResourceError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.bounds import MAX_ID, check_model, parse_model
from lit_llama.text.tokenizer.patterns import check_pattern, shortest

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
ENDS, REST = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?"
PUBLISHED = {
    "GPT-2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "Llama 3": rf"{ENDS}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "Qwen 2": rf"{ENDS}|{WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{REST}",
    "Llama 4": rf"{WORD}{UPPER}*{LOWER}+{ENDS}?|{WORD}{UPPER}+{LOWER}*{ENDS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    "Mistral": rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{REST}",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{REST}",
    "DeepSeek 1": r"\s+$",
    "Kimi": rf"[\p{{Han}}]+|{WORD}[\p{{Lu}}\p{{Lm}}&&[^\p{{Han}}]]*[\p{{Ll}}\p{{Lm}}&&[^\p{{Han}}]]+{ENDS}?|{REST}",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "possessive": rf"{WORD}+\p{{L}}++|\p{{N}}{{1,3}}+| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)",
    "thousands": r"\p{N}{1,3}(?=(?:\p{N}{3})*(?:\P{N}|$))",
    "Chameleon": r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    "CLIP": r"<\|startoftext\|>|'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    "T5": r" {2,}",
}
HOSTILE = [
    *(r"(a+)+$", r"(a|a)*b", r"(a|aa)+b", r"(.*)*x", r".*.*x", r"a*a*a*a*b", r"(\w+\s?)*!", r"(?:(?:a|b)+c?)+$"),
    *(r"(a*)\1b", r"(?<x>a)\k<x>", r"(?<x>a\g<x>?b)", r"(?(1)a|b)", r"(?~ab)c", r"(?x)(a+) +b", r"(?i)(a+)+b"),
    *(r"(a?){30}a{30}", "a?" * 30 + "a" * 30, r"(?:\p{N}{1,3})+b", r"(?=.*x.*y)z", r"\s+(?=.*x)", r"[ab]*[ab]++$"),
    *("(" * 50 + "a" + ")" * 50, "(a", "a)", "[a", "a\\", "a" * 20_001),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_patterns_pass(name: str) -> None:
    """Catches a tokenizer in use that is refused; the package takes all of them."""
    check_pattern(PUBLISHED[name])
    split = {"type": "Split", "pattern": {"Regex": PUBLISHED[name]}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    assert Backend.from_str(json.dumps({"pre_tokenizer": split, "model": model, "added_tokens": []}))


@pytest.mark.parametrize("pattern", HOSTILE)
def test_patterns_that_may_not_end_are_refused(pattern: str) -> None:
    """Catches a row that takes hours or for ever."""
    with pytest.raises(CheckpointError):
        check_pattern(pattern)


def test_the_shortest_match_is_known() -> None:
    """Catches a growth that is taken for less than it is."""
    assert [shortest(pattern) for pattern in (" {2,}", r"\s+", "a*", "(?=x)", "ab|c", "(?:ab){3}")] == [
        2,
        1,
        0,
        0,
        1,
        6,
    ]


def replace(found: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: found}, "content": content}


def chain(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(length: int) -> bytes:
    return (4).to_bytes(4, "little") + bytes(4) + b"x" * length + b"\0"


PRECOMPILED = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(charsmap(5000)).decode()}
ATTACKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "four replacements": (
        lambda raw: raw.update(normalizer=chain(*(replace(a, b * 40) for a, b in ("ab", "bc", "cd", "de")))),
        r"normalizer makes up to [\d,]+ characters of one, expected at most 64",
    ),
    "regular replacements": (
        lambda raw: raw.update(normalizer=chain(*[replace(".", "aaaa", "Regex")] * 4)),
        "makes up to 256 characters of one",
    ),
    "between characters": (
        lambda raw: raw.update(normalizer=chain(*[replace("a*", "b" * 50, "Regex")] * 2)),
        "makes up to 2,601 characters of one",
    ),
    "an empty text": (lambda raw: raw.update(normalizer=replace("", "xx")), "looks for an empty text"),
    "a long one": (lambda raw: raw.update(normalizer={"type": "Prepend", "prepend": "x" * 65}), "prepend has 65 char"),
    "a table": (lambda raw: raw.update(normalizer=PRECOMPILED), "makes 5,000 bytes of one"),
    "an added id": (lambda raw: raw["added_tokens"][0].update(id=2**31), "id 2147483648, expected a number from 0"),
    "an id": (lambda raw: raw["model"]["vocab"].update(x=MAX_ID), f"id {MAX_ID}, expected a number"),
    "a split": (lambda raw: raw.update(pre_tokenizer=split(r"(a*)\1b")), r"pre_tokenizer: .* refers back to a group"),
    "a decoder": (
        lambda raw: raw.update(
            decoder={"type": "Sequence", "decoders": [replace("a", "b" * 64), replace("b", "c" * 64)]}
        ),
        "decoder makes up to 4,096 characters",
    ),
    "a strip": (
        lambda raw: raw.update(decoder={"type": "Strip", "content": "a", "start": 2**40, "stop": 0}),
        "decoder.start is 1099511627776",
    ),
    "steps": (lambda raw: raw.update(normalizer=chain(*[{"type": "NFC"}] * 65)), "has 65 steps"),
    "a prefix": (lambda raw: raw["model"].update(continuing_subword_prefix="#" * 99), "subword_prefix has 99"),
    "a template": (
        lambda raw: raw.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}] * 65,
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": [1], "tokens": ["x"]}},
            }
        ),
        "puts more than 64 tokens around a text",
    ),
}


def write(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_named_before_anything_is_built(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches gigabytes for a line, a list of two thousand million names, and a panic of the package."""
    change, message = ATTACKS[name]
    folder = write(tmp_path, change)
    monkeypatch.setattr("tokenizers.Tokenizer", None)
    with pytest.raises(CheckpointError, match=f"tokenizer.json is not a usable tokenizer.json: .*{message}"):
        Tokenizer.from_path(folder)


def test_what_published_normalizers_do_passes(tmp_path: Path) -> None:
    """Catches Llama 2, T5 or ALBERT refused."""
    steps = chain(
        {"type": "NFKC"},
        {"type": "Prepend", "prepend": "▁"},
        *(replace(found, content) for found, content in ((" ", "▁"), ("``", '"'), ("''", '"'), ("…", "..."))),
        replace(" {2,}", " ", "Regex"),
        {"type": "Precompiled", "precompiled_charsmap": ""},
    )
    folder = write(tmp_path, lambda raw: raw.update(normalizer={**steps, "normalizers": steps["normalizers"][:-1]}))
    assert Tokenizer.from_path(folder).encode("a … b")


def test_a_decoder_that_fails_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Catches the package's panic, which is no Exception and ends a chat."""
    strip = {"type": "Strip", "content": "a", "start": 0, "stop": 9}
    ours = Tokenizer.from_path(write(tmp_path, lambda raw: raw.update(decoder=strip)))
    with pytest.raises(CheckpointError, match="cannot decode"):
        ours.decode([ours.encode("a")[0]])
    capfd.readouterr()


def test_a_table_of_sentencepiece_is_bounded() -> None:
    """Catches a tokenizer.model that makes megabytes of a letter, before and after the pieces."""

    def field(number: int, data: bytes) -> bytes:
        assert len(data) < 1 << 14
        return bytes([number << 3 | 2, len(data) & 127 | 128, len(data) >> 7]) + data

    for part in (3, 5):
        check_model(Path("x"), field(1, b"\x0a\x01a") + field(part, field(1, b"nmt_nfkc") + field(2, charsmap(33))))
        with pytest.raises(CheckpointError, match="x: the table of characters makes 257 bytes of one"):
            check_model(Path("x"), field(part, field(2, charsmap(257))))


def test_a_damaged_model_is_refused_before_sentencepiece_reads_it(llama_tokenizer: Path) -> None:
    """Catches bytes behind the last message, a message that is cut off, and a tag of no known kind."""
    data = llama_tokenizer.read_bytes()
    check_model(Path("x"), data)
    for damaged in (b"\x0f", data + b"\0", data + b"\x0a", data[:-1], data[1:], b"\x0a\xff\xff\xff\xff\x0f" + data):
        with pytest.raises(CheckpointError, match=r"^x is not a sentencepiece model .Llama 3 needs") as caught:
            check_model(Path("x"), damaged)
        assert "\n" not in str(caught.value)


def test_a_model_is_bounded_by_its_size_before_it_is_parsed_and_by_its_pieces_then(tmp_path: Path) -> None:
    """Catches gigabytes of empty pieces, of which each takes two bytes of the file and sixty of the memory."""
    path = tmp_path / "tokenizer.model"
    with path.open("wb") as file:
        file.truncate((32 << 20) + 1)  # zeros, which are no message: they are not looked at
    with pytest.raises(CheckpointError, match=r"tokenizer\.model has 33,554,433 bytes, a sentencepiece model at most"):
        Tokenizer.from_path(tmp_path)
    path.write_bytes(b"\x0a\x00" * (MAX_ID + 1))
    with pytest.raises(CheckpointError, match=rf"model has {MAX_ID + 1:,} pieces, expected at most {MAX_ID:,}"):
        Tokenizer.from_path(tmp_path)


def test_a_protobuf_that_is_too_old_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the traceback of an environment in which something else holds protobuf back."""
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.delattr(sentencepiece, "sentencepiece_model_pb2", raising=False)
    monkeypatch.setattr(runtime_version, "MAJOR", 0)
    with pytest.raises(ResourceError, match=r"^sentencepiece needs another protobuf: pip install -U protobuf"):
        parse_model(b"")
