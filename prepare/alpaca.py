"""Prepare the Alpaca data set, or any file in its format, for fine-tuning.

python prepare/alpaca.py --destination_path data/alpaca --tokenizer_path checkpoints/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.text.config import PrepareConfig, StyleName

OFFERED = [
    *("destination_path", "tokenizer_path", "test_split_size", "max_seq_length", "seed", "mask_inputs", "prompt_style"),
    *("thoughts", "typed_ends", "overflow", "near_duplicates", "encoding"),
]


@config_flags(
    "config",
    PrepareConfig,
    only=OFFERED,
    fixed={"split": "shuffle"},
    destination_path=Path("data/alpaca"),
    tokenizer_path=Path("checkpoints/lit-llama/tokenizer.model"),
    max_seq_length=256,
    mask_inputs=False,
    prompt_style="alpaca",
    types={"test_split_size": int | None, "prompt_style": StyleName},
    texts={
        "destination_path": "Folder with the raw file, and of the result. The published Alpaca file is downloaded.",
        "test_split_size": "Rows held out for testing, 0 for none; if not given 2000, or a tenth of fewer than 20,000.",
        "prompt_style": "How an instruction is put to the model.",
        "seed": "Of the split.",
        "encoding": "Of a file that is not UTF-8, such as cp1252.",
    },
)
def main(*, config: PrepareConfig, data_file_name: str = "alpaca_data_cleaned_archive.json") -> None:
    """Split, render, tokenize and mask; writes splits train and test into destination_path.

    Args:
        config: How rows become samples, and where they go.
        data_file_name: Raw file in destination_path: a JSON array of {instruction, input, output}.
    """
    from lit_llama.text.pipeline.alpaca import prepare_alpaca
    from lit_llama.train.config import usual_steps

    prepare_alpaca(config, data_file_name, plan=usual_steps())


if __name__ == "__main__":
    CLI(main)
