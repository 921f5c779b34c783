"""Folders that conversions write, opened in transformers: text has the ids there that it has here."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from conftest import tiny_model, write_adapter
from delta_files import delta_of, folder_of, state_of
from gguf_files import write_gguf
from meta_files import write
from plain import Sizes, random_state, write_sentencepiece
from test_lit import SIZES as LIT_SIZES
from test_lit import lit_state
from tokenizer_files import in_transformers

from lit_llama.conversion import convert
from lit_llama.conversion.delta import apply
from lit_llama.conversion.delta_config import DeltaConfig
from lit_llama.conversion.merge import merge
from lit_llama.conversion.tokens import FILE
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.text.tokenizer.bounds import SentencePieces

TEXTS = (" Hello", "Hello", "  two", "a\n\n b", " ", "\n", "Zoë's naïve café", "北京 😀", "1 + 23 = 24")


def piece_keys(path: Path) -> dict[str, Any]:
    """The tokenizer "llama" of a GGUF file, as llama.cpp's converter writes it."""
    model = SentencePieces.decode(path.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.text for piece in model.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
        "tokenizer.ggml.token_type": [int(piece.kind) for piece in model.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def from_meta(home: Path) -> None:
    sizes = Sizes()
    convert(write(home / "meta", random_state(sizes), sizes, write_sentencepiece(home)), home / "made")


def from_lit(home: Path) -> None:
    write_sentencepiece(home)
    torch.save(lit_state(random_state(LIT_SIZES)), home / "lit-llama.pth")
    convert(home / "lit-llama.pth", home / "made", rms_norm_eps=1e-5)


def from_gguf(home: Path, **changed: Any) -> None:
    pieces, keep = piece_keys(write_sentencepiece(home)) | changed, tiny_model()
    folder = folder_of(home / "hf", state_of(0, 384))

    def change(keys: dict[str, Any]) -> None:
        for key in [key for key in keys if key.startswith("tokenizer.")]:
            del keys[key]
        keys.update(pieces)

    convert(write_gguf(home / "model.gguf", keep, folder, change_keys=change), home / "made")


def from_gguf_without_prefix(home: Path) -> None:
    from_gguf(home, **{"tokenizer.ggml.add_space_prefix": False})


def from_delta(home: Path) -> None:
    base = folder_of(home / "base", state_of(0, 384), tokenizer=False)
    delta = folder_of(home / "delta", delta_of("add"), tokenizer=False)
    write_sentencepiece(delta)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (delta / "tokenizer_config.json").write_text(json.dumps(settings))
    apply(base, delta, home / "made", DeltaConfig(policy="add"))


def from_bin(home: Path) -> None:
    """An old folder of Hugging Face's, whose only vocabulary is the tokenizer.model."""
    folder = folder_of(home / "hf", state_of(0, 384), tokenizer=False)
    torch.save(state_of(0, 384), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    write_sentencepiece(folder)
    convert(folder, home / "made")


def from_merge(home: Path) -> None:
    from_bin(home)
    for name in ("tokenizer.json", "SHA256SUMS"):
        (home / "made" / name).unlink()
    (home / "made").rename(home / "old")
    merge(write_adapter(home / "adapter", home / "old"), home / "made", dtype=None, precision="32-true")


SOURCES = [from_bin, from_merge, from_meta, from_lit, from_gguf, from_gguf_without_prefix, from_delta]


@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__)
def test_a_sentencepiece_folder_has_its_ids_in_transformers(tmp_path: Path, make: Any) -> None:
    """Catches a tokenizer class of transformers 5 that reads our tokenizer.json by rules of its own: ' Hello' lost its
    first space there, so that what was trained was never asked."""
    make(tmp_path)
    made = tmp_path / "made"
    original = sentencepiece.SentencePieceProcessor(model_file=str(made / FILE))
    theirs, ours = in_transformers(made), Tokenizer.from_path(made)
    assert (made / "tokenizer.json").is_file(), "most programs read nothing else"
    for text in TEXTS:
        assert theirs(text)["input_ids"] == [1, *original.encode(text)], text
        assert ours.encode(text) == original.encode(text), text
        assert theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True) == text
    assert (theirs.bos_token, theirs.eos_token) == (ours.bos, ours.eos) == ("<s>", "</s>")


def test_a_folder_that_begins_no_text_begins_none_in_transformers(tmp_path: Path) -> None:
    """Catches a beginning that a completed tokenizer.json adds though the settings say that there is none."""
    folder = folder_of(tmp_path / "hf", state_of(0, 384), tokenizer=False)
    write_sentencepiece(folder)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}')
    convert(folder, tmp_path / "made", resize_vocab=400)
    theirs, ours = in_transformers(tmp_path / "made"), Tokenizer.from_path(tmp_path / "made")
    assert all(theirs(text)["input_ids"] == ours.encode(text) for text in TEXTS) and ours.bos == ""
    assert (theirs.bos_token, theirs.eos_token) == ("<s>", "</s>")


def test_a_folder_of_ours_is_saved_again_by_transformers_without_a_change(tmp_path: Path) -> None:
    """Catches settings that hold only until somebody saves the tokenizer once."""
    from_meta(tmp_path)
    theirs = in_transformers(tmp_path / "made")
    theirs.save_pretrained(tmp_path / "again")
    again = in_transformers(tmp_path / "again")
    assert [again(text)["input_ids"] for text in TEXTS] == [theirs(text)["input_ids"] for text in TEXTS]
