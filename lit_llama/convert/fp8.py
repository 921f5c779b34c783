"""A Hugging Face folder whose linear weights are 8-bit floats with scales -> a Source in bfloat16.

The weight is the 8-bit value times its scale, of which there is one for a matrix, for each row, or for each block of
rows and columns (`weight_scale_inv` of quant_method fp8, `weight_scale` of compressed-tensors and of FBGEMM).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.convert.source import EMBEDDING, HEAD, NAMES, SETTINGS_FILE, Source
from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.places import holds_fp8
from lit_llama.model.weights import DTYPES, Weights
from lit_llama.objects import as_object, read_object, read_text

_STORED = "F8_E4M3"
_SCALES = ("_scale_inv", "_scale")
_OF_ACTIVATIONS = (".input_scale", ".k_scale", ".v_scale", ".q_scale", ".output_scale", ".input_scale_ub")
"""Scales of what is computed, which other programs use to compute in 8 bits."""


def is_fp8(folder: Path) -> bool:
    """Whether config.json says that the weights are 8-bit floats."""
    try:
        return holds_fp8(as_object(read_text(folder / SETTINGS_FILE)))
    except (OSError, ValueError):
        return False


def open_fp8(folder: Path, files: Mapping[str, Path | bytes]) -> Source:
    """Open the model in such a folder.

    Args:
        folder: The folder.
        files: What belongs to it beside weights and config.json.

    Raises:
        CheckpointError: A scale is missing or does not fit, or the model is not implemented.
    """
    raw = read_object(folder / SETTINGS_FILE, CheckpointError)
    block = _block(folder, raw)
    plain = {key: value for key, value in raw.items() if key not in ("quantization_config", "torch_dtype", "dtype")}
    config = LLaMAConfig.from_dict(plain)
    weights = Weights(folder)
    kinds = {name: weights.spec(name) for name in weights}
    scales = {name: next((name + end for end in _SCALES if name + end in kinds), "") for name in kinds}
    matrices = {name for name, (kind, _) in kinds.items() if kind == _STORED}
    if bare := [name for name in sorted(matrices) if not scales[name]]:
        raise CheckpointError(f"{folder}: {bare[0]} is stored as {_STORED} without a scale ({bare[0]}_scale_inv)")
    used = {scales[name] for name in matrices}
    others = {name for name in kinds if name not in used and not name.endswith(_OF_ACTIVATIONS)}
    if odd := [name for name in sorted(others - matrices) if kinds[name][0] not in DTYPES]:
        raise CheckpointError(f"{folder}: {odd[0]} is stored as {kinds[odd[0]][0]}, expected {', '.join(DTYPES)}")
    if config.tie_word_embeddings and HEAD in others:
        if not torch.equal(weights[HEAD], weights[EMBEDDING]):
            raise CheckpointError(
                f"{folder}: tie_word_embeddings is true, but {HEAD} is another matrix than {EMBEDDING}"
            )
        others.remove(HEAD)

    def read(name: str) -> Tensor:
        if name not in matrices:
            return weights[name]
        scale = _spread(folder, name, weights[scales[name]].float(), kinds[name][1], block)
        return (weights[name].float() * scale).to(torch.bfloat16)

    said = f"{len(matrices)} matrices of 8-bit floats times their scales, rounded to bfloat16"
    return Source(
        path=folder,
        kind="Hugging Face, FP8",
        config=plain,
        specs={
            name: (NAMES[torch.bfloat16] if name in matrices else kind, shape)
            for name, (kind, shape) in kinds.items()
            if name in others
        },
        read=read,
        files=files,
        notes={"weights": said} | ({"remarks": list(weights.remarks)} if weights.remarks else {}),
    )


def _block(folder: Path, raw: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where blocks do."""
    settings = raw["quantization_config"]
    size = settings.get("weight_block_size")
    groups = settings.get("config_groups")
    if size is None and isinstance(groups, Mapping):
        size = next((group["weights"].get("block_structure") for group in groups.values()), None)
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
        raise CheckpointError(f"{folder / SETTINGS_FILE}: weight_block_size is {size!r}, expected two numbers")
    return size[0], size[1]


def _spread(folder: Path, name: str, scale: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """A scale for every element of a matrix, or what broadcasts to it."""
    rows, columns = shape
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.numel() == rows and scale.shape[0] == rows and (block is None or block[0] == 1):
        return scale.reshape(rows, 1)
    if block is not None and tuple(scale.shape) == (-(-rows // block[0]), -(-columns // block[1])):
        return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    raise CheckpointError(f"{folder}: {name} is {shape}, but its scale {tuple(scale.shape)} with blocks of {block}")
