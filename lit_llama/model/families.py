"""The model families: what config.json of Hugging Face says about each -> the fields of LLaMAConfig, and back.

A family is an entry of FAMILIES. Beyond this file its name decides nothing: the model is built from the fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_llama.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Family of models that a model_type stands for.

    Args:
        architecture: Name of its class in transformers.
        defaults: Fields that it has beside those of all families, with what an absent one means.
        implied: Fields of LLaMAConfig that are so whatever config.json says.
    """

    architecture: str
    defaults: Mapping[str, Any]
    implied: Mapping[str, Any] = field(default_factory=dict)


_QWEN2 = {
    "num_key_value_heads": 32,
    "head_dim": None,
    "max_position_embeddings": 32768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        defaults={
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults={
            "num_key_value_heads": 8,
            "head_dim": None,
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
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_QWEN2 | {"head_dim": 128, "attention_bias": False},
        implied={"use_qk_norm": True},
    ),
}
"""By model_type. The defaults are those of the configuration classes in transformers."""

# Fields that change the mathematics, with the only values that this model computes, unless the family has the field.
# Anything else in them is refused, because ignoring it would give wrong logits in silence.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "quantization_config": (None,),
    "compression_config": (None,),
    "auto_map": (None,),
    "per_layer_config": (None, {}),
    # attention
    "attention_bias": (False, None),
    "is_causal": (True, None),
    "use_sliding_window": (False, None),
    "sliding_window": (None,),
    "sliding_window_pattern": (None,),
    "dual_chunk_attention_config": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "qk_layernorm": (False, None),
    "use_qk_norm": (False, None),
    # positions
    "alibi": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rotary_pct": (1.0, None),
    "rope_interleaved": (False, None),
    "no_rope_layers": (None, []),
    "original_max_position_embeddings": (None,),
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

_COMMON = ("rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings", "pad_token_id")
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of LLaMAConfig out of a config.json, in the spelling of transformers 4 or 5.

    Raises:
        CheckpointError: A field is missing, or asks for mathematics this model does not compute.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise CheckpointError(f"model_type is {model_type!r}, expected one of {', '.join(FAMILIES)}")
    family = FAMILIES[model_type]
    decided = family.defaults.keys() | family.implied.keys()
    for name, allowed in _FIXED.items():
        if name not in decided and raw.get(name, allowed[0]) not in allowed:
            raise CheckpointError(f"{name} is {raw[name]!r}, only {allowed[0]!r} is implemented")
    if missing := [name for name in _SHAPE if name not in raw]:
        raise CheckpointError(f"missing {', '.join(missing)}")
    for name in _SHAPE:
        if type(raw[name]) is not int or raw[name] < 1:
            raise CheckpointError(f"{name} is {raw[name]!r:.60}, expected a positive whole number")
    own = {name: raw.get(name, default) for name, default in family.defaults.items()}
    heads, bias, eos = raw["num_attention_heads"], own.get("attention_bias") or False, own["eos_token_id"]
    theta, scaling = _read_rope(raw, own["max_position_embeddings"])
    window, layer_types = _read_window(raw, own)
    return {
        "model_type": model_type,
        **{name: raw[name] for name in _SHAPE},
        "num_key_value_heads": own["num_key_value_heads"] or heads,
        "head_dim": own["head_dim"] or raw["hidden_size"] // heads,
        "max_position_embeddings": own["max_position_embeddings"],
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": own.get("mlp_bias") or False,
        "sliding_window": window,
        "layer_types": layer_types,
        "tie_word_embeddings": raw.get("tie_word_embeddings") or False,
        "bos_token_id": own["bos_token_id"],
        "eos_token_id": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        "pad_token_id": raw.get("pad_token_id"),
        **family.implied,
    }


def write_fields(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Write fields of LLaMAConfig, as plain values, as a config.json that transformers 4 and 5 both read."""
    family = FAMILIES[fields["model_type"]]
    eos, window, scaling = list(fields["eos_token_id"]), fields["sliding_window"], fields["rope_scaling"]
    types = list(fields["layer_types"]) or [_FULL if window is None else _SLIDING] * fields["num_hidden_layers"]
    if scaling:
        must, may = ROPE_KEYS[scaling["rope_type"]]
        scaling = {name: scaling[name] for name in ("rope_type", *must, *may) if scaling[name] is not None}
    values = {
        **fields,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "rope_scaling": scaling,
        "use_sliding_window": window is not None,
        "max_window_layers": types.count(_FULL),  # older releases know this, newer ones layer_types
        "layer_types": types,
    }
    return {
        "architectures": [family.architecture],
        "model_type": fields["model_type"],
        **{name: values[name] for name in (*_SHAPE, *family.defaults, *_COMMON)},
        "hidden_act": "silu",
        "torch_dtype": dtype,
    }


def _read_window(raw: Mapping[str, Any], own: Mapping[str, Any]) -> tuple[int | None, tuple[str, ...]]:
    """Size of the sliding window, and the types of the layers unless all have it."""
    window = own.get("sliding_window") if own.get("use_sliding_window", True) else None
    if window is None and not raw.get("layer_types"):
        return None, ()
    layers = range(raw["num_hidden_layers"])
    first = len(layers) if window is None else own.get("max_window_layers", 0)
    usual = [_FULL if layer < first else _SLIDING for layer in layers]
    types = raw.get("layer_types") or usual
    # Families without this field are computed as usual whatever it says, so it may not say anything else.
    if types != usual and ("layer_types" not in own or window is None or set(types) - {_FULL, _SLIDING}):
        kinds = ", ".join(sorted(set(types)))
        raise CheckpointError(f"layer_types has {kinds}: not implemented for this family with sliding_window {window}")
    if _SLIDING not in types:
        return None, ()
    return window, tuple(types) if _FULL in types else ()


def _read_rope(raw: Mapping[str, Any], context: int) -> tuple[float, dict[str, Any] | None]:
    """Base of the frequencies, and the fields of RopeScaling.

    transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters with both inside.
    """
    ropes = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    scalings = [_read_scaling(name, rope, context) for name, rope in ropes.items()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise CheckpointError(f"rope_scaling {ropes['rope_scaling']} contradicts rope_parameters")
    thetas = set[float]()
    for source in (raw, *ropes.values()):
        if (theta := source.get("rope_theta")) is not None:
            if isinstance(theta, bool) or not isinstance(theta, int | float):
                raise CheckpointError(f"rope_theta is {theta!r:.60}, expected a number such as 10000")
            thetas.add(theta)
    if len(thetas) > 1:
        raise CheckpointError(f"rope_theta is given twice: {' and '.join(map(str, sorted(thetas)))}")
    return float(thetas.pop()) if thetas else 10000.0, scalings[0] if scalings else None


def _read_scaling(name: str, rope: Mapping[str, Any], context: int) -> dict[str, Any] | None:
    if layers := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise CheckpointError(f"{name} differs by layer ({', '.join(layers)}), which is not implemented")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_KEYS:
        raise CheckpointError(f"{name}: rope_type is {kind!r}, expected one of {', '.join(ROPE_KEYS)}")
    given = {key: value for key, value in rope.items() if value is not None}
    given = {key: value for key, value in given.items() if key not in ("rope_type", "type", "rope_theta")}
    if given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    must, may = ROPE_KEYS[kind]
    for key, value in given.items():
        if key not in must + may:
            raise CheckpointError(f"{name}: {key} is {value!r}, which is not implemented for rope_type {kind!r}")
    if missing := [key for key in must if key not in given]:
        raise CheckpointError(f"{name}: rope_type {kind!r} needs {', '.join(missing)}")
    return {"rope_type": kind, "original_max_position_embeddings": context, **given} if must else None
