"""A checkpoint folder and the model in it: reading mapped, writing tensor by tensor, knowing one base from another.

The folder is Hugging Face's: config.json, model.safetensors or shards with model.safetensors.index.json.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lit_llama.errors import CheckpointError
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.progress import track

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Names of the dtypes in a safetensors header."""

_SAMPLE = 4096  # bytes of the start, the middle and the end of each tensor that go into a fingerprint


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, read from the mapped files when asked for.

    Raises:
        CheckpointError: Files are missing, unreadable, or do not hold what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.files = _weight_files(folder)
        self._open = {}
        for path in sorted(set(self.files.values())):
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
            listed = {name for name, file in self.files.items() if file == path}
            check_names(path, listed, dict.fromkeys(self._open[path].keys()))

    def __getitem__(self, name: str) -> Tensor:
        return self._open[self.files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Name of the dtype and shape, without reading the tensor."""
        part = self._open[self.files[name]].get_slice(name)
        return part.get_dtype(), tuple(part.get_shape())


def _weight_files(folder: Path) -> dict[str, Path]:
    """Which file holds each tensor."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.is_file():
        try:
            names = dict(json.loads(index.read_text("utf-8"))["weight_map"])
            files = set(names.values())
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{index} is not an index of weights: {error!r}") from error
        for file in files:
            # The name comes from data: it may only be a plain file beside the index.
            if not isinstance(file, str) or Path(file).name != file or not (folder / file).is_file():
                raise CheckpointError(f"{index} names {file!r}, which is no file in {folder}")
        return {name: folder / file for name, file in names.items()}
    if single.is_file():
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{single} is not a readable safetensors file: {error}") from error
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise CheckpointError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE} (found: {found or 'nothing'})")


def load_model(folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LLaMA:
    """Build the model of a checkpoint folder, frozen and in evaluation mode.

    Args:
        folder: A folder in Hugging Face layout.
        device: Where to put it.
        dtype: Convert the weights to it; None keeps what is stored.

    Raises:
        CheckpointError: Tensors are missing, unknown, or of another shape than config.json says.
    """
    config = LLaMAConfig.from_folder(folder)
    weights = Weights(folder)
    with torch.device("meta"):
        model = LLaMA(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    # Old files carry the rotary frequencies, which follow from the configuration.
    names = [name for name in weights if not name.endswith("rotary_emb.inv_freq")]
    tied = config.tie_word_embeddings and "lm_head.weight" not in weights
    if tied:
        expected.pop("lm_head.weight")
    check_names(folder, set(expected), dict.fromkeys(names))
    state = {}
    for name in track(names, f"loading {folder}"):
        stored, shape = weights.spec(name)
        if shape != expected[name] or stored not in DTYPES:
            wanted = f"{expected[name]} of {', '.join(DTYPES)}"
            raise CheckpointError(f"{folder}: {name} is {shape} of {stored}, config.json asks for {wanted}")
        state[name] = weights[name].to(device=device, dtype=dtype)
    if config.tie_word_embeddings:
        embedding = state["model.embed_tokens.weight"]
        if not torch.equal(state.setdefault("lm_head.weight", embedding), embedding):
            raise CheckpointError(f"{folder}: tie_word_embeddings is true, but lm_head.weight is another matrix")
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_(False).eval()


def fingerprint(folder: Path) -> str:
    """Identity of the weights in a folder, however they are sharded: a hash over every tensor's name, dtype, shape and
    three samples of its bytes.

    It tells one base from another in a moment, also for the largest; it is no proof against a flipped bit.
    """
    digest = hashlib.sha256()
    headers = {path: _header(path) for path in set(_weight_files(folder).values())}
    entries = {
        name: (path, start, entry) for path, (start, header) in headers.items() for name, entry in header.items()
    }
    for name in sorted(entries):
        path, start, entry = entries[name]
        begin, end = entry["data_offsets"]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
        with path.open("rb") as file:
            for offset in (begin, (begin + end) // 2, max(begin, end - _SAMPLE)):
                file.seek(start + offset)
                digest.update(file.read(min(_SAMPLE, end - offset)))
    return digest.hexdigest()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file starts, and its table of tensors."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(size if size <= 100_000_000 else 0))  # the format's own limit
        except ValueError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    return 8 + size, header


def write_weights(
    folder: Path,
    specs: Mapping[str, tuple[str, tuple[int, ...]]],
    produce: Callable[[str], Tensor],
    max_shard_size: int = 5_000_000_000,
) -> None:
    """Write tensors one at a time, so that memory holds one and not the model.

    Args:
        folder: Where model.safetensors, or shards and their index, go.
        specs: Name of the dtype (F32, F16, BF16) and shape of each tensor, in the order to write.
        produce: Makes the tensor of a name.
        max_shard_size: Most bytes of a file, unless one tensor is larger.
    """
    sizes = {name: DTYPES[dtype].itemsize * math.prod(shape) for name, (dtype, shape) in specs.items()}
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_size:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(shards) > 1 else [SINGLE_FILE]
    for file, names in zip(files, shards, strict=True):
        (folder / file).write_bytes(_encode_header({name: specs[name] for name in names}, sizes))
    places = [(folder / file, name) for file, names in zip(files, shards, strict=True) for name in names]
    for path, name in track(places, f"writing {len(places)} tensors"):
        tensor = produce(name).contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[specs[name][0]], specs[name][1]), name
        with path.open("ab") as output:
            output.write(tensor.view(-1).view(torch.uint8).numpy().data)
    if len(shards) > 1:
        weight_map = {name: path.name for path, name in places}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _encode_header(specs: Mapping[str, tuple[str, tuple[int, ...]]], sizes: Mapping[str, int]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + sizes[name]]}
        offset += sizes[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def check_vocabulary(folder: Path, rows: int, tokens: int) -> None:
    """Raise CheckpointError if the tokenizer knows more ids than the embedding has rows; fewer is harmless padding."""
    if tokens > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokens} tokens, the embedding only {rows} rows: ids {rows} to {tokens - 1} "
            "have no embedding. Use the tokenizer that came with these weights"
        )


def check_names(path: Path, expected: set[str], found: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the tensors found are exactly those expected."""
    missing, unknown = sorted(expected - found.keys()), sorted(found.keys() - expected)
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({names[0]} ...)"
            for what, names in (("missing", missing), ("unknown", unknown))
            if names
        ]
        raise CheckpointError(f"{path}: tensors do not fit the model: {', '.join(parts)}")
