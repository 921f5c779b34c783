"""Likelihoods of texts under a model: references behind their prompts, choices, and whole documents.

All of it goes through the engine, so that a prompt which several texts stand behind is computed once.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lit_llama.errors import DataError, NumericalError
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.ticket import Ticket
from lit_llama.generate.llm import LLM
from lit_llama.text.message import IGNORE_INDEX, Conversation, headed
from lit_llama.text.pipeline.encoder import Encoder
from lit_llama.text.prompts.encode import Cutter, ids_of
from lit_llama.text.prompts.styles import Segment
from lit_llama.wording import param


def _scored(ids: Sequence[int], start: int, adapter: str | None = None) -> Request:
    return Request(ids, Sampling(max_new_tokens=0), adapter=adapter, prompt_logprobs=1, scored_from=start)


@dataclass(frozen=True)
class Text:
    """Ids of which some are to be scored.

    Attributes:
        ids: All of them.
        start: The first one that is scored.
        ends: How many at the end are no text, but the tokens that end an answer.
        bytes: Of the scored text in UTF-8.
    """

    ids: tuple[int, ...]
    start: int
    ends: int
    bytes: int

    def request(self) -> Request:
        """Build the request that scores the text, and makes nothing."""
        return _scored(self.ids, self.start)


@dataclass(frozen=True)
class Likelihood:
    """Log-probabilities of what was scored, in nats.

    Attributes:
        text: Sum over the tokens of the text.
        ends: Sum over the tokens that end it.
        tokens: How many they are, all together.
        bytes: Of the text.
        greedy: Whether each token of the text was the most likely one.
    """

    text: float
    ends: float
    tokens: int
    bytes: int
    greedy: bool


def chat_texts(llm: LLM, question: Conversation, answers: Sequence[str], system: str = "") -> list[Text]:
    """Return the answers behind one prompt in the model's style, with the tokens that end them: ids as in training.

    Raises:
        DataError: One is too long for the model.
        UserError: The style cannot say something.
    """
    style = llm.require_style()
    turns, where = headed(question.prompt, system), f"row {question.row}"
    conversations = [
        replace(question, messages=(*turns, {"role": "assistant", "content": answer}), where=where)
        for answer in answers
    ]
    encoder = Encoder(llm.tokenizer, style, max_seq_length=llm.config.context_length, train_on="last", overflow="error")
    batch = encoder.encode(encoder.render(conversations)).batch
    texts = []
    for number, answer in enumerate(answers):
        ids, labels = (column.tolist() for column in batch.sample(number))
        trained = [place for place, label in enumerate(labels) if label != IGNORE_INDEX]
        end = trained[-1] + 1
        assert trained == list(range(trained[0], end)), "one answer is trained, as a whole"
        texts.append(_text(llm, ids[:end], trained[0], answer))
    return texts


def raw_texts(llm: LLM, prompt: str, answers: Sequence[str]) -> list[Text]:
    """Return the texts that continue another one, which begins with the model's token for that.

    Raises:
        DataError: The model cannot score its first token, having none to begin with.
    """
    tokenizer, cutter = llm.tokenizer, Cutter(llm.tokenizer)
    begin = [tokenizer.control[tokenizer.bos]] if tokenizer.bos else []
    texts = []
    for answer in answers:
        runs = cutter.runs([Segment(prompt), Segment(answer, trained=True)])
        start = len(begin) + len(ids_of(tokenizer, [run for run in runs if not run.trained]))
        if not start:
            raise DataError("the prompt is empty, and the model has no token that begins a text; expected some words")
        texts.append(_text(llm, [*begin, *ids_of(tokenizer, runs)], start, answer))
    return texts


def _text(llm: LLM, ids: Sequence[int], start: int, answer: str) -> Text:
    control = {*llm.tokenizer.control.values()}
    ends = next((count for count, token in enumerate(reversed(ids[start:])) if token not in control), len(ids) - start)
    return Text(tuple(ids), start, ends, len(answer.encode("utf-8", "surrogatepass")))


def likelihoods(
    llm: LLM, texts: Sequence[Text], done: Callable[[int, Likelihood], object] = lambda *_: None
) -> list[Likelihood]:
    """Score texts, all at once.

    Args:
        llm: Whose log-probabilities.
        texts: Which; those with the same beginning are best neighbours.
        done: Called with the number of one that is scored.

    Raises:
        UserError: A text is too long for the model.
        NumericalError: The log-probabilities are not finite.
    """
    found: dict[int, Likelihood] = {}

    def take(number: int, logprobs: Sequence[float], greedy: Sequence[bool]) -> None:
        text = texts[number]
        found[number] = _likelihood(text, logprobs, greedy)
        done(number, found[number])

    score(llm, [(text.ids, text.start) for text in texts], take)
    return [found[number] for number in range(len(texts))]


def _likelihood(text: Text, logprobs: Sequence[float], greedy: Sequence[bool]) -> Likelihood:
    inner = len(logprobs) - text.ends
    return Likelihood(
        math.fsum(logprobs[:inner]), math.fsum(logprobs[inner:]), len(logprobs), text.bytes, all(greedy[:inner])
    )


def score(
    llm: LLM,
    texts: Sequence[tuple[Sequence[int], int]],
    done: Callable[[int, list[float], list[bool]], object],
) -> None:
    """Score ids of each text from some place on, by their log-probabilities.

    Args:
        llm: The model.
        texts: Ids, and the first one that is scored, which is not the first of the text.
        done: Takes the number of a text, the log-probability of each scored id, and whether it was the most likely.

    Raises:
        UserError: A text is too long for the model.
        NumericalError: The log-probabilities are not finite.
    """
    requests = [_scored(ids, start, llm.adapter) for ids, start in texts]
    for request in requests:
        llm.engine.check_request(request)
    engine, waiting = llm.engine, deque(range(len(requests)))
    tickets: dict[int, Ticket] = {}
    try:
        while tickets or waiting:
            while waiting and len(tickets) < 2 * engine.config.max_sequences:
                tickets[waiting[0]] = engine.add(requests[waiting[0]])
                waiting.popleft()
            engine.step()
            for number in [number for number, ticket in tickets.items() if ticket.done]:
                ticket = tickets.pop(number)
                if ticket.error is not None:
                    raise ticket.error
                request = ticket.request
                scores = list(zip(request.ids, ticket.steps[-1].prompt_logprobs, strict=True))[request.scored_from :]
                logprobs = [entry.logprob for _, entry in scores if entry is not None]
                if not all(map(math.isfinite, logprobs)):
                    raise _not_finite(number)
                done(number, logprobs, [entry.top[0][0] == token for token, entry in scores if entry is not None])
    finally:
        for ticket in tickets.values():
            engine.abort(ticket)


def _not_finite(number: int) -> NumericalError:
    return NumericalError(
        f"the log-probabilities of text {number} are not finite: the weights or the adapter are damaged, or the "
        f"precision is too small for them; try {param('precision', '32-true')}"
    )
