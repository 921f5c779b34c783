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
from gguf import GGMLQuantizationType as Kind
from gguf import quants

from lit_llama.convert.gguf import config as gguf_config
from lit_llama.convert.gguf.parts import model_name
from lit_llama.convert.gguf.reader import BLOCK
from lit_llama.convert.gguf.tokenizer import vocabulary
from lit_llama.convert.gguf.types import Plan, check_type, pack, plan, stored_as
from lit_llama.convert.rotary import in_pairs
from lit_llama.convert.source import Source, check_shapes
from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.place import aside, check_writable
from lit_llama.folder.publish import check_space
from lit_llama.progress import stderr, track


def write_gguf(source: Source, destination: Path, dtype: str | None = None, name: str | None = None) -> None:
    """Write a model with its tokenizer and chat template, tensor by tensor.

    Args:
        source: The model.
        destination: File to make.
        dtype: Of the matrices, as in `GGUFType`, or f32, f16, bf16. None keeps what is stored.
        name: That the model goes by; None for that of its file or folder.

    Raises:
        UserError: The file is there already, or `dtype` is none of these.
        CheckpointError: GGUF has no form for the model or its tokenizer, or `dtype` cannot hold a value.
        ResourceError: The disk has no room for it, or the library that packs `dtype` is not there.
    """
    check_file(destination)
    check_type(dtype)
    check_shapes(source)
    kinds = (planned := plan(source, dtype)).kinds
    metadata = _metadata(source, planned, name or _name(source.path))
    scaling = source.shape.rope_scaling
    divisors = gguf_config.llama3_divisors(source.shape).numpy() if scaling and scaling.rope_type == "llama3" else None
    names = {name: gguf_config.GGUF_NAMES(name) or name for name in kinds}
    sizes = {name: math.prod(quants.quant_shape_to_byte_shape(source.specs[name][1], kinds[name])) for name in kinds}
    check_space(destination, sum(sizes.values()))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (
        aside(destination) as part,
        contextlib.closing(gguf.GGUFWriter(part, gguf_config.architecture(source.shape))) as writer,
    ):
        for key, value in metadata.items():
            add_key(writer, key, value)
        if divisors is not None:
            writer.add_tensor_info(gguf_config.ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
        for name, kind in kinds.items():
            writer.add_tensor_info(
                names[name], source.specs[name][1], np.dtype(np.float32), sizes[name], raw_dtype=kind
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for name in track(list(kinds), f"writing {len(kinds)} tensors"):
            writer.write_tensor_data(_pack(source, name, kinds[name]))


def check_file(destination: Path) -> None:
    """Refuse a GGUF file that is there already, or whose name does not say what it is."""
    if destination.suffix != ".gguf":
        raise UserError(f"--format gguf writes one file: --destination_path {destination} should end in .gguf")
    check_writable(destination)
    if destination.exists():
        raise UserError(f"{destination} already exists; name another file or remove this one")


def _name(path: Path) -> str:
    """Of a model in a file or folder."""
    return path.resolve().name if path.is_dir() else model_name(path.name).removesuffix(".pth")


def _metadata(source: Source, planned: Plan, name: str) -> dict[str, Any]:
    config, architecture = source.shape, gguf_config.architecture(source.shape)
    general: dict[str, Any] = {"general.type": "model", "general.name": name}
    general |= {"general.file_type": int(planned.file_type)}
    if planned.quantized:
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


def add_key(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Write a key with the type that llama.cpp expects of such a value."""
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
        part = stored_as(rows[start : start + step], kind)
        if not part.isfinite().all():
            raise CheckpointError(
                f"{source.path}: {name} has values that are not finite in {kind.name}; use bf16 or f32"
            )
        packed[start : start + step] = pack(part, kind)
    return packed
