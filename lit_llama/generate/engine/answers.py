"""The answers that are being made: who waits or runs, with which slot of the sampler, and how each of them ends."""

from dataclasses import replace

from lit_llama.errors import UserError
from lit_llama.generate.engine.request import FinishReason, Step, TokenLogprobs
from lit_llama.generate.engine.runner import Runner
from lit_llama.generate.engine.sampling import Sampler
from lit_llama.generate.engine.scheduler import Scheduler, Sequence
from lit_llama.generate.engine.speculative import Guesser
from lit_llama.generate.engine.ticket import Answer, Ticket
from lit_llama.model.paged import BLOCK


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
