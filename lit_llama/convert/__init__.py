"""Foreign weights -> the Hugging Face layout, and back."""

import time
from pathlib import Path

from lit_llama.convert.source import SETTINGS_FILE, Source, write_folder
from lit_llama.errors import CheckpointError
from lit_llama.folder import check_destination
from lit_llama.model.weights import MAX_SHARD_SIZE
from lit_llama.progress import stderr


def convert(source: Path, destination: Path, *, dtype: str | None, max_shard_size: int = MAX_SHARD_SIZE) -> None:
    """Find out what `source` is, convert it into the folder `destination`, and say so on stderr.

    Raises:
        CheckpointError: `source` is missing, or nothing that can be converted.
    """
    start = time.perf_counter()
    check_destination(destination, SETTINGS_FILE)
    opened = open_source(source, dtype)
    write_folder(opened, destination, max_shard_size=max_shard_size)
    stderr().print(
        f"{destination}: {opened.parameters:,} parameters in {opened.dtype}, {time.perf_counter() - start:.1f} s"
    )


def open_source(source: Path, dtype: str | None) -> Source:
    """Find out what `source` is and open it.

    Raises:
        CheckpointError: It is missing, or nothing that can be read.
    """
    if source.is_dir() and (source / "config.json").is_file():
        raise CheckpointError(f"{source} already is a checkpoint folder in Hugging Face layout: use it as it is")
    if not source.is_file():
        what = "is a folder without config.json" if source.is_dir() else "does not exist"
        raise CheckpointError(f"--source: {source} {what}, expected a GGUF file")
    from lit_llama.convert.gguf import open_gguf

    return open_gguf(source, dtype)
