"""The Alpaca data set: fetched where it is missing, then prepared like any other records."""

import http.client
import shlex
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, ResourceError
from lit_llama.lock import reserving
from lit_llama.place import aside
from lit_llama.progress import reading, stderr
from lit_llama.text.dataset import raw_files
from lit_llama.text.prepare import Rules
from lit_llama.text.prompts import folder_style, named_style
from lit_llama.text.read.files import UTF8, Dialect
from lit_llama.text.read.raw import listed
from lit_llama.text.read.rows import read_rows
from lit_llama.text.records import StyleChoice, prepare_records
from lit_llama.text.tokenizer import Tokenizer

DATA_FILE = "alpaca_data_cleaned_archive.json"
URL = f"https://raw.githubusercontent.com/tloen/alpaca-lora/main/{DATA_FILE}"
"""The cleaned Alpaca data, 51,759 rows, where lit-llama took them from."""
_CHATS = {"OpenAI messages", "ShareGPT", "OASST"}
ROWS, SHARE = 2000, 0.1
"""Rows for testing, but at most this share of all."""


@reserving
def prepare_alpaca(
    destination: Path,
    *,
    tokenizer_path: Path,
    data_file_name: str,
    prompt_style: StyleChoice,
    rules: Rules,
    dialect: Dialect = UTF8,
    plan: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Make the data folder `destination` out of the raw file in it; the parameters are those of prepare/alpaca.py.

    Without a size of the test split it has ROWS, as in lit-llama, or SHARE of the rows where these are fewer.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable.
        ResourceError: The raw file is not there and cannot be downloaded.
    """
    if destination.is_file():
        raise DataError(
            f"--destination_path {destination} is a file, expected the folder that holds the Alpaca data; for a file "
            f"of your own use python prepare/records.py --source {shlex.quote(str(destination))} --destination_path "
            f"{shlex.quote(f'data/{destination.stem}')}"
        )
    if rules.test_split_size is None:
        rules = replace(rules, test_split_size=ROWS, test_limit=SHARE)
    if not (destination / data_file_name).is_file():
        Tokenizer.from_path(tokenizer_path)  # better known to be missing before anything is fetched
    source = find_or_download(destination, data_file_name)
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    if prompt_style == "alpaca" and (own := folder_style(folder)) not in (None, named_style("alpaca")):
        assert own
        stderr().print(
            f"prompt style alpaca, although {folder} has a chat template of its own ({own.name}): prepare/records.py "
            "takes that, or name another with --prompt_style",
        )
    try:
        meta = prepare_records(
            [str(source)],
            destination,
            tokenizer_path=tokenizer_path,
            prompt_style=prompt_style,
            rules=rules,
            dialect=dialect,
            plan=plan,
        )
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
    source, made, tokenizer = (shlex.quote(str(word)) for word in (path, f"data/{path.stem}", tokenizer_path))
    return (
        f"{path} holds chats; prepare/alpaca.py is for single instructions, with the defaults of lit-llama. For chats: "
        f"python prepare/records.py --source {source} --destination_path {made} --tokenizer_path {tokenizer}"
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
    if others := raw_files(folder):
        raise DataError(
            f"{folder} holds {listed([file.name for file in others], 3)} and not {name}: for instructions in Alpaca's "
            f"format give --data_file_name {shlex.quote(others[0].name)}; for anything else, chats among it, use "
            f"python prepare/records.py --source {shlex.quote(str(others[0]))}"
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
