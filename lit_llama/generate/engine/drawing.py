"""Answers that are being made: who waits or runs, what is drawn of the logits of a step, and how each answer ends.

Of the logits of a step come tokens that are drawn, guesses that were right, and scores of prompts.

Shapes: N rows of logits, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor

from lit_llama.errors import NumericalError, UserError
from lit_llama.generate.engine.request import FinishReason, Step, TokenLogprobs
from lit_llama.generate.engine.runner import Runner
from lit_llama.generate.engine.sampling import Sampler, token_logprobs
from lit_llama.generate.engine.scheduler import Part, Scheduler, Sequence
from lit_llama.generate.engine.speculative import Asked, Guesser
from lit_llama.generate.engine.ticket import Answer, Ticket
from lit_llama.model.kernels.paged import BLOCK
from lit_llama.wording import param


class Answers:
    """Answers by their sequences, from when they are added until they end.

    Args:
        scheduler: Of their sequences.
        runner: Whose blocks are cleared where they are damaged.
        tokens: Size of the tokenizer.
        guessers: Of their tokens, in the order in which they are asked.

    Attributes:
        live: Those that wait or run.
        longest: Ids of prompt and answer, at most, that the model reads and the cache holds.
        sampler: What draws their tokens.
        made: Tokens of answers so far.
        reused: Tokens of prompts that were found computed.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, tokens: int | None, guessers: list[Guesser]) -> None:
        self._scheduler, self._clear, self.guessers = scheduler, runner.clear, guessers
        self.longest = min(runner.config.context_length, runner.blocks * BLOCK)
        count = scheduler.max_sequences
        self.sampler = Sampler(count, runner.config.vocab_size, tokens=tokens, device=runner.device)
        self._free = list(range(count))
        self.slots: dict[Sequence, int] = {}
        self.live: dict[Sequence, Answer] = {}
        self.made = self.reused = 0

    def add(self, ticket: Ticket) -> None:
        """Add the answers of a ticket, which wait.

        Raises:
            TooLong, QueueFull: As of the scheduler; nothing is changed.
        """
        request = ticket.request
        longest = min(len(request.ids) + request.sampling.max_new_tokens, self.longest)
        self._scheduler.add([answer.sequence for answer in ticket.answers], longest)
        ticket.open = len(ticket.answers)
        self.live.update((answer.sequence, answer) for answer in ticket.answers)

    def assign(self) -> None:
        """Give each running sequence a slot of the sampler, and take those of the others back."""
        for sequence in [s for s in self.slots if s.state != "running"]:
            self._release(sequence)
        for sequence in self._scheduler.running:
            if sequence not in self.slots:
                answer = self.live[sequence]
                slot = self.slots[sequence] = self._free.pop()
                request = answer.ticket.request
                ids = answer.ids
                prompt, made = ids[: answer.prompt], ids[answer.prompt :]
                number = request.answer_number(answer.index)
                self.sampler.set(slot, request.sampling, number=number, prompt=prompt, made=made)
                self.reused += sequence.reused

    def _release(self, sequence: Sequence) -> None:
        slot = self.slots.pop(sequence, None)
        if slot is not None:
            self.sampler.clear(slot)
            self._free.append(slot)

    def end(
        self, answer: Answer, ids: tuple[int, ...], details: tuple[TokenLogprobs, ...], reason: FinishReason
    ) -> None:
        """Give out the last step of an answer."""
        step = Step(ids, details, reason, answer.index)
        if answer.ticket.request.prompt_logprobs is not None and not answer.index:
            step = replace(step, prompt_logprobs=(None, *answer.scores[: answer.prompt - 1]))
        self.made += len(ids)
        self._leave(answer)
        answer.ticket.steps.append(step)
        answer.ticket.tell()

    def slide(self, answer: Answer) -> int:
        """Leave out the oldest ids of an answer, which is computed again without them; how many."""
        dropped = answer.slide(self.longest)
        self._scheduler.slide(answer.sequence)
        for guesser in self.guessers:  # to which ids only ever grow
            guesser.forget(answer.sequence)
        return dropped

    def fail(self, answer: Answer, error: UserError) -> None:
        """End a request with an error; the blocks that it computed are not used again."""
        answer.ticket.error = answer.ticket.error or error
        for other in answer.ticket.answers:
            if other.sequence in self.live:
                self._leave(other, damaged=True)
        answer.ticket.tell()

    def _leave(self, answer: Answer, *, damaged: bool = False) -> None:
        for block in self._scheduler.finish(answer.sequence, damaged=damaged):
            self._clear(block)
        self._release(answer.sequence)
        for guesser in self.guessers:
            guesser.forget(answer.sequence)
        del self.live[answer.sequence]
        answer.ticket.open -= 1

    def check(self) -> None:
        """Assert that each answer waits or runs, and that no slot is lost."""
        assert set(self.live) == {*self._scheduler.running, *self._scheduler.waiting}
        assert len(self._free) + len(self.slots) == self._scheduler.max_sequences


class Drawing:
    """Draw of the tokens of answers, which are added to them.

    Args:
        scheduler: Of the sequences.
        answers: That are being made.
        vocabulary: Columns of the logits.
        tokens: Size of the tokenizer; ids from there on are neither scored nor guessed.

    Attributes:
        guessed, right: Tokens that were guessed so far, and how many of them were drawn.
    """

    def __init__(self, scheduler: Scheduler, answers: Answers, vocabulary: int, tokens: int | None) -> None:
        self._scheduler, self._answers = scheduler, answers
        self._width = vocabulary if tokens is None else min(tokens, vocabulary)
        self.guessed = self.right = 0

    def take(self, parts: list[Part], logits: Tensor) -> None:
        """Draw from the logits of a step, and say what came of it."""
        drawn: list[tuple[Answer, int, int]] = []  # answer, its first row, rows
        end = 0
        for part in parts:
            first, end = end, end + part.logits
            answer = self._answers.live.get(part.sequence)
            if answer is None:  # given up within the step, as by a generator that Python collects
                continue
            last = part.start + len(part.ids)
            complete = last >= len(part.sequence.ids)
            rows = 1 + len(part.sequence.guesses) if complete else 0
            if part.sequence.scored is not None:
                self._score(answer, part, logits[first : end - rows if complete else end])
            if complete:
                drawn.append((answer, end - rows, rows))
            else:
                self._scheduler.advance(part.sequence, last)
        if drawn:
            self._draw(drawn, logits)

    def _draw(self, drawn: list[tuple[Answer, int, int]], logits: Tensor) -> None:
        self._answers.assign()
        places = [row for _, first, count in drawn for row in range(first, first + count)]
        logits = logits if len(places) == len(logits) else logits[torch.tensor(places, device=logits.device)]
        slots = [self._answers.slots[answer.sequence] for answer, _, count in drawn for _ in range(count)]
        positions = [answer.made + i for answer, _, count in drawn for i in range(count)]
        allowed = self._allowed(drawn, logits)
        choice = self._answers.sampler.sample(logits, slots, positions, allowed)
        ids, details = choice.ids.tolist(), choice.details()
        accepted: list[tuple[int, int]] = []
        first = 0
        for answer, _, count in drawn:
            own = slice(first, first + count)
            first += count
            accepted += self._go_on(answer, ids[own], details[own])
        self._answers.sampler.accept([slot for slot, _ in accepted], [token for _, token in accepted])
        self._guess([answer for answer, _, _ in drawn])

    def _go_on(self, answer: Answer, chosen: list[int], details: list[TokenLogprobs | None]) -> list[tuple[int, int]]:
        """Add the tokens drawn at the end of an answer and after its guesses, as far as those were right.

        Returns:
            Slot and id of each new token, for the penalties of an answer that goes on.
        """
        sequence, sampling = answer.sequence, answer.ticket.request.sampling
        guesses, sequence.guesses = sequence.guesses, []
        base, made = len(sequence.ids), answer.made
        new: list[int] = []
        reason: FinishReason | None = None
        if made >= sampling.max_new_tokens:  # scored only
            if chosen[0] < 0:
                self._answers.fail(answer, _no_token(answer, base))
                return []
            self._scheduler.advance(sequence, base)  # other texts may begin alike
            self._answers.end(answer, (), (), "length")
            return []
        for index, token in enumerate(chosen):
            if token < 0 or (answer.matcher is not None and not answer.matcher.accept(token)):
                self._answers.fail(answer, _no_token(answer, base + index))
                return []
            new.append(token)
            if token in sampling.stop_ids:
                reason = "stop"
            elif made + len(new) >= sampling.max_new_tokens:
                reason = "length"
            if reason is not None or index >= len(guesses) or guesses[index] != token:
                break
        right = len(new) - 1
        self.guessed, self.right = self.guessed + len(guesses), self.right + right
        if answer.guesser is not None:
            answer.guesser.learn(sequence, len(guesses), right, base + len(new))
            answer.guesser = None
        sequence.ids += new
        self._scheduler.advance(sequence, len(sequence.ids) - 1)
        given = [part for part in details[: len(new)] if part is not None]
        if reason is None and answer.matcher is not None:
            room = sampling.max_new_tokens - made - len(new)
            forced = self._forced(answer, room) if sampling.logprobs is None else []
            new += forced
            if forced and (forced[-1] in sampling.stop_ids or len(forced) == room):
                reason = "stop" if forced[-1] in sampling.stop_ids else "length"
        if reason is not None:
            self._answers.end(answer, tuple(new), tuple(given), reason)
            return []
        self._answers.made += len(new)
        slot = self._answers.slots[sequence]
        dropped = self._answers.slide(answer) if len(sequence.ids) >= self._answers.longest else 0
        answer.ticket.steps.append(Step(tuple(new), tuple(given), None, answer.index, dropped=dropped))
        answer.ticket.tell()
        return [(slot, token) for token in new]

    def _guess(self, answers: list[Answer]) -> None:
        """Have the next tokens of answers guessed, by the first guesser that has something to say."""
        asked = {
            answer.sequence: Asked(
                answer.sequence,
                answer.sequence.ids,
                answer.made,
                self._room(answer),
                answer.ticket.request.sampling,
                answer.ticket.request.answer_number(answer.index),
            )
            for answer in answers
            if answer.sequence.state == "running"
            and answer.sequence.pending == 1
            and not answer.ticket.request.sampling.penalised  # whose draws depend on the tokens before
        }
        for guesser in self._answers.guessers if asked else ():
            for sequence, ids in zip(list(asked), guesser.guess(list(asked.values())), strict=True):
                if guesses := [token for token in ids if token < self._width]:
                    sequence.guesses = guesses
                    self._answers.live[sequence].guesser = guesser
                    del asked[sequence]

    def _room(self, answer: Answer) -> int:
        """Tokens that may be guessed: one more comes behind them, and without room then, the oldest go first."""
        wanted = answer.ticket.request.sampling.max_new_tokens - answer.made - 1
        return min(wanted, self._answers.longest - len(answer.sequence.ids) - 1)

    def _forced(self, answer: Answer, room: int) -> list[int]:
        """Ids that a constraint has follow, appended without being drawn."""
        assert answer.matcher is not None
        taken: list[int] = []
        for token in answer.matcher.forced()[:room]:
            if not answer.matcher.accept(token):
                break
            taken.append(token)
            if token in answer.ticket.request.sampling.stop_ids:
                break
        answer.sequence.ids += taken
        return taken

    def _allowed(self, drawn: list[tuple[Answer, int, int]], logits: Tensor) -> Tensor | None:
        """Which ids the constraints let follow, after each guess: (N, V); None if there are none."""
        if all(answer.matcher is None for answer, _, _ in drawn):
            return None
        allowed = torch.ones(logits.shape, dtype=torch.bool)
        row = 0
        for answer, _, count in drawn:
            if answer.matcher is not None:
                answer.matcher.allow(allowed[row])
                steps = 0
                for index, token in enumerate(answer.sequence.guesses):
                    if not answer.matcher.accept(token):
                        break  # what comes after it is not looked at
                    steps += 1
                    answer.matcher.allow(allowed[row + index + 1])
                answer.matcher.rollback(steps)
            row += count
        return allowed.to(logits.device)

    def _score(self, answer: Answer, part: Part, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens that follow those of a part, as far as they are known."""
        if not len(logits):
            return
        top = answer.ticket.request.prompt_logprobs or 0
        start = part.sequence.scored or 0
        first = max(part.start, start) + 1
        answer.scores = answer.scores or [None] * start
        ids = torch.tensor(part.sequence.ids[first : first + len(logits)], device=logits.device)
        found = token_logprobs(logits[: len(ids), : self._width], ids, top)
        chosen, tops, values = (x.tolist() for x in found)
        answer.scores[first - 1 :] = [
            TokenLogprobs(c, tuple(zip(t, v, strict=True))) for c, t, v in zip(chosen, tops, values, strict=True)
        ]


def _no_token(answer: Answer, position: int) -> UserError:
    if answer.matcher is not None:
        return UserError(f"nothing that the constraint allows can follow at token {position}")
    return NumericalError(
        f"the logits at token {position} are not finite: the weights or the adapter are damaged, or the precision is "
        f"too small for them; try {param('precision', '32-true')}"
    )
