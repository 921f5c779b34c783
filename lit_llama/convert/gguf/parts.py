"""The files of a GGUF model: one, or parts as llama-gguf-split writes them (NAME-00001-of-00003.gguf)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.convert.gguf.scan import Extent, scan
from lit_llama.errors import CheckpointError

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_SHOWN = 8  # most names in a message


@dataclass(frozen=True)
class Files:
    """Contents of all parts together.

    Args:
        metadata: Of the first part.
        tensors: File and extent of each tensor, by the names of the files.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[Path, Extent]]


def model_name(name: str) -> str:
    """Return the name of a model's file without number and suffix."""
    match = PART.fullmatch(name)
    return match["stem"] if match else name.removesuffix(".gguf")


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a model by that of one; a file that is no part is its only one."""
    match = PART.fullmatch(name)
    if not match:
        return [name]
    count = int(match["count"])
    return [f"{match['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def first_parts(names: Iterable[str]) -> list[str]:
    """Return the only or first part of each model among the names of GGUF files."""
    return sorted(name for name in names if part_names(name)[:1] == [name])


def only_model(folder: Path) -> Path | None:
    """Return the GGUF model in a folder; None if it holds no GGUF file.

    Raises:
        CheckpointError: There are several models.
    """
    found = [path.name for path in folder.iterdir() if path.suffix == ".gguf" and path.is_file()]
    models = sorted({part_names(name)[0] for name in found if part_names(name)})
    if len(models) > 1:
        shown = ", ".join(models[:_SHOWN]) + (" ..." if len(models) > _SHOWN else "")
        raise CheckpointError(f"--source: {folder} holds several GGUF models, name one of its files: {shown}")
    return folder / next(name for name in sorted(found)) if models else None


def read_parts(path: Path) -> Files:
    """Read the heads of all parts of a model.

    Args:
        path: Its file, or any of its parts.

    Raises:
        CheckpointError: A part is missing, of another model, or holds what another holds, too.
    """
    header = scan(path)
    count = header.metadata.get("split.count", 1)
    if count in (0, 1):
        return Files(header.metadata, {name: (path, extent) for name, extent in header.tensors.items()})
    names = part_names(path.name)
    if len(names) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts, so its name should end in -NNNNN-of-{count:05}.gguf, as those of the "
            "others beside it: give all parts the names that they were published under"
        )
    if lost := [name for name in names if not (path.parent / name).is_file()]:
        shown = ", ".join(lost[:_SHOWN]) + (" ..." if len(lost) > _SHOWN else "")
        raise CheckpointError(f"{path}: {len(lost)} of {count} parts are not beside it: {shown}; download them, too")
    metadata: dict[str, Any] = {}
    tensors: dict[str, tuple[Path, Extent]] = {}
    for index, part in enumerate(path.parent / name for name in names):
        header = scan(part)
        _check_part(part, header.metadata, index, count)
        metadata = metadata or header.metadata
        for name, extent in header.tensors.items():
            if name in tensors:
                raise CheckpointError(f"{part}: tensor {name} is in {tensors[name][0].name}, too")
            tensors[name] = part, extent
    announced = metadata.get("split.tensors.count", len(tensors))
    if announced != len(tensors):
        raise CheckpointError(f"{path}: its {count} parts hold {len(tensors)} tensors, expected {announced}")
    return Files(metadata, tensors)


def _check_part(path: Path, metadata: Mapping[str, Any], index: int, count: int) -> None:
    for key, wanted in {"split.no": index, "split.count": count}.items():
        if metadata.get(key) != wanted:
            raise CheckpointError(
                f"{path}: {key} is {metadata.get(key)!r}, expected {wanted} by its name: it is a part of another "
                "model, or was renamed; download it again"
            )
