"""Answers to instructions: one, streamed, or every row of a file, in batches and measured."""

import json
import sys
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lit_llama.errors import DataError, UserError
from lit_llama.folder import write_json_lines
from lit_llama.generate.decode import check_counts, check_room, generate
from lit_llama.generate.load import Speaker, report
from lit_llama.generate.sampling import Sampling
from lit_llama.progress import stderr
from lit_llama.text.dataset import TEST_FILE, read_meta
from lit_llama.text.encode import place_behind, prompt_ids
from lit_llama.text.formats import Example, read_prompts


@dataclass(frozen=True)
class Answer:
    """What the model said, and whether it stopped by itself."""

    text: str
    stopped: bool
    tokens: int


def continue_text(speaker: Speaker, prompt: str, max_new_tokens: int, sampling: Sampling) -> None:
    """Stream the continuation of a raw text to stdout."""
    bos = [speaker.tokenizer.control[speaker.tokenizer.bos]] if speaker.tokenizer.bos else []
    _print_stream(speaker, speaker.stream(bos + speaker.tokenizer.encode(prompt), max_new_tokens, sampling))


def answer_one(speaker: Speaker, example: Example, max_new_tokens: int, sampling: Sampling) -> None:
    """Stream the answer to an instruction to stdout.

    Raises:
        UserError: It is blank, or too long for the model.
    """
    if not example.instruction.strip():
        raise UserError("--prompt is empty, expected an instruction")
    _print_stream(speaker, speaker.answer(instruction_ids(speaker, example), max_new_tokens, sampling))


def _print_stream(speaker: Speaker, steps: Iterable[tuple[list[int], str]]) -> None:
    start, count = time.perf_counter(), 0
    for ids, text in steps:
        count += len(ids)
        print(text, end="", flush=True)
    print(flush=True)
    report(count, time.perf_counter() - start, speaker.model.model.embed_tokens.weight.device)


def instruction_ids(speaker: Speaker, example: Example) -> list[int]:
    """Ids of the prompt for an instruction, in the style the model was trained with."""
    style = speaker.require_style()
    turns = example.turns or [{"role": "user", "content": style.user(example)}]
    return prompt_ids(speaker.tokenizer, style, turns, example.tools)


def answer_all(
    speaker: Speaker, examples: Sequence[Example], max_new_tokens: int, sampling: Sampling, batch_size: int
) -> list[Answer]:
    """Answer every example, prompts of similar length together, in the order given.

    Raises:
        DataError: A prompt is too long for the model; found before the first answer.
    """
    prompts = [instruction_ids(speaker, example) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        try:
            check_room(speaker.model, len(prompt), max_new_tokens)
        except UserError as error:
            raise DataError(f"row {example.row}: {error}") from error
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: dict[int, Answer] = {}
    console = stderr()
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("answering", total=len(prompts))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            made = answer_batch(speaker, [prompts[row] for row in rows], max_new_tokens, sampling, rows)
            answers.update(zip(rows, made, strict=True))
            progress.advance(task, len(rows))
    return [answers[row] for row in range(len(prompts))]


def answer_batch(
    speaker: Speaker,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    numbers: Sequence[int] | None = None,
) -> list[Answer]:
    """Answer prompts, given as ids, all at once; `numbers` as in `generate`."""
    made: list[list[int]] = [[] for _ in prompts]
    steps = generate(
        speaker.model,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_ids=speaker.stop_ids,
        sampling=sampling,
        tokens=speaker.tokenizer.size,
        numbers=numbers,
    )
    for step in steps:
        for index, token in step:
            made[index].append(token)
    answers = []
    for prompt, ids in zip(prompts, made, strict=True):
        stopped = ids[-1] in speaker.stop_ids
        said = speaker.tokenizer.decode(ids[:-1] if stopped else ids, place_behind(speaker.tokenizer, prompt))
        text = said.removeprefix(speaker.opening)
        answers.append(Answer(text, stopped, len(ids)))
    return answers


def answer_file(
    speaker: Speaker,
    *,
    data_dir: Path | None,
    input_file: Path | None,
    output_file: Path | None,
    limit: int | None,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int,
) -> dict[str, Any]:
    """Answer the test split of a data folder, or the rows of a file.

    Answers go to a file or to stdout, measures to stderr.

    Returns:
        The measures.

    Raises:
        UserError: A count is below 1, or `output_file` is a folder.
        DataError: The rows are missing or unusable.
    """
    check_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, limit=limit)
    if output_file is not None and output_file.is_dir():
        raise UserError(f"--output_file {output_file} is a folder, expected a file or nothing there")
    if data_dir is not None:
        read_meta(data_dir)
    path = data_dir / TEST_FILE if data_dir is not None else input_file
    assert path is not None
    examples = read_prompts(path)[:limit]
    if not examples:
        raise DataError(f"{path} holds no rows to answer")
    if output_file is not None:  # what cannot be made is better known before the answers
        output_file.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    answers = answer_all(speaker, examples, max_new_tokens, sampling, batch_size)
    rows = [
        _asked(example) | {"output": example.response, "answer": answer.text, "stopped": answer.stopped}
        for example, answer in zip(examples, answers, strict=True)
    ]
    if output_file is not None:
        write_json_lines(output_file, rows)
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False), file=sys.stdout)
    measures = measure(examples, answers, speaker.tokenizer.control)
    stderr().print(", ".join(f"{name} {_shown(value)}" for name, value in measures.items()))
    report(
        sum(answer.tokens for answer in answers),
        time.perf_counter() - start,
        speaker.model.model.embed_tokens.weight.device,
    )
    return measures


def _asked(example: Example) -> dict[str, Any]:
    if example.turns:
        return {"messages": list(example.turns)} | ({"tools": list(example.tools)} if example.tools else {})
    return {"instruction": example.instruction, "input": example.input}


def measure(examples: Sequence[Example], answers: Sequence[Answer], control: Collection[str] = ()) -> dict[str, Any]:
    """Shares of answers that stop by themselves, that equal the reference, and that are the same JSON as it.

    The last two only over rows that have a reference; JSON only if every reference is JSON. Answers that end in a
    control token that is spelled as text, as a reference may too, are a share of their own where there are any.
    """
    pairs = [
        (example.response, answer.text) for example, answer in zip(examples, answers, strict=True) if example.response
    ]
    measures: dict[str, Any] = {"rows": len(answers), "stopped": _mean([answer.stopped for answer in answers])}
    if pairs:
        measures["exact_match"] = _mean([wanted.strip() == text.strip() for wanted, text in pairs])
    spelled = [answer.text.rstrip().endswith(tuple(control)) for answer in answers]
    if control and any(spelled):
        measures["ends_spelled_as_text"] = _mean(spelled)
    wanted = [_json(reference) for reference, _ in pairs]
    if pairs and all(value is not None for value in wanted):
        measures["json_match"] = _mean([value == _json(text) for value, (_, text) in zip(wanted, pairs, strict=True)])
    return measures


def _json(text: str) -> tuple[Any] | None:
    """The parsed value, wrapped to tell it from a failure. JSON tells 1 from true, Python does not."""
    try:
        return (json.dumps(json.loads(text), sort_keys=True),)
    except (ValueError, RecursionError):
        return None


def _mean(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _shown(value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
