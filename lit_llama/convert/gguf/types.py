"""Types of the tensors of a GGUF file: which type each gets, and how values are packed into it.

The mixtures (`_m`) and what stands in for a type that does not fit are those of llama.cpp's quantize.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType as FileType
from torch import Tensor

from lit_llama.convert.source import EMBEDDING, HEAD, Source
from lit_llama.errors import ResourceError, UserError
from lit_llama.model.config import GGUFType, LLaMAConfig
from lit_llama.progress import stderr


@dataclass(frozen=True)
class _Scheme:
    """What a name of --dtype stands for.

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
        raise UserError(f"--dtype is {dtype!r}, expected one of {known}")
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
    kinds: dict[str, Kind] = {}
    odd: dict[tuple[Kind, Kind], list[str]] = {}
    for name, (stored, shape) in source.specs.items():
        if name == HEAD and config.tie_word_embeddings:
            continue
        if len(shape) == 1:
            kinds[name] = Kind.F32
            continue
        wanted = _wanted(name, config, scheme) if scheme else _STORED[stored]
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
    if name == HEAD or (name == EMBEDDING and config.tie_word_embeddings):
        return scheme.head
    if scheme.more is None or not name.endswith(("v_proj.weight", "down_proj.weight")):
        return scheme.matrices
    layer, layers = int(name.split(".")[2]), config.num_hidden_layers
    if layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2:
        return scheme.more
    shared = layers == 80 and config.num_key_value_heads < config.num_attention_heads  # Llama 70B: v serves 8 heads
    return Kind.Q5_K if shared and "v_proj" in name else scheme.matrices


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
