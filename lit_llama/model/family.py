"""A model family: fields of its config.json, and the types of its layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_llama.model.rope_scaling import ROPES

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
"""Types of layers, as config.json names them."""

Own = Mapping[str, Any]
"""Fields of a family as a config.json has them, absent ones by their defaults."""


def all_sliding(own: Own, layer: int) -> str:
    """Give every layer a window."""
    return SLIDING


def full_first(own: Own, layer: int) -> str:
    """Give a window to the layers behind the first ones (max_window_layers)."""
    return FULL if layer < own["max_window_layers"] else SLIDING


def sliding_without_positions(own: Own, layer: int) -> str:
    """Give a window to the layers that rotate."""
    rotated = own["no_rope_layers"]
    step = own["no_rope_layer_interval"]
    return FULL if (rotated[layer] if rotated else (layer + 1) % step) else SLIDING


def full_every(step: int) -> Callable[[Own, int], str]:
    """Give a window to all but every so many layers."""

    def kind(own: Own, layer: int) -> str:
        return SLIDING if (layer + 1) % step else FULL

    return kind


def full_by_pattern(own: Own, layer: int) -> str:
    """Give a window to all but every sliding_window_pattern layers."""
    return SLIDING if (layer + 1) % own["sliding_window_pattern"] else FULL


def full_by_interval(own: Own, layer: int) -> str:
    """Give linear attention to all but every full_attention_interval layers."""
    return LINEAR if (layer + 1) % own["full_attention_interval"] else FULL


@dataclass(frozen=True, kw_only=True)
class Family:
    """Family of models that a model_type stands for.

    Args:
        architecture: Name of its class in transformers.
        defaults: Fields that it has beside those of all families, with what an absent one means.
        implied: Fields of LLaMAConfig that are so whatever config.json says; a function finds one from the fields.
        aliases: Names of fields in releases of transformers before 5, and in later ones; the former are written.
        fixed: Fields in which it allows other values than FIXED; the first is the one that is written.
        ignored: Fields of FIXED that decide nothing in it.
        layer_type: Type of a layer where config.json has a window and no layer_types.
        recurrent: Layers are of linear attention or full, in any order, and none has a window.
        sliding_theta: Name of the field with the base of the rotary frequencies of layers with a window, which are
            not stretched; "" where all layers turn alike.
        ropes: Rope types that it may have, with the keys that each must have and those it may have.
        rope_aliases: Other names of rope types.
        rope_ignored: Keys that transformers does not look at, either.
    """

    architecture: str
    defaults: Mapping[str, Any]
    implied: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    layer_type: Callable[[Own, int], str] = all_sliding
    recurrent: bool = False
    sliding_theta: str = ""
    ropes: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = field(default_factory=lambda: ROPES)
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    rope_ignored: tuple[str, ...] = ()
