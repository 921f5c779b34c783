"""Weights written into one safetensors file or several, one tensor at a time."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.errors import UserError
from lit_llama.model.files.weights import DTYPES, INDEX_FILE, SINGLE_FILE, Spec, byte_size
from lit_llama.progress import track

MAX_SHARD_SIZE = 5_000_000_000
"""Most bytes of a weight file, unless one tensor is larger."""


def write_weights(
    folder: Path,
    specs: Mapping[str, Spec],
    produce: Callable[[str], Tensor],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write tensors one at a time, so that memory holds one and not the model.

    Args:
        folder: Where model.safetensors, or shards and their index, go.
        specs: Name of the dtype (F32, F16, BF16) and shape of each tensor, in the order to write.
        produce: Makes the tensor of a name.
        max_shard_size: Most bytes of a file, unless one tensor is larger.
    """
    shards = plan_shards(specs, max_shard_size)
    names = iter(track(list(specs), f"writing {len(specs)} tensors"))
    for file, members in shards.items():
        write_shard(folder / file, {name: specs[name] for name in members}, (produce(next(names)) for _ in members))
    next(names, None)  # lets the bar finish
    write_index(folder, shards, specs)


def parse_size(text: str) -> int:
    """Parse a size such as 5GB, 200MB or 1048576 into bytes.

    Raises:
        UserError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(KB|MB|GB|)", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9, "": 1}[match[2].upper()]) if match else 0
    if size < 1:
        raise UserError(parameter="max_shard_size", value=text, expected="a size such as 5GB or 200MB")
    return size


def plan_shards(specs: Mapping[str, Spec], max_shard_size: int = MAX_SHARD_SIZE) -> dict[str, list[str]]:
    """Divide tensors among files, in order: one file, or several of at most `max_shard_size` bytes."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, spec in specs.items():
        size = byte_size(spec)
        if shards[-1] and filled + size > max_shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def write_shard(path: Path, specs: Mapping[str, Spec], tensors: Iterable[Tensor | Iterable[Tensor]]) -> str:
    """Write one safetensors file from tensors in the order of `specs`, each whole or as blocks of its rows in order.

    Returns:
        The sha256 of the file.
    """
    digest = hashlib.sha256()
    with path.open("wb") as output:
        for data in _encode(specs, tensors):
            output.write(data)
            digest.update(data)
            output.flush()
    return digest.hexdigest()


def _encode(specs: Mapping[str, Spec], tensors: Iterable[Tensor | Iterable[Tensor]]) -> Iterator[Any]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec[0], "shape": spec[1], "data_offsets": [offset, offset + byte_size(spec)]}
        offset += byte_size(spec)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    values = iter(tensors)
    for name, (dtype, shape) in specs.items():
        value, rows = next(values), 0
        for block in [value] if isinstance(value, Tensor) else value:
            assert (block.dtype, tuple(block.shape[1:])) == (DTYPES[dtype], shape[1:]), name
            rows += len(block) if shape else 1
            yield block.contiguous().view(-1).view(torch.uint8).numpy().data
            del block
        assert rows == (shape[0] if shape else 1), name
        del value  # before the next one is made
    assert next(values, None) is None


def write_index(folder: Path, shards: Mapping[str, list[str]], specs: Mapping[str, Spec]) -> None:
    """Write model.safetensors.index.json; a single file needs none."""
    if list(shards) == [SINGLE_FILE]:
        return
    total = sum(byte_size(spec) for spec in specs.values())
    weight_map = {name: file for file, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
