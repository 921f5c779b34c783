"""From a file in Alpaca's format to a data folder: read, split, encode, write, account for every row."""

import http.client
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, ResourceError
from lit_llama.folder import publish, sha256_file, write_json
from lit_llama.progress import stderr, track
from lit_llama.text.dataset import FORMAT, META_FILE, TEST_FILE, write_splits
from lit_llama.text.encode import IGNORE_INDEX, Overflow, Sample, encode_examples
from lit_llama.text.formats import Dropped, read_alpaca, write_alpaca
from lit_llama.text.prompts import TEMPLATE_FILE, named_style
from lit_llama.text.special import read_object
from lit_llama.text.split import shared, shuffle_split
from lit_llama.text.tokenizer import Tokenizer
from lit_llama.text.vocabulary import check_recorded, check_vocabulary, identity

DATA_FILE = "alpaca_data_cleaned_archive.json"
URL = f"https://raw.githubusercontent.com/tloen/alpaca-lora/main/{DATA_FILE}"
"""The cleaned Alpaca data, 51,759 rows, where lit-llama took them from."""

CHUNK = 2000  # rows encoded at a time, enough for the tokenizer to use all cores


def prepare_alpaca(
    destination: Path,
    *,
    tokenizer_path: Path,
    test_split_size: int,
    max_seq_length: int,
    seed: int,
    mask_inputs: bool,
    data_file_name: str,
    prompt_style: str,
    overflow: Overflow,
) -> dict[str, Any]:
    """Make the data folder `destination` out of the raw file in it; the parameters are those of prepare/alpaca.py.

    Returns:
        What stands in meta.json.

    Raises:
        DataError: Rows that cannot be used, or too few of them.
        CheckpointError: The tokenizer is missing or unusable.
        ResourceError: The raw file is not there and cannot be downloaded.
    """
    if max_seq_length < 3:
        raise DataError(f"--max_seq_length is {max_seq_length}, expected 3 or more tokens")
    tokenizer = _read_tokenizer(tokenizer_path)
    source = find_or_download(destination, data_file_name)
    style = named_style(prompt_style)
    examples, dropped = read_alpaca(source)
    rows = len(examples) + len(dropped)
    drawn = dict(zip(("train", "test"), shuffle_split(rows, test_split_size, seed), strict=True))
    samples: list[Sample] = []
    for start in track(range(0, len(examples), CHUNK), "encoding"):
        kept, too_long = encode_examples(
            examples[start : start + CHUNK],
            style,
            tokenizer,
            max_seq_length=max_seq_length,
            mask_inputs=mask_inputs,
            overflow=overflow,
        )
        samples += kept
        dropped += too_long
    by_row = {sample.row: sample for sample in samples}
    splits = {name: [by_row[row] for row in order if row in by_row] for name, order in drawn.items()}
    for name, chosen in splits.items():
        if not chosen:
            raise DataError(f"{source}: no row of the {name} split is usable: {_reasons(dropped)}")
    example_of = {example.row: example for example in examples}
    meta = {
        "format": FORMAT,
        "source": {"file": source.name, "sha256": sha256_file(source), "rows": rows},
        "tokenizer": identity(tokenizer) | {"path": str(tokenizer_path)},
        "prompt_style": prompt_style,
        "max_seq_length": max_seq_length,
        "mask_inputs": mask_inputs,
        "overflow": overflow,
        "seed": seed,
        "test_split_size": test_split_size,
        "kept": len(samples),
        "cut": [sample.row for sample in samples if sample.cut],
        "dropped": _by_reason(dropped),
        "test_rows_also_in_train": shared(*([tuple(s.input_ids) for s in splits[name]] for name in ("train", "test"))),
        "splits": {name: _counts(chosen) for name, chosen in splits.items()},
    }
    with publish(destination, META_FILE, replace=True) as folder:
        write_splits(folder, splits)
        write_alpaca(folder / TEST_FILE, [example_of[sample.row] for sample in splits["test"]])
        (folder / TEMPLATE_FILE).write_text(style.jinja(bos=bool(tokenizer.bos)), "utf-8")
        write_json(folder / META_FILE, meta)
    _summary(destination, source, meta, tokenizer)
    return meta


def _read_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer that fits the embedding, where the path is a model folder and so has one."""
    tokenizer = Tokenizer.from_path(path)
    rows = read_object(path / "config.json").get("vocab_size")
    if isinstance(rows, int):
        check_vocabulary(path, rows, tokenizer)
    if path.is_dir():
        check_recorded(path, tokenizer, path)
    for remark in tokenizer.remarks:
        stderr().print(remark, markup=False)
    return tokenizer


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


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    return {
        "rows": len(samples),
        "tokens": sum(len(sample.input_ids) for sample in samples),
        "trained_tokens": sum(label != IGNORE_INDEX for sample in samples for label in sample.labels[1:]),
        "longest": max(len(sample.input_ids) for sample in samples),
    }


def _by_reason(dropped: Sequence[Dropped]) -> dict[str, list[int]]:
    reasons: dict[str, list[int]] = {}
    for entry in sorted(dropped, key=lambda entry: entry.row):
        reasons.setdefault(entry.reason, []).append(entry.row)
    return reasons


def _reasons(dropped: Sequence[Dropped]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in Counter(entry.reason for entry in dropped).items())


def _summary(
    destination: Path,
    source: Path,
    meta: Mapping[str, Any],
    tokenizer: Tokenizer,
) -> None:
    say = stderr().print
    rows = meta["source"]["rows"]
    lost = {reason: len(numbers) for reason, numbers in meta["dropped"].items()}
    say(f"{source}: {rows} rows = {meta['kept']} kept (of them {len(meta['cut'])} cut) + {sum(lost.values())} dropped")
    for reason, numbers in meta["dropped"].items():
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        say(f"  dropped, {reason}: {len(numbers)} (rows {shown}; all of them in {META_FILE})")
    if sum(lost.values()) > rows / 10:
        say(f"  more than a tenth is dropped: raise --max_seq_length ({meta['max_seq_length']}) or see --overflow")
    if meta["test_rows_also_in_train"]:
        say(f"  {meta['test_rows_also_in_train']} test rows stand in train too: the test loss will flatter")
    for name, counts in meta["splits"].items():
        share = counts["trained_tokens"] / counts["tokens"]
        say(
            f"  {name}: {counts['rows']} rows, {counts['tokens']:,} tokens, {share:.0%} of them trained, "
            f"longest {counts['longest']}"
        )
    what = "answers only" if meta["mask_inputs"] else "prompts and answers (--mask_inputs true for answers only)"
    say(f"  trained: {what}; prompt style {meta['prompt_style']}; ends in {tokenizer.eos}")
    say(f"{destination}: ready for finetune/lora.py --data_dir {destination}")
