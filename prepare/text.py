"""Prepare plain text for training on every token of it.

python prepare/text.py --source books --destination_path data/books --tokenizer_path checkpoints/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from typing import Literal

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.text.config import Documents, PrepareConfig

OFFERED = [
    *("source", "destination_path", "tokenizer_path", "documents", "rendered", "max_seq_length", "overflow", "split"),
    *("test_split_size", "seed", "split_from", "near_duplicates", "encoding", "executor", "ray_address"),
]


@config_flags(
    "config",
    PrepareConfig,
    only=OFFERED,
    required=["source"],
    fixed={"prompt_style": "plain", "mask_inputs": False},
    documents="file",
    overflow="split",
    types={"documents": Documents, "overflow": Literal["split", "drop", "truncate_response", "error"]},
    texts={
        "source": "Text files in UTF-8 (each also .gz or .zst), patterns, folders with files named .txt, .text or "
        ".md, or URLs of such (https://, s3://, gs://, hf://); several as a.txt b.txt.",
        "documents": "What belongs together and ends in an end-of-text token: a file, a paragraph between blank lines, "
        "or a line (as lit-llama's prepare_any_text.py had it).",
        "rendered": "Documents hold control tokens, spelled, as <s>[INST] ... [/INST] ... </s>.",
        "overflow": "What becomes of a longer document: cut into windows that follow each other, dropped, losing its "
        "end, or an error.",
        "split": "By a hash of the document (no document moves when others are added), by shuffling as lit-llama did, "
        "or as the sources are divided by their names, as train.txt and test.txt are (given). auto is given where the "
        "sources are divided, and else hash. All windows of a document stand on one side.",
        "split_from": "A data folder, or a file like those of --source: its documents for testing are for testing here "
        "too (whatever their case and white space), all others for training, in place of --split.",
    },
)
def main(*, config: PrepareConfig) -> None:
    """Read, tokenize, cut into windows and split; writes train and test and a report.

    Args:
        config: What is read, how documents become samples, and where they go.
    """
    from lit_llama.text.pipeline.records import prepare_records
    from lit_llama.train.config import usual_steps

    prepare_records(config, plan=usual_steps())


if __name__ == "__main__":
    CLI(main)
