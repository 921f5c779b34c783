"""The way in which rotary positions are stretched, as config.json says it. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from lit_llama.errors import CheckpointError

ROPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate"),
    ),
}
"""Rope types of most families, with the keys that each must have and those it may have."""
LONGROPE = {
    "default": ((), ()),
    "longrope": (("short_factor", "long_factor"), ("factor", "original_max_position_embeddings", "attention_factor")),
}
LLAMA4_YARN = {"yarn": ((*ROPES["yarn"][0], "llama_4_scaling_beta"), ROPES["yarn"][1])}
"""The same of the families that have others: Phi, and Ministral 3."""


def is_number(value: object) -> bool:
    """Tell whether a value is a finite number, which true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**63


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of rotary positions beyond the context that a model was first trained on; see rope.py.

    Args:
        rope_type: linear, dynamic, llama3, yarn or longrope.
        factor: How many times as far.
        original_max_position_embeddings: The first context, in tokens.
        low_freq_factor: llama3: wavelengths above original / low are stretched in full.
        high_freq_factor: llama3: wavelengths below original / high are left alone.
        attention_factor: yarn, longrope: cosine and sine are multiplied by it; None follows from `factor`.
        beta_fast: yarn: what turns more often than this within the first context is left alone.
        beta_slow: yarn: what turns less often is stretched in full.
        truncate: yarn: the bounds between them are rounded outwards to whole components.
        short_factor: longrope: divisors of the frequencies of samples within the first context.
        long_factor: longrope: those of longer samples.
        llama_4_scaling_beta: Queries are multiplied by 1 + beta ln(1 + floor(position / original)); None for 0.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    llama_4_scaling_beta: float | None = None

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, tuple):
                if all(is_number(item) and item > 0 for item in value):
                    continue
            elif entry.name in ("rope_type", "truncate") or value is None or is_number(value):
                continue
            raise CheckpointError(
                f"rotary scaling of type {self.rope_type}: {entry.name} cannot be {value!r:.60}: it is a number"
            )
        if not isinstance(self.truncate, bool):
            raise CheckpointError(f"rotary scaling: truncate is {self.truncate!r:.60}, expected true or false")
        for name, right in {
            "rope_type": self.rope_type in ("linear", "dynamic", "llama3", "yarn", "longrope"),
            "factor": 1 <= self.factor < math.inf,
            "original_max_position_embeddings": self.original_max_position_embeddings >= 1,
            "low_freq_factor": 0 < self.low_freq_factor < self.high_freq_factor,
            "attention_factor": self.attention_factor is None or 0 < self.attention_factor < math.inf,
            "beta_slow": 0 < self.beta_slow < self.beta_fast,
        }.items():
            if not right:
                raise CheckpointError(
                    f"rotary scaling of type {self.rope_type}: {name} cannot be {getattr(self, name)!r}"
                )

    def turns_long(self, length: int) -> bool:
        """Tell whether samples of a length turn by `long_factor`."""
        return self.rope_type == "longrope" and length > self.original_max_position_embeddings

    @property
    def by_length(self) -> bool:
        """Whether the angles of a sample follow from its length."""
        return self.rope_type in ("dynamic", "longrope")
