"""Rules of the publishers of deltas, and the arithmetic of one tensor.

Sums are made in float32 and rounded once, which for float16 is bit for bit the sum in float16: float32 has enough
digits that rounding twice cannot differ. Policies are those of the publishers:

- ziya: embedding and head come from the delta as they are, the rest is added (IDEA-CCNL, Ziya-LLaMA-13B-v1).
- vicuna: the base grows by rows of zeros, then everything is added (lm-sys, Vicuna v0).
- alpaca: the base grows by rows that are the mean of its rows, then everything is added (Stanford Alpaca).
- add: same shapes, everything is added (lm-sys, Vicuna v1.1).
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.weights import Stored

Policy = Literal["ziya", "vicuna", "alpaca", "add"]
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
"""The matrices with a row for each token, the only ones a policy treats on their own."""

_BLOCK = 16 << 20  # bytes of float32 that are summed at a time


@dataclass(frozen=True)
class Side:
    """Base, delta or target: where its tensors lie."""

    folder: Path
    stored: Mapping[str, Stored]

    def rows(self) -> int:
        """Return the number of rows of the embedding (R)."""
        return self.stored[VOCABULARY[0]].shape[0]


def check_size(base: Side, delta: Side) -> None:
    """Raise CheckpointError unless both have the same layers, and tensors of the same names."""
    wide = {side.folder: side.stored["model.norm.weight"].shape[0] for side in (base, delta)}
    deep = {side.folder: sum(name.endswith("input_layernorm.weight") for name in side.stored) for side in (base, delta)}
    if len({*wide.values()}) > 1 or len({*deep.values()}) > 1:
        sizes = ", ".join(f"{folder} has {deep[folder]} layers of width {wide[folder]}" for folder in wide)
        raise CheckpointError(f"the delta belongs to a base of another size: {sizes}")
    if missing := sorted(base.stored.keys() ^ delta.stored.keys()):
        only = base.folder if missing[0] in base.stored else delta.folder
        raise CheckpointError(f"{len(missing)} tensors are on one side only, such as {missing[0]} in {only}")


def check_shapes(base: Side, delta: Side, policy: Policy) -> None:
    """Raise CheckpointError unless every tensor of the delta can be put on the base by this policy."""
    for name, part in delta.stored.items():
        there = base.stored[name].shape
        grows = name in VOCABULARY and part.shape[1:] == there[1:] and part.shape[0] > there[0]
        if part.shape != there and not (grows and policy != "add"):
            hint = ""
            if grows:
                hint = "; --policy add needs equal shapes: say how the base grows with --policy ziya, vicuna or alpaca"
            elif name in VOCABULARY and part.shape[0] < there[0]:
                hint = "; the base has more rows than the delta: it may be merged already, or is another base"
            raise CheckpointError(f"{name} is {there} in {base.folder}, {part.shape} in {delta.folder}{hint}")


def combine(
    base: Side,
    other: Side,
    policy: Policy,
    name: str,
    dtype: torch.dtype,
    *,
    sign: int = 1,
    rows: tuple[int, int] | None = None,
) -> Iterator[Tensor]:
    """Yield a tensor of base + delta, or with sign -1 of target - base, in `dtype`: all of it, or the rows start to
    stop, in blocks of rows, so that memory holds one block.

    Raises:
        CheckpointError: A value is not finite.
    """
    part, ground = other.stored[name], base.stored[name]
    first, last = rows or (0, part.shape[0])
    own = name in VOCABULARY
    for start, stop in blocks(part.shape, first, last):
        value = part.read(start, stop).float()
        if not (own and policy == "ziya"):
            old = min(max(ground.shape[0] - start, 0), stop - start)  # rows after these are new to the base
            value[:old] += sign * ground.read(start, start + old).float() if old else 0
            if own and policy == "alpaca":
                value[old:] += sign * mean_row(ground)
        block = value.to(dtype)
        if not block.isfinite().all():
            raise CheckpointError(f"{name}: the result has values that are not finite in {str(dtype)[6:]}")
        yield block


@lru_cache(maxsize=2)
def mean_row(stored: Stored) -> Tensor:
    """Return the mean of all rows: (R, C) -> (C,) in float32, summed in float64."""
    total = torch.zeros(stored.shape[1:], dtype=torch.float64)
    for start, stop in blocks(stored.shape):
        total += stored.read(start, stop).double().sum(0)
    return (total / stored.shape[0]).float()


def blocks(shape: tuple[int, ...], first: int = 0, last: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield ranges of rows that together are the rows first to last of a tensor, each a few megabytes."""
    step = max(1, _BLOCK // (4 * max(1, math.prod(shape[1:]))))
    last = shape[0] if last is None else last
    for start in range(first, last, step):
        yield start, min(start + step, last)


def digest(stored: Stored) -> str:
    """Return the sha256 of a tensor's bytes, row after row."""
    result = hashlib.sha256()
    for start, stop in blocks(stored.shape):
        result.update(stored.read(start, stop).view(-1).view(torch.uint8).numpy().data)
    return result.hexdigest()
