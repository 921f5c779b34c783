"""Experts whose matrices are stored as one tensor, as transformers 5 holds them in memory and may write them.

Shapes: E experts, C hidden, I the width of one; gate_up_proj (E, 2 I, C) holds the gates above the ups, down_proj is
(E, C, I).
"""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig

_STACKED = re.compile(r"(?P<layer>model\.layers\.\d+\.)mlp\.experts\.(?P<kind>gate_up_proj|down_proj)")
_ROUTER = re.compile(r"(?P<layer>model\.layers\.\d+\.)mlp\.gate\.weight")


class Part(NamedTuple):
    """Rows of one expert's matrix in a stacked tensor."""

    expert: int
    start: int
    stop: int


def unstacked(
    folder: Path, names: Iterable[str], shape: Callable[[str], tuple[int, ...]]
) -> dict[str, tuple[str, Part | None]]:
    """Find the tensors of a model, each expert's by itself, in those of a folder.

    Args:
        folder: With the config.json that says what experts are called.
        names: Of its tensors.
        shape: Gives the shape of one.

    Returns:
        By the name in the model the tensor that holds it, and which part of that it is; None for all of it.

    Raises:
        CheckpointError: A stacked tensor has a shape that none can have, or there is no configuration.
    """
    names = list(names)
    if not any(_STACKED.fullmatch(name) for name in names):
        return {name: (name, None) for name in names}
    config = LLaMAConfig.from_folder(folder)
    gate, up, down = config.expert_projections
    found: dict[str, tuple[str, Part | None]] = {}
    for name in names:
        if router := _ROUTER.fullmatch(name):
            found[f"{router['layer']}{config.expert_block}.gate.weight"] = name, None
            continue
        if not (stacked := _STACKED.fullmatch(name)):
            found[name] = name, None
            continue
        sizes = shape(name)
        linears = (gate, up) if stacked["kind"] == "gate_up_proj" else (down,)
        if len(sizes) != 3 or sizes[1] % len(linears):
            raise CheckpointError(f"{folder}: {name} is {sizes}, expected (experts, {len(linears)} n, m)")
        rows = sizes[1] // len(linears)
        for expert in range(sizes[0]):
            prefix = f"{stacked['layer']}{config.expert_block}.experts.{expert}."
            for index, linear in enumerate(linears):
                found[f"{prefix}{linear}.weight"] = name, Part(expert, index * rows, (index + 1) * rows)
    return found
