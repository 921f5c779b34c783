"""A model in Hugging Face's names -> one GGUF file, for llama.cpp, Ollama and whatever else reads them.

As llama.cpp's converter does it: vectors stay in float32, matrices are of the type asked for, and the rotary rows of
the architecture "llama" stand in pairs.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch import Tensor

from lit_llama.convert.gguf import config as gguf_config
from lit_llama.convert.gguf.reader import BLOCK
from lit_llama.convert.gguf.tokenizer import vocabulary
from lit_llama.convert.rotary import in_pairs
from lit_llama.convert.source import HEAD, Source, check_shapes
from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder import check_space
from lit_llama.place import aside, check_writable
from lit_llama.progress import stderr, track

TYPES = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16, "q8_0": Kind.Q8_0}
"""What matrices may be stored as."""

_SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_STORED = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
_TORCH = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_FILE_TYPES = {Kind.F32: 0, Kind.F16: 1, Kind.Q8_0: 7, Kind.BF16: 32}  # general.file_type: what most of it is


def write_gguf(source: Source, destination: Path, dtype: str | None = None) -> None:
    """Write a model with its tokenizer and chat template, tensor by tensor.

    Args:
        source: The model.
        destination: File to make.
        dtype: Of the matrices: f32, f16, bf16 or q8_0 (8 bits, and a scale for 32 values). None keeps what is stored.

    Raises:
        UserError: The file is there already, or `dtype` is none of these.
        CheckpointError: GGUF has no form for the model or its tokenizer, or `dtype` cannot hold a value.
        ResourceError: The disk has no room for it.
    """
    wanted = _SHORT.get(dtype or "", dtype)
    if wanted is not None and wanted not in TYPES:
        raise UserError(f"--dtype is {dtype!r}, expected one of {', '.join([*_SHORT, 'q8_0'])}")
    check_file(destination)
    check_shapes(source)
    plan = _plan(source, TYPES[wanted] if wanted else None)
    metadata = _metadata(source, plan)
    scaling = source.shape.rope_scaling
    divisors = gguf_config.llama3_divisors(source.shape).numpy() if scaling and scaling.rope_type == "llama3" else None
    names = {name: gguf_config.GGUF_NAMES(name) or name for name in plan}
    sizes = {name: math.prod(quants.quant_shape_to_byte_shape(source.specs[name][1], plan[name])) for name in plan}
    check_space(destination, sum(sizes.values()))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (
        aside(destination) as part,
        contextlib.closing(gguf.GGUFWriter(part, gguf_config.architecture(source.shape))) as writer,
    ):
        for key, value in metadata.items():
            _add(writer, key, value)
        if divisors is not None:
            writer.add_tensor_info(gguf_config.ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
        for name, kind in plan.items():
            writer.add_tensor_info(
                names[name], source.specs[name][1], np.dtype(np.float32), sizes[name], raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for name in track(list(plan), f"writing {len(plan)} tensors"):
            writer.write_tensor_data(_pack(source, name, plan[name]))


def check_file(destination: Path) -> None:
    """Refuse a GGUF file that is there already, or whose name does not say what it is."""
    if destination.suffix != ".gguf":
        raise UserError(f"--format gguf writes one file: --destination_path {destination} should end in .gguf")
    check_writable(destination)
    if destination.exists():
        raise UserError(f"{destination} already exists; name another file or remove this one")


def _plan(source: Source, wanted: Kind | None) -> dict[str, Kind]:
    """How each tensor is stored. A tied head is the embedding and goes unsaid."""
    plan = {}
    for name, (stored, shape) in source.specs.items():
        if name != HEAD or not source.shape.tie_word_embeddings:  # F32 is 0, which counts as false
            plan[name] = Kind.F32 if len(shape) == 1 else _STORED[stored] if wanted is None else wanted
    odd = [name for name, kind in plan.items() if kind == Kind.Q8_0 and source.specs[name][1][-1] % 32]
    if odd:
        stderr().print(f"{len(odd)} matrices, {odd[0]} first, have rows that 32 does not divide: f16 instead of q8_0")
    return plan | dict.fromkeys(odd, Kind.F16)


def _metadata(source: Source, plan: dict[str, Kind]) -> dict[str, Any]:
    config, architecture = source.shape, gguf_config.architecture(source.shape)
    values: dict[Kind, int] = {}
    for name, kind in plan.items():
        values[kind] = values.get(kind, 0) + math.prod(source.specs[name][1])
    general: dict[str, Any] = {"general.type": "model", "general.name": source.path.stem}
    general |= {"general.file_type": _FILE_TYPES[max(values, key=lambda kind: values[kind])]}
    if Kind.Q8_0 in values:
        general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    if config.sliding_window and config.sliding_window < config.max_position_embeddings:
        stderr().print(
            f"{source.path}: a token sees the last {config.sliding_window}; the architecture {architecture!r} of "
            f"llama.cpp has no such window, so the file is for texts of up to {config.sliding_window} tokens"
        )
    try:
        keys = gguf_config.to_metadata(config)
        tokenizer = vocabulary(source.files, source.config, config.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    return general | {f"{architecture}.{key}": value for key, value in keys.items()} | tokenizer


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _pack(source: Source, name: str, kind: Kind) -> npt.NDArray[np.uint8]:
    """The bytes of one tensor, row by row."""
    value = source.read(name)
    if gguf_config.in_rotary_pairs(source.shape):
        value = in_pairs(name, value, source.shape)
    rows = value.reshape(-1, value.shape[-1])  # of a vector: one
    step = max(1, BLOCK // value.shape[-1])
    packed = np.empty(quants.quant_shape_to_byte_shape(tuple(rows.shape), kind), np.uint8)
    for start in range(0, len(rows), step):
        part = rows[start : start + step].to(_TORCH.get(kind, torch.float32))
        if not part.isfinite().all():
            raise CheckpointError(
                f"{source.path}: {name} has values that are not finite in {kind.name}; use bf16 or f32"
            )
        packed[start : start + step] = _rows(part, kind)
    return packed


def _rows(rows: Tensor, kind: Kind) -> npt.NDArray[np.uint8]:
    if kind == Kind.Q8_0:
        return quants.quantize(rows.numpy(), kind)
    return rows.contiguous().view(torch.uint8).numpy()
