"""GGUF files written as llama.cpp writes them, sharing nothing with the code under test."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import save_file

from lit_llama.model.config import LLaMAConfig
from lit_llama.model.llama import LLaMA

Array = npt.NDArray[Any]
Packed = tuple[Array, gguf.GGMLQuantizationType]
"""Rows of bytes, and what they are."""


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Sizes that are multiples of 32, the block of Q8_0; the head size is 16 and there are fewer key heads than heads.
SHAPE: dict[str, Any] = {"intermediate_size": 96, "rope_theta": 1234.5, "rms_norm_eps": 1e-5}

_RAW: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1234.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LONGROPE = {"short_factor": [1.0, 1.1, 1.3, 1.4, 1.6, 1.9], "long_factor": [2.0, 3.0, 5.0, 6.0, 6.5, 9.0]}
OTHERS: dict[str, dict[str, Any]] = {
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", "num_hidden_layers": 5, "sliding_window": 20, "rope_scaling": _YARN},
    "phi3": {"model_type": "phi3"},
    "phi3, long": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.75,
        "original_max_position_embeddings": 64,
        "rope_scaling": {"type": "longrope", **_LONGROPE},
    },
    "glm": {"model_type": "glm", "head_dim": 16},
    "glm4": {"model_type": "glm4", "head_dim": 16, "attention_bias": False},
    "gemma2": {
        "model_type": "gemma2",
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 5.0,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        "num_hidden_layers": 7,
        "head_dim": 24,
        "query_pre_attn_scalar": 24,
        "sliding_window": 20,
        "rope_local_base_freq": 500.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen3_5": {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 6,
        "head_dim": 32,
        "full_attention_interval": 3,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "ministral3": {
        "model_type": "ministral3",
        "head_dim": 24,
        "rope_scaling": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3},
    },
}
"""Fields of config.json of families that differ from LLaMA in more than a few fields."""
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 5,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
"""Those of mixtures of experts."""


def read_quickly(patch: pytest.MonkeyPatch) -> None:
    """Have gguf's reader, and transformers with it, take a plain view of a file's bytes, and make a model's names of
    tensors once; its `numpy.memmap` makes an object for each string, and the names are made for each module."""
    memmap = np.memmap
    patch.setattr("gguf.gguf_reader.np", _Plain(np, lambda *given, **named: np.asarray(memmap(*given, **named))))
    patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))


class _Plain:
    """numpy with another `memmap`."""

    def __init__(self, whole: Any, memmap: Callable[..., Array]) -> None:
        self._whole, self.memmap = whole, memmap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def fields_of(raw: dict[str, Any]) -> dict[str, Any]:
    """Fields of LLaMAConfig of a small model with these fields of config.json."""
    return dict(LLaMAConfig.from_dict(_RAW | raw).__dict__)


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.{kind}"
    return f"{NAMES[stem]}.{kind}"


def pairs_from_halves(weight: Array, heads: int) -> Array:
    """Rows as llama.cpp stores them, rotary partners side by side; row by row, so that it shares nothing with ours."""
    size = len(weight) // heads
    rows = []
    for head in range(heads):
        for i in range(size // 2):
            rows += [weight[head * size + i], weight[head * size + size // 2 + i]]
    return np.stack(rows)


def q8_0(weight: Array) -> tuple[Array, Array]:
    """Blocks of 32 values as one float16 scale and 32 signed bytes: the bytes, and the values that they stand for."""
    blocks = weight.reshape(-1, 32)
    scale = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float16)
    steps = np.round(blocks / scale.astype(np.float32)).astype(np.int8)
    packed = np.concatenate([scale.view(np.uint8), steps.view(np.uint8)], 1)
    values = steps.astype(np.float32) * scale.astype(np.float32)
    return packed.reshape(len(weight), -1), values.reshape(weight.shape)


def tokenizer_keys(folder: Path) -> dict[str, Any]:
    """Of a folder that `write_tokenizer` made."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    control = [token["id"] for token in raw["added_tokens"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(vocabulary, key=vocabulary.__getitem__),
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in range(len(vocabulary))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in raw["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }


def write_gguf(
    path: Path,
    model: LLaMA,
    tokenizer_dir: Path,
    kind: str = "F32",
    *,
    permute: Callable[[Array, int], Array] = pairs_from_halves,
    change_keys: Callable[[dict[str, Any]], Any] = lambda keys: None,
    change_tensors: Callable[[dict[str, Array | Packed]], Any] = lambda tensors: None,
    architecture: str = "llama",
    split: int = 0,
) -> Path:
    """Write `model` as llama.cpp does; with F16, BF16 and Q8_0 its matrices are stored so, and vectors in F32.

    With `split` tensors in a file at most, the parts get names with numbers.
    """
    config = model.config
    keys: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    if architecture == "llama":
        keys["rope.dimension_count"] = config.head_dim
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        keys["attention.key_length"] = keys["attention.value_length"] = config.head_dim
    keys = {f"{architecture}.{key}": value for key, value in keys.items()} | tokenizer_keys(tokenizer_dir)
    change_keys(keys)
    tensors: dict[str, Array | Packed] = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy().copy()
        if architecture == "llama" and "q_proj" in name:
            array = permute(array, config.num_attention_heads)
        elif architecture == "llama" and "k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        if array.ndim > 1 and kind == "F16":
            array = array.astype(np.float16)
        elif array.ndim > 1 and kind == "BF16":
            bits = torch.from_numpy(array).bfloat16().view(torch.uint8).numpy()
            tensors[gguf_name(name)] = bits, gguf.GGMLQuantizationType.BF16
            continue
        elif array.ndim > 1 and kind == "Q8_0":
            tensors[gguf_name(name)] = q8_0(array)[0], gguf.GGMLQuantizationType.Q8_0
            continue
        tensors[gguf_name(name)] = array
    change_tensors(tensors)
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split)
    write_keys(writer, keys)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_keys(writer: gguf.GGUFWriter, keys: dict[str, Any]) -> None:
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def stored_values(model: LLaMA, kind: str) -> LLaMA:
    """The model with its matrices rounded to what a file of this kind can hold."""
    for value in model.state_dict().values():
        if value.ndim > 1 and kind == "F16":
            value.copy_(value.half().float())
        elif value.ndim > 1 and kind == "BF16":
            value.copy_(value.bfloat16().float())
        elif value.ndim > 1 and kind == "Q8_0":
            value.copy_(torch.from_numpy(q8_0(value.numpy())[1]))
    return model


def write_model(folder: Path, model: LLaMA, dtype: str) -> Path:
    """A Hugging Face folder of a model, beside the tokenizer that is there."""
    state = {name: value.to(getattr(torch, dtype)) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    save_file(
        {name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(dtype)))
    return folder
