"""Foreign weights -> the Hugging Face layout, and back."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder.lock import reserving
from lit_llama.folder.manifest import check_folder
from lit_llama.folder.publish import check_destination, check_no_file
from lit_llama.model.config import PlainType
from lit_llama.model.places import foreign_adapter, repository, wrong_place
from lit_llama.progress import stderr
from lit_llama.wording import call, param

if TYPE_CHECKING:
    from lit_llama.conversion.source import Source

Layout = Literal["hf", "meta", "lit", "gguf"]
_SETTINGS = "config.json"
_MARKERS = {"hf": _SETTINGS, "meta": "params.json", "lit": "lit-llama.pth"}
"""The file that tells a whole folder, so that one is refused before anything is read."""

_ADAPTER = "adapter_config.json"
_EXPECTED = (
    "a GGUF file, a .pth of lit-llama, a folder of Meta's (consolidated.NN.pth), of litgpt (lit_model.pth) or of "
    "Hugging Face (config.json with weights)"
)


@reserving
def convert(
    source: Path,
    destination: Path,
    *,
    layout: Layout = "hf",
    dtype: str | None = None,
    max_shard_size: int | None = None,
    num_shards: int = 1,
    rms_norm_eps: float | None = None,
    resize_vocab: int | None = None,
    base_dir: Path | None = None,
    modelfile: bool = False,
) -> None:
    """Find out what `source` is, write it as `layout` into the folder `destination`, and say so on stderr.

    Args:
        source: File or folder with weights.
        destination: Folder to make, or for gguf the file.
        layout: What to write: hf, meta, lit or gguf.
        dtype: Round all weights to it; None rounds none but quantised ones, which become bfloat16. For gguf see
            `GGUFType`.
        max_shard_size: Most bytes of a safetensors file, unless one tensor is larger; None for `MAX_SHARD_SIZE`.
        num_shards: Number of Meta's consolidated.NN.pth.
        rms_norm_eps: Epsilon of the norms, for lit-llama's file, which does not say it.
        resize_vocab: Rows that embedding and head are to grow to.
        base_dir: The base model of an adapter folder that becomes a GGUF adapter; None looks for it.
        modelfile: Write a Modelfile for Ollama beside the GGUF file.

    Raises:
        CheckpointError: `source` is missing, or nothing that can be converted.
        UserError: There is nothing to do, or `destination` is whole already.
        ResourceError: The disk has no room.
    """
    from lit_llama.conversion.source import write_folder
    from lit_llama.model.files.shards import MAX_SHARD_SIZE

    start = time.perf_counter()
    size = MAX_SHARD_SIZE if max_shard_size is None else max_shard_size
    adapter = layout == "gguf" and _is_adapter(source)
    if modelfile and (adapter or layout != "gguf"):
        raise UserError(f"is for a model with {param('format', 'gguf')}", parameter="modelfile")
    if adapter:
        from lit_llama.conversion.gguf.adapter import write_adapter

        write_adapter(source, destination, dtype, base_dir)
        return
    if base_dir is not None:
        raise UserError(
            f"is for adapters, and {source}, which is to be a file of {param('format', layout)}, is none",
            parameter="base_dir",
        )
    if num_shards != 1 and layout != "meta":
        raise UserError(
            f"{param('num_shards')} is {num_shards}, but only {param('format', 'meta')} has shards; see "
            f"{param('max_shard_size')}"
        )
    if layout == "gguf":
        from lit_llama.conversion.gguf.modelfile import check_modelfile
        from lit_llama.conversion.gguf.writer import check_file, check_type

        check_file(destination)
        check_type(dtype)
        if modelfile:
            check_modelfile(destination)
    else:
        check_no_file(destination)
        check_destination(destination, _MARKERS[layout])
    if dtype not in (None, *get_args(PlainType)) and layout != "gguf":
        raise UserError(f"is a type of GGUF files: it needs {param('format', 'gguf')}", parameter="dtype", value=dtype)
    if layout == "hf" and dtype is None and resize_vocab is None and size == MAX_SHARD_SIZE:
        _check_foreign(source)
    # A GGUF file is written from all that a value has, and rounded there, once.
    exact = None if dtype is None else "float32"
    opened = open_source(source, exact if layout == "gguf" else dtype, rms_norm_eps)
    if resize_vocab is not None:
        from lit_llama.conversion.tensors import resize

        opened = resize(opened, resize_vocab)
    if layout == "hf":
        write_folder(opened, destination, max_shard_size=size)
    elif layout == "meta":
        from lit_llama.conversion.layouts.meta_writer import write_meta

        write_meta(opened, destination, num_shards)
    elif layout == "lit":
        from lit_llama.conversion.layouts.lit_llama import write_lit

        write_lit(opened, destination)
    else:
        from lit_llama.conversion.gguf.writer import write_gguf

        write_gguf(opened, destination, dtype)
    say = stderr().print
    for remark in opened.notes.get("remarks", ()):
        say(remark)
    for name, note in opened.notes.items():
        if isinstance(note, str):
            say(f"{name}: {note}")
    if modelfile:
        from lit_llama.conversion.gguf.modelfile import write_modelfile

        write_modelfile(destination)
    made = f"{opened.parameters:,} parameters in {dtype or opened.dtype}"
    say(f"{destination}: {made} from {opened.kind}, {time.perf_counter() - start:.1f} s")


def _is_adapter(folder: Path) -> bool:
    return (folder / _ADAPTER).is_file() and not (folder / _SETTINGS).is_file()


def _merge_hint(folder: Path) -> str:
    return (
        f"{param('source')}: {folder} is an adapter: merge it into its base with {call('merge')}, or name "
        f"{param('format', 'gguf')} for "
        "an adapter of llama.cpp"
    )


def _check_foreign(source: Path) -> None:
    from lit_llama.conversion.native import has_safetensors, is_fp8

    if source.is_dir() and has_safetensors(source) and not is_fp8(source):
        raise CheckpointError(f"{source} already is a checkpoint folder in Hugging Face layout: use it as it is")


def open_source(source: Path, dtype: str | None = None, rms_norm_eps: float | None = None) -> "Source":
    """Find out what `source` is and open it; the parameters are those of `convert`.

    Raises:
        CheckpointError: It is missing, or nothing that can be read.
    """
    if source.is_dir():
        opened = _open_folder(source, dtype, rms_norm_eps)
    elif source.is_file():
        opened = _open_file(source, dtype, rms_norm_eps)
    else:
        raise _absent(source)
    if rms_norm_eps is not None and opened.kind != "lit-llama":
        raise UserError(f"{param('rms_norm_eps')}: {source} ({opened.kind}) says its epsilon itself, leave it out")
    return opened.checked()


def _absent(source: Path) -> CheckpointError:
    if repository(str(source)) is None:
        return CheckpointError(
            f"{param('source')}: {source} does not exist (working folder: {Path.cwd()}), expected {_EXPECTED}"
        )
    return CheckpointError(
        f"{param('source')}: {source} does not exist (working folder: {Path.cwd()}). If it is a model on the Hub: "
        f"{call('download', repo_id=str(source))}"
    )


@reserving
def convert_adapter(source: Path, base_dir: Path, destination: Path, lora_alpha: float) -> None:
    """Make a PEFT adapter folder of another program's: lit-llama's LoRA .pth, a GGUF adapter, a folder of mlx-lm.

    Args:
        source: The file or folder.
        base_dir: The converted base model that it was trained on.
        destination: Folder to make.
        lora_alpha: Alpha of a LoRA of lit-llama, whose file does not hold it.

    Raises:
        CheckpointError: It is none of these, or does not fit the base.
    """
    from lit_llama.conversion.gguf.adapter import read_adapter
    from lit_llama.conversion.layouts import mlx
    from lit_llama.conversion.layouts.lit_llama import convert_lit_lora

    if not source.exists():
        raise _absent(source)
    if (source / mlx.WEIGHTS_FILE).is_file():
        mlx.convert_mlx(source, base_dir, destination)
    elif source.is_dir():
        raise CheckpointError(
            f"{param('source')}: {source} holds no adapter of another program; with {param('base_dir')} expected a "
            "LoRA .pth of "
            f"lit-llama, a GGUF adapter or a folder of mlx-lm ({mlx.WEIGHTS_FILE}). PEFT's own folders need no "
            "conversion"
        )
    elif _is_gguf(source):
        read_adapter(source, base_dir, destination)
    else:
        convert_lit_lora(source, base_dir, destination, lora_alpha)


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _open_file(path: Path, dtype: str | None, rms_norm_eps: float | None) -> "Source":
    from lit_llama.conversion.layouts.meta import SHARD
    from lit_llama.model.files.weights import describe_wrong_file

    if SHARD.fullmatch(path.name):
        raise CheckpointError(
            f"{param('source')}: {path} is one shard of a folder in Meta's layout, name the folder {path.parent}"
        )
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        from lit_llama.conversion.gguf.reader import open_gguf

        return open_gguf(path, dtype)
    if (path.parent / _SETTINGS).is_file() and path.suffix in (".safetensors", ".bin"):
        raise CheckpointError(f"{param('source')}: {path} is a file of the folder {path.parent}: name the folder")
    if start.startswith(b"PK") or path.suffix == ".pth":
        from lit_llama.conversion.layouts.lit_llama import open_lit

        return open_lit(path, rms_norm_eps).cast(dtype)
    what = describe_wrong_file(path) or f"none of these: it starts with {start!r}"
    raise CheckpointError(f"{param('source')}: {path} is {what}; expected {_EXPECTED}")


def _open_folder(folder: Path, dtype: str | None, rms_norm_eps: float | None) -> "Source":
    from lit_llama.conversion.gguf.scan import only_model

    check_folder(folder)
    if (opened := _open_layout(folder, rms_norm_eps)) is not None:
        return opened.cast(dtype)
    if (path := only_model(folder)) is not None:  # as a download makes it
        return _open_file(path, dtype, rms_norm_eps)
    if foreign := foreign_adapter(folder, {path.name for path in folder.iterdir()}):
        raise CheckpointError(f"{param('source')}: {folder} {foreign}")
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(_merge_hint(folder))
    if (folder / "consolidated.safetensors").is_file():
        raise CheckpointError(f"{param('source')}: {wrong_place(folder)}")
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{param('source')}: {folder} is a folder without config.json or weights (found: {found}), expected {_EXPECTED}"
    )


def _open_layout(folder: Path, rms_norm_eps: float | None) -> "Source | None":
    """The layouts that a folder may be in, those first whose files leave no doubt."""
    from lit_llama.conversion import native
    from lit_llama.conversion.layouts import lit_llama as lit
    from lit_llama.conversion.layouts import litgpt
    from lit_llama.conversion.layouts import meta as meta

    if native.has_safetensors(folder):
        return native.open_folder(folder)
    if meta.has_shards(folder):
        return meta.open_meta(folder)
    if any((folder / name).is_file() for name in (litgpt.FILE, lit.FILE)):
        return lit.open_lit(folder, rms_norm_eps)
    if native.has_bin(folder) or ((folder / _SETTINGS).is_file() and not meta.has_shards(folder / "original")):
        return native.open_folder(folder)
    if meta.has_shards(folder / "original"):
        return meta.open_meta(folder)
    return None
