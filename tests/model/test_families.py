"""config.json of every family: as published, in both spellings, written again, and what absent fields mean."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from published_configs import FULL, PUBLISHED, SLIDING

from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.families import FAMILIES


@pytest.mark.parametrize(("raw", "wanted"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_are_read_in_both_spellings(
    raw: dict[str, Any], wanted: dict[str, Any], tmp_path: Path
) -> None:
    """As published, and as transformers 5 saves it again; catches a harmless field that is refused, a field that is
    looked for in one spelling only, a default of another family."""
    from transformers import AutoConfig

    config = LLaMAConfig.from_dict(raw)
    assert {name: getattr(config, name) for name in wanted} == wanted
    theirs = AutoConfig.for_model(**raw | {"pad_token_id": None})
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved and "rope_theta" not in saved, "this is not the newer spelling"
    assert LLaMAConfig.from_folder(tmp_path) == replace(config, pad_token_id=None)


@pytest.mark.parametrize("raw", [raw for raw, _ in PUBLISHED.values()], ids=PUBLISHED)
def test_what_is_written_means_the_same_to_transformers(raw: dict[str, Any]) -> None:
    """Every field that transformers has after reading ours, against the published file; catches one that is written
    under a name, or a model_type, under which nobody looks for it."""
    from transformers import AutoConfig

    config = LLaMAConfig.from_dict(raw)
    ours = json.loads(json.dumps(config.to_dict(raw["torch_dtype"])))
    assert LLaMAConfig.from_dict(ours) == config
    assert ours["rope_theta"] == config.rope_theta, "transformers 4 looks for it nowhere else"
    plain = {"pad_token_id": None}  # LLaMA 1 has -1, which transformers 5 does not take
    if not config.sliding_window:  # how large a window is that nobody looks through is not kept
        plain |= {"sliding_window": None, "max_window_layers": 0}
    found, wanted = (AutoConfig.for_model(**given | plain).to_dict() for given in (ours, raw))
    wanted["rope_parameters"].pop("type", None)
    for ropes in (found, wanted):
        ropes |= ropes.pop("rope_parameters")
        for kind in (FULL, SLIDING):  # where these differ
            ropes |= {f"{kind} {name}": value for name, value in ropes.pop(kind, {}).items()}
    same = wanted.keys() & found.keys() - {"architectures", "transformers_version"}
    assert {name: found[name] for name in same} == {name: wanted[name] for name in same}
    assert found["architectures"] == [FAMILIES[config.model_type].architecture]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_absent_fields_mean_what_they_mean_to_transformers(model_type: str) -> None:
    """Catches defaults of our own: Mistral's 8 key heads and its window, Qwen3's heads of 128."""
    from transformers import AutoConfig

    raw = {"model_type": model_type, "vocab_size": 9, "hidden_size": 512, "intermediate_size": 9}
    raw |= {"num_hidden_layers": 30, "num_attention_heads": 32}
    theirs, config = AutoConfig.for_model(**raw), LLaMAConfig.from_dict(raw)
    for name in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.head_dim == (getattr(theirs, "head_dim", None) or 512 // 32)
    ropes = theirs.rope_parameters
    assert config.rope_theta == ropes.get(FULL, ropes)["rope_theta"]
    assert config.local_rope_theta == ropes.get(SLIDING, {}).get("rope_theta")
    assert config.sliding_window == getattr(theirs, "sliding_window", None)
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert (config.bos_token_id, config.eos_token_id) == (theirs.bos_token_id, tuple(end for end in ends if end))
    assert FAMILIES[model_type].architecture == type(theirs).__name__.replace("Text", "").replace(
        "Config", "ForCausalLM"
    )
    for name in ("use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias"):
        assert FAMILIES[model_type].defaults.get(name) == getattr(theirs, name, None), name
    windowed = LLaMAConfig.from_dict(raw | {"use_sliding_window": True}) if model_type in ("qwen2", "qwen3") else None
    assert windowed is None or (windowed.sliding_window, windowed.layer_types.count("full_attention")) == (4096, 28)


LAYERS = 4
SMALL: dict[str, Any] = {"vocab_size": 9, "hidden_size": 64, "intermediate_size": 9, "num_attention_heads": 4}
SMALL |= {"num_hidden_layers": LAYERS, "num_key_value_heads": 2}
# A window is on: 3 layers see all.
WINDOWED = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("raw", "windows"),
    [
        (WINDOWED, [None, None, None, 8]),
        (WINDOWED | {"use_sliding_window": False}, [None] * 4),
        (WINDOWED | {"sliding_window": None}, [None] * 4),
        (WINDOWED | {"max_window_layers": 0}, [8] * 4),
        (WINDOWED | {"max_window_layers": 28}, [None] * 4),
        (WINDOWED | {"layer_types": [SLIDING, FULL, SLIDING, FULL]}, [8, None, 8, None]),
        (WINDOWED | {"layer_types": [FULL] * 4}, [None] * 4),
        (WINDOWED | {"use_sliding_window": False, "layer_types": [FULL] * 4}, [None] * 4),
        ({"model_type": "mistral", "sliding_window": 8}, [8] * 4),
        ({"model_type": "mistral", "sliding_window": 8, "max_window_layers": 2}, [8] * 4),
        ({"model_type": "llama", "max_window_layers": 2, "layer_types": [FULL] * 4}, [None] * 4),
    ],
)
def test_which_layers_have_a_window(raw: dict[str, Any], windows: list[int | None]) -> None:
    """Catches a switch that is not looked at, and a bound off by one layer."""
    config = LLaMAConfig.from_dict(SMALL | raw)
    assert [config.window(layer) for layer in range(LAYERS)] == windows
    again = LLaMAConfig.from_dict(config.to_dict("float32"))
    assert again == config


def rope(**changes: Any) -> dict[str, Any]:
    return {"model_type": "llama", "max_position_embeddings": 64, "rope_scaling": {"factor": 2.0} | changes}


LONG = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma"}, "model_type is 'gemma', expected one of llama, mistral, qwen2, qwen3, "),
    ({"model_type": "llama", "no_rope_layers": [1, 1, 1, 0]}, "no_rope_layers is"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1, 2, 0]}, "no_rope_layers is .*expected 0 or 1 for each of 4"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "no_rope_layers is .*expected 0 or 1 for each of 4"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
    ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation is 'gelu'"),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    ({"model_type": "gemma3_text", "rope_parameters": {"rope_theta": 1e4}}, "expected full_attention and sliding"),
    (
        {"model_type": "olmo3", "rope_parameters": {FULL: {}, SLIDING: {"rope_type": "linear", "factor": 2.0}}},
        "stretches sliding_attention",
    ),
    ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv is 8.0"),
    ({"model_type": "granite", "residual_multiplier": 0}, "residual_multiplier is 0, expected a number above 0"),
    ({"model_type": "phi3", "partial_rotary_factor": 0.1}, "partial_rotary_factor is 0.1, which rotates 1 of the 16"),
    (
        {"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2}},
        "rope_type is 'yarn', expected one",
    ),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1]}}, "needs long_factor"),
    ({"model_type": "phi3", "rope_scaling": LONG | {"long_factor": [2.0]}}, "long_factor has 1 entries, expected 8"),
    ({"model_type": "phi3", "rope_scaling": LONG | {"short_factor": [0.0] * 8}}, "short_factor cannot be"),
    ({"model_type": "ministral3", "rope_scaling": {"type": "yarn", "factor": 2}}, "needs llama_4_scaling_beta"),
    ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
    ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok is 8, more than the 4 experts"),
    ({"model_type": "qwen3_moe", "num_experts": 9, "num_local_experts": 8}, "num_experts is 9, which contradicts"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": ["1"]}, "mlp_only_layers"),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
    ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts is 0"),
    ({"model_type": "mixtral", "router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
    ({"model_type": "qwen3", "num_experts": 128}, "num_experts is 128"),
    ({"model_type": "mistral", "num_local_experts": 8}, "num_local_experts is 8"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"model_type": "llama", "rope_interleaved": True}, "rope_interleaved is True"),
    ({"model_type": "llama", "logits_soft_cap": 30.0}, "logits_soft_cap is 30.0"),
    ({"model_type": "llama", "final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"model_type": "llama", "sliding_window": 4096}, "sliding_window is 4096"),
    ({"model_type": "llama", "is_causal": False}, "is_causal is False"),
    ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True"),
    ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is True"),
    ({"model_type": "qwen2", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "auto_map"),
    ({"model_type": "mistral", "layer_types": [FULL, SLIDING] * 2}, "layer_types"),
    ({"model_type": "llama", "layer_types": [SLIDING] * 4}, "layer_types"),
    (WINDOWED | {"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
    (WINDOWED | {"layer_types": [SLIDING, FULL]}, "layer_types has 2 entries"),
    (WINDOWED | {"use_sliding_window": False, "layer_types": [SLIDING] * 4}, "layer_types"),
    (WINDOWED | {"sliding_window": 0}, "sliding_window is 0"),
    (rope(type="longrope"), "rope_type is 'longrope'"),
    (rope(type="su"), "rope_type is 'su'"),
    (rope(rope_type="proportional"), "rope_type is 'proportional', expected one of default, linear, dynamic"),
    (rope(type="linear", mrope_section=[1, 2]), r"mrope_section is \[1, 2\]"),
    (rope(type="default"), "factor is 2.0"),
    (rope(type="yarn", mscale=0.7), "mscale is 0.7"),
    (rope(type="linear", partial_rotary_factor=0.5), "partial_rotary_factor is 0.5"),
    (rope(type="llama3"), "'llama3' needs low_freq_factor, high_freq_factor"),
    (rope(type="linear", factor=None), "'linear' needs factor"),
    (rope(type="linear", factor=0.5), "factor cannot be 0.5"),
    (rope(type="linear", factor=float("nan")), "factor cannot be nan"),
    (rope(type="llama3", low_freq_factor=4.0, high_freq_factor=4.0), "low_freq_factor cannot be 4.0"),
    (rope(type="yarn", original_max_position_embeddings=0), "original_max_position_embeddings cannot be 0"),
    ({"model_type": "llama", "rope_parameters": {FULL: {"rope_type": "default"}}}, "differs by layer"),
    (rope(type="linear") | {"rope_parameters": {"rope_type": "default"}}, "contradicts"),
    ({"model_type": "llama", "rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta is given twice"),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_would_be_another_model_is_refused_by_name(raw: dict[str, Any], message: str) -> None:
    """Catches fields that are ignored, which would give wrong logits in silence."""
    with pytest.raises(CheckpointError, match=message):
        LLaMAConfig.from_dict(SMALL | raw)


def test_stretching_starts_from_the_context_where_nothing_else_is_said() -> None:
    """As transformers does; catches an error for, or a constant in place of, what old files leave out."""
    found = LLaMAConfig.from_dict(SMALL | rope(type="yarn")).rope_scaling
    assert found == RopeScaling(rope_type="yarn", factor=2.0, original_max_position_embeddings=64)


def test_a_shape_that_config_json_cannot_say_is_not_written() -> None:
    """Catches a LLaMA with norms of its heads, which every reader would take for one without."""
    raw = SMALL | {"model_type": "llama"}
    with pytest.raises(AssertionError, match="llama cannot say"):
        replace(LLaMAConfig.from_dict(raw), use_qk_norm=True).to_dict("float32")
