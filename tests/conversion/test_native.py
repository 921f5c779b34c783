"""Hugging Face folders as a source, with weights in either container, and finding out what a source is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_here, tiny_model, write_tokenizer
from meta_files import IDS, equal, nothing_left
from safetensors.torch import load_file, save_file

from lit_llama.conversion import convert, open_source
from lit_llama.conversion.native import open_folder
from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

State = dict[str, torch.Tensor]


def write_bin(folder: Path, model: LLaMA, parts: int = 1, *, index: bool = False) -> State:
    """A folder as older releases of transformers write it: torch files, shared tensors and rotary frequencies."""
    folder.mkdir()
    state = dict(model.state_dict())
    stored = state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    names = list(stored)
    files = {}
    for i in range(parts):
        file = "pytorch_model.bin" if parts == 1 else f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin"
        torch.save({name: stored[name] for name in names[i::parts]}, folder / file)
        files |= dict.fromkeys(names[i::parts], file)
    if index:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    raw = {**model.config.to_dict("float32"), "pretraining_tp": 1, "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(raw))
    (folder / "meta.json").write_text("{}")
    (folder / "LICENSE.txt").write_text("free")
    (folder / "training_args.bin").write_bytes(b"no tensors")
    write_tokenizer(folder)
    return state


@pytest.mark.parametrize(("parts", "index"), [(1, False), (3, True), (12, False)])
def test_torch_files_become_safetensors(tmp_path: Path, parts: int, index: bool) -> None:
    """Catches a part that is left out, frequencies that are carried on, and settings or tokenizer that are lost."""
    state = write_bin(tmp_path / "bin", tiny_model(), parts, index=index)
    convert(tmp_path / "bin", tmp_path / "made")
    assert equal(load_file(tmp_path / "made" / "model.safetensors"), state)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["pretraining_tp"] == 1 and config["torch_dtype"] == "float32" and "dtype" not in config
    found = {path.name for path in (tmp_path / "made").iterdir()}
    kept = {"LICENSE.txt", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
    assert found == kept | {"SHA256SUMS", "config.json", "meta.json", "model.safetensors"}
    assert load_model(tmp_path / "made")(IDS).isfinite().all()


def test_a_shared_head_is_stored_once(tmp_path: Path) -> None:
    """Catches a tied matrix written twice."""
    model = tiny_model(tie_word_embeddings=True)
    state = write_bin(tmp_path / "bin", model)
    assert "lm_head.weight" in state
    convert(tmp_path / "bin", tmp_path / "made")
    assert "lm_head.weight" not in load_file(tmp_path / "made" / "model.safetensors")
    assert (load_model(tmp_path / "made")(IDS) - model(IDS)).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_a_tied_head_with_other_values_is_refused(tmp_path: Path, kind: str) -> None:
    """Catches a head that is dropped though it is another matrix."""
    model = tiny_model(tie_word_embeddings=True)
    state = {name: value.clone() for name, value in write_bin(tmp_path / "made", model).items()}
    state["lm_head.weight"][0, 0] += 1
    (tmp_path / "made" / "pytorch_model.bin").unlink()
    if kind == "bin":
        torch.save(state, tmp_path / "made" / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "made" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight is another matrix"):
        open_folder(tmp_path / "made")


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    """Catches weights that are read from the older container."""
    state = write_bin(tmp_path / "both", tiny_model())
    save_file(state, tmp_path / "both" / "model.safetensors")
    (tmp_path / "both" / "pytorch_model.bin").write_bytes(b"broken")
    assert not open_folder(tmp_path / "both").notes
    with pytest.raises(CheckpointError, match="use it as it is"):
        convert(tmp_path / "both", tmp_path / "made")


def test_a_folder_is_written_anew_only_for_a_reason(tmp_path: Path) -> None:
    """Catches a copy for nothing, and a reason that is not seen."""
    state = write_bin(tmp_path / "bin", tiny_model())
    convert(tmp_path / "bin", tmp_path / "made")
    convert(tmp_path / "made", tmp_path / "half", dtype="float16")
    assert load_file(tmp_path / "half" / "model.safetensors")["lm_head.weight"].dtype == torch.float16
    convert(tmp_path / "made", tmp_path / "cut", max_shard_size=50_000)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    assert equal({name: open_folder(tmp_path / "cut").read(name) for name in state}, state)


def lose(pattern: str) -> Callable[[Path], Any]:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def copy_part(name: str) -> Callable[[Path], Any]:
    first = "pytorch_model-00001-of-00003.bin"
    return lambda folder: shutil.copy(folder / first, folder / f"pytorch_model-{name}.bin")


def change_config(**values: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lose("pytorch_model-00002*"), "missing are the parts 2 of 3"),
        (lose("pytorch_model-00003*"), "missing are the parts 3 of 3"),
        (lose("pytorch_model-*"), "has no model.safetensors"),
        (copy_part("00001-of-00004"), "whole set"),
        (copy_part("00002-of-00003"), "is in pytorch_model-00001-of-00003.bin, too"),
        (lambda folder: (folder / "pytorch_model-00002-of-00003.bin").write_bytes(b"<html>"), "pytorch_model-00002"),
        (change_config(quantization_config={"bits": 4}), "a method that is not named in 4 bits"),
        (change_config(model_type="gpt_oss"), "model_type is 'gpt_oss'"),
        (change_config(num_hidden_layers=1), "model.layers.1."),
    ],
)  # fmt: skip
def test_a_folder_that_is_not_whole_is_refused(tmp_path: Path, change: Callable[[Path], Any], message: str) -> None:
    """Catches a model with missing parts, the same part twice, and an architecture that is not implemented."""
    write_bin(tmp_path / "bin", tiny_model(), 3)
    change(tmp_path / "bin")
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "bin", tmp_path / "made")
    assert message in str(caught.value), caught.value
    assert nothing_left(tmp_path / "made")


def test_an_index_that_names_other_tensors_is_refused(tmp_path: Path) -> None:
    """Catches an index and files that do not belong together."""
    write_bin(tmp_path / "bin", tiny_model(), 2, index=True)
    path = tmp_path / "bin" / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 unknown \(lm_head.weight"):
        convert(tmp_path / "bin", tmp_path / "made")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone", None, "does not exist"),
        ("page.pth", b"<html>", "HTML"),
        ("weights.bin", b"\x00\x01\x02\x03", "starts with b'\\x00\\x01\\x02\\x03'; expected a GGUF file"),
        ("notes.txt", b"hello", "text"),
        ("folder/readme.md", b"hello", "without config.json or weights (found: readme.md), expected a GGUF file"),
        ("adapter/adapter_config.json", b"{}", "is an adapter: merge it into its base with finetune/merge.py"),
    ],
)
def test_anything_else_is_named_with_what_was_expected(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Row 4; catches a traceback, and a guess."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_source(path if path.parent == tmp_path else path.parent)
    assert message in str(caught.value), caught.value


def test_the_door_converts_there_and_back(tmp_path: Path) -> None:
    """Catches a flag that does not reach its function, and a size that is misread."""
    state = write_bin(tmp_path / "bin", tiny_model(), 2)
    flags = (
        "--source",
        tmp_path / "bin",
        "--destination_path",
        tmp_path / "meta",
        "--format",
        "meta",
        "--num_shards",
        2,
    )
    done = run_here("prepare/checkpoint.py", *flags, "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    shards = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "meta").glob("*.pth"))]
    assert [shard["norm.weight"].dtype for shard in shards] == [torch.bfloat16] * 2
    flags = ("--source", tmp_path / "bin", "--destination_path", tmp_path / "made", "--max_shard_size", "50KB")
    assert run_here("prepare/checkpoint.py", *flags).returncode == 0
    assert (tmp_path / "made" / "model.safetensors.index.json").is_file()
    assert equal({name: open_folder(tmp_path / "made").read(name) for name in state}, state)
    done = run_here(
        "prepare/checkpoint.py", *flags[:2], "--destination_path", tmp_path / "x", "--max_shard_size", "5XB"
    )
    assert done.returncode == 2 and "5XB" in done.stderr


def test_an_embedding_grows_on_the_way(tmp_path: Path) -> None:
    """Catches a flag that does not reach its function, or old rows that change."""
    state = write_bin(tmp_path / "bin", tiny_model())
    flags = ("--source", tmp_path / "bin", "--destination_path", tmp_path / "made", "--resize_vocab", 400)
    assert run_here("prepare/checkpoint.py", *flags).returncode == 0
    found = load_file(tmp_path / "made" / "model.safetensors")["lm_head.weight"]
    assert found.shape[0] == 400 and torch.equal(found[:384], state["lm_head.weight"])
    assert load_model(tmp_path / "made").config.vocab_size == 400


def test_shards_are_metas_alone(tmp_path: Path) -> None:
    """Catches a flag that is ignored in silence."""
    write_bin(tmp_path / "bin", tiny_model())
    with pytest.raises(UserError, match="--num_shards is 2, but only --format meta"):
        convert(tmp_path / "bin", tmp_path / "made", num_shards=2)
