"""Answers to instructions: one, streamed, or every row of a file, in batches and measured."""

import contextlib
import hashlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from lit_llama.console import Results, shown
from lit_llama.errors import DataError, NumericalError, UserError
from lit_llama.folder.place import check_output
from lit_llama.folder.publish import write_json_lines
from lit_llama.generate.engine.engine import Ticket
from lit_llama.generate.engine.request import FinishReason, Overflow, Request, Sampling
from lit_llama.generate.llm import LLM
from lit_llama.generate.metrics import Answer as Answer
from lit_llama.generate.metrics import measure as measure
from lit_llama.generate.metrics import notes
from lit_llama.generate.plan import report
from lit_llama.generate.questions import Fitted, fitted_messages, fitted_text, room
from lit_llama.generate.store import Row, RowStore, described, unfinished
from lit_llama.progress import bar, stderr
from lit_llama.text.message import Conversation, headed
from lit_llama.text.prompts.encode import Cutter, ids_of, prompt_ids
from lit_llama.text.prompts.styles import Segment
from lit_llama.wording import param


def continue_text(
    llm: LLM, prompt: str, sampling: Sampling, *, control_tokens: bool = False, overflow: Overflow = "error"
) -> None:
    """Stream the continuation of a raw text to stdout.

    Args:
        llm: Who continues it.
        prompt: The text. It begins with the model's token for that, whether it spells it or not.
        sampling: How tokens are drawn.
        control_tokens: Control tokens that the text spells become such, and are no words.
        overflow: Where text and continuation are too long for the model.

    Raises:
        UserError: They are, and nothing is to be left out.
    """
    fitted = fitted_text(llm, raw_ids(llm, prompt, control_tokens), room(llm, sampling), overflow)
    if fitted.dropped:
        stderr().print(f"the prompt is too long for the model: its {fitted.dropped} oldest tokens are left out")
    _print_answers(llm, fitted, sampling, overflow)


def raw_ids(llm: LLM, text: str, control_tokens: bool) -> list[int]:
    """Return the ids of a text that no style was put around."""
    tokenizer = llm.tokenizer
    if not control_tokens and (spelled := [token for token in tokenizer.control if token in text]):
        stderr().print(f"{', '.join(spelled)} in the prompt: words as any others, without {param('control_tokens')}")
    runs = Cutter(tokenizer).runs([Segment(text, template=control_tokens)])
    ids = ids_of(tokenizer, runs)
    bos = [tokenizer.control[tokenizer.bos]] if tokenizer.bos else []
    return ids if bos == ids[:1] else bos + ids


def answer_one(
    llm: LLM, question: Conversation, sampling: Sampling, system: str = "", overflow: Overflow = "error"
) -> None:
    """Stream the answer to a question to stdout.

    Raises:
        UserError: It is too long for the model.
    """
    fitted = _fitted(llm, question, sampling, system, overflow)
    if fitted.dropped:
        stderr().print(f"the conversation is too long for the model: {fitted.dropped} oldest turns are left out")
    _print_answers(llm, fitted, sampling, overflow, llm.opening)


def _print_answers(llm: LLM, prompt: Fitted, sampling: Sampling, overflow: Overflow, opening: str = "") -> None:
    """Every answer to a prompt on stdout, each ending its line; which one it is, on stderr.

    They are made together. The first one is shown as it comes, and each other one as soon as it is its turn.
    """
    engine, start = llm.engine, time.perf_counter()
    ticket = engine.add(llm.request(prompt.ids, sampling, overflow=overflow, keep=prompt.keep))
    texts = [llm.text_behind(prompt.ids, sampling, opening) for _ in range(sampling.n)]
    unshown = [""] * sampling.n
    try:
        for number, text in enumerate(texts):
            if sampling.n > 1:
                stderr().print(f"answer {number + 1} of {sampling.n}:")
            results = Results()
            results.write(unshown[number])
            for step in () if text.ended else engine.follow(ticket):
                piece = texts[step.answer].take(step)
                if texts[step.answer].is_before(step):  # at a stop text
                    engine.abort(ticket, step.answer)
                if step.answer != number:
                    unshown[step.answer] += piece
                    continue
                results.write(piece)
                if text.finish_reason is not None:
                    break
            results.end()
            ending = ended(text.finish_reason, sampling) + _slid(text.dropped)
            report(text.tokens, time.perf_counter() - start, llm.device, ending)
    finally:
        engine.abort(ticket)


def ended(reason: FinishReason | None, sampling: Sampling) -> str:
    """Return the end of a report on an answer that did not stop by itself."""
    return f"; cut off at {param('max_new_tokens', sampling.max_new_tokens)}" if reason == "length" else ""


def _slid(dropped: int) -> str:
    """The end of a report on an answer that became too long for the model."""
    return f"; the oldest {dropped} tokens were left out on the way" if dropped else ""


def question_ids(llm: LLM, question: Conversation, system: str = "") -> list[int]:
    """Return the ids of the prompt of a question, in the style the model was trained with.

    Args:
        llm: Who is asked.
        question: Turns up to the answer.
        system: Message that they begin with, unless they have one.
    """
    return prompt_ids(llm.tokenizer, llm.require_style(), headed(question.prompt, system), question.tools)


def _fitted(llm: LLM, question: Conversation, sampling: Sampling, system: str, overflow: Overflow) -> Fitted:
    """The prompt of a question, without turns for which there is no room."""
    return fitted_messages(llm, headed(question.prompt, system), room(llm, sampling), overflow, question.tools)


def answer_all(
    llm: LLM,
    questions: Sequence[Conversation],
    sampling: Sampling,
    system: str = "",
    overflow: Overflow = "error",
    store: RowStore | None = None,
) -> list[Answer]:
    """Answer every question `sampling.n` times, in the order given.

    Args:
        llm: Who is asked.
        questions: What.
        sampling: How tokens are drawn.
        system: Message that prompts begin with, unless they have one.
        store: Keeps answers as they come; those that are in it are not made again.

    Raises:
        DataError: A prompt is too long for the model; found before the first answer.
    """
    prompts = [_fitted(llm, question, sampling, system, overflow) for question in questions]
    if cut := [prompt.dropped for prompt in prompts if prompt.dropped]:
        stderr().print(f"{len(cut)} of {len(prompts)} prompts are too long: {sum(cut)} oldest turns are left out")
    requests = [
        llm.request(prompt.ids, sampling, number=row, overflow=overflow, keep=prompt.keep)
        for row, prompt in enumerate(prompts)
    ]
    for question, request in zip(questions, requests, strict=True):
        try:
            llm.engine.check_request(request)
        except UserError as error:
            raise DataError(f"row {question.row}: {error}") from error
    console = stderr()
    with bar(console, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        known = {} if store is None else {row: _kept(found) for (row,), found in store.rows.items()}
        task = progress.add_task("answering", total=len(prompts), completed=len(known))
        # Prompts of similar length next to each other: those that begin alike are found, and fewer wait for others.
        order = sorted({*range(len(prompts))} - known.keys(), key=lambda row: (len(prompts[row].ids), row))

        def keep(index: int, answers: list[Answer]) -> None:
            known[order[index]] = answers
            if store is not None and not any(answer.error for answer in answers):  # which are made again
                found = [{name: getattr(answer, name) for name in _KEPT} for answer in answers]
                store.add({"row": order[index], "answers": found})
            progress.advance(task)

        answer_requests(llm, [requests[row] for row in order], keep)
    return [answer for row in range(len(prompts)) for answer in known[row]]


_KEPT = ("text", "stopped", "tokens", "dropped")
"""Attributes of an answer on its way to a file."""


def _kept(row: Row) -> list[Answer]:
    return [Answer(**answer) for answer in row["answers"]]


def answer_requests(
    llm: LLM,
    requests: Sequence[Request],
    done: Callable[[int, list[Answer]], object] = lambda *_: None,
    *,
    opening: str | None = None,
) -> list[list[Answer]]:
    """Answer requests, all at once: of each its `n` answers.

    Args:
        llm: Who is asked.
        requests: Made by `LLM.request`.
        done: Called with the number of a request and its answers, when it is answered.
        opening: Text that is left out where answers begin with it; None for that of the style.

    Returns:
        One that failed has its error, and the others go on.
    """
    engine, waiting = llm.engine, deque(range(len(requests)))
    made: dict[int, list[Answer]] = {}
    tickets: dict[int, Ticket] = {}  # of those in the engine, which are few: each step looks at all of them
    unseen = llm.opening if opening is None else opening
    texts = [[llm.text_behind(r.ids, r.sampling, unseen) for _ in range(r.sampling.n)] for r in requests]
    parts: list[list[list[str]]] = [[[] for _ in own] for own in texts]
    try:
        while tickets or waiting:
            while waiting and len(tickets) < 2 * engine.config.max_sequences:
                index = waiting.popleft()
                tickets[index] = engine.add(requests[index])
            engine.step()
            for index, ticket in list(tickets.items()):
                while ticket.steps:
                    step = ticket.steps.popleft()
                    text = texts[index][step.answer]
                    if not text.ended:
                        parts[index][step.answer].append(text.take(step))
                        if text.is_before(step):  # at a stop text
                            engine.abort(ticket, step.answer)
                if ticket.done and not ticket.steps:
                    del tickets[index]
                    made[index] = [
                        Answer(
                            "".join(part),
                            text.finish_reason == "stop",
                            text.tokens,
                            None if text.ended else ticket.error,
                            text.dropped,
                        )
                        for part, text in zip(parts[index], texts[index], strict=True)
                    ]
                    done(index, made[index])
    finally:
        for ticket in tickets.values():
            engine.abort(ticket)
    return [made[index] for index in range(len(requests))]


def answer(
    llm: LLM,
    asked: Conversation | Sequence[Conversation],
    sampling: Sampling,
    *,
    output_file: Path | None = None,
    system: str = "",
    overflow: Overflow = "error",
    identity: Mapping[str, Any] | None = None,
) -> None:
    """Answer one question, streamed to stdout, or rows; see `answer_one` and `answer_rows`."""
    if isinstance(asked, Conversation):
        answer_one(llm, asked, sampling, system, overflow)
    else:
        answer_rows(llm, asked, sampling, output_file=output_file, system=system, overflow=overflow, identity=identity)


def answer_rows(
    llm: LLM,
    questions: Sequence[Conversation],
    sampling: Sampling,
    *,
    output_file: Path | None = None,
    system: str = "",
    overflow: Overflow = "error",
    identity: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer rows, a line of JSON for each answer.

    Answers go to a file or to stdout, measures to stderr.

    Args:
        llm: Who is asked.
        questions: What.
        sampling: How tokens are drawn.
        output_file: Where the lines go; None for stdout.
        system: Message that prompts begin with, unless they have one.
        identity: What decides the answers of `llm`: with it, answers on their way to a file survive a kill, and the
            same call goes on behind them.

    Returns:
        The measures.

    Raises:
        UserError: Nothing can be written at `output_file`.
        NumericalError: Answers failed; raised after all is written.
        DataError: A prompt is too long for the model.
    """
    if output_file is not None:  # what cannot be made is better known before the answers
        check_output(output_file)
    if system and (own := sum(question.messages[0]["role"] == "system" for question in questions)):
        stderr().print(f"{own} of {len(questions)} rows have a system message of their own, which they keep")
    start = time.perf_counter()
    asked = [question for question in questions for _ in range(sampling.n)]
    with _journal(questions, sampling, output_file, system, overflow, identity) as store:
        known = 0 if store is None else sum(answer.tokens for row in store.rows.values() for answer in _kept(row))
        answers = answer_all(llm, questions, sampling, system, overflow, store)
        rows = [
            _asked(question, system) | _answered(question, answer) | ({"sample": number} if sampling.n > 1 else {})
            for question, answer, number in zip(asked, answers, cycle(range(sampling.n)), strict=False)
        ]
        if output_file is not None:
            write_json_lines(output_file, rows)
    for row in rows if output_file is None else ():
        print(shown(json.dumps(row, ensure_ascii=False), sys.stdout))
    control = llm.tokenizer.control
    measures = measure(asked, answers, control) | {"rows": len(questions)}
    if sampling.n > 1:
        measures["answers"] = len(answers)
    stderr().print(", ".join(f"{name} {_shown(value)}" for name, value in measures.items()))
    for note in notes(asked, answers, control):
        stderr().print(note)
    if slid := sum(answer.dropped > 0 for answer in answers):
        stderr().print(f"{slid} answers became too long for the model and went on without the oldest tokens")
    tokens, device = sum(answer.tokens for answer in answers) - known, llm.device
    report(tokens, time.perf_counter() - start, device)
    _check_failed(asked, answers)
    return measures


def _check_failed(asked: Sequence[Conversation], answers: Sequence[Answer]) -> None:
    """Raise for answers that failed."""
    failed = [(question, answer.error) for question, answer in zip(asked, answers, strict=True) if answer.error]
    if failed:
        question, first = failed[0]
        raise NumericalError(
            f"{len(failed)} of {len(answers)} answers failed, their finish_reason is error; the others are there. The "
            f"first of them, row {question.row}: {first}"
        )


@contextlib.contextmanager
def _journal(
    questions: Sequence[Conversation],
    sampling: Sampling,
    output_file: Path | None,
    system: str,
    overflow: Overflow,
    identity: Mapping[str, Any] | None,
) -> Iterator[RowStore | None]:
    """Where answers on their way to a file are kept; nowhere on their way to stdout or a device."""
    if output_file is None or identity is None or (output_file.exists() and not output_file.is_file()):
        yield None
        return
    rows = json.dumps([_asked(question, system) for question in questions]).encode()
    asked = hashlib.sha256(rows).hexdigest()[:16]
    header = {"model": dict(identity), "sampling": described(sampling), "rows": asked}
    header |= {} if overflow == "error" else {"overflow": overflow}
    with unfinished(output_file, header, ("row",)) as store:
        if store.begun_anew:
            stderr().print(f"{store.path} was of other settings or rows: it is begun anew")
        elif store.rows:
            stderr().print(f"{len(store.rows)} of {len(questions)} rows were answered before, and are kept")
        yield store


def _asked(question: Conversation, system: str) -> dict[str, Any]:
    if (alone := question.instruction) is None:
        tools = {"tools": list(question.tools)} if question.tools else {}
        return {"messages": list(headed(question.prompt, system))} | tools
    asked = {"instruction": alone["content"], "input": alone.get("input", "")}
    return ({"system": system} if system else {}) | asked


def _answered(question: Conversation, answer: Answer) -> dict[str, Any]:
    return {
        "output": question.response,
        "answer": answer.text,
        "stopped": answer.stopped,
        "finish_reason": answer.finish_reason,
    } | ({} if answer.error is None else {"error": str(answer.error)})


def _shown(value: float) -> str:
    return f"{value:.1%}" if isinstance(value, float) else str(value)
