"""Foreign weights -> the Hugging Face layout, and back."""

import time
from pathlib import Path
from typing import Literal, get_args

from lit_llama.convert.source import SETTINGS_FILE, Source, write_folder
from lit_llama.errors import CheckpointError, UserError
from lit_llama.folder import check_destination
from lit_llama.model.config import PlainType
from lit_llama.model.weights import MAX_SHARD_SIZE, describe_wrong_file
from lit_llama.progress import stderr

Layout = Literal["hf", "meta", "lit", "gguf"]
_MARKERS = {"hf": SETTINGS_FILE, "meta": "params.json", "lit": "lit-llama.pth"}
"""The file that tells a whole folder, so that one is refused before anything is read."""

_ADAPTER = "adapter_config.json"
_EXPECTED = (
    "a GGUF file, a .pth of lit-llama, a folder of Meta's (consolidated.NN.pth), of litgpt (lit_model.pth) or of "
    "Hugging Face (config.json with weights)"
)


def convert(
    source: Path,
    destination: Path,
    *,
    layout: Layout = "hf",
    dtype: str | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    num_shards: int = 1,
    rms_norm_eps: float | None = None,
    resize_vocab: int | None = None,
    base_dir: Path | None = None,
    lora_alpha: float = 16,
    modelfile: bool = False,
) -> None:
    """Find out what `source` is, write it as `layout` into the folder `destination`, and say so on stderr.

    Args:
        source: File or folder with weights.
        destination: Folder to make, or for gguf the file.
        layout: What to write: hf, meta, lit or gguf.
        dtype: Round all weights to it; None rounds none but quantised ones, which become bfloat16. For gguf see
            `GGUFType`.
        max_shard_size: Most bytes of a safetensors file, unless one tensor is larger.
        num_shards: Number of Meta's consolidated.NN.pth.
        rms_norm_eps: Epsilon of the norms, for lit-llama's file, which does not say it.
        resize_vocab: Rows that embedding and head are to grow to.
        base_dir: The base model, of an adapter.
        lora_alpha: Alpha of lit-llama's LoRA file, which does not say it.
        modelfile: Write a Modelfile for Ollama beside the GGUF file.

    Raises:
        CheckpointError: `source` is missing, or nothing that can be converted.
        UserError: There is nothing to do, or `destination` is whole already.
        ResourceError: The disk has no room.
    """
    start = time.perf_counter()
    adapter = base_dir is not None or (layout == "gguf" and (source / _ADAPTER).is_file() and not _is_model(source))
    if modelfile and (adapter or layout != "gguf"):
        raise UserError("--modelfile is for a model with --format gguf")
    if adapter:
        _convert_adapter(source, destination, layout, dtype, base_dir, lora_alpha)
        return
    if num_shards != 1 and layout != "meta":
        raise UserError(f"--num_shards is {num_shards}, but only --format meta has shards; see --max_shard_size")
    if layout == "gguf":
        from lit_llama.convert.gguf.modelfile import check_modelfile
        from lit_llama.convert.gguf.types import check_type
        from lit_llama.convert.gguf.writer import check_file

        check_file(destination)
        check_type(dtype)
        if modelfile:
            check_modelfile(destination)
    else:
        check_destination(destination, _MARKERS[layout])
    if dtype not in (None, *get_args(PlainType)) and layout != "gguf":
        raise UserError(f"--dtype {dtype} is a type of GGUF files: it needs --format gguf")
    if layout == "hf" and dtype is None and resize_vocab is None and max_shard_size == MAX_SHARD_SIZE:
        _check_foreign(source)
    # A GGUF file is written from all that a value has, and rounded there, once.
    exact = None if dtype is None else "float32"
    opened = open_source(source, exact if layout == "gguf" else dtype, rms_norm_eps)
    if resize_vocab is not None:
        from lit_llama.convert.resize import resize

        opened = resize(opened, resize_vocab)
    if layout == "hf":
        write_folder(opened, destination, max_shard_size=max_shard_size)
    elif layout == "meta":
        from lit_llama.convert.meta.writer import write_meta

        write_meta(opened, destination, num_shards)
    elif layout == "lit":
        from lit_llama.convert.lit.lit_llama import write_lit

        write_lit(opened, destination)
    else:
        from lit_llama.convert.gguf.writer import write_gguf

        write_gguf(opened, destination, dtype)
    say = stderr().print
    for remark in opened.notes.get("remarks", ()):
        say(remark, markup=False)
    for name, note in opened.notes.items():
        if isinstance(note, str):
            say(f"{name}: {note}", markup=False)
    if modelfile:
        from lit_llama.convert.gguf.modelfile import write_modelfile

        write_modelfile(destination)
    made = f"{opened.parameters:,} parameters in {dtype or opened.dtype}"
    say(f"{destination}: {made} from {opened.kind}, {time.perf_counter() - start:.1f} s")


def _is_model(folder: Path) -> bool:
    return (folder / SETTINGS_FILE).is_file()


def _convert_adapter(
    source: Path, destination: Path, layout: Layout, dtype: str | None, base_dir: Path | None, lora_alpha: float
) -> None:
    """An adapter folder -> a GGUF adapter, or a GGUF adapter or lit-llama's LoRA file -> an adapter folder."""
    from lit_llama.convert.gguf.adapter import read_adapter, write_adapter
    from lit_llama.convert.gguf.scan import MAGIC
    from lit_llama.convert.lit.lora import convert_lit_lora

    if source.is_dir() and (source / _ADAPTER).is_file():
        if layout != "gguf":
            raise CheckpointError(_merge_hint(source))
        write_adapter(source, destination, dtype, base_dir)
        return
    if base_dir is None or layout != "hf":
        raise UserError(f"--source: {source} is no adapter folder, from which alone --format {layout} makes an adapter")
    if not source.is_file():
        raise CheckpointError(f"--source: {source} is no file: --base_dir is for adapters, see --help")
    with source.open("rb") as file:
        is_gguf = file.read(len(MAGIC)) == MAGIC
    if is_gguf:
        read_adapter(source, base_dir, destination)
    else:
        convert_lit_lora(source, base_dir, destination, lora_alpha)
    stderr().print(f"{destination}: an adapter of {base_dir}, from {source}", markup=False)


def _merge_hint(folder: Path) -> str:
    return (
        f"--source: {folder} is an adapter: merge it into its base with finetune/merge.py, or name --format gguf for "
        "an adapter of llama.cpp"
    )


def _check_foreign(source: Path) -> None:
    from lit_llama.convert.native import has_safetensors

    if source.is_dir() and has_safetensors(source):
        raise CheckpointError(f"{source} already is a checkpoint folder in Hugging Face layout: use it as it is")


def open_source(source: Path, dtype: str | None = None, rms_norm_eps: float | None = None) -> Source:
    """Find out what `source` is and open it; the parameters are those of `convert`.

    Raises:
        CheckpointError: It is missing, or nothing that can be read.
    """
    if source.is_dir():
        opened = _open_folder(source, dtype, rms_norm_eps)
    elif source.is_file():
        opened = _open_file(source, dtype, rms_norm_eps)
    else:
        raise CheckpointError(f"--source: {source} does not exist (working folder: {Path.cwd()}), expected {_EXPECTED}")
    if rms_norm_eps is not None and opened.kind != "lit-llama":
        raise UserError(f"--rms_norm_eps: {source} ({opened.kind}) says its epsilon itself, leave the flag out")
    return opened


def _open_file(path: Path, dtype: str | None, rms_norm_eps: float | None) -> Source:
    from lit_llama.convert.meta.reader import SHARD

    if SHARD.fullmatch(path.name):
        raise CheckpointError(
            f"--source: {path} is one shard of a folder in Meta's layout, name the folder {path.parent}"
        )
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        from lit_llama.convert.gguf.reader import open_gguf

        return open_gguf(path, dtype)
    if start.startswith(b"PK") or path.suffix == ".pth":
        from lit_llama.convert.lit.lit_llama import open_lit

        return open_lit(path, rms_norm_eps).cast(dtype)
    what = describe_wrong_file(path) or f"none of these: it starts with {start!r}"
    raise CheckpointError(f"--source: {path} is {what}; expected {_EXPECTED}")


def _open_folder(folder: Path, dtype: str | None, rms_norm_eps: float | None) -> Source:
    from lit_llama.convert.gguf.parts import only_model

    if (opened := _open_layout(folder, rms_norm_eps)) is not None:
        return opened.cast(dtype)
    if (path := only_model(folder)) is not None:  # as prepare/download.py makes it
        return _open_file(path, dtype, rms_norm_eps)
    if (folder / _ADAPTER).is_file():
        raise CheckpointError(_merge_hint(folder))
    found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"--source: {folder} is a folder without config.json or weights (found: {found}), expected {_EXPECTED}"
    )


def _open_layout(folder: Path, rms_norm_eps: float | None) -> Source | None:
    """The layouts that a folder may be in, those first whose files leave no doubt."""
    from lit_llama.convert import native
    from lit_llama.convert.lit import lit_llama as lit
    from lit_llama.convert.lit import litgpt
    from lit_llama.convert.meta import reader as meta

    if native.has_safetensors(folder):
        return native.open_folder(folder)
    if meta.has_shards(folder):
        return meta.open_meta(folder)
    if any((folder / name).is_file() for name in (litgpt.FILE, lit.FILE)):
        return lit.open_lit(folder, rms_norm_eps)
    if native.has_bin(folder) or ((folder / SETTINGS_FILE).is_file() and not meta.has_shards(folder / "original")):
        return native.open_folder(folder)
    if meta.has_shards(folder / "original"):
        return meta.open_meta(folder)
    return None
