"""Metadata of a GGUF file: the keys that tell the configuration of a model, and their values for one.

Keys: the GGUF specification of ggml; rope_freqs: llama.cpp's conversion of Llama 3.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lit_llama.conversion.gguf.architectures import ARCHITECTURES, architecture, check_form, interval
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.rope import attention_factor, frequencies

ROPE_FREQS = "rope_freqs.weight"
"""Tensor with the divisors (D/2,) of the rotary frequencies of Llama 3."""

ROPE_LONG, ROPE_SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors with those of longrope, in long texts and in short ones."""
_STEP = 4
"""Of every so many layers of smollm3, llama.cpp rotates all but the last."""

# config.json -> <architecture>.*; llama.cpp cannot do without the first ones.
REQUIRED_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
RECURRENT_KEYS = INTERVAL, INNER, SECTIONS = "full_attention_interval", "ssm.inner_size", "rope.dimension_sections"
TEMPERATURE, LOG = "attention.temperature_scale", "rope.scaling.yarn_log_multiplier"
FACTOR = "rope.scaling.attn_factor"
EXPERT_COUNTS = {"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"}
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # of YaRN, by default
LLAMA3_CONTEXT = 8192  # that Llama 3 was first trained on


def llama3_divisors(config: LLaMAConfig) -> Tensor:
    """Compute the divisor of each rotary frequency: 1 for short waves, the factor for long ones: (D/2,)."""
    return frequencies(replace(config, rope_scaling=None)) / frequencies(config)


def to_metadata(config: LLaMAConfig) -> dict[str, Any]:
    """Return the keys of `<architecture>.*`, without the prefix.

    Raises:
        CheckpointError: llama.cpp has no word for the scaling of the positions, or does not rotate the same layers.
    """
    name = architecture(config)
    entry = ARCHITECTURES[name]
    check_form(config)
    if name == "smollm3" and config.no_rope_layers != (only := rotated_layers(config.num_hidden_layers)):
        raise CheckpointError(f"no_rope_layers is {config.no_rope_layers}, llama.cpp computes only {only}")
    values: dict[str, Any] = {key: getattr(config, name) for name, key in REQUIRED_KEYS.items()}
    if config.sliding_window and not entry.windows:
        values["context_length"] = min(config.max_position_embeddings, config.sliding_window)
    values |= {
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
    }
    values |= {key: float(getattr(config, field)) for field, key in entry.keys.items()}
    if config.model_type == entry.experts:
        values |= {key: getattr(config, field) for field, key in EXPERT_COUNTS.items()}
        width = config.moe_intermediate_size or config.intermediate_size
        values |= {entry.expert_width: width} if entry.expert_width else {}
    values |= {key: getattr(config, field) for field, key in entry.sizes.items()}
    if entry.recurrent:
        pairs = config.rotary_dim // 2  # shared by three positions, which of text are one
        sections = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3, 0]
        values |= {INTERVAL: interval(config), INNER: config.linear_channels[2], SECTIONS: sections}
    if (entry.windows or entry.unused_window) and config.sliding_window:
        values["attention.sliding_window"] = config.sliding_window
        if config.local_rope_theta not in (None, entry.local_rope_theta or config.rope_theta):
            values["rope.freq_base_swa"] = config.local_rope_theta
    scaling = config.rope_scaling
    if scaling is None:
        return values
    kind, original = (
        scaling.rope_type,
        {"rope.scaling.original_context_length": scaling.original_max_position_embeddings},
    )
    if kind == "llama3" and name == "llama":  # the tensor rope_freqs says the rest
        return values | (original if scaling.original_max_position_embeddings != LLAMA3_CONTEXT else {})
    if kind == "longrope":  # two tensors say the rest
        return values | original | {FACTOR: attention_factor(scaling)}
    if entry.temperature:
        values |= {TEMPERATURE: scaling.llama_4_scaling_beta or 0.0}
        if scaling.attention_factor == 1.0:
            values |= {LOG: 1.0}
            scaling = replace(scaling, attention_factor=None)
    known = attention_factor(replace(scaling, attention_factor=None))
    if kind not in ("linear", "yarn") or not scaling.truncate or scaling.attention_factor not in (None, known):
        raise CheckpointError(f"{scaling} has no form in GGUF for {name!r}")
    values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling.factor)}
    if kind == "yarn":
        betas = {name: float(getattr(scaling, name)) for name in BETAS}
        values |= original | ({} if betas == BETAS else {f"rope.scaling.yarn_{key}": betas[key] for key in betas})
    return values


def rope_tensors(config: LLaMAConfig) -> dict[str, Tensor]:
    """Return the tensors of rotary frequencies that a file has, by GGUF's names: (D/2,) in float32."""
    scaling = config.rope_scaling
    if scaling and scaling.rope_type == "llama3":
        return {ROPE_FREQS: llama3_divisors(config)}
    if scaling and scaling.rope_type == "longrope":
        return {ROPE_LONG: torch.tensor(scaling.long_factor), ROPE_SHORT: torch.tensor(scaling.short_factor)}
    return {}


def rotated_layers(layers: int) -> tuple[int, ...]:
    rotated = tuple(int((layer + 1) % _STEP != 0) for layer in range(layers))
    return () if all(rotated) else rotated
