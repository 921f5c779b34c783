"""Questions to generate/instruct.py: one instruction, or the rows of a file."""

from pathlib import Path

from lit_llama.errors import DataError, UserError
from lit_llama.generate.flags import EXAMPLE_PROMPT
from lit_llama.text.dataset.folder import TEST_FILE, read_meta
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.read.sources import read_questions


def choose_questions(
    prompt: str,
    input: str,
    *,
    data_dir: Path | None,
    input_file: Path | None,
    output_file: Path | None,
    limit: int | None,
) -> Conversation | list[Conversation]:
    """Read what is to be answered, before a model is loaded.

    Args:
        prompt: An instruction, to be answered alone.
        input: What it is about.
        data_dir: A data folder, of which the test split is to be answered.
        input_file: Any file with rows.
        output_file: Where answers to rows go.
        limit: Only so many rows.

    Raises:
        UserError: Flags exclude each other, the prompt is blank, or answers would go to a folder.
        DataError: The rows are missing or unusable.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}, expected 1 or more")
    if data_dir is None and input_file is None:
        for flag, value in (("output_file", output_file), ("limit", limit)):
            if value is not None:
                raise UserError(f"--{flag} is of answers to rows, expected --data_dir or --input_file with it")
        if not prompt.strip():
            raise UserError("--prompt is empty, expected an instruction")
        return instruct(prompt, input)
    if data_dir and input_file:
        raise UserError("--data_dir and --input_file are both given, expected one of them")
    for flag, given in (("prompt", prompt != EXAMPLE_PROMPT), ("input", input != "")):
        if given:
            rows = "--data_dir" if data_dir else "--input_file"
            raise UserError(f"--{flag} and {rows} are both given, expected one question or the rows of a file")
    if output_file is not None and output_file.is_dir():
        raise UserError(f"--output_file {output_file} is a folder, expected a file or nothing there")
    return _rows(data_dir, input_file)[:limit]


def _rows(data_dir: Path | None, input_file: Path | None) -> list[Conversation]:
    if data_dir is not None and read_meta(data_dir).get("splits", {}).get("test", {}).get("rows") == 0:
        raise DataError(f"{data_dir} has no test split to answer: it was prepared with --test_split_size 0")
    path = data_dir / TEST_FILE if data_dir is not None else input_file
    assert path is not None
    examples = read_questions(path)
    if not examples:
        raise DataError(f"{path} holds no rows to answer")
    return examples
