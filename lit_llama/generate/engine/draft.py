"""Guesses of a smaller model with the vocabulary of the one that answers (Leviathan et al. 2023, arXiv:2211.17192).

The draft draws with the random numbers of the answer itself, so that it guesses right wherever the two models lead to
the same token. As a guess counts only where it is the token that is drawn anyway, answers are the same bytes as without
it, greedy or seeded, and not only their distribution.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

from lit_llama.generate.engine.cache import BlockPool, OutOfBlocks
from lit_llama.generate.engine.runner import Runner
from lit_llama.generate.engine.sampling import Sampler
from lit_llama.generate.engine.speculative import Asked, check_takes_back
from lit_llama.memory import ran_out
from lit_llama.model.kernels.paged import BLOCK, PagedBatch


@dataclass(eq=False, slots=True)
class _Draft:
    """What the draft model has computed of an answer.

    Attributes:
        ids: In its blocks; the first `sure` of them are those of the answer.
        chain: What stands for each full block of the answer, see BlockPool.
        length: Ids that it guesses next time.
        resume: Length of the answer before which it guesses nothing.
    """

    length: int
    ids: list[int] = field(default_factory=list)
    sure: int = 0
    blocks: list[int] = field(default_factory=list)
    chain: list[Hashable] = field(default_factory=list)
    resume: int = 0
    trials: int = 0
    guessed: int = 0
    right: int = 0


@dataclass(eq=False, slots=True)
class _Going:
    """A draft in a call of `guess`: its next ids, and where its guesses go."""

    place: int
    asked: Asked
    draft: _Draft
    next: list[int]
    complete: bool


class DraftModel:
    """A model that guesses, see Guesser, with a cache of its own.

    Args:
        runner: The model.
        tokens: Size of the tokenizer.
        max_sequences: Answers that are guessed together, at most.
        cost: Time of one of its tokens, as a share of a step of the model that answers.
        adapter: Of the runner, that guesses.
        most: Ids guessed at a time, at most.
    """

    CATCH_UP = 256
    """Tokens of prompts that it computes at a time, lest they hold up the answers."""
    FREE = 32
    """Tokens whose computation takes as long as reading the weights, so that wider steps cost time."""
    TRIALS = 8
    """Guesses after which it is looked at whether they pay."""
    PAUSE = 64
    """Tokens without guesses where they do not."""

    def __init__(
        self,
        runner: Runner,
        *,
        tokens: int,
        max_sequences: int,
        cost: float,
        adapter: str | None = None,
        most: int = 8,
    ) -> None:
        check_takes_back(runner.config, "the draft")
        self._runner, self._cost, self._adapter, self._most = runner, cost, adapter, most
        self._pool = BlockPool(runner.blocks, BLOCK)
        self._sampler = Sampler(max_sequences, runner.config.vocab_size, tokens=tokens, device=runner.device)
        self._drafts: dict[Hashable, _Draft] = {}
        self._needed = cost

    # ---- as a Guesser

    def guess(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Continue answers by a few tokens, together; by none where it did not pay, or a prompt is not read yet."""
        guesses: list[list[int]] = [[] for _ in asked]
        # A token more of each answer costs its own computation in a wider step, and the step of the draft.
        self._needed = len(asked) / (self.FREE + len(asked)) + self._cost
        if self._needed >= 1:
            return guesses
        try:
            self._run(self._begin(asked), guesses)
        except (MemoryError, RuntimeError) as error:  # it is of use only where there is room for it
            if not ran_out(error):
                raise
            for key in list(self._drafts):
                self.forget(key)
            return [[] for _ in asked]
        return guesses

    def learn(self, key: Hashable, guessed: int, right: int, length: int) -> None:
        """Guess more where all was right, less where it was not, and nothing for a while where it does not pay."""
        draft = self._drafts.get(key)
        if draft is None or not guessed:
            return
        draft.length = min(draft.length + 2, self._most) if right == guessed else max(draft.length - 1, 1)
        draft.trials, draft.guessed, draft.right = draft.trials + 1, draft.guessed + guessed, draft.right + right
        if draft.trials >= self.TRIALS:
            if draft.right < self._needed * draft.guessed:
                draft.resume = length + self.PAUSE
            draft.trials = draft.guessed = draft.right = 0

    def forget(self, key: Hashable) -> None:
        """Give back the blocks of an answer."""
        draft = self._drafts.pop(key, None)
        if draft is not None:
            self._publish(draft)
            self._pool.release(draft.blocks)

    def trim(self) -> int:
        """Give back the memory of its cache that no answer needs."""
        return self._runner.reclaim(self._pool.trim())

    # ---- the model

    def _begin(self, asked: Sequence[Asked]) -> list[_Going]:
        """The answers that are continued, or whose prompts are read, with what is to be computed first."""
        going, budget = [], self.CATCH_UP
        for place, one in enumerate(asked):
            draft = self._drafts.get(one.key)
            if draft is None:
                draft = self._drafts[one.key] = self._known(one.ids)
            self._sync(draft, one.ids)
            room = min(one.room, self._runner.config.context_length - len(one.ids))
            if len(one.ids) < draft.resume or room < 1 or budget < 1:
                continue
            count = min(len(one.ids) - len(draft.ids), budget)
            budget -= count
            first = list(one.ids[len(draft.ids) : len(draft.ids) + count])
            going.append(_Going(place, one, draft, first, len(draft.ids) + count == len(one.ids)))
            sampling = one.sampling if one.sampling.logprobs is None else replace(one.sampling, logprobs=None)
            self._sampler.set(len(going) - 1, sampling, number=one.number)
        return going

    def _run(self, going: list[_Going], guesses: list[list[int]]) -> None:
        slots = {id(one): slot for slot, one in enumerate(going)}
        busy = [one.asked.key for one in going]
        while going := [one for one in going if self._hold(one, busy)]:
            logits = self._runner.logits(
                PagedBatch(
                    ids=[one.next for one in going],
                    starts=[len(one.draft.ids) for one in going],
                    tables=[one.draft.blocks for one in going],
                    logits=[int(one.complete) for one in going],
                    adapters=[self._adapter] * len(going),
                )
            )
            for one in going:
                one.draft.ids += one.next
                if not guesses[one.place]:  # these are of the answer itself
                    one.draft.sure = len(one.draft.ids)
            going = [one for one in going if one.complete]
            if not going:
                return
            positions = [one.asked.made + len(guesses[one.place]) for one in going]
            drawn = self._sampler.sample(logits, [slots[id(one)] for one in going], positions).ids.tolist()
            for one, token in zip(going, drawn, strict=True):
                if token < 0:
                    self._damaged(one.asked.key)
                else:
                    guesses[one.place].append(token)
                    one.next = [token]
            going = [one for one, token in zip(going, drawn, strict=True) if token >= 0 and self._goes_on(one, guesses)]

    def _goes_on(self, one: _Going, guesses: list[list[int]]) -> bool:
        made, room = guesses[one.place], min(one.asked.room, self._runner.config.context_length - len(one.asked.ids))
        return len(made) < min(one.draft.length, room) and made[-1] not in one.asked.sampling.stop_ids

    # ---- its cache

    def _known(self, ids: Sequence[int]) -> _Draft:
        """A draft that begins with what is known of an answer, but for its last id."""
        draft = _Draft(min(4, self._most))
        parent: Hashable = "draft"
        while (end := len(draft.ids) + BLOCK) < len(ids):
            block = tuple(ids[end - BLOCK : end])
            found = self._pool.find(parent, block)
            if found is None:
                break
            self._pool.share(found[0])
            draft.blocks.append(found[0])
            draft.ids += block
            parent = found[1]
            draft.chain.append(parent)
        draft.sure = len(draft.ids)
        return draft

    def _sync(self, draft: _Draft, ids: Sequence[int]) -> None:
        """Keep of what was computed what is of the answer; its full blocks become known."""
        most = min(len(draft.ids), len(ids) - 1)
        while draft.sure < most and draft.ids[draft.sure] == ids[draft.sure]:
            draft.sure += 1
        draft.sure = min(draft.sure, most)
        del draft.ids[draft.sure :]
        self._publish(draft)

    def _publish(self, draft: _Draft) -> None:
        while (end := (len(draft.chain) + 1) * BLOCK) <= draft.sure:
            parent = draft.chain[-1] if draft.chain else "draft"
            block = tuple(draft.ids[end - BLOCK : end])
            draft.chain.append(self._pool.publish(draft.blocks[len(draft.chain)], parent, block))

    def _hold(self, one: _Going, busy: Sequence[Hashable]) -> bool:
        """Get blocks for the next ids of a draft, from answers that are not guessed now if need be."""
        draft = one.draft
        missing = -(-(len(draft.ids) + len(one.next)) // BLOCK) - len(draft.blocks)
        for _ in range(missing):
            try:
                draft.blocks.append(self._pool.allocate())
            except OutOfBlocks:
                idle = [key for key in self._drafts if key not in busy]
                for key in idle:
                    self.forget(key)
                if not self._pool.available:
                    return False
                draft.blocks.append(self._pool.allocate())
        return True

    def _damaged(self, key: Hashable) -> None:
        """Forget a draft whose numbers are not finite, with its blocks."""
        blocks = self._drafts.pop(key).blocks
        self._pool.forget(blocks)
        self._pool.release(blocks)
        for block in blocks:
            if not self._pool.is_held(block):
                self._runner.clear(block)

    def check(self) -> None:
        """Assert that no block is lost or held twice."""
        held: dict[int, int] = {}
        for draft in self._drafts.values():
            assert len(draft.blocks) >= -(-len(draft.ids) // BLOCK)
            for block in draft.blocks:
                held[block] = held.get(block, 0) + 1
        self._pool.check(held)
