"""Models written as GGUF: back again bit for bit, and as transformers and the gguf package read the file."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, as_transformers, tiny_model, write_tokenizer
from gguf_files import OTHERS, SHAPE, Array, fields_of, gguf_name, pairs_from_halves, q8_0, write_model
from safetensors.torch import load_file

from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.gguf.writer import write_gguf
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import Source, write_folder
from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.llama import LLaMA
from lit_llama.text.tokenizer.base import Tokenizer

IDS = torch.arange(2, 50)
FAMILIES: dict[str, dict[str, Any]] = {
    "granite": {
        "model_type": "granite",
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layers": (1, 1, 1, 0)},
    "llama": {"head_dim": 24},
    "biases": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "mistral": {"model_type": "mistral"},
    "qwen2": {"model_type": "qwen2", "attention_bias": True, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "use_qk_norm": True, "head_dim": 128},  # what transformers takes for granted
    "linear": {"rope_scaling": RopeScaling(rope_type="linear", factor=4, original_max_position_embeddings=256)},
    "yarn": {
        "model_type": "qwen2",
        "attention_bias": True,
        "rope_scaling": RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=64, beta_fast=16),
    },
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": RopeScaling(rope_type="llama3", factor=8, original_max_position_embeddings=32),
    },
    **{name: fields_of(raw) for name, raw in OTHERS.items()},
}


@pytest.fixture
def made(tmp_path: Path) -> Any:
    """A folder with a tokenizer and a model of a certain shape, and the model."""

    def make(dtype: str = "float32", **changes: Any) -> tuple[Source, LLaMA]:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        write_tokenizer(folder)
        model = tiny_model(**SHAPE | changes)
        return open_folder(write_model(folder, model, dtype)), model

    return make


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata and tensors, by the gguf package."""
    reader = gguf.GGUFReader(path)
    return {n: field.contents() for n, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_and_back_again(tmp_path: Path, made: Any, family: str, dtype: str) -> None:
    """Catches a bit, a name, a setting, a token or the template that is lost on the way."""
    source, model = made(dtype, **FAMILIES[family])
    write_gguf(source, tmp_path / "model.gguf")
    write_folder(open_gguf(tmp_path / "model.gguf"), tmp_path / "back")
    before, after = load_file(source.path / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if family.startswith(("gemma", "qwen3_5")) and name.endswith(("norm.weight", "A_log")):
            assert value.dtype == after[name].dtype, "the file holds one more, or another function"
            torch.testing.assert_close(value.float(), after[name].float(), atol=1e-6, rtol=0)
        else:
            assert value.dtype == after[name].dtype and torch.equal(value, after[name]), name
    config, wanted = LLaMAConfig.from_folder(tmp_path / "back"), model.config.__dict__ | {"eos_token_id": (2,)}
    wanted |= {"model_type": "llama"} if family == "mistral" else {}
    wanted |= {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    assert config == LLaMAConfig(**wanted)
    ours, theirs = Tokenizer.from_path(tmp_path / "back"), Tokenizer.from_path(source.path)
    assert ours.fingerprint() == theirs.fingerprint() and (ours.bos, ours.eos) == (theirs.bos, theirs.eos)
    text = "Zoë's naïve café, 北京 is a city. 😀\n\n  {1 + 23}"
    assert ours.encode(text) == theirs.encode(text)
    template = (tmp_path / "back" / "chat_template.jinja").read_bytes()
    assert template == (source.path / "chat_template.jinja").read_bytes()


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "llama3"])
def test_transformers_reads_the_same_model(tmp_path: Path, made: Any, family: str) -> None:
    """Catches rows of q and k in an order that only we read, and a setting that only we understand."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, model = made(**FAMILIES[family] | {"rope_scaling": None})  # theirs knows of no scaling
    write_gguf(source, tmp_path / "model.gguf", "f32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    assert theirs.config.model_type == {"mistral": "llama", "llama3": "llama"}.get(family, family)
    assert (theirs(IDS[None]).logits[0] - as_transformers(model)(IDS[None]).logits[0]).abs().max() <= 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "Zoë's naïve café, 北京 is a city."
    assert tokenizer(text)["input_ids"] == Tokenizer.from_path(source.path).encode(text)


def test_the_file_says_what_llama_cpp_needs(tmp_path: Path, made: Any) -> None:
    """Catches a key that is missing, of another type, or in a wrong unit; the names are those of llama.cpp."""
    source, model = made("bfloat16", **FAMILIES["llama"], vocab_size=400)
    write_gguf(source, tmp_path / "model.gguf")
    metadata, tensors = read(tmp_path / "model.gguf")
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.file_type": 32,
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 24,
        "llama.attention.value_length": 24,
        "llama.rope.dimension_count": 24,
        "llama.rope.freq_base": 1234.5,
        "llama.vocab_size": 400,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: metadata[key] for key in wanted} == wanted
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 400 and tokens[384:] == [f"[PAD{i}]" for i in range(384, 400)]
    assert metadata["tokenizer.ggml.token_type"] == [3] * 3 + [1] * 381 + [5] * 16
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds == {gguf_name(n): "F32" if v.ndim == 1 else "BF16" for n, v in model.state_dict().items()}


def stored(model: LLaMA, name: str) -> Array:
    """A tensor with its rotary rows in pairs."""
    array = model.state_dict()[name].numpy()
    heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
    return pairs_from_halves(array, heads[name.split(".")[-2]]) if name.split(".")[-2] in heads else array


def test_q8_0_is_packed_as_the_format_says(
    tmp_path: Path, made: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three rows at a time; catches rows cut within a block, a vector that is packed, and a silent fallback."""
    monkeypatch.setattr("lit_llama.conversion.gguf.writer.BLOCK", 3 * 64)
    source, model = made(intermediate_size=112)
    write_gguf(source, tmp_path / "model.gguf", "q8_0")
    metadata, tensors = read(tmp_path / "model.gguf")
    assert (metadata["general.file_type"], metadata["general.quantization_version"]) == (7, 2)
    for name, value in model.state_dict().items():
        tensor = tensors[gguf_name(name)]
        if value.ndim == 1 or value.shape[1] % 32:
            assert tensor.tensor_type.name == ("F32" if value.ndim == 1 else "F16")
            continue
        packed, rounded = q8_0(stored(model, name))
        assert tensor.tensor_type.name == "Q8_0"
        steps = tensor.data.reshape(-1, 34)[:, 2:].view(np.int8).astype(int) - packed.reshape(-1, 34)[:, 2:].view(
            np.int8
        )
        assert (
            np.array_equal(tensor.data.reshape(-1, 34)[:, :2], packed.reshape(-1, 34)[:, :2]) and abs(steps).max() <= 1
        )
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.abs(values - rounded).max() <= np.abs(rounded).max() / 100
        assert np.sqrt(((values - stored(model, name)) ** 2).mean()) / stored(model, name).std() < 0.007
    assert "2 matrices, model.layers.0.mlp.down_proj.weight first" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "float32", "float16", "bfloat16"])
def test_matrices_are_rounded_and_vectors_are_not(tmp_path: Path, made: Any, dtype: str) -> None:
    """Catches norms that lose precision, and rounding in another dtype than the one asked for."""
    source, model = made("bfloat16" if "32" in dtype else "float32")
    write_gguf(source, tmp_path / "model.gguf", dtype)
    bits, code = {"f32": ("float32", 0), "f16": ("float16", 1), "bf16": ("bfloat16", 32)}.get(dtype, (dtype, None))
    metadata, tensors = read(tmp_path / "model.gguf")
    assert code in (None, metadata["general.file_type"])
    for name in model.state_dict():
        value, kind = source.read(name), {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[bits]
        assert tensors[gguf_name(name)].tensor_type.name == (kind if value.ndim > 1 else "F32"), name
        target = getattr(torch, bits)
        back = open_gguf(tmp_path / "model.gguf", "float32").read(name)
        assert torch.equal(back, value.to(target).float() if value.ndim > 1 else value.float()), name


def test_the_scaling_of_llama_3_is_a_tensor(tmp_path: Path, made: Any) -> None:
    """Catches a file that llama.cpp reads as one without scaling."""
    source, _ = made(**FAMILIES["llama3"])
    write_gguf(source, tmp_path / "model.gguf")
    metadata, tensors = read(tmp_path / "model.gguf")
    freqs = tensors["rope_freqs.weight"].data
    assert freqs.shape == (8,) and freqs[0] == 1 and freqs[-1] == 8 and (np.diff(freqs) >= 0).all()
    assert "llama.rope.scaling.type" not in metadata


def test_a_window_becomes_the_length_of_the_context(
    tmp_path: Path, made: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a Mistral that sees more than it was trained on, because llama.cpp gives its kind no window."""
    source, _ = made(model_type="mistral", sliding_window=32)
    write_gguf(source, tmp_path / "model.gguf")
    assert read(tmp_path / "model.gguf")[0]["llama.context_length"] == 32
    assert "a token sees the last 32" in capsys.readouterr().err


def test_a_value_that_does_not_fit_is_refused(tmp_path: Path, made: Any) -> None:
    """Catches infinity in a file, and a file that is left behind."""
    source, _ = made()
    state = load_file(source.path / "model.safetensors")
    state["lm_head.weight"][3, 5] = 1e6
    changed = Source(**{**source.__dict__, "read": state.__getitem__})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has values that are not finite in F16; use bf16 or f32"):
        write_gguf(changed, tmp_path / "model.gguf", "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    write_gguf(changed, tmp_path / "model.gguf", "bf16")


def test_nothing_is_overwritten_and_no_other_type_accepted(tmp_path: Path, made: Any) -> None:
    """Catches a file lost to a mistyped name, and a type that is taken for another."""
    source, _ = made()
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_gguf(source, tmp_path / "model.gguf")
    with pytest.raises(UserError, match="--dtype is 'q4_1', expected one of f32, f16, bf16, q8_0, q6_k, q5_k_m"):
        write_gguf(source, tmp_path / "other.gguf", "q4_1")
    assert (tmp_path / "model.gguf").read_text() == "mine" and not (tmp_path / "other.gguf").exists()


def test_a_kill_leaves_no_file_that_looks_whole(tmp_path: Path, made: Any) -> None:
    """Catches a file under its final name before its last tensor is written; the next try works."""
    source, _ = made()
    code = f"""
import os, signal
from pathlib import Path
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.gguf import writer as gguf_writer
made, pack = [], gguf_writer._pack
def killed(*arguments):
    made.append(arguments)
    if len(made) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return pack(*arguments)
gguf_writer._pack = killed
gguf_writer.write_gguf(open_folder(Path({str(source.path)!r})), Path({str(tmp_path / "out" / "model.gguf")!r}))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out" / "model.gguf").exists()
    write_gguf(source, tmp_path / "out" / "model.gguf")
    assert open_gguf(tmp_path / "out" / "model.gguf").parameters == source.parameters


@pytest.mark.real
def test_the_real_model_there_and_back_again(tmp_path: Path, real_folder: Path) -> None:
    """135 million values, 49152 tokens; catches whatever a tiny model hides."""
    source = open_folder(real_folder)
    write_gguf(source, tmp_path / "model.gguf")
    back = open_gguf(tmp_path / "model.gguf")
    assert back.specs == source.specs
    assert all(torch.equal(back.read(name), source.read(name)) for name in source.specs)
    assert back.shape == source.shape
    assert back.files["tokenizer.json"] == (real_folder / "tokenizer.json").read_bytes()
    assert back.files["chat_template.jinja"] == (real_folder / "chat_template.jinja").read_bytes()
    settings, before = back.files["tokenizer_config.json"], (real_folder / "tokenizer_config.json").read_text()
    assert isinstance(settings, bytes) and json.loads(settings) == json.loads(before)
