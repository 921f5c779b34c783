"""The model families: what config.json of Hugging Face says about each, and what is so without saying.

A family is an entry of FAMILIES. Beyond this file its name decides nothing: config_json.py turns the entry into fields
of LLaMAConfig, and the model is built from those.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
"""Types of layers, as config.json names them."""

Own = Mapping[str, Any]
"""Fields of a family as a config.json has them, absent ones by their defaults."""


def _all_sliding(own: Own, layer: int) -> str:
    return SLIDING


def _full_first(own: Own, layer: int) -> str:
    return FULL if layer < own["max_window_layers"] else SLIDING


def _sliding_without_positions(own: Own, layer: int) -> str:
    rotated = own["no_rope_layers"]
    step = own["no_rope_layer_interval"]
    return FULL if (rotated[layer] if rotated else (layer + 1) % step) else SLIDING


def _full_every(step: int) -> Callable[[Own, int], str]:
    def kind(own: Own, layer: int) -> str:
        return SLIDING if (layer + 1) % step else FULL

    return kind


@dataclass(frozen=True, kw_only=True)
class Family:
    """Family of models that a model_type stands for.

    Args:
        architecture: Name of its class in transformers.
        defaults: Fields that it has beside those of all families, with what an absent one means.
        implied: Fields of LLaMAConfig that are so whatever config.json says; a function finds one from the fields.
        fixed: Fields in which it allows other values than FIXED; the first is the one that is written.
        layer_type: Type of a layer where config.json has a window and no layer_types.
        sliding_theta: Name of the field with the base of the rotary frequencies of layers with a window, which are
            not stretched; "" where all layers turn alike.
        ropes: Rope types that it may have; empty for all but longrope.
    """

    architecture: str
    defaults: Mapping[str, Any]
    implied: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    layer_type: Callable[[Own, int], str] = _all_sliding
    sliding_theta: str = ""
    ropes: tuple[str, ...] = ()


ALL: dict[str, Any] = {
    "head_dim": None,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}
"""Fields of all families, with what an absent one means unless the family says otherwise."""

_LLAMA = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_bias": False,
    "mlp_bias": False,
}
_QWEN2 = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
FAMILIES = {
    "llama": Family(architecture="LlamaForCausalLM", defaults=_LLAMA),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sliding_window": 4096,
        },
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_QWEN2,
        implied={"attention_bias": True},
        layer_type=_full_first,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN2 | {"head_dim": 128, "attention_bias": False},
        implied={"use_qk_norm": True},
        layer_type=_full_first,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=_LLAMA
        | {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "tie_word_embeddings": True,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "pad_token_id": 128004,
            "no_rope_layers": None,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
            "layer_types": None,
        },
        layer_type=_sliding_without_positions,
    ),
}
"""By model_type. The defaults are those of the configuration classes in transformers."""

FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": (None, "silu"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
    "per_layer_config": (None, {}),
    # attention
    "attention_bias": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "sliding_window_pattern": (None,),
    "dual_chunk_attention_config": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "clip_qkv": (None,),
    "qk_layernorm": (False, None),
    "use_qk_norm": (False, None),
    # positions
    "alibi": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rotary_pct": (1.0, None),
    "rope_interleaved": (False, None),
    "no_rope_layers": (None, []),
    "original_max_position_embeddings": (None,),
    "rope_local_base_freq": (None,),
    # MLP and experts
    "mlp_bias": (False, None),
    "num_local_experts": (None, 0),
    "num_experts": (None, 0),
    "n_routed_experts": (None, 0),
    # scales
    "logits_soft_cap": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
}
"""Fields that change the mathematics, with the only values that this model computes, unless the family has the field.
Anything else in them is refused, because ignoring it would give wrong logits in silence."""

ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
}
"""Rope types, with the keys that each must have and those it may have."""
