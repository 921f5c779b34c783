"""GGUF (llama.cpp's single-file format) -> a model in Hugging Face's names: weights, settings, tokenizer, template.

Dequantisation is the gguf package's, a few rows at a time.
"""

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import quants
from torch import Tensor

from lit_llama.conversion import listed
from lit_llama.conversion.bpe import adds_bos, tokenizer_json
from lit_llama.conversion.gguf.architectures import is_router
from lit_llama.conversion.gguf.config import Reading, absent_biases
from lit_llama.conversion.gguf.metadata import ROPE_FREQS, ROPE_LONG, ROPE_SHORT
from lit_llama.conversion.gguf.scan import Extent, read_parts
from lit_llama.conversion.gguf.values import changes, from_stored, is_plain, native_shape, to_stored
from lit_llama.conversion.listed import from_metadata
from lit_llama.conversion.source import NAMES, Source, settings
from lit_llama.conversion.tokens import PLAIN_CLASS, class_settings, fast_tokenizer
from lit_llama.errors import CheckpointError
from lit_llama.folder.publish import encode_json
from lit_llama.model.files.weights import Stored, check_finite
from lit_llama.wording import param

BLOCK = 2**24
"""Values that are dequantised, or quantised, at once: 64 MiB in float32."""

_MAX_EXPERTS = 1 << 12  # of a layer
_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_PACKED = (
    *(Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q2_K, Kind.Q3_K, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K),
    *(Kind.IQ1_S, Kind.IQ1_M, Kind.IQ2_XXS, Kind.IQ2_XS, Kind.IQ2_S, Kind.IQ3_XXS, Kind.IQ3_S, Kind.IQ4_NL),
    *(Kind.IQ4_XS, Kind.TQ1_0, Kind.TQ2_0, Kind.MXFP4),
)
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # ours -> theirs


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file.

    Args:
        name: As the file calls it.
        extent: Where it lies.
        rows: The same as a matrix of values, or of the bytes of packed values.
    """

    name: str
    extent: Extent
    rows: Stored

    @classmethod
    def at(cls, path: Path, name: str, extent: Extent) -> "GGUFTensor":
        """Return the tensor at an extent; CheckpointError if its values are packed in a way that is not implemented."""
        if extent.kind not in (*_PLAIN, *_PACKED):
            known = ", ".join(kind.name for kind in (*_PLAIN, *_PACKED))
            raise CheckpointError(f"{name} is of type {extent.kind.name}, implemented are {known}")
        count = math.prod(extent.shape[:-1])
        stored = Stored(path, extent.offset, _PLAIN.get(extent.kind, torch.uint8), (count, extent.shape[-1]), name=name)
        if extent.kind in _PACKED:
            stored = Stored(path, extent.offset, torch.uint8, (count, extent.size // count))
        return cls(name, extent, stored)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the tensor is kept if nobody asks for another."""
        return _PLAIN.get(self.extent.kind, torch.bfloat16)

    def read(self, dtype: torch.dtype) -> Tensor:
        """Read the values, dequantised in float32 and rounded once.

        Raises:
            CheckpointError: One is not finite.
        """
        count, width = self.rows.shape[0], self.extent.shape[-1]
        out = torch.empty((count, width), dtype=dtype)
        step = max(1, BLOCK // width)
        for start in range(0, count, step):
            part = self.rows.read(start, min(start + step, count))
            if self.extent.kind in _PACKED:
                with np.errstate(all="ignore"):  # what is not finite is told below
                    part = torch.from_numpy(quants.dequantize(part.numpy(), self.extent.kind))
            if part.is_floating_point():
                check_finite(part, self.name, self.rows.path, whole=True)
            out[start : start + step] = part
            if not out[start : start + step].isfinite().all():
                raise CheckpointError(f"{self.name} has values that are not finite in {str(dtype)[6:]}")
        return out.view(self.extent.shape)


class GGUFFile:
    """Metadata and tensors of a GGUF file.

    Raises:
        CheckpointError: It is no readable GGUF file of a model that is implemented.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        files = read_parts(path)
        self.metadata = files.metadata
        self.tensors: dict[str, GGUFTensor] = {}  # by Hugging Face's names
        divisors = {}
        with self.explained("cannot be used"):
            check_model(files.metadata)
            reading = Reading(files.metadata)
            for name, (part, extent) in files.tensors.items():
                tensor = GGUFTensor.at(part, name, extent)
                if name in (ROPE_FREQS, ROPE_LONG, ROPE_SHORT) and extent.size <= 2**16:
                    divisors[name] = tensor.read(torch.float32)
                elif native := reading.entry.native_name(name):
                    stacked = "{}" in native
                    for index, one in enumerate(_unstacked(name, extent) if stacked else [extent]):
                        self.tensors[native.format(index)] = GGUFTensor.at(part, name, one) if stacked else tensor
                else:
                    raise CheckpointError(f"tensor {name} has no place in a LLaMA model")
            shapes = {name: native_shape(name, tensor.extent.shape) for name, tensor in self.tensors.items()}
            self.config = reading.config(shapes, divisors)
            self.zeros = absent_biases(self.config, shapes)

    @contextlib.contextmanager
    def explained(self, what: str) -> Iterator[None]:
        """Name the file in whatever error its contents run into."""
        try:
            yield
        except CheckpointError as error:
            raise error if str(self.path) in str(error) else CheckpointError(f"{self.path}: {error}") from error
        except OSError:  # a full disk is not the file's fault
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path} {what}: {type(error).__name__}: {error}") from error

    def dtypes(self) -> dict[str, torch.dtype]:
        """Return the dtype that each tensor is kept in: as it is stored, bfloat16 for what is quantised.

        llama.cpp stores every vector, and every router, in float32. One that came from a narrower dtype returns to
        that of the matrices; one that would lose a bit stays.
        """
        values: dict[torch.dtype, int] = {}
        vectors = {
            name
            for name, tensor in self.tensors.items()
            if len(tensor.extent.shape) == 1 or is_router(tensor.name) or is_plain(name)
        }
        for name, tensor in self.tensors.items():
            if name not in vectors:
                values[tensor.dtype] = values.get(tensor.dtype, 0) + math.prod(tensor.extent.shape)
        main = max(values, key=lambda dtype: values[dtype])

        def kept(name: str, tensor: GGUFTensor) -> torch.dtype:
            if name not in vectors or tensor.dtype != torch.float32:
                return tensor.dtype
            stored = tensor.rows.read().view(tensor.extent.shape)
            value = from_stored(name, stored, self.config).to(main)
            return main if torch.equal(to_stored(name, value, self.config).float(), stored) else torch.float32

        return {name: kept(name, tensor) for name, tensor in self.tensors.items()} | dict.fromkeys(self.zeros, main)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return one tensor, its rotary rows in Hugging Face's order."""
        if name in self.zeros:
            return torch.zeros(self.zeros[name], dtype=dtype)
        with self.explained("cannot be dequantised"):
            value = self.tensors[name].read(torch.float32 if changes(name, self.config) else dtype)
        return from_stored(name, value, self.config).to(dtype)


def _unstacked(name: str, extent: Extent) -> list[Extent]:
    """The matrices of the experts in one tensor (E, out, in), one after the other."""
    count, *shape = extent.shape
    if len(shape) != 2 or not 1 <= count <= _MAX_EXPERTS:
        raise CheckpointError(f"{name} is {extent.shape}, expected (experts, rows, columns)")
    size = extent.size // count
    return [Extent(extent.kind, tuple(shape), extent.offset + index * size, size) for index in range(count)]


def check_model(metadata: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a file holds something else than a model, such as an adapter."""
    kind = metadata.get("general.type", "model")
    if kind == "adapter":
        raise CheckpointError(f"it is an adapter: name the folder of its base with {param('base_dir')}")
    if kind != "model":
        raise CheckpointError(f"general.type is {kind!r}, expected 'model'")


def open_gguf(path: Path, dtype: str | None = None) -> Source:
    """Open the model in a GGUF file.

    Args:
        path: The .gguf file, or one of its parts.
        dtype: bfloat16, float16 or float32, to which every value is rounded once. None keeps what is stored, and makes
            bfloat16 of what is quantised.

    Raises:
        CheckpointError: It is no readable GGUF file, or of a model that is not implemented.
    """
    file = GGUFFile(path)
    with file.explained("has metadata that cannot be used"):
        shapes = {name: native_shape(name, tensor.extent.shape) for name, tensor in file.tensors.items()} | file.zeros
        kept = dict.fromkeys(shapes, getattr(torch, dtype)) if dtype else file.dtypes()
        raw = settings(file.config)
    with file.explained("has a tokenizer that cannot be rebuilt"):
        files = _folder_files(file)
    return Source(
        path=path,
        kind="GGUF",
        config=raw,
        specs={name: (NAMES[kept[name]], shape) for name, shape in shapes.items()},
        read=lambda name: file.tensor(name, kept[name]),
        files=files,
        notes={"biases": f"{len(file.zeros)} that the file has not are zero"} if file.zeros else {},
    )


def _folder_files(file: GGUFFile) -> dict[str, bytes]:
    """Tokenizer, template and settings, as a Hugging Face folder holds them."""
    metadata, config = file.metadata, file.config
    kind = metadata.get("tokenizer.ggml.model")
    tokens = listed.tokens(metadata)
    if len(tokens) > config.vocab_size:
        raise CheckpointError(f"{len(tokens)} tokens, but only {config.vocab_size} rows in the embedding")
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        listed.token_id(metadata, name, len(tokens), 0)
    files: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    if kind == "llama":
        files |= _sentencepiece_files(from_metadata(metadata).encode())
        values |= class_settings("tokenizer.json" in files)
        values |= {f"add_{name}_token": _flag(metadata, name, name == "bos") for name in ("bos", "eos")}
    elif kind == "gpt2":
        files["tokenizer.json"] = encode_json(tokenizer_json(metadata))
        values |= {"tokenizer_class": PLAIN_CLASS, "add_bos_token": adds_bos(metadata)}
    else:
        raise CheckpointError(f"tokenizer.ggml.model is {kind!r}, implemented are 'llama' and 'gpt2'")
    for name, key in _SPECIAL.items():
        token_id = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            values[f"{name}_token"] = tokens[token_id]
    values |= {"clean_up_tokenization_spaces": False, "model_max_length": config.max_position_embeddings}
    files["tokenizer_config.json"] = encode_json(values)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_id)}
    files["generation_config.json"] = encode_json(ids | {"pad_token_id": config.pad_token_id})
    if template := metadata.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template.encode()
    return files


def _sentencepiece_files(model: bytes) -> dict[str, bytes]:
    """The model, and what most programs read instead of it if that does the same."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.model"
        path.write_bytes(model)
        fast = fast_tokenizer(path)
    return {"tokenizer.model": model} | ({} if fast is None else {"tokenizer.json": encode_json(fast)})


def _flag(metadata: Mapping[str, Any], token: str, default: bool) -> bool:
    return bool(metadata.get(f"tokenizer.ggml.add_{token}_token", default))
