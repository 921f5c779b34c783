"""A model in Hugging Face's names -> one GGUF file, for llama.cpp, Ollama and whatever else reads them.

As llama.cpp's converter does it: vectors and routers stay in float32, matrices are of the type asked for, those of the
experts of a layer are one tensor, and the rotary rows of the architecture "llama" stand in pairs. The mixtures of types
(`_m`) and what stands in for a type that does not fit are those of llama.cpp's quantize.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from torch import Tensor

from lit_llama.conversion.gguf.architectures import architecture, entry_of, is_router, is_stacked
from lit_llama.conversion.gguf.metadata import rope_tensors, to_metadata
from lit_llama.conversion.gguf.reader import BLOCK
from lit_llama.conversion.gguf.scan import model_name
from lit_llama.conversion.gguf.tokenizer import vocabulary
from lit_llama.conversion.gguf.values import is_plain, stored_shape, to_stored
from lit_llama.conversion.source import HEAD, Source, check_shapes
from lit_llama.errors import CheckpointError, ResourceError, UserError
from lit_llama.folder.place import aside, check_writable
from lit_llama.folder.publish import check_space
from lit_llama.model.config import GGUFType, LLaMAConfig
from lit_llama.progress import stderr, track
from lit_llama.wording import param


@dataclass(frozen=True)
class _Scheme:
    """What a name of a `dtype` stands for.

    Args:
        matrices: Type of the matrices.
        head: Type of the head, or of the embedding where that is the head.
        more: Type of the layers that matter most, of the two projections that lose most.
        file_type: What the file calls it.
    """

    matrices: Kind
    head: Kind
    file_type: FileType
    more: Kind | None = None


_SCHEMES: dict[str, _Scheme] = {
    "float32": _Scheme(Kind.F32, Kind.F32, FileType.ALL_F32),
    "float16": _Scheme(Kind.F16, Kind.F16, FileType.MOSTLY_F16),
    "bfloat16": _Scheme(Kind.BF16, Kind.BF16, FileType.MOSTLY_BF16),
    "q8_0": _Scheme(Kind.Q8_0, Kind.Q8_0, FileType.MOSTLY_Q8_0),
    "q6_k": _Scheme(Kind.Q6_K, Kind.Q6_K, FileType.MOSTLY_Q6_K),
    "q5_k_m": _Scheme(Kind.Q5_K, Kind.Q6_K, FileType.MOSTLY_Q5_K_M, Kind.Q6_K),
    "q4_k_m": _Scheme(Kind.Q4_K, Kind.Q6_K, FileType.MOSTLY_Q4_K_M, Kind.Q6_K),
    "q4_0": _Scheme(Kind.Q4_0, Kind.Q8_0, FileType.MOSTLY_Q4_0),  # llama.cpp's head is Q6_K, which needs a library
}
assert set(_SCHEMES) == set(get_args(GGUFType))
_SHORT = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_STORED = {"F32": Kind.F32, "F16": Kind.F16, "BF16": Kind.BF16}
_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_OF_LIBRARY = (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)  # gguf reads these and does not write them
# For rows that the block of a type does not divide.
_INSTEAD = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0} | dict.fromkeys(
    (Kind.Q8_0, Kind.Q5_0, Kind.Q5_1, Kind.Q4_0), Kind.F16
)


@dataclass(frozen=True)
class Plan:
    """Types in which the tensors of a model are stored.

    Args:
        kinds: Type of each tensor, by Hugging Face's names; a tied head is the embedding and goes unsaid.
        file_type: What most of the file is, as GGUF counts it.
    """

    kinds: Mapping[str, Kind]
    file_type: FileType

    @property
    def quantized(self) -> bool:
        """Whether some values are packed."""
        return not set(self.kinds.values()) <= _PLAIN.keys()


def check_type(dtype: str | None) -> None:
    """Refuse a name that is none, or whose library is not there.

    Raises:
        UserError: It is none of the names.
        ResourceError: Nothing here can pack it.
    """
    scheme = _scheme(dtype)
    if scheme and {scheme.matrices, scheme.head, scheme.more} & set(_OF_LIBRARY):
        _library(dtype or "")


def _scheme(dtype: str | None) -> _Scheme | None:
    if dtype is None:
        return None
    name = _SHORT.get(dtype, dtype)
    if name not in _SCHEMES:
        known = ", ".join([*_SHORT, *(name for name in _SCHEMES if name not in _SHORT.values())])
        raise UserError(parameter="dtype", value=dtype, expected=f"one of {known}")
    return _SCHEMES[name]


def _library(what: str) -> Any:
    try:
        import libgguf
    except ImportError as error:
        raise ResourceError(
            f"libgguf is needed for {what}: pip install 'lit_llama[kquants]'; q8_0 and q4_0 need nothing more"
        ) from error
    return libgguf


def plan(source: Source, dtype: str | None) -> Plan:
    """Choose the type of each tensor: vectors stay in float32, and None keeps what is stored.

    Args:
        source: The model.
        dtype: Of the matrices.
    """
    scheme, config = _scheme(dtype), source.shape
    translate = entry_of(config).names
    kinds: dict[str, Kind] = {}
    odd: dict[tuple[Kind, Kind], list[str]] = {}
    for name, (stored, shape) in source.specs.items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        called = translate(name) or name
        if len(shape) == 1 or is_router(called) or is_plain(name):
            kinds[name] = Kind.F32
            continue
        wanted = _wanted(called, config, scheme) if scheme else _STORED[stored]
        kinds[name] = _fitting(wanted, shape[-1])
        if kinds[name] != wanted:
            odd.setdefault((wanted, kinds[name]), []).append(name)
    for (wanted, kind), names in odd.items():
        stderr().print(
            f"{len(names)} matrices, {names[0]} first, have rows that the {GGML_QUANT_SIZES[wanted][0]} values of a "
            f"{wanted.name} block do not divide: {kind.name} instead"
        )
    return Plan(kinds, scheme.file_type if scheme else _most(source, kinds))


def _wanted(name: str, config: LLaMAConfig, scheme: _Scheme) -> Kind:
    """The type of a matrix that GGUF calls `name`."""
    first, _, last = name.removesuffix(".weight").rpartition(".")
    if last == "output" or (last == "token_embd" and config.tie_word_embeddings):
        return scheme.head
    if config.num_local_experts == 8 and scheme.matrices not in _PLAIN:  # Mixtral, of which attention is a small part
        if last in ("attn_k", "attn_v"):
            return Kind.Q8_0
        if last == "attn_output" and scheme.matrices == Kind.Q4_K:
            return Kind.Q5_K
    if scheme.more is None or last not in ("attn_v", "ffn_down", "ffn_down_exps"):
        return scheme.matrices
    layer, layers = int(first.split(".")[1]), config.num_hidden_layers
    if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
        return scheme.more
    shared = layers == 80 and config.num_key_value_heads < config.num_attention_heads  # Llama 70B: v serves 8 heads
    return Kind.Q5_K if shared and last == "attn_v" else scheme.matrices


def _fitting(kind: Kind, width: int) -> Kind:
    while width % GGML_QUANT_SIZES[kind][0]:
        kind = _INSTEAD[kind]
    return kind


def _most(source: Source, kinds: Mapping[str, Kind]) -> FileType:
    values = dict.fromkeys(_PLAIN, 0)
    for name, kind in kinds.items():
        values[kind] += math.prod(source.specs[name][1])
    most = max(values, key=lambda kind: values[kind])
    return next(scheme.file_type for scheme in _SCHEMES.values() if scheme.matrices == most)


def stored_as(rows: Tensor, kind: Kind) -> Tensor:
    """Return rows of values, rounded to a plain type, or in the float32 that they are packed from."""
    return rows.to(_PLAIN.get(kind, torch.float32))


def pack(rows: Tensor, kind: Kind) -> npt.NDArray[np.uint8]:
    """Return the bytes of rows that `stored_as` made."""
    if kind in _PLAIN:
        return rows.contiguous().view(torch.uint8).numpy()
    if kind in _OF_LIBRARY:
        packed = _library(kind.name).quantize_rows(np.ascontiguousarray(rows.numpy()), int(kind))
        return np.asarray(packed, np.uint8).reshape(len(rows), -1)
    return quants.quantize(rows.numpy(), kind)


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
    divisors = {name: value.numpy() for name, value in rope_tensors(source.shape).items()}
    translate = entry_of(source.shape).names
    tensors: dict[str, list[str]] = {}  # those of a source that are one in the file, by its name there
    for name in kinds:
        tensors.setdefault(translate(name) or name, []).append(name)
    shapes = {called: _shape(source, called, names) for called, names in tensors.items()}
    sizes = {
        called: math.prod(quants.quant_shape_to_byte_shape(shapes[called], kinds[names[0]]))
        for called, names in tensors.items()
    }
    check_space(destination, sum(sizes.values()))
    destination.parent.mkdir(parents=True, exist_ok=True)
    with (
        aside(destination) as part,
        contextlib.closing(gguf.GGUFWriter(part, architecture(source.shape))) as writer,
    ):
        for key, value in metadata.items():
            add_key(writer, key, value)
        for key, values in divisors.items():
            writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
        for called, names in tensors.items():
            kind = kinds[names[0]]
            writer.add_tensor_info(called, shapes[called], np.dtype(np.float32), sizes[called], raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in divisors.values():
            writer.write_tensor_data(values)
        for called, names in track(list(tensors.items()), f"writing {len(tensors)} tensors"):
            packed, kind = np.empty((len(names), sizes[called] // len(names)), np.uint8), kinds[names[0]]
            for place, name in zip(packed, names, strict=True):
                place[:] = _pack(source, name, kind).reshape(-1)
            writer.write_tensor_data(packed)


def _shape(source: Source, called: str, names: Sequence[str]) -> tuple[int, ...]:
    """Of a tensor in the file, of which experts are many matrices."""
    shape = stored_shape(names[0], source.specs[names[0]][1])
    return (len(names), *shape) if is_stacked(called) else shape


def check_file(destination: Path) -> None:
    """Refuse a GGUF file that is there already, or whose name does not say what it is."""
    if destination.suffix != ".gguf":
        raise UserError(
            f"writes one file: {param('destination_path', destination)} should end in .gguf",
            parameter="format",
            value="gguf",
        )
    check_writable(destination)
    if destination.exists():
        raise UserError(f"{destination} already exists; name another file or remove this one")


def _name(path: Path) -> str:
    """Of a model in a file or folder."""
    return path.resolve().name if path.is_dir() else model_name(path.name).removesuffix(".pth")


def _metadata(source: Source, planned: Plan, name: str) -> dict[str, Any]:
    config, called = source.shape, architecture(source.shape)
    general: dict[str, Any] = {"general.type": "model", "general.name": name}
    general |= {"general.file_type": int(planned.file_type)}
    if planned.quantized:
        general["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    if (
        config.sliding_window
        and config.sliding_window < config.max_position_embeddings
        and not entry_of(config).windows
    ):
        stderr().print(
            f"{source.path}: a token sees the last {config.sliding_window}; the architecture {called!r} of "
            f"llama.cpp has no such window, so the file is for texts of up to {config.sliding_window} tokens"
        )
    try:
        keys = to_metadata(config)
        tokenizer = vocabulary(source.files, source.config, config.vocab_size)
    except CheckpointError as error:
        raise CheckpointError(f"{source.path}: {error}") from error
    return general | {f"{called}.{key}": value for key, value in keys.items()} | tokenizer


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
    value = to_stored(name, source.read(name), source.shape)
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
