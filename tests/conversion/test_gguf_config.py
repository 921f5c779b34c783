"""Rotary scaling in a GGUF file against transformers, Meta's formula, and files written here."""

import math
import re
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from conftest import as_transformers, tiny_config, tiny_model, write_tokenizer
from gguf_files import OTHERS, SHAPE, Array, fields_of, write_gguf

from lit_llama.conversion.gguf.architectures import ARCHITECTURES, architecture, entry_of
from lit_llama.conversion.gguf.config import Reading
from lit_llama.conversion.gguf.metadata import llama3_divisors, to_metadata
from lit_llama.conversion.gguf.reader import open_gguf
from lit_llama.conversion.source import write_folder
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

IDS = torch.arange(2, 200)
SLIDING, FULL = "sliding_attention", "full_attention"
YARN3 = OTHERS["ministral3"]["rope_scaling"]


def divisors(theta: float, dim: int, factor: float, original: int = 8192, low: float = 1, high: float = 4) -> Array:
    """As llama.cpp's converter makes rope_freqs, one frequency after the other."""
    out = []
    for i in range(0, dim, 2):
        wave = 2 * math.pi * theta ** (i / dim)
        if wave < original / high:
            out.append(1.0)
        elif wave > original / low:
            out.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, np.float32)


def opened(tmp_path: Path, keys: dict[str, Any], freqs: Array | None = None) -> tuple[LLaMA, LLaMAConfig]:
    """A model, and the configuration that is read from its file with these keys and divisors."""
    write_tokenizer(tmp_path)
    model = tiny_model(**SHAPE | {"rope_theta": 500000.0})
    tensors = {} if freqs is None else {"rope_freqs.weight": freqs}
    path = write_gguf(
        tmp_path / "model.gguf",
        model,
        tmp_path,
        change_keys=lambda all_keys: all_keys.update({f"llama.{key}": value for key, value in keys.items()}),
        change_tensors=lambda all_tensors: all_tensors.update(tensors),
    )
    source = open_gguf(path)
    shutil.rmtree(tmp_path / "folder", ignore_errors=True)
    write_folder(source, tmp_path / "folder")
    return model, source.shape


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
SCALED: dict[str, tuple[dict[str, Any], Array | None, RopeScaling | None]] = {
    "none": ({"rope.scaling.type": "none"}, None, None),
    "linear": (LINEAR, None, RopeScaling(rope_type="linear", factor=4, original_max_position_embeddings=256)),
    "linear in old files": (
        {"rope.scale_linear": 2.0},
        None,
        RopeScaling(rope_type="linear", factor=2, original_max_position_embeddings=256),
    ),
    "yarn": (YARN, None, RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=64)),
    "yarn with bounds": (
        YARN | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
        None,
        RopeScaling(rope_type="yarn", factor=4, original_max_position_embeddings=64, beta_fast=16, beta_slow=2),
    ),
    "llama 3.1": (
        {},
        divisors(5e5, 16, 8),
        RopeScaling(rope_type="llama3", factor=8, original_max_position_embeddings=8192),
    ),
    "llama 3.2": (
        {},
        divisors(5e5, 16, 32),
        RopeScaling(rope_type="llama3", factor=32, original_max_position_embeddings=8192),
    ),
    "ones": ({}, np.ones(8, np.float32), None),
}


@pytest.mark.parametrize(("keys", "freqs", "scaling"), SCALED.values(), ids=SCALED)
def test_scaling_is_read_and_computed_as_transformers_does(
    tmp_path: Path, keys: dict[str, Any], freqs: Array | None, scaling: RopeScaling | None
) -> None:
    """Catches a factor or a context that is lost on the way, and a file that is read as if it were not scaled."""
    model, config = opened(tmp_path, keys, freqs)
    assert config.rope_scaling == scaling
    loaded = load_model(tmp_path / "folder")
    wanted = as_transformers(loaded)(IDS[None]).logits[0]
    assert (loaded(IDS) - wanted).abs().max() <= 2e-4
    if scaling is not None and scaling.rope_type != "llama3":  # whose first context is too long for these texts
        assert (loaded(IDS) - model(IDS)).abs().max() > 0.01


REFUSED: dict[str, tuple[dict[str, Any], Array | None, str]] = {
    "other divisors": ({}, divisors(5e5, 16, 8, high=5), "rope_freqs.weight holds other divisors"),
    "too few": ({}, divisors(5e5, 8, 8), "rope_freqs.weight holds other divisors"),
    "half": ({}, np.full(8, 0.5, np.float32), "factor cannot be 0.5"),
    "infinite": ({}, np.full(8, np.inf, np.float32), "not finite"),
    "both": (LINEAR, divisors(5e5, 16, 8), "exclude each other"),
    "no factor": ({"rope.scaling.type": "yarn"}, None, "no llama.rope.scaling.factor"),
    "yarn of its own": (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, None, "yarn_log_multiplier is 0.1"),
    "half a yarn": (YARN | {"rope.scaling.yarn_ext_factor": 0.5}, None, "yarn_ext_factor is 0.5, for type 'yarn'"),
    "no yarn": (YARN | {"rope.scaling.yarn_ext_factor": 0.0}, None, "yarn_ext_factor is 0.0, for type 'yarn'"),
    "linear and yarn": (LINEAR | {"rope.scaling.yarn_ext_factor": 1.0}, None, "yarn_ext_factor is 1.0"),
    "no rotation": ({"rope.scaling.attn_factor": 0.0}, None, "attn_factor is 0.0, only 1.0 is implemented"),
    "half a residual": ({"residual_scale": 0.5}, None, "residual_scale is 0.5, only 1.0 is implemented"),
    "logits": ({"logit_scale": 0.25}, None, "logit_scale is 0.25, only 1.0 is implemented"),
    "another scale": ({"attention.scale": 0.5}, None, "attention.scale is 0.5, which is not implemented"),
    "a window": ({"attention.sliding_window": 255}, None, "sliding_window is 255"),
    "a new key": ({"attention.new_thing": 1.0}, None, "attention.new_thing is 1.0, which is not implemented"),
    "layers that differ": ({"attention.new_thing": [0.0, 1.0]}, None, r"attention.new_thing is \[0.0, 1.0\]"),
}


@pytest.mark.parametrize(("keys", "freqs", "message"), REFUSED.values(), ids=REFUSED)
def test_scaling_that_is_not_understood_is_refused(
    tmp_path: Path, keys: dict[str, Any], freqs: Array | None, message: str
) -> None:
    """Catches a model that talks nonsense beyond its first context."""
    with pytest.raises(CheckpointError, match=message):
        opened(tmp_path, keys, freqs)


NEUTRAL: dict[str, Any] = {
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "rope.scale_linear": 0.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "logit_scale": 1.0,
    "attention.scale": 0.25,  # one over the root of the head size
    "attention.sliding_window": 256,
    "attention.max_alibi_bias": 0.0,
    "attention.head_count_kv": [2, 2],
    "expert_count": 0,
    "expert_used_count": 2,
    "rope.dimension_sections": [0, 0, 0, 0],
    "use_parallel_residual": False,
}


def test_keys_that_change_nothing_pass(tmp_path: Path) -> None:
    """Catches files of other converters that are refused though llama.cpp computes the plain model; see REFUSED."""
    model, config = opened(tmp_path, NEUTRAL)
    assert config.rope_scaling is None and config.num_key_value_heads == 2
    assert torch.equal(load_model(tmp_path / "folder")(IDS), model(IDS))
    _, config = opened(tmp_path, YARN | {"rope.scaling.yarn_ext_factor": 1.0, "rope.scaling.attn_factor": 1.0})
    assert config.rope_scaling == SCALED["yarn"][2]


@pytest.mark.parametrize(("factor", "original"), [(8, 8192), (32, 8192), (8, 64)])
def test_divisors_are_those_of_llama_cpp(factor: float, original: int) -> None:
    """Catches the bounds of short and long waves exchanged; 64 is so short that all three kinds of waves occur."""
    scaling = RopeScaling(rope_type="llama3", factor=factor, original_max_position_embeddings=original)
    config = tiny_config(rope_theta=5e5, head_dim=128, rope_scaling=scaling)
    np.testing.assert_allclose(llama3_divisors(config), divisors(5e5, 128, factor, original), rtol=1e-5)


def test_names_go_both_ways() -> None:
    """Catches a tensor that is called one thing when read and another when written."""
    llama = ARCHITECTURES["llama"]
    for options in ({}, {"attention_bias": True}, {"mlp_bias": True}, {"use_qk_norm": True}):
        for name in tiny_model(**options).state_dict():
            assert llama.native_name(llama.names(name) or "") == name
    assert llama.native_name("blk.0.ffn_gate_shexp.weight") is None and llama.native_name("") is None
    for raw in OTHERS.values():
        model = tiny_model(**fields_of(raw))
        entry, tied = entry_of(model.config), {"lm_head.weight"}
        assert all(entry.native_name(entry.names(name) or "") == name for name in model.state_dict().keys() - tied)


@pytest.mark.parametrize("raw", OTHERS.values(), ids=OTHERS)
def test_the_gguf_package_knows_the_tensors(raw: dict[str, Any]) -> None:
    """Catches a name that llama.cpp has not in this architecture."""
    config = LLaMAConfig(**fields_of(raw))
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture(config))
    known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "0") for tensor in gguf.MODEL_TENSORS[arch]}
    names = {entry_of(config).names(name) or name for name in tiny_model(**fields_of(raw)).state_dict()}
    first = {
        re.sub(r"\.(weight|bias)$", "", name)
        for name in names
        if not name.startswith("blk.") or name.startswith("blk.0.")
    }
    assert first - known <= ({"output"} if config.tie_word_embeddings else set())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"model_type": "olmo2", "head_dim": 24}, "head_dim is 24"),
        ({"model_type": "olmo2", "tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"model_type": "olmo3", "layer_types": [FULL, SLIDING]}, "layer_types is"),
        ({"model_type": "olmo3", "sliding_window": None}, "sliding_window is none"),
        (OTHERS["qwen3_5"] | {"layer_types": ["linear_attention", *[FULL] * 5]}, "layer_types are"),
        (OTHERS["qwen3_5"] | {"linear_key_head_dim": 8}, "linear_key_head_dim is 8 and linear_value_head_dim 16"),
        (OTHERS["gemma2"] | {"tie_word_embeddings": False}, "tie_word_embeddings is false"),
        (OTHERS["gemma2"] | {"query_pre_attn_scalar": 16}, "query_pre_attn_scalar is 16"),
        (OTHERS["gemma2"] | {"attn_logit_softcapping": None}, "attn_logit_softcapping is none"),
        (OTHERS["gemma3"] | {"final_logit_softcapping": 3.0}, "final_logit_softcapping is there"),
        ({"model_type": "ministral3", "rope_scaling": YARN3 | {"mscale": 1.0, "mscale_all_dim": 0.5}}, "no form in"),
    ],
)
def test_what_llama_cpp_takes_for_granted_otherwise_is_not_written(raw: dict[str, Any], message: str) -> None:
    """Catches a file that llama.cpp computes as another model."""
    with pytest.raises(CheckpointError, match=message):
        to_metadata(LLaMAConfig(**fields_of(raw)))


@pytest.mark.parametrize("layers", [46, 62])
def test_the_largest_gemmas_scale_by_the_width_of_the_model(layers: int) -> None:
    """Of Gemma 2 27B, with 46 layers, and Gemma 3 27B, with 62; catches a scale that is taken from the heads there."""
    model_type = {46: "gemma2", 62: "gemma3_text"}[layers]
    raw = {"model_type": model_type, "num_hidden_layers": layers, "head_dim": 24, "sliding_window": 20}
    to_metadata(LLaMAConfig(**fields_of(raw | {"query_pre_attn_scalar": 64 // 4})))
    with pytest.raises(CheckpointError, match="query_pre_attn_scalar is 24"):
        to_metadata(LLaMAConfig(**fields_of(raw | {"query_pre_attn_scalar": 24})))


def test_a_window_that_llama_cpp_does_not_compute_is_kept() -> None:
    """Of Phi 3: the file is for texts as long as the window, and the folder that is made of it has the window again."""
    model = tiny_model(**fields_of({"model_type": "phi3", "sliding_window": 100}))
    keys = to_metadata(model.config)
    assert (keys["context_length"], keys["attention.sliding_window"]) == (100, 100)
    metadata = {f"phi3.{key}": value for key, value in keys.items()}
    metadata |= {"general.architecture": "phi3", "tokenizer.ggml.eos_token_id": 2}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert Reading(metadata).config(shapes, {}).sliding_window == 100


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gemma3.attention.sliding_window_pattern": [True] * 7}, "only the family's is implemented"),
        ({"gemma3.attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping is 50.0"),
        ({"gemma3.rope.freq_base_swa": 300.0}, 300.0),
        ({"gemma3.attention.sliding_window_pattern": 3}, (SLIDING, SLIDING, FULL) * 2 + (SLIDING,)),
    ],
)
def test_windows_are_read_as_they_are_told(tmp_path: Path, keys: dict[str, Any], message: Any) -> None:
    """Catches a pattern or a base of frequencies that is passed over."""
    model = tiny_model(**fields_of(OTHERS["gemma3"]))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name != "lm_head.weight"}
    metadata = {f"gemma3.{key}": value for key, value in to_metadata(model.config).items()} | keys
    metadata |= {"general.architecture": "gemma3", "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    if isinstance(message, str):
        with pytest.raises(CheckpointError, match=message):
            Reading(metadata).config(shapes, {})
    else:
        config = Reading(metadata).config(shapes, {})
        assert message in (config.local_rope_theta, config.layer_types)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"ssm.inner_size": 97}, "ssm.inner_size 97 for 6 heads"),
        ({"ssm.group_count": 4}, "linear_num_value_heads 6 is not a multiple of linear_num_key_heads 4"),
        ({"ssm.dt_rank": 4}, "qwen35.ssm.dt_rank is 4, which is not implemented"),
        ({"rope.dimension_sections": [4, 0, 0, 0]}, ""),
    ],
)
def test_sizes_of_linear_attention_fit_each_other(keys: dict[str, Any], message: str) -> None:
    """Catches a head that is cut in two, and sections of positions, which of text are one, that are refused."""
    model = tiny_model(**fields_of(OTHERS["qwen3_5"]))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    metadata = {f"qwen35.{key}": value for key, value in (to_metadata(model.config) | keys).items()}
    metadata |= {"general.architecture": "qwen35", "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    if message:
        with pytest.raises(CheckpointError, match=message):
            Reading(metadata).config(shapes, {})
    else:
        assert Reading(metadata).config(shapes, {}) == model.config


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.5},
        {"rope_type": "yarn", "factor": 2.0, "truncate": False},
    ],
)
def test_scaling_without_a_word_in_gguf_is_not_written(scaling: dict[str, Any]) -> None:
    """Catches a file whose reader turns positions in another way."""
    config = tiny_config(rope_scaling=RopeScaling(**scaling, original_max_position_embeddings=64))
    with pytest.raises(CheckpointError, match="has no form in GGUF"):
        to_metadata(config)
