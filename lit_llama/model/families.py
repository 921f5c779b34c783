"""The model families: what config.json of Hugging Face says about each, and what is so without saying.

A family is an entry of FAMILIES. Beyond this file its name decides nothing: config_json.py turns the entry into fields
of LLaMAConfig, and the model is built from those.
"""

from typing import Any

from lit_llama.model.family import (
    Family,
    full_by_interval,
    full_by_pattern,
    full_every,
    full_first,
    sliding_without_positions,
)
from lit_llama.model.rope_scaling import LLAMA4_YARN, LONGROPE

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
_OLMO2 = {
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 50279,
    "pad_token_id": 1,
    "attention_bias": False,
}
_NORMS_AFTER = {
    "layer_norms": ("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    "use_qk_norm": True,
    "joined_qk_norm": True,
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
}
_GEMMA_FIXED = {"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh", None)}
_GEMMA_IMPLIED = {
    "hidden_act": "gelu_pytorch_tanh",
    "norm_offset": 1.0,
    "layer_norms": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "embedding_multiplier": lambda raw: raw["hidden_size"] ** 0.5,
}
_GLM = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "bos_token_id": None,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}
_GLM_IMPLIED = {"joined_gate_up": True, "attention_out_bias": False, "rope_interleaved": True}
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
        layer_type=full_first,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN2 | {"head_dim": 128, "attention_bias": False},
        implied={"use_qk_norm": True},
        layer_type=full_first,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
            "attention_bias": False,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": False,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
        },
        implied={"use_qk_norm": True},
        aliases={"num_experts": "num_local_experts"},
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "sliding_window": None,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        implied={"expert_block": "block_sparse_moe", "expert_projections": ("w1", "w3", "w2")},
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
        layer_type=sliding_without_positions,
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults=_LLAMA
        | {
            "embedding_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
    ),
    "olmo2": Family(architecture="Olmo2ForCausalLM", defaults=_OLMO2, implied=_NORMS_AFTER),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        defaults=_OLMO2 | {"rope_theta": 500000.0, "sliding_window": 4096, "layer_types": None},
        implied=_NORMS_AFTER,
        layer_type=full_every(4),
        sliding_theta="rope_theta",
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults={
            "num_key_value_heads": None,
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "bos_token_id": 1,
            "eos_token_id": 32000,
            "pad_token_id": 32000,
            "sliding_window": None,
            "partial_rotary_factor": 1.0,
        },
        implied={"joined_qkv": True, "joined_gate_up": True},
        ropes=LONGROPE,
        ignored=("auto_map",),  # to the code that transformers has as well
        rope_aliases={"su": "longrope"},
    ),
    "ministral3": Family(
        architecture="Ministral3ForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1000000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 11,
            "sliding_window": None,
        },
        ropes=LLAMA4_YARN,
        rope_ignored=("max_position_embeddings",),
    ),
    "glm": Family(architecture="GlmForCausalLM", defaults=_GLM, implied=_GLM_IMPLIED),
    "glm4": Family(
        architecture="Glm4ForCausalLM",
        defaults=_GLM,
        implied=_GLM_IMPLIED
        | {
            "layer_norms": (
                "input_layernorm",
                "post_self_attn_layernorm",
                "post_attention_layernorm",
                "post_mlp_layernorm",
            )
        },
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=_GEMMA
        | {"max_position_embeddings": 8192, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        implied=_GEMMA_IMPLIED,
        fixed=_GEMMA_FIXED,
        layer_type=full_every(2),
    ),
    "qwen3_5_text": Family(
        architecture="Qwen3_5ForCausalLM",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 32768,
            "bos_token_id": None,
            "eos_token_id": None,
            "attention_bias": False,
            "partial_rotary_factor": 0.25,
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "full_attention_interval": 4,
            "layer_types": None,
        },
        implied={"use_qk_norm": True, "norm_offset": 1.0, "attention_gate": True},
        fixed={"attn_output_gate": (True, None)},
        layer_type=full_by_interval,
        recurrent=True,
        rope_ignored=("mrope_section", "mrope_interleaved"),  # of text alone, the three positions are one
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults=_GEMMA
        | {
            "max_position_embeddings": 131072,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
            "final_logit_softcapping": None,
        },
        implied=_GEMMA_IMPLIED | {"use_qk_norm": True},
        fixed=_GEMMA_FIXED,
        layer_type=full_by_pattern,
        sliding_theta="rope_local_base_freq",
    ),
}
"""By model_type. The defaults are those of the configuration classes in transformers."""

WITH_VISION: dict[str, tuple[str, dict[str, int]]] = {
    "gemma3": (
        "gemma3_text",
        {
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
    ),
    "mistral3": ("mistral", {}),
    "qwen3_5": (
        "qwen3_5_text",
        {
            "vocab_size": 248320,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
        },
    ),
}
"""Models of text and images, whose text model is read alone: its model_type unless text_config says another, and what
an absent field of that means.
"""

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
    "router_jitter_noise": (0.0, None),
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
