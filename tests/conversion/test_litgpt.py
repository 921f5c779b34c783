"""litgpt's folder in both orders of its one matrix, written here row by row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_model, write_tokenizer
from meta_files import IDS, equal, nothing_left
from safetensors.torch import load_file
from torch import Tensor

from lit_llama.conversion import convert
from lit_llama.errors import CheckpointError
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

INNER = {
    "self_attn.o_proj": "attn.proj",
    "mlp.gate_proj": "mlp.fc_1",
    "mlp.up_proj": "mlp.fc_2",
    "mlp.down_proj": "mlp.proj",
    "input_layernorm": "norm_1",
    "post_attention_layernorm": "norm_2",
}
OUTER = {"model.embed_tokens": "transformer.wte", "model.norm": "transformer.ln_f", "lm_head": "lm_head"}
SHAPE = {
    "name": "tiny",
    "hf_config": {},
    "block_size": 256,
    "n_layer": 2,
    "n_embd": 64,
    "n_head": 4,
    "n_query_groups": 2,
    "head_size": 16,
    "vocab_size": 380,
    "padded_vocab_size": 384,
    "intermediate_size": 112,
    "norm_class_name": "RMSNorm",
    "norm_eps": 1e-5,
    "mlp_class_name": "LLaMAMLP",
    "rotary_percentage": 1.0,
    "rope_base": 10000,
    "parallel_residual": False,
    "bias": False,
    "n_expert": 0,
}


def fused(q: Tensor, k: Tensor, v: Tensor, order: str) -> Tensor:
    """Rows of q, k and v end to end (`attn.qkv`), or group by group (`attn.attn`): two queries, a key, a value."""
    if order == "attn.qkv":
        return torch.stack([*q, *k, *v])
    rows: list[Tensor] = []
    for group in range(2):
        rows += [*q[group * 32 : group * 32 + 32], *k[group * 16 : group * 16 + 16], *v[group * 16 : group * 16 + 16]]
    return torch.stack(rows)


def write_litgpt(folder: Path, model: LLaMA, order: str = "attn.qkv", *, nested: bool = False, **shape: Any) -> Path:
    folder.mkdir()
    found = {}
    state = model.state_dict()
    for name, value in state.items():
        stem = name.removesuffix(".weight")
        if stem in OUTER:
            found[f"{OUTER[stem]}.weight"] = value
        elif (rest := stem.split(".", 3)[3]) in INNER:
            found[f"transformer.h.{stem.split('.')[2]}.{INNER[rest]}.weight"] = value
    for layer in range(2):
        parts = [state[f"model.layers.{layer}.self_attn.{part}_proj.weight"] for part in "qkv"]
        found[f"transformer.h.{layer}.{order}.weight"] = fused(*parts, order)
    torch.save({"model": found} if nested else found, folder / "lit_model.pth")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(SHAPE | shape))
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("order", ["attn.qkv", "attn.attn"])
def test_both_orders_become_the_model(tmp_path: Path, order: str, nested: bool) -> None:
    """Catches one order read as the other, rotary rows that are moved though they stand right, and a fine-tuned file,
    which litgpt nests under "model"."""
    model = tiny_model()
    convert(write_litgpt(tmp_path / "litgpt", model, order, nested=nested), tmp_path / "made")
    assert equal(load_file(tmp_path / "made" / "model.safetensors"), dict(model.state_dict()))
    assert (load_model(tmp_path / "made")(IDS) - model(IDS)).abs().max() <= 1e-5
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (None, 2, 384)
    assert (tmp_path / "made" / "tokenizer.json").is_file() and (tmp_path / "made" / "chat_template.jinja").is_file()


def test_the_orders_differ() -> None:
    """Guards the test above."""
    q, k, v = torch.arange(64), torch.arange(100, 132), torch.arange(200, 232)
    assert not torch.equal(fused(q, k, v, "attn.qkv"), fused(q, k, v, "attn.attn"))


def test_rotary_scaling_and_a_tied_head_are_taken_over(tmp_path: Path) -> None:
    """Llama 3.2; catches frequencies that are not stretched, and a head stored twice."""
    scaling = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_seq_len": 8192}
    model = tiny_model(tie_word_embeddings=True)
    convert(write_litgpt(tmp_path / "litgpt", model, rope_base=500000, rope_adjustments=scaling), tmp_path / "made")
    config = load_model(tmp_path / "made").config
    assert config.tie_word_embeddings and config.rope_theta == 500000.0
    assert config.rope_scaling is not None and config.rope_scaling.factor == 32.0
    assert "lm_head.weight" not in load_file(tmp_path / "made" / "model.safetensors")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"mlp_class_name": "GemmaMLP"}, "mlp_class_name is 'GemmaMLP', only 'LLaMAMLP'"),
        ({"rotary_percentage": 0.25}, "rotary_percentage is 0.25"),
        ({"norm_qk": True}, "norm_qk is True"),
        ({"sliding_window_size": 4096}, "sliding_window_size is 4096"),
        ({"rope_adjustments": {"factor": 8.0}}, "rope_adjustments is {'factor': 8.0}"),
        ({"n_layer": 3}, "transformer.h.2."),
        ({"n_layer": "x"}, "num_hidden_layers is 'x'"),
        ({"n_query_groups": 4}, "asks for 192 rows"),
        ({"intermediate_size": 96}, "mlp.down_proj.weight is (64, 112), the settings ask for (64, 96)"),
    ],
)
def test_other_shapes_are_refused(tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    """Catches a model that would be computed as a LLaMA and is none; the key and the value are named."""
    folder = write_litgpt(tmp_path / "litgpt", tiny_model(), **shape)
    with pytest.raises(CheckpointError) as caught:
        convert(folder, tmp_path / "made")
    assert message in str(caught.value), caught.value
    assert nothing_left(tmp_path / "made")


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("- 1", "no"), ("{", "is no YAML")])
def test_a_missing_shape_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    """Catches a traceback."""
    folder = write_litgpt(tmp_path / "litgpt", tiny_model())
    (folder / "model_config.yaml").unlink()
    if content is not None:
        (folder / "model_config.yaml").write_text(content)
    with pytest.raises(CheckpointError, match=rf"model_config\.yaml.* {message}"):
        convert(folder, tmp_path / "made")
