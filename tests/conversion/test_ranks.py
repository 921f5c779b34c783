"""A tokenizer.json in the style of Llama 2, made from the original by the rule of transformers."""

import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from lit_llama.conversion.gguf.tokenizer import from_ranks
from lit_llama.errors import CheckpointError
from lit_llama.text.tokenizer.bounds import SentencePieces
from lit_llama.text.tokenizer.kinds import SentencePieceTokenizer


@pytest.fixture(scope="module")
def llama2(llama_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pairs that make a piece, the best-scored piece first, among those of one piece the lowest ids first."""
    pieces = SentencePieces.decode(llama_tokenizer.read_bytes()).pieces
    vocabulary = {piece.text: index for index, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        halves = [(piece.text[:at], piece.text[at:]) for at in range(1, len(piece.text))]
        pairs = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        merges += [(piece.score, pair) for pair in sorted(pairs, key=lambda pair: [vocabulary[half] for half in pair])]
    merges.sort(key=lambda merge: -merge[0])
    model = models.BPE(vocabulary, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>")])
    folder = tmp_path_factory.mktemp("llama2")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def changed(llama2: Path, tmp_path: Path) -> Callable[[Callable[[dict[str, Any]], Any]], Path]:
    """The same with a change."""

    def change(how: Callable[[dict[str, Any]], Any]) -> Path:
        raw = json.loads((llama2 / "tokenizer.json").read_text())
        how(raw)
        (tmp_path / "tokenizer_config.json").write_bytes((llama2 / "tokenizer_config.json").read_bytes())
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        return tmp_path / "tokenizer.json"

    return change


def test_scores_made_from_ranks_encode_as_the_original(
    llama2: Path, llama_tokenizer: Path, alpaca_file: Path, tmp_path: Path
) -> None:
    """Compared with the original's own scores on 3000 strings; catches ranks that are off by a piece."""
    made = from_ranks(llama2 / "tokenizer.json")
    (tmp_path / "tokenizer.model").write_bytes(made.encode())
    ours, theirs = SentencePieceTokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer(llama_tokenizer)
    rows = json.loads(alpaca_file.read_text("utf-8"))
    texts = list(itertools.chain.from_iterable((row["instruction"], row["input"], row["output"]) for row in rows))
    assert ours.encode_batch(texts) == theirs.encode_batch(texts)
    assert made.special == {"unk": 0, "bos": 1, "eos": 2} and made.dummy_prefix


def test_a_tokenizer_without_a_first_space_is_found_out(
    changed: Callable[[Callable[[dict[str, Any]], Any]], Path],
) -> None:
    """Catches a space before every text of a model that never saw one."""

    def no_prefix(raw: dict[str, Any]) -> None:
        raw["normalizer"] = json.loads(Tokenizer.from_str(json.dumps(raw)).to_str())["normalizer"]["normalizers"][1]

    assert not from_ranks(changed(no_prefix)).dummy_prefix


DIFFERENT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a merge that is missing": (lambda raw: raw["model"]["merges"].pop(100), "does not merge every pair"),
    "merges in no order": (lambda raw: random.Random(0).shuffle(raw["model"]["merges"]), "in no order of pieces"),
    "no bytes": (lambda raw: raw["model"].update(byte_fallback=False), "has no form in GGUF"),
    "chance": (lambda raw: raw["model"].update(dropout=0.1), "has no form in GGUF"),
    "words cut first": (
        lambda raw: raw.update(pre_tokenizer=json.loads(pre_tokenizers.Digits(individual_digits=True).__getstate__())),
        "encodes otherwise",
    ),
    "a space only where none is": (
        lambda raw: raw.update(
            normalizer=None,
            pre_tokenizer={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
        ),
        "encodes otherwise",
    ),
}


@pytest.mark.parametrize(("change", "message"), DIFFERENT.values(), ids=DIFFERENT)
def test_what_cannot_be_proven_asks_for_the_model(
    changed: Callable[[Callable[[dict[str, Any]], Any]], Path], change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    """Catches a file whose reader cuts text in another way than the model was trained with."""
    with pytest.raises(CheckpointError, match=message) as caught:
        from_ranks(changed(change))
    assert "tokenizer.model" in str(caught.value)
