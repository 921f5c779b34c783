"""A checkpoint folder and the model in it: loading, and knowing one base from another.

The folder is Hugging Face's: config.json, model.safetensors or shards with model.safetensors.index.json.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig, Quantization
from lit_llama.model.files.weights import DTYPES, Spec, Stored, Weights, check_names, read_header, weight_files
from lit_llama.model.llama import LLaMA
from lit_llama.model.quantize import is_quantized, quantized
from lit_llama.progress import track
from lit_llama.wording import call, param

_DELTA = 0.05
"""Root mean square of all norm weights below which a folder is a difference: models have 0.3 and more."""
_SAMPLE = 4096  # bytes of the start, the middle and the end of each tensor that go into a fingerprint


class TensorSource(Protocol):
    """Tensors of a model by their names, made or read as they are asked for.

    Attributes:
        config: Shape of the model.
    """

    config: LLaMAConfig

    def spec(self, name: str) -> Spec:
        """Return the dtype, as safetensors spells it, and the shape."""
        ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def __getitem__(self, name: str, /) -> torch.Tensor: ...


class _Stored(Weights):
    """Those of a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.config = LLaMAConfig.from_folder(folder)
        super().__init__(folder)


def load_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    quantize: Quantization | None = None,
    linear_dtype: torch.dtype | None = None,
    stored_from: int | None = None,
    source: TensorSource | None = None,
    mapped: bool = True,
) -> LLaMA:
    """Build the model of a checkpoint folder, frozen and in evaluation mode.

    Args:
        folder: A folder in Hugging Face layout.
        device: Where to put it.
        dtype: Convert the weights to it; None keeps what is stored.
        quantize: Hold the linear layers of the decoder like this, each made so as soon as it is read.
        linear_dtype: The same of the weights of linear layers, where theirs is another. A head that is the embedding
            follows the embedding.
        stored_from: Decoder layers from this one on stay as they are stored, mapped from their files, see offload.py.
        source: Tensors in place of those of the folder.
        mapped: Weights that stay as they are stored may stay in their files, mapped; else they are read, one at a
            time, and the files are let go.

    Raises:
        ResourceError: The quantisation cannot be had here.
        CheckpointError: Tensors are missing, unknown, or of another shape than config.json says, or the folder holds a
            delta, or a value does not fit float16.
    """
    folder = Path(folder)
    weights = _Stored(folder) if source is None else source

    def whole(name: str) -> torch.Tensor:
        """A tensor of which a copy is made anyway, or that is not to be mapped."""
        return weights.read(name) if isinstance(weights, Weights) else weights[name]

    config = weights.config
    with torch.device("meta"):
        model = LLaMA(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    linear = linear_weights(model)
    names = list(weights)
    tied = config.tie_word_embeddings and "lm_head.weight" not in weights
    if tied:
        expected.pop("lm_head.weight")
    check_names(folder, set(expected), dict.fromkeys(names))
    if not config.norm_offset:  # else those of a model may be near zero
        check_no_delta(folder, (whole(name) for name in weights if name.endswith("norm.weight")))
    state: dict[str, torch.Tensor] = {}
    for name in track(names, f"loading {folder}"):
        stored, shape = weights.spec(name)
        if shape != expected[name] or stored not in DTYPES:
            wanted = f"{expected[name]} of {', '.join(DTYPES)}"
            raise CheckpointError(f"{folder}: {name} is {shape} of {stored}, config.json asks for {wanted}")
        if stored_from is not None and (layer_index := layer_of(name)) is not None and layer_index >= stored_from:
            state[name] = weights[name]
        elif quantize and is_quantized(name):
            module = name.removesuffix(".weight")
            bias = dict(model.get_submodule(module).named_parameters()).get("bias")
            layer = quantized(whole(name).to(device), bias, quantize)
            model.set_submodule(module, layer)
            state[f"{module}.packed"] = layer.packed
        else:
            wanted_dtype = linear_dtype or dtype if name in linear else dtype
            kept = mapped and wanted_dtype in (None, DTYPES[stored])
            state[name] = (weights[name] if kept else whole(name)).to(device=device, dtype=wanted_dtype)
            if wanted_dtype == torch.float16 and not state[name].isfinite().all():
                raise CheckpointError(
                    f"{folder}: {name} has values beyond float16; use {param('precision', '32-true')} or bf16-true"
                )
    if config.tie_word_embeddings:
        embedding = state["model.embed_tokens.weight"]
        if not torch.equal(state.setdefault("lm_head.weight", embedding), embedding):
            raise CheckpointError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is another matrix")
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def layer_of(name: str) -> int | None:
    """Return the index of the decoder layer that a parameter belongs to, if it belongs to one."""
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def linear_weights(model: LLaMA) -> set[str]:
    """Return the names of the weights of linear layers; a head that is the embedding is none of them."""
    names = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return names - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())


def check_no_delta(folder: Path, norms: Iterable[torch.Tensor]) -> None:
    """Refuse a delta, which runs as well as a model does, and says nothing: its norms, which scale all there is, are
    near zero.

    Raises:
        CheckpointError: The norms in `folder` are those of a delta.
    """
    if (size := torch.cat([norm.flatten().float() for norm in norms]).square().mean().sqrt().item()) < _DELTA:
        added = call("add_delta", base_dir="BASE", delta_dir=folder, destination_path=f"{folder}-merged")
        raise CheckpointError(
            f"{folder} holds a delta and no model: its norms are near zero (root mean square {size:.2g}, expected 0.3 "
            f"or more). Add it to its base: {added}"
        )


def fingerprint(folder: Path) -> str:
    """Hash the weights in a folder, however they are sharded, over every tensor's name, dtype, shape and
    three samples of its bytes.

    It tells one base from another in a moment, also for the largest; it is no proof against a flipped bit.
    """
    found: dict[str, _Place] = {}
    for path in set(weight_files(folder).values()):
        start, header = read_header(path)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            found[name] = _Place(entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
    return _fingerprint(found)


def fingerprint_stored(stored: Mapping[str, Stored]) -> str:
    """Compute `fingerprint` of tensors wherever they lie, which need not be in safetensors."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    return _fingerprint(
        {
            name: _Place(names[place.dtype], place.shape, place.path, place.offset, place.size)
            for name, place in stored.items()
        }
    )


class _Place(NamedTuple):
    """Dtype and shape of a tensor, and where its bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    size: int


def _fingerprint(places: Mapping[str, _Place]) -> str:
    digest = hashlib.sha256()
    for name, place in sorted(places.items()):
        digest.update(json.dumps([name, place.dtype, place.shape]).encode())
        with place.path.open("rb") as file:
            for offset in (0, place.size // 2, max(0, place.size - _SAMPLE)):
                file.seek(place.start + offset)
                digest.update(file.read(min(_SAMPLE, place.size - offset)))
    return digest.hexdigest()
