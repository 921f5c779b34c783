"""Questions to models: one instruction or the rows of a file, fitted into what the model reads.

A prompt that is longer is refused, or goes without its oldest turns or tokens, which are counted. An answer that
becomes too long while it is made is the engine's matter, see `Request.overflow`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.errors import DataError, UserError
from lit_llama.generate.engine.request import Overflow, Sampling
from lit_llama.generate.flags import EXAMPLE_PROMPT
from lit_llama.generate.llm import LLM
from lit_llama.model.places import ADAPTER, DATA, MODEL, check_places
from lit_llama.text.dataset.folder import TEST_FILE, read_meta
from lit_llama.text.message import Conversation, instruct
from lit_llama.text.prompts.encode import prompt_ids
from lit_llama.text.read.formats.sources import read_questions
from lit_llama.wording import param


def choose_questions(
    prompt: str,
    input: str,
    *,
    checkpoint_dir: Path,
    data_dir: Path | None,
    input_file: Path | None,
    output_file: Path | None,
    limit: int | None,
) -> Conversation | list[Conversation]:
    """Read what is to be answered, before a model is loaded.

    Args:
        prompt: An instruction, to be answered alone.
        input: What it is about.
        checkpoint_dir: Folder of the model that is to answer, which tells of folders in each other's place.
        data_dir: A data folder, of which the test split is to be answered.
        input_file: Any file with rows.
        output_file: Where answers to rows go.
        limit: Only so many rows.

    Raises:
        UserError: Flags exclude each other, folders are swapped, the prompt is blank, or answers would go to a folder.
        DataError: The rows are missing or unusable.
    """
    if limit is not None and limit < 1:
        raise UserError(parameter="limit", value=limit, expected="1 or more")
    check_places(
        {"checkpoint_dir": MODEL + ADAPTER, "data_dir": DATA}, {"checkpoint_dir": checkpoint_dir, "data_dir": data_dir}
    )
    if data_dir is None and input_file is None:
        for flag, value in (("output_file", output_file), ("limit", limit)):
            if value is not None:
                raise UserError(
                    f"is of answers to rows, expected {param('data_dir')} or {param('input_file')} with it",
                    parameter=flag,
                )
        if not prompt.strip():
            raise UserError("is empty, expected an instruction", parameter="prompt")
        return instruct(prompt, input)
    if data_dir and input_file:
        raise UserError(f"{param('data_dir')} and {param('input_file')} are both given, expected one of them")
    if input_file is not None and (input_file / "dataset_dict.json").is_file():
        raise UserError(
            "is a data folder, expected a file with rows",
            parameter="input_file",
            value=input_file,
            remedy=f"give it as {param('data_dir', input_file)}",
        )
    for flag, given in (("prompt", prompt != EXAMPLE_PROMPT), ("input", input != "")):
        if given:
            rows = param("data_dir") if data_dir else param("input_file")
            raise UserError(f"{param(flag)} and {rows} are both given, expected one question or the rows of a file")
    if output_file is not None and output_file.is_dir():
        raise UserError("is a folder, expected a file or nothing there", parameter="output_file", value=output_file)
    return _rows(data_dir, input_file)[:limit]


def _rows(data_dir: Path | None, input_file: Path | None) -> list[Conversation]:
    if data_dir is not None and read_meta(data_dir).get("splits", {}).get("test", {}).get("rows") == 0:
        raise DataError(f"{data_dir} has no test split to answer: it was prepared with {param('test_split_size', 0)}")
    path = data_dir / TEST_FILE if data_dir is not None else input_file
    assert path is not None
    examples = read_questions(path)
    if not examples:
        raise DataError(f"{path} holds no rows to answer")
    return examples


Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Fitted:
    """A prompt that the model reads.

    Attributes:
        ids: Of the prompt.
        dropped: Turns, or tokens of a plain text, that were left out.
        keep: First ids that stay if the answer slides: the system message, or the token that begins a text.
        messages: That are left of a conversation.
    """

    ids: list[int]
    dropped: int = 0
    keep: int = 0
    messages: Messages = ()


def room(llm: LLM, sampling: Sampling) -> int:
    """Return the tokens of a prompt that leave an answer its room; half of what the model reads where the answer has no
    limit.
    """
    context = llm.config.context_length
    return max(context - sampling.max_new_tokens, context // 2)


def fitted_text(llm: LLM, ids: Sequence[int], limit: int, overflow: Overflow) -> Fitted:
    """Return the ids of a plain text, with `drop_oldest` without those at its beginning for which there is no room.

    Args:
        llm: Who continues it.
        ids: Of the text; a token that begins texts stays.
        limit: Tokens of the prompt, at most.
        overflow: With `error`, nothing is left out, and the engine refuses what is too long.
    """
    begin = llm.tokenizer.control.get(llm.tokenizer.bos or "")
    keep = int(begin is not None and list(ids[:1]) == [begin])
    dropped = max(0, len(ids) - limit) if overflow == "drop_oldest" else 0
    return Fitted([*ids[:keep], *ids[keep + dropped :]], dropped, keep)


def fitted_messages(
    llm: LLM,
    messages: Messages,
    limit: int,
    overflow: Overflow,
    tools: Sequence[Mapping[str, Any]] = (),
    more: Mapping[str, Any] | None = None,
) -> Fitted:
    """Return a conversation, with `drop_oldest` without the oldest turns for which there is no room.

    A turn is a message of the user with all that answers it. The system message and the last turn stay.

    Args:
        llm: Who answers.
        messages: So far; the last one is to be answered.
        limit: Tokens of the prompt, at most; where the last turn alone has more, it is left at that.
        overflow: With `error`, nothing is left out.
        tools: That may be called.
        more: What the chat template is told besides.
    """
    style, more = llm.require_style(), more or {}
    left, dropped = list(messages), 0
    head = int(bool(left) and left[0]["role"] == "system")
    ids = prompt_ids(llm.tokenizer, style, left, tools, more)
    while overflow == "drop_oldest" and len(ids) > limit and (end := _next_turn(left, head)) is not None:
        del left[head:end]
        dropped += 1
        ids = prompt_ids(llm.tokenizer, style, left, tools, more)
    return Fitted(ids, dropped, _opening(llm, left[:head], ids, tools, more), left)


def _next_turn(messages: Messages, first: int) -> int | None:
    """Where the turn after the one at `first` begins."""
    starts = (place for place in range(first + 1, len(messages)) if messages[place]["role"] == "user")
    return next(starts, None)


def _opening(
    llm: LLM, head: Messages, ids: Sequence[int], tools: Sequence[Mapping[str, Any]], more: Mapping[str, Any]
) -> int:
    """How many ids come before the first turn: those that prompts with this system message have in common."""
    try:
        other = prompt_ids(llm.tokenizer, llm.require_style(), [*head, {"role": "user", "content": "\n"}], tools, more)
    except UserError:  # a style that reads nothing but whole conversations
        return 0
    return next((i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b), min(len(ids), len(other)))
