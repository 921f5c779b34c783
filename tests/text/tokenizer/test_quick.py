"""The quick ways of encoding against the plain ones, and when they have to stand back."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from conftest import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import mixed_texts
from tokenizer_files import byte_level as write_byte_level
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from lit_llama.errors import DataError
from lit_llama.text.tokenizer import quick as module
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.quick import _CL100K, ByteLevel, Words, byte_level, merges_by_id, splits_at_spaces
from lit_llama.text.tokenizer.special import Place, without_prefix

CUTS: dict[str, Callable[[], Any]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digit by digit": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama 3": lambda: split(_CL100K),
    "qwen 2": lambda: split(_CL100K.replace("{1,3}", "")),
}
AWKWARD = [
    "a  b",
    "a   1 23  4567",
    "\r\n\r\n \n x",
    "it's IT'S 'Sx 'ſ",
    "  ",
    " ",
    "a\u2003 b\u00a0c",
    "\u0085x",
    "½②٣ ４",
    "aaaa" * 9,
]


def split(pattern: str) -> Any:
    """A regular expression, then bytes."""
    cut = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def trained(cut: Callable[[], Any]) -> dict[str, Any]:
    """tokenizer.json of a byte-level vocabulary."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = cut(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*CORPUS, *AWKWARD * 20, "-------- \n\n\n\n        x" * 30], trainer)
    raw: dict[str, Any] = json.loads(backend.to_str())
    return raw


def with_all_merges(raw: dict[str, Any]) -> dict[str, Any]:
    """The same vocabulary as Llama 3's is written: every pair that makes a token is listed, by the token's id."""
    vocabulary = raw["model"]["vocab"]
    pairs = [
        (vocabulary[token], vocabulary[token[:cut]], vocabulary[token[cut:]], [token[:cut], token[cut:]])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return raw | {"model": raw["model"] | {"merges": [pair for *_, pair in sorted(pairs)], "ignore_merges": True}}


def same(quick: ByteLevel, backend: Backend, texts: list[str]) -> None:
    """Every text comes to the same ids both ways."""
    wanted = [each.ids for each in backend.encode_batch(texts, add_special_tokens=False)]
    found = quick.encode(texts)
    assert found is not None
    ids, lengths = found
    assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted


@pytest.mark.parametrize("written", [dict, with_all_merges])
@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_ids_are_those_of_tokenizers(cut: str, written: Callable[[Any], dict[str, Any]]) -> None:
    """Catches a border of words, or a merge, that the other package sets elsewhere."""
    raw = written(trained(CUTS[cut]))
    backend = Backend.from_str(json.dumps(raw))
    quick = byte_level(raw, backend)
    assert quick is not None
    same(quick, backend, [*AWKWARD, *mixed_texts(1500), *CORPUS, "", ""])

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.text(max_size=30), min_size=1, max_size=5))
    def any_text(texts: list[str]) -> None:
        if "\ufdd0" not in "".join(texts):
            same(quick, backend, texts)

    any_text()


def test_what_is_not_proven_goes_the_plain_way() -> None:
    """Catches a vocabulary whose ids say nothing of its merges, an unknown cut, and a byte without a token."""
    raw = trained(CUTS["gpt-2"])
    model = raw["model"]
    backend = Backend.from_str(json.dumps(raw))
    shuffled = model | {"merges": random.Random(0).sample(model["merges"], len(model["merges"]))}
    fewer = model | {"merges": [pair for pair in model["merges"] if pair != model["merges"][40]]}
    for other in (
        {"model": shuffled},
        {"model": fewer},
        {"model": model | {"byte_fallback": True}},
        {"model": model | {"unk_token": "a"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
    ):
        changed = {**raw, **other}
        assert byte_level(changed, Backend.from_str(json.dumps(changed))) is None, other
    assert byte_level(raw, backend) is not None and byte_level({**raw, "normalizer": {"type": "NFC"}}, backend)


ODD = {
    "listed from the left": (True, "a b ab ba aba", ["a b", "b a", "ab a", "a ba"]),
    "a pair that makes no token": (False, "a b", ["a b"]),
    "a half that is no token": (False, "a b ab abc", ["a b", "ab c"]),
    "by no order of ids": (False, "a b ba ab", ["a b", "b a"]),
    "x y x, from the right": (False, "a b c ab bc ca abca abc cab", ["a b", "b c", "c a", "ab ca", "a bca", "ab c"]),
    "a run of one": (True, "a aa aaa aaaa", ["a a", "a aa", "aa a", "a aaa", "aa aa", "aaa a"]),
    "merged on at once": (False, "a b c abca ab bc abc", ["abc a", "a b", "b c", "a bc", "ab c"]),
}


@pytest.mark.parametrize("case", ODD)
def test_merges_whose_order_matters_are_seen(case: str) -> None:
    """Catches a vocabulary that one package merges as it is listed and the other from the left."""
    holds, tokens, merges = ODD[case]
    vocabulary = {token: index for index, token in enumerate(tokens.split())}
    assert merges_by_id({"model": {"vocab": vocabulary, "merges": merges}}, []) is holds


def test_texts_that_are_not_composed_and_characters_without_tokens_stand_back() -> None:
    """Catches a normaliser left out, and a byte that is dropped by one package and an error in the other."""
    raw = trained(CUTS["qwen 2"]) | {"normalizer": {"type": "NFC"}}
    backend = Backend.from_str(json.dumps(raw))
    quick = byte_level(raw, backend)
    assert quick is not None and quick.encode(["e\u0301"]) is None and quick.encode(["a \ufdd0\ufdd0 b"]) is None
    same(quick, backend, ["é", "é 1"])
    with pytest.raises(UnicodeEncodeError):
        quick.encode(["\ud800"])
    model = raw["model"]
    vocabulary = {token: index for token, index in model["vocab"].items() if token != "\u0104"}  # stands for byte 4
    lacking = {**raw, "normalizer": None, "model": model | {"vocab": vocabulary}}
    fewer = byte_level(lacking, Backend.from_str(json.dumps(lacking)))
    assert fewer is not None and fewer.encode(["a\x04b"]) is None and fewer.encode(["a\x05b"]) is not None


@pytest.mark.parametrize("name", ["trained_model", "llama_tokenizer"])
def test_words_are_those_of_sentencepiece(name: str, request: pytest.FixtureRequest) -> None:
    """Catches a space that is lost or doubled."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(request.getfixturevalue(name)))
    assert splits_at_spaces(model)
    plain = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(model.serialized_model_proto()))
    quick = Words(model, plain)

    def compare(texts: list[str]) -> None:
        for blank, wanted in ((True, model.encode(texts)), (False, plain.encode(texts))):
            ids, lengths = quick.encode(texts, blank=blank)
            assert [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] == wanted

    compare([*AWKWARD, *mixed_texts(2000), *CORPUS, "", " ", "▁", " ▁▁a▁ b", "a ", " a", "a  ", "", "\0"])
    any_text = st.lists(st.text(st.sampled_from("ab ▁\n1é北😀"), max_size=20), min_size=1, max_size=6)
    settings(max_examples=200, deadline=None)(given(any_text)(compare))()


def test_the_book_of_words_stays_small(llama_tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the data, and ids of words that were forgotten."""
    monkeypatch.setattr(module, "_REMEMBERED", 500)
    model = sentencepiece.SentencePieceProcessor(model_file=str(llama_tokenizer))
    quick = Words(model, model)
    for start in range(0, 600, 20):
        texts = mixed_texts(20, seed=start)
        ids, _ = quick.encode(texts)
        assert ids.tolist() == [i for each in model.encode(texts) for i in each]
    assert len(quick._number) < 600


def test_flat_ids_are_the_same_before_and_after_the_quick_way_opens(
    tiny_folder: Path, trained_model: Path, beside: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches a data folder whose first rows are encoded otherwise than its last ones: an added word in letters, or a
    blank in the middle of a text."""
    size = sentencepiece.SentencePieceProcessor(model_file=str(trained_model)).vocab_size()
    with_words = beside(tokenizer_config={"added_tokens_decoder": {str(size): {"content": "<SQL>", "special": False}}})
    write_byte_level(tmp_path, ["<s>", "</s>"], "<s>", "</s>", ["<SQL>"])
    for path in (tiny_folder, with_words, tmp_path):
        tokenizer = Tokenizer.from_path(path)
        texts = [text + "<SQL> 1" * (number % 9 == 0) for number, text in enumerate(mixed_texts(2500))]
        places = [Place(number % 3) for number in range(len(texts))]
        by_place = {place: iter(tokenizer.encode_batch(texts[place::3], place)) for place in Place}
        wanted = [i for place in places for i in next(by_place[place])]
        for _ in range(5):
            ids, lengths = tokenizer.encode_flat(texts, places)
            assert ids.tolist() == wanted and lengths.sum() == len(wanted) and len(lengths) == len(texts)
        assert tokenizer._quick is not None
        with pytest.raises(DataError, match="lone surrogate"):
            tokenizer.encode_flat(["fine", "\ud800"])


@pytest.mark.real
def test_the_base_of_the_demo_takes_the_quick_way(real_folder: Path, alpaca_file: Path) -> None:
    """Catches a condition that no published tokenizer meets."""
    tokenizer = Tokenizer.from_path(real_folder)
    assert isinstance(tokenizer._quick, ByteLevel)
    texts = [text for row in json.loads(alpaca_file.read_bytes()) for text in (row["instruction"], row["output"])]
    ids, _ = tokenizer.encode_flat(texts * 3)
    assert ids.tolist() == [i for ids in tokenizer.encode_batch(texts * 3) for i in ids]
