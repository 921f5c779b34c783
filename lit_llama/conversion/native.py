"""A Hugging Face folder -> a Source: weights as safetensors or as torch's .bin files, everything else as it is.

Linear weights that are 8-bit floats with scales become bfloat16: the weight is the 8-bit value times its scale, of
which there is one for a matrix, for each row, or for each block of rows and columns (`weight_scale_inv` of quant_method
fp8, `weight_scale` of compressed-tensors and of FBGEMM).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_llama.conversion.source import EMBEDDING, HEAD, META_FILE, NAMES, SETTINGS_FILE, Source, check_stored
from lit_llama.conversion.tensors import same
from lit_llama.errors import CheckpointError
from lit_llama.folder.manifest import check_folder
from lit_llama.model.config import LLaMAConfig, text_part
from lit_llama.model.files.names import tidy
from lit_llama.model.files.pth.files import read_pth
from lit_llama.model.files.weights import DTYPES, INDEX_FILE, SINGLE_FILE, Stored, Weights, check_names, read_index
from lit_llama.model.places import holds_fp8
from lit_llama.objects import as_object, read_object, read_text

_STORED = "F8_E4M3"
_REPLACED = ("quantization_config", "torch_dtype", "dtype")
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
    plain = {key: value for key, value in text_part(raw).items() if key not in _REPLACED}
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


BIN_FILE, BIN_INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"
_BIN_SHARD = re.compile(r"pytorch_model-(\d+)-of-(\d+)\.bin")
_SUFFIXES = (".json", ".model", ".txt", ".jinja")
_OF_RUN = ("report.json", "state.json")
"""What a fine-tuned model's folder holds of its run; see lit_llama/train/."""
_OF_IMAGES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_OURS = (SETTINGS_FILE, META_FILE, INDEX_FILE, BIN_INDEX_FILE, *_OF_RUN, *_OF_IMAGES)


def has_safetensors(folder: Path) -> bool:
    """Whether a folder holds weights that can be used as they are."""
    return (folder / SETTINGS_FILE).is_file() and any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))


def has_bin(folder: Path) -> bool:
    """Whether a folder holds weights as torch's .bin files."""
    return any(path.name in (BIN_FILE, BIN_INDEX_FILE) or _BIN_SHARD.fullmatch(path.name) for path in folder.iterdir())


def companions(folder: Path) -> dict[str, Path]:
    """Find the files of a model beside config.json and weights: tokenizer, chat template, settings, licences."""
    paths = (path for path in sorted(folder.iterdir()) if path.suffix in _SUFFIXES and path.is_file())
    return {path.name: path for path in paths if path.name not in _OURS}


def open_folder(folder: Path) -> Source:
    """Open the model in a folder of Hugging Face's; safetensors are preferred where there are both.

    Raises:
        CheckpointError: Files are missing or unreadable, or the model is not implemented.
        IntegrityError: A file is not as it was written.
    """
    check_folder(folder)
    if is_fp8(folder) and has_safetensors(folder):
        return open_fp8(folder, companions(folder))
    config = LLaMAConfig.from_folder(folder)
    raw = read_object(folder / SETTINGS_FILE, CheckpointError)
    safe = has_safetensors(folder)
    places, remarks = _locate(folder) if safe else _locate_bin(folder)
    notes: dict[str, Any] = ({} if safe else {"weights": "torch .bin"}) | ({"remarks": remarks} if remarks else {})
    if config.tie_word_embeddings and HEAD in places:
        if EMBEDDING not in places or not same(places[EMBEDDING], places.pop(HEAD)):
            raise CheckpointError(
                f"{folder}: tie_word_embeddings is true, but {HEAD} is another matrix than {EMBEDDING}"
            )
        notes["head"] = f"the embedding; {HEAD} holds the same"
    check_stored(folder, set(places), places)
    return Source(
        path=folder,
        kind="Hugging Face",
        config={key: value for key, value in text_part(raw).items() if key not in ("torch_dtype", "dtype")},
        specs={name: (NAMES[place.dtype], place.shape) for name, place in places.items()},
        read=lambda name: places[name].read(),
        stored=places,
        files=companions(folder),
        notes=notes,
    )


def _locate(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """Where each tensor of the safetensors files lies, and what is to be said of them."""
    weights = Weights(folder)
    return weights.locate(), list(weights.remarks)


def _locate_bin(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """The same of pytorch_model*.bin. Of a single file and an index the file counts, as in transformers."""
    index, remarks = folder / BIN_INDEX_FILE, []
    if (folder / BIN_FILE).is_file():
        listed, paths = {}, [folder / BIN_FILE]
        if index.is_file():
            remarks.append(
                f"{folder}: {BIN_FILE} is used, as transformers does; {BIN_INDEX_FILE} beside it is left out"
            )
    elif index.is_file():
        listed = read_index(index)
        paths = sorted(set(listed.values()))
    else:
        listed, paths = {}, _bin_shards(folder)
    places: dict[str, Stored] = {}
    for path in paths:
        found = read_pth(path)
        if listed:
            check_names(path, {name for name, file in listed.items() if file == path}, found)
        if twice := sorted(found.keys() & places.keys()):
            raise CheckpointError(f"{path}: {twice[0]} is in {places[twice[0]].path.name}, too")
        places |= found
    tidied = tidy(folder, places)
    return {name: places[stored] for name, stored in tidied.names.items()}, [*remarks, *tidied.remarks]


def _bin_shards(folder: Path) -> list[Path]:
    """pytorch_model-00001-of-0000N.bin and so on, which no index lists: all N of them."""
    matches: Mapping[str, re.Match[str]] = {
        path.name: match for path in sorted(folder.iterdir()) if (match := _BIN_SHARD.fullmatch(path.name))
    }
    numbers = {int(match[1]) for match in matches.values()}
    totals = {int(match[2]) for match in matches.values()}
    total = max(totals, default=0)
    if not matches or len(totals) > 1 or numbers != set(range(1, total + 1)) or len(matches) != total:
        found = ", ".join(matches) or ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        missing = sorted(set(range(1, total + 1)) - numbers)
        what = (
            f"; missing are the parts {', '.join(map(str, missing))} of {total}: download them again" if missing else ""
        )
        raise CheckpointError(
            f"{folder} has no {SINGLE_FILE}, {INDEX_FILE}, {BIN_FILE} or whole set of its parts (found: {found}){what}"
        )
    return [folder / name for name in sorted(matches, key=lambda name: int(matches[name][1]))]
