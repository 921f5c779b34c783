"""Prepare the Alpaca data set, or any file in its format, for fine-tuning.

python prepare/alpaca.py --destination_path data/alpaca --tokenizer_path checkpoints/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.text.prompts import StyleName


def main(
    *,
    destination_path: Path = Path("data/alpaca"),
    tokenizer_path: Path = Path("checkpoints/lit-llama/tokenizer.model"),
    test_split_size: int | None = None,
    max_seq_length: int = 256,
    seed: int = 42,
    mask_inputs: bool = False,
    data_file_name: str = "alpaca_data_cleaned_archive.json",
    prompt_style: StyleName = "alpaca",
    thoughts: Literal["template", "keep", "drop"] = "template",
    typed_ends: Literal["keep", "strip"] = "keep",
    overflow: Literal["drop", "truncate_prompt", "truncate_response", "split", "error"] = "drop",
    near_duplicates: int = 200_000,
    encoding: str | None = None,
) -> None:
    """Split, render, tokenize and mask; writes splits train and test into destination_path.

    Args:
        destination_path: Folder with the raw file, and of the result. The published Alpaca file is downloaded.
        tokenizer_path: A tokenizer.model, a tokenizer.json, or a model folder.
        test_split_size: Rows held out for testing, 0 for none; if not given 2000, or a tenth of fewer than 20,000.
        max_seq_length: Most tokens of a sample.
        seed: Of the split.
        mask_inputs: Train on the answer only, not on the prompt.
        data_file_name: Raw file in destination_path: a JSON array of {instruction, input, output}.
        prompt_style: How an instruction is put to the model.
        thoughts: Thoughts before answers (<think>...</think>) stay where they are (template, keep), or are dropped.
        typed_ends: An answer that ends in a spelled control token such as </s> keeps it as text, or loses it.
        overflow: What becomes of a longer row: dropped, losing the beginning of its question, losing the end of its
            answer (not the end-of-text token), cut into several samples between turns, or an error.
        near_duplicates: Rows up to which nearly equal rows are looked for, at 1.7 kB of memory a row; 0 for not at all.
        encoding: Of a file that is not UTF-8, such as cp1252.
    """
    from lit_llama.text.alpaca import prepare_alpaca
    from lit_llama.text.prepare import Rules
    from lit_llama.text.read.files import Dialect
    from lit_llama.train.config import CPU_TOKENS, TrainConfig

    rules = Rules(
        max_seq_length=max_seq_length,
        mask_inputs=mask_inputs,
        train_on="all",
        thoughts=thoughts,
        typed_ends=typed_ends,
        overflow=overflow,
        split="shuffle",
        test_split_size=test_split_size,
        seed=seed,
        near_duplicates=near_duplicates,
    )
    prepare_alpaca(
        destination_path,
        tokenizer_path=tokenizer_path,
        data_file_name=data_file_name,
        prompt_style=prompt_style,
        rules=rules,
        dialect=Dialect(encoding),
        plan={"batch_size": TrainConfig.batch_size, "micro_batch_tokens": CPU_TOKENS},
    )


if __name__ == "__main__":
    CLI(main)
