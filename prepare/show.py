"""Look at samples of a data folder: their tokens, and which of them are trained.

python prepare/show.py --data_dir data/alpaca --rows 0,17
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI


def main(
    *,
    data_dir: Path,
    rows: str = "0-2",
    split: Literal["train", "test"] = "train",
    tokenizer_path: Path | None = None,
    verify: bool = False,
) -> None:
    """Print samples token by token, in colours on a terminal and with brackets elsewhere.

    Args:
        data_dir: Folder that prepare/alpaca.py made.
        rows: Positions in the split, such as 0,17 or 3-5.
        split: train or test.
        tokenizer_path: The tokenizer, if it is no longer where it was when the data were made.
        verify: Hash every file that is read, however large, before the work; small ones always are.
    """
    from lit_llama.model.adapters.peft_folder import verify_folders
    from lit_llama.text.inspect.show import show_rows

    if verify:
        verify_folders(data_dir)
    show_rows(data_dir, rows, split, tokenizer_path)


if __name__ == "__main__":
    CLI(main)
