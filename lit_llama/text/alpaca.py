"""The Alpaca data set: fetched where it is missing, then prepared like any other records."""

import http.client
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, ResourceError
from lit_llama.progress import stderr
from lit_llama.text.prepare import Rules
from lit_llama.text.prompts import folder_style, named_style
from lit_llama.text.records import StyleChoice, prepare_records
from lit_llama.text.tokenizer import Tokenizer

DATA_FILE = "alpaca_data_cleaned_archive.json"
URL = f"https://raw.githubusercontent.com/tloen/alpaca-lora/main/{DATA_FILE}"
"""The cleaned Alpaca data, 51,759 rows, where lit-llama took them from."""


def prepare_alpaca(
    destination: Path,
    *,
    tokenizer_path: Path,
    data_file_name: str,
    prompt_style: StyleChoice,
    rules: Rules,
    plan: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Make the data folder `destination` out of the raw file in it; the parameters are those of prepare/alpaca.py.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable.
        ResourceError: The raw file is not there and cannot be downloaded.
    """
    if not (destination / data_file_name).is_file():
        Tokenizer.from_path(tokenizer_path)  # better known to be missing before anything is fetched
    source = find_or_download(destination, data_file_name)
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    if prompt_style == "alpaca" and (own := folder_style(folder)) not in (None, named_style("alpaca")):
        assert own
        stderr().print(
            f"prompt style alpaca, although {folder} has a chat template of its own ({own.name}): prepare/records.py "
            "takes that, or name another with --prompt_style",
            markup=False,
        )
    return prepare_records(
        [str(source)], destination, tokenizer_path=tokenizer_path, prompt_style=prompt_style, rules=rules, plan=plan
    )


def find_or_download(folder: Path, name: str) -> Path:
    """The raw file in `folder`; the published Alpaca file is downloaded if it is not there.

    Raises:
        DataError: Another file is missing.
        ResourceError: The download fails.
    """
    path = folder / name
    if path.is_file():
        return path
    if name != DATA_FILE:
        raise DataError(f"{path} does not exist; put the data there, or name another file with --data_file_name")
    try:
        _download(URL, path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        raise ResourceError(
            f"{URL} cannot be downloaded ({reason}); fetch it elsewhere and put it at {path}"
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    from rich.progress import wrap_file

    part = path.with_name(f".{path.name}.part")
    with urllib.request.urlopen(url, timeout=30) as answer:
        size = int(answer.headers["Content-Length"] or 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with (
                part.open("wb") as file,
                wrap_file(answer, size, description="downloading", console=stderr(), transient=True) as source,
            ):
                while block := source.read(1 << 20):
                    file.write(block)
                if size and file.tell() != size:
                    raise OSError(f"{file.tell()} of {size} bytes arrived")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
