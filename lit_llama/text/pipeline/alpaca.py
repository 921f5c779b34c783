"""The Alpaca data set: fetched where it is missing, then prepared like any other records."""

import http.client
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, ResourceError
from lit_llama.folder.lock import reserve
from lit_llama.folder.place import aside
from lit_llama.progress import reading, stderr
from lit_llama.text.config import PrepareConfig
from lit_llama.text.dataset.folder import raw_files
from lit_llama.text.pipeline.records import prepare_records
from lit_llama.text.prompts.encode import folder_style, named_style
from lit_llama.text.read.formats.files import Dialect
from lit_llama.text.read.formats.sources import read_rows
from lit_llama.text.read.raw import listed
from lit_llama.text.tokenizer.base import Tokenizer
from lit_llama.wording import call, param

DATA_FILE = "alpaca_data_cleaned_archive.json"
URL = f"https://raw.githubusercontent.com/tloen/alpaca-lora/main/{DATA_FILE}"
"""The cleaned Alpaca data, 51,759 rows, where lit-llama took them from."""
_CHATS = {"OpenAI messages", "ShareGPT", "OASST"}
ROWS, SHARE = 2000, 0.1
"""Rows for testing, but at most this share of all."""


def prepare_alpaca(
    config: PrepareConfig, data_file_name: str = DATA_FILE, *, plan: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Make the data folder of a configuration out of the raw file in it, whatever its sources.

    Without a size of the test split it has ROWS, as in lit-llama, or SHARE of the rows where these are fewer.

    Args:
        config: How rows become samples, and where they go.
        data_file_name: Of the raw file; that of the published Alpaca data is downloaded where it is missing.
        plan: See `prepare_records`.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable.
        ResourceError: The raw file is not there and cannot be downloaded.
    """
    destination = config.destination_path
    if destination.is_file():
        raise DataError(
            "is a file, expected the folder that holds the Alpaca data",
            parameter="destination_path",
            value=destination,
            remedy="for a file of your own use "
            + call("prepare", source=destination, destination_path=f"data/{destination.stem}"),
        )
    with reserve(destination, required=False):
        return _prepare(config, data_file_name, plan)


def _prepare(config: PrepareConfig, data_file_name: str, plan: Mapping[str, int] | None) -> dict[str, Any]:
    destination, tokenizer_path = config.destination_path, config.tokenizer_path
    if not (destination / data_file_name).is_file():
        Tokenizer.from_path(tokenizer_path)  # better known to be missing before anything is fetched
    source = find_or_download(destination, data_file_name)
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    if config.prompt_style == "alpaca" and (own := folder_style(folder)) not in (None, named_style("alpaca")):
        assert own
        stderr().print(
            f"prompt style alpaca, although {folder} has a chat template of its own ({own.name}): {call('prepare')} "
            f"takes that, or name another with {param('prompt_style')}",
        )
    config = replace(config, source=[str(source)])
    if config.test_split_size is None:
        config = replace(config, test_split_size=ROWS, test_limit=SHARE)
    dialect = Dialect(config.encoding)
    try:
        meta = prepare_records(config, plan=plan)
    except DataError as error:
        if _is_chat(source, dialect):
            raise DataError(f"{error}. {_chats(source, tokenizer_path)}") from error
        raise
    if meta["schemas"].keys() & _CHATS:
        stderr().print(_chats(source, tokenizer_path))
    return meta


def _is_chat(path: Path, dialect: Dialect) -> bool:
    """Whether the first row of a file holds messages."""
    with suppress(DataError):
        row = next(read_rows(path, dialect), None)
        return bool(row and row.value and row.value.keys() & {"messages", "conversations"})
    return False


def _chats(path: Path, tokenizer_path: Path) -> str:
    """Where chats are at home."""
    prepare = call("prepare", source=path, destination_path=f"data/{path.stem}", tokenizer_path=tokenizer_path)
    return (
        f"{path} holds chats; {call('text.pipeline.alpaca.prepare_alpaca')} is for single instructions, with the "
        f"defaults of lit-llama. For chats: {prepare}"
    )


def find_or_download(folder: Path, name: str) -> Path:
    """Find the raw file in `folder`; the published Alpaca file is downloaded if it is not there.

    Raises:
        DataError: Another file is missing.
        ResourceError: The download fails.
    """
    path = folder / name
    if path.is_file():
        return path
    if name != DATA_FILE:
        raise DataError(
            f"{path} does not exist; put the data there, or name another file with {param('data_file_name')}"
        )
    if others := raw_files(folder):
        raise DataError(
            f"{folder} holds {listed([file.name for file in others], 3)} and not {name}: for instructions in Alpaca's "
            f"format give {param('data_file_name', others[0].name)}; for anything else, chats among it, use "
            f"{call('prepare', source=others[0])}"
        )
    try:
        _download(URL, path)
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        raise ResourceError(
            f"{URL} cannot be downloaded ({reason}); fetch it elsewhere and put it at {path}"
        ) from error
    return path


def _download(url: str, path: Path) -> None:
    with urllib.request.urlopen(url, timeout=30) as answer:
        size = int(answer.headers["Content-Length"] or 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            aside(path) as part,
            part.open("wb") as file,
            reading(answer, size, "downloading") as source,
        ):
            while block := source.read(1 << 20):
                file.write(block)
            if size and file.tell() != size:
                raise OSError(f"{file.tell()} of {size} bytes arrived")
