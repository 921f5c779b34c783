"""Tiny models of the families, made and saved by transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
"""No two sizes are equal by chance."""

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
# Settings as transformers 5 spells them; fields of ours which, changed, must change the logits visibly; what fused
# layers say of the layers that they leave.
MODELS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], dict[str, int]]] = {
    "smollm3": (
        {"model_type": "smollm3", "no_rope_layer_interval": 2, "num_hidden_layers": 3},
        [{"no_rope_layers": ()}, {"no_rope_layers": (0, 1, 1)}],
        {"layers without rotary positions": 1},
    ),
    "smollm3, window": (
        {
            "model_type": "smollm3",
            "no_rope_layers": [0, 1, 0],
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 7,
            "tie_word_embeddings": False,
        },
        [{"layer_types": (FULL, SLIDING, SLIDING)}],
        {"layers without rotary positions": 2},
    ),
    "granite": (
        {
            "model_type": "granite",
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.5,
            "residual_multiplier": 0.3,
            "logits_scaling": 0.25,
        },
        [
            {"embedding_multiplier": 1.0},
            {"attention_multiplier": None},
            {"residual_multiplier": 1.0},
            {"logits_scaling": 1.0},
        ],
        {"scale of the scores": 2},
    ),
    "granite, tied, biases": (
        {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        [{"attention_multiplier": None}],
        {"scale of the scores": 2},
    ),
    "olmo2": (
        {"model_type": "olmo2"},
        [{"layer_norms": ("post_attention_layernorm", "", "post_feedforward_layernorm", "")}],
        {"norms elsewhere than before attention and MLP": 2},
    ),
    "olmo3": (
        {"model_type": "olmo3", "num_hidden_layers": 3, "sliding_window": 7, "layer_types": [SLIDING, FULL, SLIDING]}
        | {
            "rope_parameters": {
                FULL: {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 5e3},
                SLIDING: {"rope_type": "default", "rope_theta": 1e3},
            }
        },
        [{"local_rope_theta": None}, {"local_rope_theta": 5e3}, {"rope_scaling": None}, {"sliding_window": 8}],
        {"two kinds of rotary positions": 3},
    ),
    "olmo3, as published": (
        {"model_type": "olmo3", "num_hidden_layers": 4, "sliding_window": 7},
        [{"layer_types": (FULL, SLIDING, SLIDING, SLIDING)}],
        {"two kinds of rotary positions": 4},
    ),
    "phi3": (
        {"model_type": "phi3", "sliding_window": 9},
        [{"sliding_window": 8}],
        {"projections that are one": 2},
    ),
    "phi3, long": (
        {
            "model_type": "phi3",
            "max_position_embeddings": 256,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.3],
                "long_factor": [2.0, 3.0, 5.0],
            },
        },
        [{"rope_scaling": None}],
        {"partly rotated heads": 2},
    ),
    "ministral3": (
        {
            "model_type": "ministral3",
            "head_dim": 8,
            "sliding_window": 100,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "max_position_embeddings": 64,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.5,
            },
        },
        [{"rope_scaling": None}, {"sliding_window": None}],
        {"queries scaled by position": 2},
    ),
    "glm": (
        {"model_type": "glm", "head_dim": 8},
        [{"rope_interleaved": False}, {"partial_rotary_factor": 1.0}],
        {"partly rotated heads": 2},
    ),
    "glm4": (
        {"model_type": "glm4", "head_dim": 8, "attention_bias": False, "rope_parameters": {"rope_theta": 1e3}},
        [{"layer_norms": ("input_layernorm", "", "post_attention_layernorm", "")}],
        {"partly rotated heads": 2},
    ),
    "gemma2": (
        {
            "model_type": "gemma2",
            "head_dim": 12,
            "query_pre_attn_scalar": 7,
            "attn_logit_softcapping": 1.5,
            "final_logit_softcapping": 2.0,
            "sliding_window": 7,
        },
        [
            {"query_pre_attn_scalar": None},
            {"attn_logit_softcapping": None},
            {"final_logit_softcapping": None},
            {"layer_types": (FULL, SLIDING)},
            {"norm_offset": 0.0},
            {"hidden_act": "silu"},
            {"embedding_multiplier": 1.0},
        ],
        {"norms elsewhere than before attention and MLP": 2},
    ),
    "gemma2, no bounds": (
        {"model_type": "gemma2", "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 8},
        [{"attn_logit_softcapping": 1.0}],
        {"norms elsewhere than before attention and MLP": 2},
    ),
    "gemma3": (
        {
            "model_type": "gemma3_text",
            "num_hidden_layers": 3,
            "head_dim": 12,
            "sliding_window": 7,
            "layer_types": [SLIDING, FULL, SLIDING],
            "tie_word_embeddings": False,
            "rope_parameters": {
                FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                SLIDING: {"rope_type": "default", "rope_theta": 1e3},
            },
        },
        [{"local_rope_theta": 1e6}, {"rope_scaling": None}, {"query_pre_attn_scalar": None}],
        {"two kinds of rotary positions": 3},
    ),
    "gemma3, as published": (
        {"model_type": "gemma3_text", "num_hidden_layers": 6, "head_dim": 8, "sliding_window": 7},
        [{"layer_types": (FULL, *[SLIDING] * 5)}],
        {"two kinds of rotary positions": 6},
    ),
    "qwen3_moe": (
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 3,
            "head_dim": 8,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
        },
        [{"num_experts_per_tok": 1}, {"norm_topk_prob": False}],
        {"mixtures of experts": 2},
    ),
    "qwen3_moe, every second layer": (
        {
            "model_type": "qwen3_moe",
            "num_hidden_layers": 3,
            "num_experts": 4,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
        },
        [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
        {"mixtures of experts": 1},
    ),
    "mixtral": (
        {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7},
        [{"num_experts_per_tok": 3}, {"norm_topk_prob": False}, {"sliding_window": 8}],
        {"mixtures of experts": 2},
    ),
    "qwen3_5": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 3,
            "head_dim": 16,
            "layer_types": [LINEAR, FULL, LINEAR],
            "max_position_embeddings": 256,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 6,
            "linear_key_head_dim": 12,
            "linear_value_head_dim": 10,
            "rope_parameters": {"rope_theta": 1e3, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
        },
        [{"partial_rotary_factor": 1.0}, {"use_qk_norm": False}, {"norm_offset": 0.0}],
        {"recurrent layers": 2, "gates of the attention": 1},
    ),
    "qwen3_5, as published": (
        {
            "model_type": "qwen3_5_text",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "max_position_embeddings": 256,
            "linear_conv_kernel_dim": 3,
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        [{"attention_bias": False, "attention_out_bias": False}],
        {"recurrent layers": 3, "gates of the attention": 1},
    ),
}


def random_ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 384, (count,), generator=torch.Generator().manual_seed(seed))


def write_model(folder: Path, settings: dict[str, Any]) -> Any:
    """A random model that transformers makes and saves, large enough in all its weights for differences to show."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**settings, attn_implementation="eager")
    theirs = AutoModelForCausalLM.from_config(config).to(torch.float32).eval()
    torch.manual_seed(0)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15 if parameter.ndim > 1 else 0.5)
    theirs.save_pretrained(folder)
    return theirs
