"""Foreign weights -> the Hugging Face layout."""

import time
from pathlib import Path

from lit_llama.errors import CheckpointError
from lit_llama.progress import stderr


def convert(source: Path, destination: Path, dtype: str) -> None:
    """Find out what `source` is, convert it into the folder `destination`, and say so on stderr.

    Raises:
        CheckpointError: `source` is missing, or nothing that can be converted.
    """
    start = time.perf_counter()
    if source.is_dir() and (source / "config.json").is_file():
        raise CheckpointError(f"{source} already is a checkpoint folder in Hugging Face layout: use it as it is")
    if not source.is_file():
        what = "is a folder without config.json" if source.is_dir() else "does not exist"
        raise CheckpointError(f"--source: {source} {what}, expected a GGUF file")
    from lit_llama.convert import gguf

    parameters = gguf.convert(source, destination, dtype)
    stderr().print(f"{destination}: {parameters:,} parameters in {dtype}, {time.perf_counter() - start:.1f} s")
