"""tokenizer.model written by hand, against the original one and sentencepiece itself."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lit_llama.conversion.listed import from_metadata, padding
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import Kind, Piece, SentencePieces
from lit_llama.text.tokenizer.kinds import SentencePieceTokenizer

ODD = [
    "",
    " ",
    "  ",
    " a",
    "a ",
    "\n",
    "\r\n",
    "\t",
    "\x00",
    "</s>",
    "<s>",
    "<unk>",
    "▁",
    "[PAD3]",
    "<0x41>",
    "\ufeff",
    "😀👩‍👩‍👧",
]
ODD += [
    "e\u0301",
    "你好",
    "ﬁ",
    "１２",
    "a" * 200,
    " " * 63,
    "\u00a0",
    "don't",
    "1234567890",
    "def f(x):\n    return x\n",
]


@pytest.fixture(scope="module")
def original(llama_tokenizer: Path) -> SentencePieces:
    return SentencePieces.decode(llama_tokenizer.read_bytes())


@pytest.fixture(scope="module")
def metadata(original: SentencePieces) -> dict[str, Any]:
    """The tokenizer as llama.cpp's converter puts it into a file."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in original.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in original.pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in original.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def opened(model: SentencePieces, folder: Path) -> SentencePieceTokenizer:
    path = folder / "tokenizer.model"
    path.write_bytes(model.encode())
    return SentencePieceTokenizer(path)


def texts(alpaca_file: Path) -> list[str]:
    """3000 strings: instructions, inputs and answers."""
    rows = json.loads(alpaca_file.read_text("utf-8"))
    return ODD + list(itertools.chain.from_iterable((row["instruction"], row["input"], row["output"]) for row in rows))


def test_the_original_is_read_as_sentencepiece_reads_it(original: SentencePieces, llama_tokenizer: Path) -> None:
    """Catches a field of the protobuf that is taken for another."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer))
    assert len(original.pieces) == model.vocab_size() == 32000
    checks = {
        Kind.UNKNOWN: model.is_unknown,
        Kind.CONTROL: model.is_control,
        Kind.UNUSED: model.is_unused,
        Kind.BYTE: model.is_byte,
    }
    for index, piece in enumerate(original.pieces):
        assert (piece.text, piece.score) == (model.id_to_piece(index), model.get_score(index))
        assert all((piece.kind == kind) == check(index) for kind, check in checks.items())
    assert original.special == {"unk": 0, "bos": 1, "eos": 2} and original.dummy_prefix


def test_what_is_written_encodes_as_the_original(
    metadata: dict[str, Any], llama_tokenizer: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    """Through the metadata of a GGUF file; catches a lost score, another normalisation, a missing first space."""
    ours, theirs = opened(from_metadata(metadata), tmp_path), SentencePieceTokenizer(llama_tokenizer)
    strings = texts(alpaca_file)
    assert len(strings) > 3000
    wanted = theirs.encode_batch(strings)
    assert ours.encode_batch(strings) == wanted
    assert [ours.decode(ids) for ids in wanted] == [theirs.decode(ids) for ids in wanted]
    assert ours.fingerprint() == theirs.fingerprint()
    assert (ours.control, ours.bos, ours.eos) == (theirs.control, "<s>", "</s>")


def test_the_bytes_are_those_of_a_protobuf() -> None:
    """Worked out by hand; catches a reader and a writer that err together."""
    model = SentencePieces([Piece("a", 0.5, Kind.NORMAL)], {"unk": 0})
    trainer = b"\x18\x02\x20\x01\x98\x02\x00\xc0\x02\x00"  # BPE, 1 piece, no bytes, unk_id 0
    trainer += b"".join(bytes([tag, 0x02]) + b"\xff" * 9 + b"\x01" for tag in (0xC8, 0xD0, 0xD8))  # no bos, eos, pad
    trainer += b"\xea\x02\x01a"  # unk_piece a
    normalizer = b"\x0a\x08identity\x18\x01\x20\x00\x28\x01"
    wanted = b"\x0a\x0a\x0a\x01a\x15\x00\x00\x00\x3f\x18\x01"
    wanted += b"\x12" + bytes([len(trainer)]) + trainer + b"\x1a" + bytes([len(normalizer)]) + normalizer
    assert model.encode() == wanted
    assert SentencePieces.decode(wanted) == model


def test_added_tokens_keep_their_ids_and_kinds(metadata: dict[str, Any], tmp_path: Path) -> None:
    """Catches a control token that text can spell, a user's token that text cannot, and padding taken for tokens."""
    extra = [("<|im_end|>", 3), ("<think>  x", 4), (padding(32002), 5), (padding(32003), 5)]
    changed = metadata | {
        "tokenizer.ggml.tokens": metadata["tokenizer.ggml.tokens"] + [text for text, _ in extra],
        "tokenizer.ggml.scores": metadata["tokenizer.ggml.scores"] + [-1000.0] * 4,
        "tokenizer.ggml.token_type": metadata["tokenizer.ggml.token_type"] + [kind for _, kind in extra],
        "tokenizer.ggml.eos_token_id": 32000,
    }
    tokenizer = opened(from_metadata(changed), tmp_path)
    assert tokenizer.size == 32002 and tokenizer.eos == "<|im_end|>" and tokenizer.eos_id == 32000
    assert 32000 not in tokenizer.encode("a <|im_end|>")
    assert tokenizer.encode("a<think>  xb")[-2:] == [32001, metadata["tokenizer.ggml.tokens"].index("b")]
    assert tokenizer.decode([32001]).strip() == "<think>  x"


@pytest.mark.parametrize("prefix", [True, False])
def test_the_first_space_is_as_the_file_says(metadata: dict[str, Any], tmp_path: Path, prefix: bool) -> None:
    """Catches a model of which every first word is another token."""
    changed = metadata | {"tokenizer.ggml.add_space_prefix": prefix}
    tokenizer = opened(from_metadata(changed), tmp_path)
    assert tokenizer.encode("Hello") == ([15043] if prefix else [10994])
    assert SentencePieces.decode((tmp_path / "tokenizer.model").read_bytes()).dummy_prefix is prefix


def test_control_tokens_are_known_whatever_their_type(metadata: dict[str, Any], tmp_path: Path) -> None:
    """Catches files in which <unk> is a control token, as of llama.cpp, or </s> a plain one."""
    types = list(metadata["tokenizer.ggml.token_type"])
    types[:3] = 3, 3, 1
    tokenizer = opened(from_metadata(metadata | {"tokenizer.ggml.token_type": types}), tmp_path)
    assert tokenizer.control == {"<s>": 1, "</s>": 2} and tokenizer.encode("</s>") != [2]


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "scores": ({"tokenizer.ggml.scores": [0.0]}, r"tokenizer\.ggml\.scores has 1 entries"),
    "no scores": ({"tokenizer.ggml.scores": None}, r"the metadata has no tokenizer\.ggml\.scores"),
    "types": ({"tokenizer.ggml.token_type": [1]}, r"tokenizer\.ggml\.token_type has 1 entries"),
    "no types": ({"tokenizer.ggml.token_type": None}, r"the metadata has no tokenizer\.ggml\.token_type"),
    "end": ({"tokenizer.ggml.eos_token_id": 32000}, r"eos_token_id is 32000, but there are 32000 tokens"),
    "padding": ({"tokenizer.ggml.padding_token_id": 32000}, r"padding_token_id is 32000"),
    "twice": ({"tokenizer.ggml.tokens": ["a"] * 32000}, "the same token twice: 0 and 1 are 'a'"),
    "empty": ({"tokenizer.ggml.tokens": [""] * 32000}, r"tokenizer\.ggml\.tokens: token 0 is empty"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, r"tokenizer\.ggml\.tokens is empty"),
    "numbers": ({"tokenizer.ggml.tokens": [1] * 32000}, r"tokenizer\.ggml\.tokens is no list of texts"),
    "score": ({"tokenizer.ggml.scores": [float("nan")] * 32000}, r"scores: token 0 has the score nan"),
    "type": ({"tokenizer.ggml.token_type": [9] * 32000}, r"token_type: token 0 is of type 9"),
    "unknown": ({"tokenizer.ggml.token_type": [2] * 32000}, "more than one unknown token"),
}


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=BROKEN)
def test_a_vocabulary_that_contradicts_itself_is_refused(
    metadata: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    """Catches a tokenizer.model that sentencepiece refuses, or reads as something else."""
    with pytest.raises(CheckpointError, match=message):
        from_metadata(metadata | changes)


def test_models_of_another_kind_are_refused(llama_tokenizer: Path) -> None:
    """Catches a unigram model, or one that changes text, in a file whose reader merges the text as it is."""
    data = llama_tokenizer.read_bytes()
    for field, message in (
        (b"\x12\x02\x18\x01", "does not merge pieces by score"),  # model_type UNIGRAM; the last one counts
        (b"\x1a\x03\x12\x01x", "changes text before it is cut"),  # a table of characters
        (b"\x1a\x02\x20\x01", "changes text before it is cut"),  # spaces are removed
        (b"\x0a\xff\xff\x03", "is not a sentencepiece model"),  # longer than the file
        (b"\xff" * 11, "is not a sentencepiece model"),
    ):
        with pytest.raises(CheckpointError, match=message):
            SentencePieces.decode(data + field)
