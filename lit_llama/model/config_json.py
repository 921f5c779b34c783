"""config.json of Hugging Face -> the fields of LLaMAConfig, and back, by the entries of families.py."""

import math
from collections.abc import Mapping
from typing import Any

from lit_llama.errors import CheckpointError
from lit_llama.model.families import ALL, FAMILIES, FIXED, WITH_VISION
from lit_llama.model.family import FULL, LINEAR, SLIDING, Family, Own

_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SAME = (
    "max_position_embeddings",
    "rms_norm_eps",
    "bos_token_id",
    "pad_token_id",
    "embedding_multiplier",
    "attention_multiplier",
    "residual_multiplier",
    "logits_scaling",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "num_local_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)
"""Fields of LLaMAConfig that config.json has under the same name and with the same meaning, where the family has
them."""


_OUTER = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "quantization_config"),
    *("torch_dtype", "dtype", "transformers_version"),
)
"""Fields beside text_config that count before those in it."""


def text_part(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config.json of the text model alone, of a model that sees images, too; any other as it is.

    Raises:
        CheckpointError: It has no text_config.
    """
    if (model_type := raw.get("model_type")) not in WITH_VISION:
        return dict(raw)
    usual, absent = WITH_VISION[model_type]
    text = raw.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"text_config is {text!r:.60}, expected the fields of the text model")
    part = {**absent, "model_type": usual, **text, **{name: raw[name] for name in _OUTER if name in raw}}
    family = FAMILIES.get(part["model_type"])
    return part | ({"architectures": [family.architecture]} if family else {})


def read_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Read the fields of LLaMAConfig out of a config.json, in the spelling of transformers 4 or 5.

    Raises:
        CheckpointError: A field is missing, or asks for mathematics this model does not compute.
    """
    raw = text_part(raw)
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        known = ", ".join((*FAMILIES, *WITH_VISION))
        raise CheckpointError(f"model_type is {model_type!r}, expected one of {known}")
    family = FAMILIES[model_type]
    raw = _renamed(raw, family)
    decided = (family.defaults.keys() | family.implied.keys()) - family.fixed.keys()
    decided |= {*family.ignored}
    for name, allowed in {**FIXED, **family.fixed}.items():
        if name not in decided and raw.get(name, allowed[0]) not in allowed:
            raise CheckpointError(f"{name} is {raw[name]!r}, only {allowed[0]!r} is implemented")
    if missing := [name for name in _SHAPE if name not in raw]:
        raise CheckpointError(f"missing {', '.join(missing)}")
    for name in _SHAPE:
        if type(raw[name]) is not int or raw[name] < 1:
            raise CheckpointError(f"{name} is {raw[name]!r:.60}, expected a positive whole number")
    own = {name: raw.get(name, default) for name, default in {**ALL, **family.defaults}.items()}
    heads, bias, eos = raw["num_attention_heads"], own.get("attention_bias") or False, own["eos_token_id"]
    window, layer_types = _read_window(raw, own, family)
    return {
        "model_type": model_type,
        **{name: raw[name] for name in _SHAPE},
        **{name: own[name] for name in _SAME if name in own},
        "num_key_value_heads": own["num_key_value_heads"] or heads,
        "head_dim": own["head_dim"] or raw["hidden_size"] // heads,
        **_read_rope(raw, own, family),
        "no_rope_layers": _read_no_rope(own, raw["num_hidden_layers"]),
        "attention_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": own.get("mlp_bias") or False,
        "sliding_window": window,
        "layer_types": layer_types,
        "mlp_only_layers": tuple(own.get("mlp_only_layers") or ()),
        "tie_word_embeddings": own["tie_word_embeddings"] or False,
        "eos_token_id": tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        **{name: value(raw) if callable(value) else value for name, value in family.implied.items()},
    }


def write_fields(fields: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Write fields of LLaMAConfig, as plain values, as a config.json that transformers 4 and 5 both read."""
    family = FAMILIES[fields["model_type"]]
    layers = fields["num_hidden_layers"]
    eos, window, scaling = list(fields["eos_token_id"]), fields["sliding_window"], fields["rope_scaling"]
    types = list(fields["layer_types"]) or [FULL if window is None else SLIDING] * layers
    local = fields["local_rope_theta"]
    if scaling:
        must, may = family.ropes[scaling["rope_type"]]
        names = {"rope_type", *must, *may} - family.defaults.keys()
        scaling = {name: value for name, value in scaling.items() if name in names and value is not None}
        if scaling["rope_type"] == "longrope":  # transformers 4 takes three fields and no more
            original = fields["rope_scaling"]["original_max_position_embeddings"]
            scaling["type"] = scaling.pop("rope_type")
            if scaling["factor"] == max(fields["max_position_embeddings"] / original, 1.0):
                del scaling["factor"]
    values = {
        **family.defaults,  # of what is only read
        **fields,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "rope_scaling": scaling,
        "no_rope_layers": list(fields["no_rope_layers"]) or [1] * layers,
        "use_sliding_window": window is not None,
        "max_window_layers": types.count(FULL),  # older releases know this, newer ones layer_types
        "layer_types": types,
        "mlp_only_layers": list(fields["mlp_only_layers"]),
        "original_max_position_embeddings": (fields["rope_scaling"] or fields)[
            "original_max_position_embeddings" if fields["rope_scaling"] else "max_position_embeddings"
        ],
    }
    if local is not None and family.sliding_theta != "rope_theta":
        values[family.sliding_theta] = local
    full = {"rope_theta": fields["rope_theta"], **(scaling or {"rope_type": "default"})}
    written = {name: other for other, name in family.aliases.items()}
    apart = {FULL: full, SLIDING: {"rope_type": "default", "rope_theta": local}}
    return {
        "architectures": [family.architecture],
        "model_type": fields["model_type"],
        **{written.get(name, name): values[name] for name in (*_SHAPE, *{**ALL, **family.defaults})},
        **({"rope_parameters": apart} if local is not None else {}),
        "hidden_act": "silu",
        **{name: allowed[0] for name, allowed in family.fixed.items()},
        "torch_dtype": dtype,
    }


def _renamed(raw: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Give fields the names that they are known by, whichever of them a release of transformers writes."""
    renamed = dict(raw)
    for other, name in family.aliases.items():
        if renamed.get(name, value := renamed.pop(other, renamed.get(name))) != value:
            raise CheckpointError(f"{other} is {value!r:.60}, which contradicts {name} {renamed[name]!r:.60}")
        if value is not None:
            renamed[name] = value
    return renamed


def _read_no_rope(own: Own, layers: int) -> tuple[int, ...]:
    """1 for each layer that rotates queries and keys, 0 for one that does not; empty if all do."""
    if "no_rope_layers" not in own:
        return ()
    given, step = own["no_rope_layers"], own["no_rope_layer_interval"]
    if given is None:
        if type(step) is not int or step < 1:
            raise CheckpointError(f"no_rope_layer_interval is {step!r:.60}, expected a positive whole number")
        given = [int((layer + 1) % step != 0) for layer in range(layers)]
    if not isinstance(given, list) or len(given) < layers or any(value not in (0, 1) for value in given):
        raise CheckpointError(f"no_rope_layers is {given!r:.60}, expected 0 or 1 for each of {layers} layers")
    rotated = tuple(map(int, given[:layers]))
    return () if all(rotated) else rotated


def _read_window(raw: Mapping[str, Any], own: Own, family: Family) -> tuple[int | None, tuple[str, ...]]:
    """Size of the sliding window, and the types of the layers unless all have it."""
    if family.recurrent:
        return None, _read_recurrent(raw, own, family)
    window = own.get("sliding_window") if own.get("use_sliding_window", True) else None
    if window is None and not raw.get("layer_types"):
        return None, ()
    layers = range(raw["num_hidden_layers"])
    usual = [FULL if window is None else family.layer_type(own, layer) for layer in layers]
    types = raw.get("layer_types") or usual
    # Families without this field are computed as usual whatever it says, so it may not say anything else.
    if types != usual and ("layer_types" not in own or window is None or set(types) - {FULL, SLIDING}):
        kinds = ", ".join(sorted(set(types)))
        raise CheckpointError(f"layer_types has {kinds}: not implemented for this family with sliding_window {window}")
    if SLIDING not in types:
        return None, ()
    return window, tuple(types) if FULL in types else ()


def _read_recurrent(raw: Mapping[str, Any], own: Own, family: Family) -> tuple[str, ...]:
    """Types of the layers of a family some of whose layers are recurrent; empty if none is."""
    if type(step := own["full_attention_interval"]) is not int or step < 1:
        raise CheckpointError(f"full_attention_interval is {step!r:.60}, expected a positive whole number")
    layers = raw["num_hidden_layers"]
    types = own["layer_types"] or [family.layer_type(own, layer) for layer in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in (FULL, LINEAR) for kind in types):
        raise CheckpointError(f"layer_types is {types!r:.60}, expected {LINEAR} or {FULL} for each of {layers} layers")
    if FULL not in types:
        raise CheckpointError(f"layer_types has {LINEAR} alone, expected {FULL} in one layer at least")
    return tuple(types) if LINEAR in types else ()


def _read_rope(raw: Mapping[str, Any], own: Own, family: Family) -> dict[str, Any]:
    """Base of the frequencies, in layers with a window too, which components turn, and the fields of RopeScaling.

    transformers 4 writes rope_theta and rope_scaling, 5 writes rope_parameters with both inside, apart for the types of
    layers where they differ.
    """
    ropes = {name: raw[name] for name in ("rope_scaling", "rope_parameters") if raw.get(name)}
    if not ropes and own["rope_scaling"]:
        ropes = {"rope_scaling": own["rope_scaling"]}
    local = dict[str, Mapping[str, Any]]()
    if family.sliding_theta and (both := ropes.get("rope_parameters")):
        if not all(isinstance(both.get(kind), Mapping) for kind in (FULL, SLIDING)) or set(both) - {FULL, SLIDING}:
            raise CheckpointError(f"rope_parameters has {', '.join(both)}, expected {FULL} and {SLIDING}")
        ropes["rope_parameters"], local["rope_parameters"] = both[FULL], both[SLIDING]
    context = own.get("original_max_position_embeddings") or own["max_position_embeddings"]
    scalings = [_read_scaling(name, rope, own, family, context) for name, rope in ropes.items()]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise CheckpointError(f"rope_scaling {ropes['rope_scaling']} contradicts rope_parameters")
    values: dict[str, Any] = {"rope_scaling": scalings[0] if scalings else None}
    for name in ("rope_theta", "partial_rotary_factor"):
        given = _one_number(name, [source.get(name) for source in (raw, *ropes.values())])
        values[name] = own.get(name, 1.0) if given is None else given
    if family.sliding_theta:
        if any(_read_scaling(name, rope, own, family, context) for name, rope in local.items()):
            raise CheckpointError(f"rope_parameters stretches {SLIDING}, which is not implemented")
        thetas = [rope.get("rope_theta") for rope in local.values()] or [raw.get(family.sliding_theta)]
        given = _one_number(family.sliding_theta, thetas)
        values["local_rope_theta"] = own[family.sliding_theta] if given is None else given
    return values


def _one_number(name: str, given: list[Any]) -> float | None:
    """The number that a field is given as, wherever it stands; None if nowhere."""
    found = set[float]()
    for value in given:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{name} is {value!r:.60}, expected a number such as 10000")
        found.add(float(value))
    if len(found) > 1:
        raise CheckpointError(f"{name} is given twice: {' and '.join(map(str, sorted(found)))}")
    return found.pop() if found else None


def _read_scaling(name: str, rope: Mapping[str, Any], own: Own, family: Family, context: int) -> dict[str, Any] | None:
    if layers := [key for key, value in rope.items() if isinstance(value, Mapping)]:
        raise CheckpointError(f"{name} differs by layer ({', '.join(layers)}), which is not implemented")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = family.rope_aliases.get(kind, kind)
    if kind not in family.ropes:
        raise CheckpointError(f"{name}: rope_type is {kind!r}, expected one of {', '.join(family.ropes)}")
    given = {key: value for key, value in rope.items() if value is not None}
    for key in ("rope_type", "type", "rope_theta", *family.rope_ignored):
        given.pop(key, None)
    if given.get("partial_rotary_factor") == 1 or "partial_rotary_factor" in own:
        given.pop("partial_rotary_factor", None)
    must, may = family.ropes[kind]
    if {"mscale", "mscale_all_dim"} <= given.keys() and kind == "yarn":
        _fold_mscale(given)
    for key, value in given.items():
        if key not in must + may:
            raise CheckpointError(f"{name}: {key} is {value!r}, which is not implemented for rope_type {kind!r}")
    if missing := [key for key in must if key not in given]:
        raise CheckpointError(f"{name}: rope_type {kind!r} needs {', '.join(missing)}")
    if not must:
        return None
    if "original_max_position_embeddings" in own and given.get("original_max_position_embeddings", context) != context:
        raise CheckpointError(f"original_max_position_embeddings is {context}, which contradicts {name}")
    scaling = {"rope_type": kind, "original_max_position_embeddings": context, **given}
    if kind == "longrope":
        scaling.setdefault("factor", max(own["max_position_embeddings"] / context, 1.0))
        scaling |= {key: tuple(scaling[key]) for key in ("short_factor", "long_factor")}
    return scaling


def _fold_mscale(given: dict[str, Any]) -> None:
    """Replace the two factors of DeepSeek's yarn by that of cosine and sine, which is all they are for."""
    stretch = 0.1 * math.log(max(given["factor"], 1.0))
    one, other = (given.pop(key) * stretch + 1.0 for key in ("mscale", "mscale_all_dim"))
    given.setdefault("attention_factor", one / other)
