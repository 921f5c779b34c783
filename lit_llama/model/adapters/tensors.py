"""The tensors of an adapter folder: read from whichever file holds them, and named by module and part."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.files.names import plain_name
from lit_llama.model.files.pth.files import read_pth
from lit_llama.model.files.weights import DTYPES, check_finite, describe_wrong_file

WEIGHTS_FILE, BIN_FILE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_STEM = re.compile(r"\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+\.(?=weight$)")
_ROWS = re.compile(r"\.trainable_tokens_delta(\.[^.]+)?$")


@dataclass(frozen=True)
class AdapterFile:
    """Contents of the weight file of an adapter.

    Attributes:
        path: The file.
        tensors: By module and part, such as `model.layers.0.mlp.up_proj.lora_A.weight`.
        remarks: What was taken off names, for people.
    """

    path: Path
    tensors: Mapping[str, Tensor]
    remarks: tuple[str, ...] = ()


def part_name(stored: str) -> str:
    """Return the module and part that a stored name means: PEFT's names with the name of the adapter, and the prefixes
    of wrappers, taken off.
    """
    name = _STEM.sub(r".\1", plain_name(stored))
    name = _SAVED.sub(".", name).replace(".original_module.weight", ".base_layer.weight")
    name = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", name)
    return _ROWS.sub(".trainable_tokens_delta", name)


def find_file(folder: Path) -> Path:
    """Find the weight file of an adapter folder; safetensors are preferred where there are both, as in PEFT."""
    path = folder / WEIGHTS_FILE
    return path if path.exists() or not (folder / BIN_FILE).is_file() else folder / BIN_FILE


def read_adapter_file(folder: Path) -> AdapterFile:
    """Read an adapter folder's tensors, from safetensors or, restricted to tensors, from torch's .bin.

    Raises:
        CheckpointError: The file is missing, unreadable, empty, or not finite, or two of its tensors have one name.
    """
    path = find_file(folder)
    if wrong := describe_wrong_file(path):  # also a pipe, which would be waited for
        raise CheckpointError(f"{path} is {wrong}")
    raw = _read_bin(path) if path.name == BIN_FILE else _read_safetensors(path)
    tensors: dict[str, Tensor] = {}
    stored_names: dict[str, str] = {}
    for stored, value in raw.items():
        name = part_name(stored)
        if name in tensors:
            raise CheckpointError(f"{path} holds {name} twice: as {stored_names[name]} and as {stored}")
        tensors[name], stored_names[name] = value, stored
    if not tensors:
        raise CheckpointError(f"{path} is empty: it holds no tensor")
    for name, value in tensors.items():
        check_finite(value, name, path, whole=True)
    odd = [(stored, name) for name, stored in stored_names.items() if stored != PREFIX + name]
    said = [f"{path}: {len(odd)} names are as a wrapper saves them: {raw} is read as {name}" for raw, name in odd[:1]]
    return AdapterFile(path, tensors, tuple(said))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error


def _read_bin(path: Path) -> dict[str, Tensor]:
    stored = read_pth(path)
    for name, place in stored.items():
        if place.dtype not in DTYPES.values():
            raise CheckpointError(f"{path}: {name} is of {place.dtype}, expected one of {', '.join(DTYPES)}")
    return {name: place.read() for name, place in stored.items()}
