"""Prepare the Alpaca data set, or any file in its format, for fine-tuning.

python prepare/alpaca.py --destination_path data/alpaca --tokenizer_path checkpoints/NAME
"""

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.text.encode import Overflow
from lit_llama.text.prompts import StyleName


def main(
    *,
    destination_path: Path = Path("data/alpaca"),
    tokenizer_path: Path = Path("checkpoints/lit-llama/tokenizer.model"),
    test_split_size: int = 2000,
    max_seq_length: int = 256,
    seed: int = 42,
    mask_inputs: bool = False,
    data_file_name: str = "alpaca_data_cleaned_archive.json",
    prompt_style: StyleName = "alpaca",
    overflow: Overflow = "drop",
) -> None:
    """Split, render, tokenize and mask; writes splits train and test into destination_path.

    Args:
        destination_path: Folder with the raw file, and of the result. The published Alpaca file is downloaded.
        tokenizer_path: A tokenizer.model, a tokenizer.json, or a model folder.
        test_split_size: Rows held out for testing.
        max_seq_length: Most tokens of a sample.
        seed: Of the split.
        mask_inputs: Train on the answer only, not on the prompt.
        data_file_name: Raw file in destination_path: a JSON array of {instruction, input, output}.
        prompt_style: How an instruction is put to the model.
        overflow: A row that is too long is dropped, its answer is cut before its end-of-text token, or it is an error.
    """
    from lit_llama.text.alpaca import prepare_alpaca

    prepare_alpaca(
        destination_path,
        tokenizer_path=tokenizer_path,
        test_split_size=test_split_size,
        max_seq_length=max_seq_length,
        seed=seed,
        mask_inputs=mask_inputs,
        data_file_name=data_file_name,
        prompt_style=prompt_style,
        overflow=overflow,
    )


if __name__ == "__main__":
    CLI(main)
