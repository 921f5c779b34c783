"""config.json of every family as published, and the fields that must be read from it."""

from typing import Any

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
# What one release or another wrote beside the mathematics.
V4: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
}
GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
LLAMA = V4 | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "mlp_bias": False}
MISTRAL = V4 | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2}
QWEN2 = V4 | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
QWEN2 |= {"rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "vocab_size": 151936}
LLAMA3_1 = LLAMA | {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256}
ROPE3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def shape(layers: int, hidden: int, heads: int, groups: int, intermediate: int, context: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "intermediate_size": intermediate,
        "max_position_embeddings": context,
    }


# config.json as published, and what must be read from it.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "LLaMA 1 7B": (
        {
            "_name_or_path": "",
            "architectures": ["LLaMAForCausalLM"],
            "bos_token_id": 0,
            "eos_token_id": 1,
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "initializer_range": 0.02,
            "max_sequence_length": 2048,
            "model_type": "llama",
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pad_token_id": -1,
            "rms_norm_eps": 1e-06,
            "torch_dtype": "float16",
            "transformers_version": "4.27.0.dev0",
            "use_cache": True,
            "vocab_size": 32000,
        },
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 2048, "rope_theta": 10000.0},
    ),
    "LLaMA 2 70B": (
        LLAMA | shape(80, 8192, 64, 8, 28672, 4096) | {"rms_norm_eps": 1e-05, "vocab_size": 32000, "pretraining_tp": 1},
        {"head_dim": 128, "context_length": 4096, "bos_token_id": 1, "eos_token_id": (2,)},
    ),
    "Llama 3 8B": (
        LLAMA3_1 | shape(32, 4096, 32, 8, 14336, 8192) | {"bos_token_id": 128000, "eos_token_id": 128001},
        {"rope_theta": 500000.0, "rope_scaling": None},
    ),
    "Llama 3.1 8B": (
        LLAMA3_1
        | shape(32, 4096, 32, 8, 14336, 131072)
        | {"eos_token_id": [128001, 128008, 128009], "rope_scaling": {"factor": 8.0, "rope_type": "llama3"} | ROPE3},
        {"eos_token_id": (128001, 128008, 128009), "context_length": 131072},
    ),
    "Llama 3.2 1B": (
        LLAMA3_1
        | shape(16, 2048, 32, 8, 8192, 131072)
        | {"head_dim": 64, "tie_word_embeddings": True}
        | {"rope_scaling": {"factor": 32.0, "rope_type": "llama3"} | ROPE3},
        {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "CodeLlama 34B": (
        LLAMA
        | shape(48, 8192, 64, 8, 22016, 16384)
        | {"rope_theta": 1000000, "rms_norm_eps": 1e-05, "vocab_size": 32000},
        {"rope_theta": 1000000.0},
    ),
    "TinyLlama": (
        LLAMA | shape(22, 2048, 32, 4, 5632, 2048) | {"rms_norm_eps": 1e-05, "vocab_size": 32000},
        {"head_dim": 64, "num_key_value_heads": 4},
    ),
    "Vicuna 1.5 16k": (
        LLAMA
        | shape(32, 4096, 32, 32, 11008, 4096)
        | {"max_sequence_length": 16384, "pad_token_id": 0, "rms_norm_eps": 1e-05, "vocab_size": 32000}
        | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "_flash_attn_2_enabled": False},
        {"context_length": 16384, "max_position_embeddings": 4096},
    ),
    "Ziya 13B": (
        {name: LLAMA[name] for name in ("architectures", "model_type", "hidden_act", "torch_dtype")}
        | shape(40, 5120, 40, 40, 13824, 2048)
        | {"max_sequence_length": 2048, "pad_token_id": 0, "rms_norm_eps": 1e-06, "vocab_size": 39424},
        {"vocab_size": 39424, "num_key_value_heads": 40},
    ),
    "Yi 34B": (
        LLAMA
        | shape(60, 7168, 56, 8, 20480, 4096)
        | {"rope_theta": 5000000.0, "rms_norm_eps": 1e-05, "vocab_size": 64000, "pad_token_id": 0},
        {"rope_theta": 5000000.0, "head_dim": 128},
    ),
    "SmolLM2 135M": (
        LLAMA
        | shape(30, 576, 9, 3, 1536, 8192)
        | {"is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "rms_norm_eps": 1e-05}
        | {"vocab_size": 49152, "tie_word_embeddings": True, "transformers.js_config": {"kv_cache_dtype": {}}},
        {"head_dim": 64, "tie_word_embeddings": True},
    ),
    "Mistral 7B 0.1": (
        MISTRAL
        | shape(32, 4096, 32, 8, 14336, 32768)
        | {"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 32000},
        {"sliding_window": 4096, "layer_types": (), "attention_bias": False, "context_length": 32768},
    ),
    "Mistral 7B 0.3": (
        MISTRAL
        | shape(32, 4096, 32, 8, 14336, 32768)
        | {"rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "vocab_size": 32768},
        {"sliding_window": None},
    ),
    "Mistral Nemo": (
        MISTRAL
        | shape(40, 5120, 32, 8, 14336, 131072)
        | {"head_dim": 128, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None}
        | {"vocab_size": 131072},
        {"head_dim": 128},
    ),
    "Qwen 2.5 0.5B": (
        QWEN2
        | shape(24, 896, 14, 2, 4864, 32768)
        | {"max_window_layers": 21, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False}
        | {"bos_token_id": 151643, "eos_token_id": 151645},
        {
            "attention_bias": True,
            "attention_out_bias": False,
            "mlp_bias": False,
            "sliding_window": None,
            "head_dim": 64,
        },
    ),
    "Qwen 2.5 7B, prolonged": (
        QWEN2
        | shape(28, 3584, 28, 4, 18944, 32768)
        | {"max_window_layers": 28, "sliding_window": 131072, "vocab_size": 152064}
        | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
        {"context_length": 131072, "sliding_window": None, "bos_token_id": None, "eos_token_id": ()},
    ),
    "Qwen 2 with a window": (
        QWEN2
        | shape(4, 3584, 28, 4, 18944, 32768)
        | {"max_window_layers": 3, "sliding_window": 4096, "use_sliding_window": True},
        {"sliding_window": 4096, "layer_types": ("full_attention",) * 3 + ("sliding_attention",)},
    ),
    "SmolLM 3 3B": (
        LLAMA
        | shape(36, 2048, 16, 4, 11008, 65536)
        | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "vocab_size": 128256}
        | {"no_rope_layers": [1, 1, 1, 0] * 9, "no_rope_layer_interval": 4, "layer_types": [FULL] * 36}
        | {"max_window_layers": 28, "sliding_window": None, "use_sliding_window": False, "rope_theta": 5000000.0}
        | {"rms_norm_eps": 1e-06, "pretraining_tp": 2, "tie_word_embeddings": True}
        | {"bos_token_id": 128000, "eos_token_id": 128012, "pad_token_id": 128004},
        {"no_rope_layers": (1, 1, 1, 0) * 9, "sliding_window": None, "rope_theta": 5000000.0},
    ),
    "Granite 3.3 2B": (
        LLAMA
        | shape(40, 2048, 32, 8, 8192, 131072)
        | {"architectures": ["GraniteForCausalLM"], "model_type": "granite", "attention_dropout": 0.0}
        | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0}
        | {"residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_theta": 10000000.0, "tie_word_embeddings": True}
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 49159},
        {"attention_scale": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22},
    ),
    "OLMo 2 7B": (
        V4
        | shape(32, 4096, 32, 32, 11008, 4096)
        | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False}
        | {"bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277, "vocab_size": 100352}
        | {"rms_norm_eps": 1e-06, "rope_theta": 500000},
        {"use_qk_norm": True, "joined_qk_norm": True, "eos_token_id": (100257,), "local_rope_theta": None},
    ),
    "OLMo 3 7B": (
        V4
        | shape(32, 4096, 32, 32, 11008, 65536)
        | {"architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False}
        | {"bos_token_id": None, "eos_token_id": 100257, "pad_token_id": 100277, "vocab_size": 100278}
        | {"rms_norm_eps": 1e-06, "rope_theta": 500000, "sliding_window": 4096}
        | {"layer_types": ([SLIDING] * 3 + [FULL]) * 8}
        | {
            "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0}
            | {"original_max_position_embeddings": 8192, "rope_type": "yarn"}
        },
        {"sliding_window": 4096, "local_rope_theta": 500000.0, "rope_theta": 500000.0},
    ),
    "Phi 3 mini 4k": (
        V4
        | shape(32, 3072, 32, 32, 8192, 4096)
        | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0}
        | {"auto_map": {"AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}, "resid_pdrop": 0.0}
        | {"bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, "vocab_size": 32064}
        | {"original_max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_theta": 10000.0}
        | {"sliding_window": 2047},
        {"sliding_window": 2047, "joined_qkv": True, "rope_scaling": None, "head_dim": 96},
    ),
    "Phi 4 mini": (
        V4
        | shape(32, 3072, 24, 8, 8192, 131072)
        | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0}
        | {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "resid_pdrop": 0.0}
        | {"bos_token_id": 199999, "eos_token_id": 199999, "pad_token_id": 199999, "vocab_size": 200064}
        | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-05}
        | {"rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.5] * 48}},
        {"rotary_dim": 96, "context_length": 131072, "tie_word_embeddings": True},
    ),
    "GLM 4 9B 0414": (
        V4
        | shape(40, 4096, 32, 2, 13696, 32768)
        | {"architectures": ["Glm4ForCausalLM"], "model_type": "glm4", "attention_bias": False, "head_dim": 128}
        | {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "partial_rotary_factor": 0.5}
        | {"rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 151552},
        {"rotary_dim": 64, "rope_interleaved": True, "joined_gate_up": True, "attention_bias": False},
    ),
    "Gemma 2 2B": (
        V4
        | shape(26, 2304, 8, 4, 9216, 8192)
        | {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "attention_bias": False, "head_dim": 256}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}
        | GELU
        | {"bos_token_id": 2, "eos_token_id": [1, 107], "pad_token_id": 0, "rms_norm_eps": 1e-06, "rope_theta": 10000.0}
        | {"sliding_window": 4096, "vocab_size": 256000, "tie_word_embeddings": True},
        {"embedding_multiplier": 48.0, "attention_scale": 0.0625, "layer_types": (SLIDING, FULL) * 13},
    ),
    "Gemma 3 1B": (
        V4
        | shape(26, 1152, 4, 1, 6912, 32768)
        | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attention_bias": False}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 256}
        | GELU
        | {"head_dim": 256}
        | {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0, "rms_norm_eps": 1e-06}
        | {"rope_local_base_freq": 10000, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6}
        | {"vocab_size": 262144, "tie_word_embeddings": True},
        {"sliding_window": 512, "local_rope_theta": 10000.0, "rope_theta": 1000000.0, "norm_offset": 1.0},
    ),
    "GLM 4 9B": (
        V4
        | shape(40, 4096, 32, 2, 13696, 131072)
        | {"architectures": ["GlmForCausalLM"], "model_type": "glm", "attention_bias": True, "head_dim": 128}
        | {"eos_token_id": [151329, 151336, 151338], "pad_token_id": 151329, "rms_norm_eps": 1.5625e-07}
        | {"rope_theta": 10000.0, "vocab_size": 151552},
        {"rotary_dim": 64, "attention_bias": True, "attention_out_bias": False},
    ),
    "Qwen 3 0.6B": (
        QWEN2
        | shape(28, 1024, 16, 8, 3072, 40960)
        | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128}
        | {"max_window_layers": 28, "sliding_window": None, "tie_word_embeddings": True, "eos_token_id": 151645},
        {"head_dim": 128, "use_qk_norm": True, "attention_bias": False, "attention_out_bias": False},
    ),
    "Qwen 3.5 2B": (
        V4
        | shape(24, 2048, 8, 2, 6144, 262144)
        | {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "attention_bias": False}
        | {"attn_output_gate": True, "full_attention_interval": 4, "layer_types": ([LINEAR] * 3 + [FULL]) * 6}
        | {"linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
        | {"linear_num_key_heads": 16, "linear_num_value_heads": 16, "mamba_ssm_dtype": "float32"}
        | {"mlp_only_layers": [], "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False}
        | {"eos_token_id": 248044, "head_dim": 256, "rms_norm_eps": 1e-06, "vocab_size": 248320}
        | {"tie_word_embeddings": True}
        | {
            "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "rope_type": "default"}
            | {"rope_theta": 10000000, "partial_rotary_factor": 0.25}
        },
        {"layer_types": ((LINEAR,) * 3 + (FULL,)) * 6, "rotary_dim": 64, "rope_theta": 1e7, "attention_gate": True}
        | {"linear_channels": (2048, 2048, 2048), "norm_offset": 1.0, "sliding_window": None, "use_qk_norm": True},
    ),
}
