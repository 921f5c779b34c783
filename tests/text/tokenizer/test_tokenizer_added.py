"""A tokenizer.model with tokens added beside it, against transformers' tokenizers for sentencepiece models."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.kinds import HubTokenizer, SentencePieceTokenizer
from lit_llama.text.tokenizer.special import Place
from lit_llama.text.tokenizer.stream import Streamer

Beside = Callable[..., Path]
TEXTS = ["Hello.", "the order as JSON", " two  blanks", "naïve café, 北京 😀", "", "### Response:"]


def pieces(model: Path) -> int:
    size: int = sentencepiece.SentencePieceProcessor(model_file=str(model)).vocab_size()
    return size


def added(spelling: str, special: bool = True) -> dict[str, object]:
    """An entry of added_tokens_decoder."""
    return {"content": spelling, "special": special, "lstrip": False, "rstrip": False, "normalized": False}


def circulated(size: int) -> dict[str, dict[str, Any]]:
    """The JSON files of folders as they are passed around."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {str(size): added("<tool>"), str(size + 1): added("<t>", special=False)}
    own = {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>")}
    return {
        "ziya": {"added_tokens": {"<human>": size, "<bot>": size + 1}, "special_tokens_map": roles},
        "vicuna v0": {
            "added_tokens": {"[PAD]": size},
            "special_tokens_map": roles | {"pad_token": "[PAD]"},
        },
        "llama 2": {"tokenizer_config": {"added_tokens_decoder": own, **roles}},
        "later transformers": {
            "tokenizer_config": {"added_tokens_decoder": own | more, "additional_special_tokens": ["<tool>"]} | roles,
            "added_tokens": {"<tool>": size, "<t>": size + 1},
        },
    }  # fmt: skip


NAMES = list(circulated(0))


@pytest.mark.parametrize("name", NAMES)
def test_added_tokens_equal_those_of_transformers(name: str, beside: Beside, trained_model: Path) -> None:
    """Catches an id of its own for an added token, one that is not found in a template, and a wrong size."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    folder = beside(**circulated(pieces(trained_model))[name])
    theirs, ours = SentencePieceBackend.from_pretrained(folder), Tokenizer.from_path(folder)
    assert ours.size == len(theirs) and not ours.remarks
    assert (ours.bos, ours.eos) == ("<s>", "</s>")
    for token, token_id in theirs.added_tokens_encoder.items():
        if token != "<unk>" or name in ("llama 2", "later transformers"):
            assert ours.added[token] == token_id
        for text in TEXTS:  # theirs parses the token and encodes what stands beside it apart
            wanted = theirs(f"{text}{token}{text}", add_special_tokens=False)["input_ids"]
            assert [*ours.encode(text), token_id, *ours.encode(text)] == wanted
            shown, same = ours.decode(wanted), theirs.decode(wanted, skip_special_tokens=True)
            if token != "<unk>" and "<0x" not in same:  # theirs shows bytes, and blanks around a token
                assert shown.replace(" ", "") == same.replace(" ", "")


@pytest.mark.parametrize("name", NAMES)
def test_what_somebody_typed_never_becomes_an_added_token(name: str, beside: Beside, trained_model: Path) -> None:
    """Catches a user who speaks as the bot by typing <bot>."""
    ours = Tokenizer.from_path(beside(**circulated(pieces(trained_model))[name]))
    for token in ours.control:
        for text in (token, f"a{token}b", f" {token} ", f"{token}{token}", f"\n{token}:"):
            assert not set(ours.encode(text)) & set(ours.control.values())
            assert ours.decode(ours.encode(text)) == text


def test_a_special_token_among_the_pieces_is_no_word(beside: Beside, trained_model: Path) -> None:
    """Catches Code Llama's ▁<PRE>, which stands among the pieces and which ordinary text reaches."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(trained_model))
    word = model.encode("instruction")[-1]
    spelling = model.id_to_piece(word)
    for special in (True, False):
        ours = Tokenizer.from_path(
            beside(tokenizer_config={"added_tokens_decoder": {str(word): added(spelling, special)}})
        )
        assert (spelling in ours.control) == special
        assert (word in ours.encode("instruction")) != special
        assert ours.decode(ours.encode("instruction")) == "instruction"
        assert (ours.decode([word]) == "") == special
        assert ours.size == model.vocab_size()


def test_special_tokens_are_not_shown_and_others_are(beside: Beside, trained_model: Path) -> None:
    """Catches [PAD] in an answer, and <human> hidden although the folder calls it text."""
    size = pieces(trained_model)
    ours = Tokenizer.from_path(
        beside(added_tokens={"[PAD]": size, "<human>": size + 1}, special_tokens_map={"pad_token": "[PAD]"})
    )
    a = ours.encode("a b")
    assert ours.decode([size, *a, size, *a, 2, size]) == "a b a b"
    assert ours.decode([size + 1, *a, size + 1, *a]) == "<human>a b<human>a b"
    assert ours.pad == "[PAD]"


def test_streamed_text_equals_the_text_decoded_at_once(beside: Beside, trained_model: Path) -> None:
    """Catches blanks lost or doubled beside an added token, and halves of characters before one."""
    size = pieces(trained_model)
    ours = Tokenizer.from_path(
        beside(added_tokens={"[PAD]": size, "<bot>": size + 2}, special_tokens_map={"pad_token": "[PAD]"})
    )
    draw, odd = random.Random(0), [0, 1, 2, size, size + 1, size + 2, *ours.encode(" \n 😀é")] * 8
    for _ in range(1500):
        ids = draw.choices([*range(3, size), *odd], k=draw.randrange(24))
        streamer = Streamer(ours)
        assert "".join(streamer.push([i]) for i in ids) + streamer.flush() == ours.decode(ids), ids


def test_ids_that_stand_for_nothing_are_named(beside: Beside, trained_model: Path) -> None:
    """Catches Ziya's added_tokens.json beside the base's tokenizer.model, whose middle is missing."""
    size = pieces(trained_model)
    ours = Tokenizer.from_path(beside(added_tokens={"<human>": size + 8, "<bot>": size + 9}))
    [remark] = ours.remarks
    assert f"it has {size} pieces, and 8 ids between {size} and {size + 7} stand for no token" in remark
    assert ours.size == size + 10 and ours.vocabulary[size:] == [None] * 8 + ["<human>", "<bot>"]
    assert ours.decode([size + 3]) == f"<unused {size + 3}>"


@pytest.mark.parametrize(
    ("spelling", "offset", "message"),
    [("<new>", -1, "clashes with the piece '"), ("<s>", 0, "clashes with the piece with id 1"), ("▁", -5, "clashes")],
)
def test_an_added_token_in_the_way_of_a_piece(
    spelling: str, offset: int, message: str, beside: Beside, trained_model: Path
) -> None:
    """Catches files of two models: the embedding of another token would be used."""
    folder = beside(added_tokens={spelling: pieces(trained_model) + offset})
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_path(folder)


@pytest.mark.parametrize(
    ("files", "bos", "eos", "pad", "remarks"),
    [
        ({}, "<s>", "</s>", "", 0),
        ({"tokenizer_config": {"bos_token": None, "eos_token": None}}, "<s>", "</s>", "", 0),
        ({"tokenizer_config": {"eos_token": {"content": "<end>"}}}, "<s>", "<end>", "", 0),
        ({"special_tokens_map": {"eos_token": "<end>", "pad_token": "<end>"}}, "<s>", "<end>", "<end>", 0),
        (
            {"tokenizer_config": {"eos_token": "</s>"}, "special_tokens_map": {"eos_token": "<end>"}},
            "<s>",
            "</s>",
            "",
            0,
        ),
        ({"special_tokens_map": {"bos_token": "</s>", "eos_token": "</s>"}}, "</s>", "</s>", "", 0),  # Alpaca's
        ({"tokenizer_config": {"add_bos_token": False}}, "", "</s>", "", 0),
        ({"tokenizer_config": {"add_bos_token": True, "pad_token": ""}}, "<s>", "</s>", "", 0),
        ({"tokenizer_config": {"bos_token": "", "eos_token": "", "unk_token": ""}}, "<s>", "</s>", "", 2),
        ({"tokenizer_config": {"bos_token": ""}, "special_tokens_map": {"bos_token": "<s>"}}, "<s>", "</s>", "", 1),
        ({"tokenizer_config": {"eos_token": "<nobody>", "pad_token": "<nobody>"}}, "<s>", "</s>", "", 1),
        ({"tokenizer_config": {"eos_token": "the"}}, "<s>", "</s>", "", 1),
        ({"tokenizer_config": {"eos_token": "<unk>", "bos_token": 7}}, "<s>", "</s>", "", 2),
    ],
)
def test_beginning_and_end_as_the_files_name_them(
    files: dict[str, Any], bos: str, eos: str, pad: str, remarks: int, beside: Beside, trained_model: Path
) -> None:
    """Catches empty names (decapoda's LLaMA) that take away beginning and end, and a named end that is not used."""
    ours = Tokenizer.from_path(beside(**{"added_tokens": {"<end>": pieces(trained_model)}} | files))
    assert (ours.bos, ours.eos, ours.pad, len(ours.remarks)) == (bos, eos, pad, remarks)
    assert all(".json: " in remark and "no control token; taking '<" in remark for remark in ours.remarks)


def test_a_tokenizer_json_is_used_where_there_are_both(beside: Beside, tiny_folder: Path) -> None:
    """Catches added tokens of one file on the pieces of the other."""
    folder = beside(added_tokens={"<human>": 9999}, tokenizer_config={"eos_token": "<|im_end|>"})
    (folder / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    ours = Tokenizer.from_path(folder)
    assert isinstance(ours, HubTokenizer) and ours.size == 384


def test_both_containers_of_one_vocabulary_have_one_fingerprint(
    beside: Beside, llama_tokenizer: Path, tmp_path: Path
) -> None:
    """Catches a model refused because its tokenizer was saved again as tokenizer.json, and other ids from it."""
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    vocabulary, _, merges = SentencePieceExtractor(str(llama_tokenizer)).extract()
    fast = LlamaTokenizer(vocab=vocabulary, merges=merges, legacy=True, add_bos_token=True)
    fast.add_tokens(["<human>", "<bot>"], special_tokens=True)
    fast.save_pretrained(tmp_path / "fast")
    theirs = Tokenizer.from_path(tmp_path / "fast")
    ours = Tokenizer.from_path(beside(llama_tokenizer, added_tokens={"<human>": 32000, "<bot>": 32001}))
    assert isinstance(theirs, HubTokenizer) and isinstance(ours, SentencePieceTokenizer)
    assert ours.fingerprint() == theirs.fingerprint() and ours.size == theirs.size == 32002
    assert ours.spaced and theirs.spaced and (ours.bos, ours.eos) == (theirs.bos, theirs.eos)
    texts = [text for text in TEXTS if not text.startswith(" ")]  # theirs puts no space before a space
    assert ours.encode_batch(texts) == theirs.encode_batch(texts)
    assert Tokenizer.from_path(beside(llama_tokenizer, added_tokens={})).fingerprint() != ours.fingerprint()


def test_which_tokenizers_put_a_space_in_front(tiny_folder: Path, trained_model: Path) -> None:
    """Catches a byte-level tokenizer whose answers would lose the space that a template puts before them."""
    assert Tokenizer.from_path(trained_model).spaced and not Tokenizer.from_path(tiny_folder).spaced


@pytest.mark.parametrize("legacy", [True, False])
def test_words_and_blanks_equal_those_of_transformers(legacy: bool, beside: Beside, trained_model: Path) -> None:
    """Catches an added word in letters, and a blank behind one, or behind a control token, that is not to be there."""
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    size = pieces(trained_model)
    words = {str(size): added("<SQL>", special=False), str(size + 1): added("<sep>")}
    words[str(size + 2)] = {**added("<trim>", special=False), "lstrip": True, "rstrip": True}
    folder = beside(tokenizer_config={"added_tokens_decoder": words, "unk_token": "<unk>", "legacy": legacy})
    theirs, ours = SentencePieceBackend.from_pretrained(folder), Tokenizer.from_path(folder)
    texts = ["a<SQL>b", "<SQL>", "a <SQL> b<SQL>", "a <trim>  b", "<SQL><SQL> 1"]
    if legacy:
        assert ours.encode_batch(texts) == theirs(texts, add_special_tokens=False)["input_ids"]
    else:  # which their plain class cannot say: no blank but before the first word
        a, b = (ours.encode(text, Place.MORE) for text in ("a", "b"))
        assert ours.encode("a<SQL>b") == [*ours.encode("a"), size, *b]
        assert ours.encode(" a") == ours.encode("a") and ours.encode("a", Place.AFTER) == a != ours.encode("a")
    joint = sentencepiece.SentencePieceProcessor(model_file=str(trained_model)).encode("# Response: Hello. 1 2")
    assert ours.encode("# Response:") + ours.encode(" Hello. 1 2", Place.MORE) == joint
    assert size + 1 not in ours.encode("<sep>")
