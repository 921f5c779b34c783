"""An adapter folder with a tokenizer of its own, as PEFT's users save it after they added tokens."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
from conftest import write_adapter
from tokenizer_files import in_transformers

from lit_llama.conversion import convert
from lit_llama.conversion.merge import merge, merge_into_gguf
from lit_llama.errors import CheckpointError
from lit_llama.generate.llm import load
from lit_llama.text.tokenizer.base import Tokenizer

END = "<|done|>"


def extend(folder: Path, index: int) -> None:
    """Save the tokenizer with one token more, which ends texts."""
    tokenizer = in_transformers(folder)
    tokenizer.add_special_tokens({"eos_token": END})
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(END) == index


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    """A base with rows for a token that its own tokenizer does not know."""
    convert(tiny_folder, tmp_path / "base", resize_vocab=400)
    (tmp_path / "base" / "added_tokens.json").write_text("{}")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    adapter = write_adapter(tmp_path / "adapter", base, style=None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    extend(adapter, 384)
    return adapter


def test_the_adapters_tokenizer_is_used_in_generation(
    base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a trained token that is never drawn or encoded, and answers that do not end."""
    llm = load(adapter)
    theirs = in_transformers(adapter)
    assert llm.tokenizer.size == 385 and llm.tokenizer.eos == theirs.eos_token == END
    assert llm.stop_ids >= {384, 2}, "where the adapter ends, and where its base does"
    assert "its own tokenizer is used (385 tokens" in capsys.readouterr().err
    assert load(base).tokenizer.size == 384


def test_a_merged_folder_and_a_gguf_file_have_the_adapters_tokenizer(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Catches a merge that forgets the tokens, or mixes the files of two tokenizers."""
    merge(adapter, tmp_path / "merged", dtype=None, precision="32-true")
    merged = tmp_path / "merged"
    assert (merged / "tokenizer.json").read_bytes() == (adapter / "tokenizer.json").read_bytes()
    assert not (merged / "added_tokens.json").exists(), "a file of the base's tokenizer"
    theirs, ours = in_transformers(merged), Tokenizer.from_path(merged)
    assert theirs.convert_tokens_to_ids(END) == ours.eos_id == 384 and theirs.eos_token == ours.eos == END
    assert 384 in json.loads((merged / "generation_config.json").read_text())["eos_token_id"]
    assert (merged / "chat_template.jinja").read_bytes() == (base / "chat_template.jinja").read_bytes()
    assert load(merged).stop_ids >= {384}
    merge_into_gguf(adapter, tmp_path / "m.gguf", dtype="float16", precision="32-true")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.tokens"].contents(384) == END
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 384


def test_more_tokens_than_rows_name_the_way_out(tiny_folder: Path, adapter: Path) -> None:
    """Catches an index error, or silence, at the first new token."""
    message = (
        r"own tokenizer has 385 tokens, the base .* only 384 rows.*--resize_vocab 385, then .*--base_dir .*-resized"
    )
    (adapter / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        load(adapter, base_dir=tiny_folder)
    with pytest.raises(CheckpointError, match=message):
        merge(adapter, adapter / "merged", dtype=None, precision="32-true", base_dir=tiny_folder)


def test_vocabulary_and_merges_are_a_tokenizer_of_its_own(adapter: Path) -> None:
    """Catches the older pair of files, passed over for the tokenizer of the base."""
    model = json.loads((adapter / "tokenizer.json").read_text())["model"]
    (adapter / "vocab.json").write_text(json.dumps(model["vocab"]))
    (adapter / "merges.txt").write_text("\n".join(" ".join(merge) for merge in model["merges"]))
    (adapter / "added_tokens.json").write_text(json.dumps({END: 384}))
    settings = json.loads((adapter / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (adapter / "tokenizer_config.json").write_text(json.dumps(settings))
    (adapter / "tokenizer.json").unlink()
    assert load(adapter).tokenizer.size == 385


def test_an_adapter_that_has_none_takes_that_of_its_base(base: Path, adapter: Path) -> None:
    """Catches settings without a vocabulary, as some programs leave them, taken for a tokenizer."""
    (adapter / "tokenizer.json").unlink()
    assert load(adapter).tokenizer.size == 384
