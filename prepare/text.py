"""Prepare plain text for training on every token of it.

python prepare/text.py --source books --destination_path data/books --tokenizer_path checkpoints/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI


def main(
    *,
    source: str | list[str],
    destination_path: Path,
    tokenizer_path: Path,
    documents: Literal["file", "paragraph", "line"] = "file",
    rendered: bool = False,
    max_seq_length: int = 2048,
    overflow: Literal["split", "drop", "truncate_response", "error"] = "split",
    split: Literal["auto", "hash", "shuffle", "given"] = "auto",
    test_split_size: float | None = None,
    seed: int = 42,
    split_from: Path | None = None,
    near_duplicates: int = 200_000,
    encoding: str | None = None,
    shard: str | None = None,
    shards: str | list[str] | None = None,
) -> None:
    """Read, tokenize, cut into windows and split; writes train and test and a report.

    Args:
        source: Text files in UTF-8 (each also .gz or .zst), patterns, or folders with files named .txt, .text or .md;
            several as a.txt b.txt.
        destination_path: Folder to make, such as data/NAME.
        tokenizer_path: The model folder, a tokenizer.json or a tokenizer.model.
        documents: What belongs together and ends in an end-of-text token: a file, a paragraph between blank lines, or a
            line (as lit-llama's prepare_any_text.py had it).
        rendered: Documents hold control tokens, spelled, as <s>[INST] ... [/INST] ... </s>.
        max_seq_length: Most tokens of a sample.
        overflow: What becomes of a longer document: cut into windows that follow each other, dropped, losing its end,
            or an error.
        split: By a hash of the document (no document moves when others are added), by shuffling as lit-llama did, or
            as the sources are divided by their names, as train.txt and test.txt are (given). auto is given where the
            sources are divided, and else hash. All windows of a document stand on one side.
        test_split_size: Documents held out for testing: their share, or with --split shuffle their number; 0.05 if it
            is not given, 0 trains on all documents.
        seed: Of the split.
        split_from: A data folder, or a file like those of --source: its documents for testing are for testing here too
            (whatever their case and white space), all others for training, in place of --split.
        near_duplicates: Documents up to which nearly equal ones are looked for, at 1.7 kB of memory each; 0 for never.
        encoding: Of files that are not UTF-8, such as cp1252.
        shard: Encode one part of the documents only, such as 0/3, 1/3 or 2/3, into a folder of its own.
        shards: The folders, or a pattern, of all these parts: put them together, as if all had been encoded here.
    """
    from lit_llama.text.prepare import Rules
    from lit_llama.text.read.files import Dialect
    from lit_llama.text.records import prepare_records
    from lit_llama.train.config import CPU_TOKENS, TrainConfig

    rules = Rules(
        max_seq_length=max_seq_length,
        mask_inputs=False,
        train_on="all",
        rendered=rendered,
        overflow=overflow,
        split=split,
        test_split_size=test_split_size,
        seed=seed,
        near_duplicates=near_duplicates,
    )
    prepare_records(
        source,
        destination_path,
        tokenizer_path=tokenizer_path,
        prompt_style="plain",
        rules=rules,
        documents=documents,
        dialect=Dialect(encoding),
        split_from=split_from,
        shard=shard,
        shards=shards,
        plan={"batch_size": TrainConfig.batch_size, "micro_batch_tokens": CPU_TOKENS},
    )


if __name__ == "__main__":
    CLI(main)
