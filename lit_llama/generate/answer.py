"""Answers to instructions: one, streamed, or every row of a file, in batches and measured."""

import json
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from lit_llama.console import Results, shown
from lit_llama.errors import DataError, UserError
from lit_llama.folder import write_json_lines
from lit_llama.generate.decode import check_counts, check_room, generate
from lit_llama.generate.engine.request import FinishReason, Request, Sampling
from lit_llama.generate.load import Speaker, Stream, report
from lit_llama.generate.metrics import Answer as Answer
from lit_llama.generate.metrics import measure as measure
from lit_llama.generate.metrics import notes
from lit_llama.place import check_output
from lit_llama.progress import bar, stderr
from lit_llama.text.conversation import Message
from lit_llama.text.encode import Cutter, ids_of, place_behind, prompt_ids
from lit_llama.text.formats import Example
from lit_llama.text.styles import Segment


def continue_text(speaker: Speaker, prompt: str, sampling: Sampling, *, control_tokens: bool = False) -> None:
    """Stream the continuation of a raw text to stdout.

    Args:
        speaker: Who continues it.
        prompt: The text. It begins with the model's token for that, whether it spells it or not.
        sampling: How tokens are drawn.
        control_tokens: Control tokens that the text spells become such, and are no words.
    """
    _print_answers(speaker, raw_ids(speaker, prompt, control_tokens), sampling)


def raw_ids(speaker: Speaker, text: str, control_tokens: bool) -> list[int]:
    """Ids of a text that no style was put around."""
    tokenizer = speaker.tokenizer
    if not control_tokens and (spelled := [token for token in tokenizer.control if token in text]):
        stderr().print(f"{', '.join(spelled)} in the prompt: words as any others, without --control_tokens")
    runs = Cutter(tokenizer).runs([Segment(text, template=control_tokens)])
    ids = ids_of(tokenizer, runs)
    bos = [tokenizer.control[tokenizer.bos]] if tokenizer.bos else []
    return ids if bos == ids[:1] else bos + ids


def answer_one(speaker: Speaker, example: Example, sampling: Sampling, system: str = "") -> None:
    """Stream the answer to an instruction to stdout.

    Raises:
        UserError: It is too long for the model.
    """
    _print_answers(speaker, instruction_ids(speaker, example, system), sampling, speaker.opening)


def _print_answers(speaker: Speaker, prompt: Sequence[int], sampling: Sampling, opening: str = "") -> None:
    """Every answer to a prompt on stdout, each ending its line; which one it is, on stderr."""
    for answer in range(sampling.n):
        if sampling.n > 1:
            stderr().print(f"answer {answer + 1} of {sampling.n}:")
        number = Request(prompt, sampling).answer_number(answer)
        _print_stream(speaker, speaker.stream(prompt, sampling, number=number, opening=opening), sampling)


def _print_stream(speaker: Speaker, stream: Stream, sampling: Sampling) -> None:
    start, results = time.perf_counter(), Results()
    for _, text in stream:
        results.write(text)
    print(flush=True)
    ending = ended(stream.text.finish_reason, sampling)
    report(stream.text.tokens, time.perf_counter() - start, speaker.model.model.embed_tokens.weight.device, ending)


def ended(reason: FinishReason | None, sampling: Sampling) -> str:
    """The end of a report on an answer that did not stop by itself."""
    return f"; cut off at --max_new_tokens {sampling.max_new_tokens}" if reason == "length" else ""


def instruction_ids(speaker: Speaker, example: Example, system: str = "") -> list[int]:
    """Ids of the prompt for an instruction, in the style the model was trained with.

    Args:
        speaker: Who is asked.
        example: What is asked.
        system: Message that it begins with, unless it has one.
    """
    style = speaker.require_style()
    turns = example.turns or ({"role": "user", "content": style.user(example)},)
    return prompt_ids(speaker.tokenizer, style, _headed(turns, system), example.tools)


def _headed(turns: tuple[Message, ...], system: str) -> tuple[Message, ...]:
    """Turns that begin with a system message: their own, or this one."""
    return turns if not system or turns[0]["role"] == "system" else ({"role": "system", "content": system}, *turns)


def answer_all(
    speaker: Speaker, examples: Sequence[Example], sampling: Sampling, batch_size: int, system: str = ""
) -> list[Answer]:
    """Answer every example `sampling.n` times, prompts of similar length together, in the order given.

    Raises:
        DataError: A prompt is too long for the model; found before the first answer.
    """
    prompts = [instruction_ids(speaker, example, system) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        try:
            check_room(speaker.model, len(prompt), sampling.max_new_tokens)
        except UserError as error:
            raise DataError(f"row {example.row}: {error}") from error
    rows = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    order = [(row, answer) for row in rows for answer in range(sampling.n)]
    answers: dict[tuple[int, int], Answer] = {}
    console = stderr()
    with bar(console, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("answering", total=len(order))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            numbers = [Request(prompts[row], sampling, number=row).answer_number(answer) for row, answer in part]
            made = answer_batch(speaker, [prompts[row] for row, _ in part], sampling, numbers)
            answers.update(zip(part, made, strict=True))
            progress.advance(task, len(part))
    return [answers[key] for key in sorted(answers)]


def answer_batch(
    speaker: Speaker, prompts: Sequence[Sequence[int]], sampling: Sampling, numbers: Sequence[int] | None = None
) -> list[Answer]:
    """Answer prompts, given as ids, all at once; `numbers` as in `generate`."""
    places = (place_behind(speaker.tokenizer, prompt) for prompt in prompts)
    texts = [speaker.text(sampling, speaker.opening, place) for place in places]
    parts: list[list[str]] = [[] for _ in prompts]
    steps = generate(
        speaker.model,
        prompts,
        max_new_tokens=sampling.max_new_tokens,
        stop_ids=texts[0].stop_ids,
        sampling=sampling,
        tokens=speaker.tokenizer.size,
        numbers=numbers,
        ended=lambda row, _: texts[row].finish_reason is not None,
    )
    for step in steps:
        for row, token in step:
            parts[row].append(texts[row].push(token))
    return [
        Answer("".join(part), text.finish_reason == "stop", text.tokens)
        for part, text in zip(parts, texts, strict=True)
    ]


def answer(
    speaker: Speaker,
    asked: Example | Sequence[Example],
    sampling: Sampling,
    *,
    output_file: Path | None = None,
    batch_size: int = 32,
    system: str = "",
) -> None:
    """Answer one question, streamed to stdout, or rows; see `answer_one` and `answer_rows`."""
    if isinstance(asked, Example):
        answer_one(speaker, asked, sampling, system)
    else:
        answer_rows(speaker, asked, sampling, output_file=output_file, batch_size=batch_size, system=system)


def answer_rows(
    speaker: Speaker,
    examples: Sequence[Example],
    sampling: Sampling,
    *,
    output_file: Path | None = None,
    batch_size: int = 32,
    system: str = "",
) -> dict[str, Any]:
    """Answer rows, a line of JSON for each answer.

    Answers go to a file or to stdout, measures to stderr.

    Returns:
        The measures.

    Raises:
        UserError: `batch_size` is below 1, or nothing can be written at `output_file`.
        DataError: A prompt is too long for the model.
    """
    check_counts(batch_size=batch_size)
    if output_file is not None:  # what cannot be made is better known before the answers
        check_output(output_file)
    if system and (own := sum(bool(example.turns) and example.turns[0]["role"] == "system" for example in examples)):
        stderr().print(f"{own} of {len(examples)} rows have a system message of their own, which they keep")
    start = time.perf_counter()
    answers = answer_all(speaker, examples, sampling, batch_size, system)
    asked = [example for example in examples for _ in range(sampling.n)]
    rows = [
        _asked(example, system) | _answered(example, answer) | ({"sample": number} if sampling.n > 1 else {})
        for example, answer, number in zip(asked, answers, cycle(range(sampling.n)), strict=False)
    ]
    if output_file is not None:
        write_json_lines(output_file, rows)
    else:
        for row in rows:
            print(shown(json.dumps(row, ensure_ascii=False), sys.stdout))
    control = speaker.tokenizer.control
    measures = measure(asked, answers, control) | {"rows": len(examples)}
    if sampling.n > 1:
        measures["answers"] = len(answers)
    stderr().print(", ".join(f"{name} {_shown(value)}" for name, value in measures.items()))
    for note in notes(asked, answers, control):
        stderr().print(note)
    tokens, device = sum(answer.tokens for answer in answers), speaker.model.model.embed_tokens.weight.device
    report(tokens, time.perf_counter() - start, device)
    return measures


def _asked(example: Example, system: str) -> dict[str, Any]:
    if example.turns:
        tools = {"tools": list(example.tools)} if example.tools else {}
        return {"messages": list(_headed(example.turns, system))} | tools
    return ({"system": system} if system else {}) | {"instruction": example.instruction, "input": example.input}


def _answered(example: Example, answer: Answer) -> dict[str, Any]:
    return {
        "output": example.response,
        "answer": answer.text,
        "stopped": answer.stopped,
        "finish_reason": answer.finish_reason,
    }


def _shown(value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
