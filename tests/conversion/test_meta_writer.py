"""The way back into Meta's layout: the same bits, and what Meta's code could not compute."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_files import MODELS, cut, equal, nothing_left, write
from meta_files import vocabulary as vocabulary  # a fixture
from plain import Sizes, random_state

from lit_llama.conversion import convert
from lit_llama.conversion.layouts import meta_writer as meta_writer
from lit_llama.conversion.layouts.meta import open_meta
from lit_llama.conversion.layouts.meta_writer import ffn_width, write_meta
from lit_llama.conversion.native import open_folder
from lit_llama.errors import CheckpointError, UserError


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("name", ["LLaMA 1", "Llama 3.2"])
def test_there_and_back_is_the_same_to_the_last_bit(tmp_path: Path, vocabulary: Path, name: str, shards: int) -> None:
    """Catches a permutation that is not undone, an embedding cut the other way, copies of heads that are lost, and a
    params.json that describes another model."""
    sizes = MODELS[name]
    state = random_state(sizes, torch.float16, tied=name == "Llama 3.2")
    embedding = "columns" if name == "LLaMA 1" else "rows"
    source = write(tmp_path / "meta", state, sizes, vocabulary, shards, embedding)
    convert(source, tmp_path / "made")
    convert(tmp_path / "made", tmp_path / "back", layout="meta", num_shards=shards)
    for i, wanted in enumerate(cut(state, sizes, shards, embedding)):
        del wanted["rope.freqs"]
        assert equal(torch.load(tmp_path / "back" / f"consolidated.{i:02d}.pth", weights_only=True), wanted)
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == vocabulary.read_bytes()
    subprocess.run(["md5sum", "-c", "--status", "checklist.chk"], cwd=tmp_path / "back", check=True)
    again, first = open_meta(tmp_path / "back"), open_meta(source)
    assert again.config == first.config and again.notes["family"] == first.notes["family"]
    params = json.loads((tmp_path / "back" / "params.json").read_text())
    assert ffn_width(sizes.dim, params["multiple_of"], params.get("ffn_dim_multiplier")) == sizes.ffn


@pytest.mark.parametrize(
    ("dim", "multiple", "multiplier", "width"),
    [
        (4096, 256, None, 11008), (5120, 256, None, 13824), (6656, 256, None, 17920), (8192, 256, None, 22016),
        (8192, 4096, 1.3, 28672), (4096, 1024, 1.3, 14336), (2048, 256, 1.5, 8192), (3072, 256, 1.0, 8192),
        (16384, 4096, 1.2, 53248),
    ],
)  # fmt: skip
def test_the_width_of_the_mlp_is_metas(dim: int, multiple: int, multiplier: float | None, width: int) -> None:
    """Every published size; catches a params.json from which Meta's code would build another width."""
    assert ffn_width(dim, multiple, multiplier) == width
    assert ffn_width(dim, *meta_writer._width(dim, width)) == width
    assert ffn_width(dim, *meta_writer._width(dim, 1000)) == 1000


@pytest.mark.parametrize("shards", [3, 8])
def test_shards_that_do_not_divide_the_model_are_refused(tmp_path: Path, vocabulary: Path, shards: int) -> None:
    """Catches a head cut in two."""
    source = open_meta(write(tmp_path / "meta", random_state(Sizes()), Sizes(), vocabulary))
    with pytest.raises(UserError, match=f"--num_shards is {shards}, which does not divide num_attention_heads 4"):
        write_meta(source, tmp_path / "back", shards)
    assert nothing_left(tmp_path / "back")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_dim": 24}, "head_dim is 24"),
        ({"attention_bias": True, "attention_out_bias": True}, "proj.bias has no place"),
        ({"model_type": "mistral", "sliding_window": 64}, "sliding_window is 64"),
    ],
)
def test_what_metas_code_cannot_compute_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    """Catches a model that Meta's code would read and compute otherwise."""
    from conftest import tiny_model
    from safetensors.torch import save_file

    model = tiny_model(**changes)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict("float32")))
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        write_meta(open_folder(folder), tmp_path / "back")
    assert nothing_left(tmp_path / "back")
