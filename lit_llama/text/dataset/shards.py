"""Encoding divided among processes or machines: each writes the blocks of one shard, and one run takes them together.

Every shard reads all rows, which is cheap, and encodes every n-th block of them. The run that takes the shards together
does everything else, and so gives the bytes that it would give alone.
"""

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_llama.errors import DataError, IntegrityError, UserError
from lit_llama.folder.manifest import sha256_file
from lit_llama.folder.publish import publish, write_json
from lit_llama.text.dataset.blocks import Block, ahead, encode_blocks, read_blocks
from lit_llama.text.dataset.encoder import Encoded, Encoder
from lit_llama.text.dataset.folder import META_FILE
from lit_llama.text.dataset.writer import Samples
from lit_llama.text.message import Conversation, Dropped
from lit_llama.text.read.reading import Reader
from lit_llama.text.tokenizer.special import read_object

SHARD_FILE = "shard.json"
_SAMPLES, _BLOCKS = "samples.arrow", "blocks.jsonl"


@dataclass(frozen=True)
class Part:
    """Shard of so many: blocks `index`, `index` + `of`, and so on."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read "0/3", the first of three.

        Raises:
            UserError: It is none.
        """
        index, slash, of = text.partition("/")
        if not (slash and index.isdecimal() and of.isdecimal() and int(index) < int(of)):
            raise UserError(f"--shard is {text!r}, expected I/N with I from 0 to N - 1, such as 0/3, 1/3 and 2/3")
        return cls(int(index), int(of))

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def write_shard(
    reader: Reader, encoder: Encoder, destination: Path, part: Part, *, key: str, made_of: Mapping[str, Any]
) -> dict[str, Any]:
    """Encode the blocks of one shard into the folder `destination`.

    Args:
        reader: All rows.
        encoder: Makes samples of them.
        destination: Folder to make or to replace.
        part: Which blocks.
        key: Of the data folder that all shards will be together.
        made_of: What that key stands for, each thing by its name.

    Returns:
        What stands in shard.json.

    Raises:
        UserError: The destination is a data folder; or what `Encoder` says of a row.
    """
    if (destination / META_FILE).exists():
        raise UserError(f"--destination_path {destination} is a data folder; name another one for the shard")
    blocks = rows = samples = tokens = 0
    with publish(destination, SHARD_FILE, replace=True) as folder:
        with _Writer(folder) as writer:
            mine = (block for block in read_blocks(reader) if block.number % part.of == part.index)
            for block, encoded in encode_blocks(mine, encoder):
                writer.add(block, encoded)
                blocks, rows = blocks + 1, rows + len(block.conversations) + len(block.dropped)
                samples, tokens = samples + len(encoded.conversations), tokens + len(encoded.batch.input_ids)
        made = {
            **{"shard": str(part), "key": key, "made_of": dict(made_of), "blocks": blocks, "rows": rows},
            **{"of_rows": reader.rows, "samples": samples, "tokens": tokens},
            "sha256": {name: sha256_file(folder / name) for name in (_SAMPLES, _BLOCKS)},
            "files": {name: (folder / name).stat().st_size for name in (_SAMPLES, _BLOCKS)},
        }
        write_json(folder / SHARD_FILE, made)
    return made


class _Writer:
    """The files of a shard: ids and labels, a record batch a block, and what else there is to say of a block."""

    def __init__(self, folder: Path) -> None:
        import pyarrow as pa

        ids = pa.list_(pa.int32())
        self._schema = pa.schema([("input_ids", ids), ("labels", ids), ("row", pa.int64())])
        self._samples = pa.ipc.new_stream(str(folder / _SAMPLES), self._schema)
        self._blocks = (folder / _BLOCKS).open("w", encoding="utf-8")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._samples.close()
        self._blocks.close()

    def add(self, block: Block, encoded: Encoded) -> None:
        import pyarrow as pa

        batch, whole = encoded.batch, {conversation.row: conversation for conversation in block.conversations}
        offsets = np.concatenate([[0], np.cumsum(batch.lengths)]).astype(np.int32)
        columns = [pa.ListArray.from_arrays(offsets, values) for values in (batch.input_ids, batch.labels)]
        rows = pa.array([conversation.row for conversation in encoded.conversations], pa.int64())
        self._samples.write_batch(pa.record_batch([*columns, rows], schema=self._schema))
        entry = {
            "block": block.number,
            "dropped": [(row.row, row.reason, row.tokens) for row in encoded.dropped],
            "cut": encoded.cut,
            "parts": encoded.parts,
            "notes": encoded.notes,
            "messages": {  # of the samples that are not what the row is
                number: conversation.messages
                for number, conversation in enumerate(encoded.conversations)
                if conversation is not whole[conversation.row]
            },
        }
        self._blocks.write(json.dumps(entry) + "\n")


class Shards:
    """All shards of one data folder.

    Args:
        folders: The shards, in any order.
        key: Of the data folder.
        made_of: What that key stands for, each thing by its name.

    Raises:
        DataError: A folder is no shard, a shard is missing or there twice, or is of other data or made otherwise.
        IntegrityError: A shard is damaged.
    """

    def __init__(self, folders: Sequence[Path], *, key: str, made_of: Mapping[str, Any]) -> None:
        found: dict[int, Path] = {}
        of = 0
        for folder in folders:
            made = _read(folder)
            part = Part.parse(str(made.get("shard")))
            if made["key"] != key:
                raise DataError(f"--shards: {_difference(folder, made['made_of'], made_of)}")
            of = of or part.of
            if part.of != of:
                raise DataError(f"--shards: {folder} is shard {part}, {folders[0]} is one of {of}: name shards of one")
            if part.index in found:
                raise DataError(f"--shards: {found[part.index]} and {folder} both are shard {part}; name it once")
            found[part.index] = folder
        if missing := [f"{index}/{of}" for index in range(of) if index not in found]:
            raise DataError(f"--shards: {', '.join(missing)} missing; make it with --shard {missing[0]}, and name all")
        self._folders = [found[index] for index in range(of)]

    def encoded(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        """Yield each block with the samples that its shard made of it."""
        return ahead(self._encoded(ahead(blocks)))

    def _encoded(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        streams = [_entries(folder) for folder in self._folders]
        for block in blocks:
            number = block.number % len(streams)
            entry = next(streams[number], None)
            if entry is None or entry[1]["block"] != block.number:
                raise IntegrityError(f"{self._folders[number]} lacks block {block.number}: make this shard again")
            yield block, _decoded(block, *entry)
        if any(next(stream, None) is not None for stream in streams):
            raise IntegrityError("--shards: there are more blocks than rows: make the shards again")


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """Find the folders that are named, or that patterns match.

    Raises:
        DataError: A pattern matches nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        matches = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]
        if not matches:
            raise DataError(f"--shards {pattern} matches no folder (working folder: {Path.cwd()})")
        found += map(Path, matches)
    return found


def _read(folder: Path) -> dict[str, Any]:
    made = read_object(folder / SHARD_FILE)
    if not made:
        raise DataError(f"--shards: {folder} is no finished shard: it has no {SHARD_FILE}; make it with --shard I/N")
    for name, digest in made["sha256"].items():
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise IntegrityError(f"{folder / name} is not what {SHARD_FILE} says it is: copy or make this shard again")
    return made


def _difference(folder: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """What one shard was made of, other than this run's: the first thing that differs."""
    name = next((name for name in ours if ours[name] != theirs.get(name)), "contents")
    if name.startswith("--"):
        return f"{folder} was made with {name} {theirs.get(name)}, expected {ours[name]}: give every run the same flags"
    if name == "sources":
        pairs = zip(ours[name], theirs[name], strict=False)
        file = next((f"{mine[0]} here, {other[0]} there" for mine, other in pairs if mine != other), "their number")
        return f"{folder} was made of other sources or other bytes of them ({file}): make it again"
    return f"{folder} was made with another {name}: make it again"


def _entries(folder: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Record batch and entry of every block, one in memory at a time."""
    import pyarrow as pa

    with pa.OSFile(str(folder / _SAMPLES)) as file, (folder / _BLOCKS).open(encoding="utf-8") as lines:
        yield from zip(pa.ipc.open_stream(file), map(json.loads, lines), strict=True)


def _decoded(block: Block, batch: Any, entry: Mapping[str, Any]) -> Encoded:
    """What the encoder gave for a block."""
    whole: dict[int, Conversation] = {conversation.row: conversation for conversation in block.conversations}
    ids, labels = (batch.column(name) for name in ("input_ids", "labels"))
    lengths = np.diff(ids.offsets.to_numpy()).astype(np.int64)
    samples = Samples(ids.values.to_numpy(), labels.values.to_numpy(), lengths)
    conversations = [whole[row] for row in batch.column("row").to_pylist()]
    for number, messages in entry["messages"].items():
        conversations[int(number)] = replace(conversations[int(number)], messages=tuple(messages))
    dropped = [Dropped(row, whole[row].where, reason, tokens) for row, reason, tokens in entry["dropped"]]
    return Encoded(samples, conversations, entry["cut"], entry["parts"], dropped, entry["notes"])
