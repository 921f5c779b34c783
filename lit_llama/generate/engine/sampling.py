"""Choice of the next token of many sequences in one pass, each in its own way.

Shapes: N rows of logits, V vocabulary, S slots, P slots with penalties, D rows that draw, K likeliest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_llama.generate.engine.candidates import Draws, Rows, candidates, draw, narrows, on_device
from lit_llama.generate.engine.request import Sampling, TokenLogprobs
from lit_llama.model.kernels.choice import chooses, peaks, penalise

_BLOCK = 64  # random numbers made at a time


@dataclass(frozen=True)
class Choice:
    """Tokens chosen, one for each row.

    Attributes:
        ids: (N,); -1 where the logits are not finite, or where nothing may be drawn.
        logprobs: (N,) of the tokens chosen, NaN for rows that did not ask; None if no row did.
        top_ids, top_logprobs: (N, K), the likeliest first; of a row only the first ones that it asked for count.
        counts: How many of them each row asked for, None for none at all.
    """

    ids: Tensor
    counts: Sequence[int | None]
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None
    top_logprobs: Tensor | None = None

    def details(self) -> list[TokenLogprobs | None]:
        """Return the log-probabilities of each row, None where they were not asked for."""
        if self.logprobs is None or self.top_ids is None or self.top_logprobs is None:
            return [None] * len(self.counts)
        rows = zip(self.counts, self.logprobs.tolist(), self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        return [
            None if count is None else TokenLogprobs(chosen, tuple(zip(ids[:count], values[:count], strict=True)))
            for count, chosen, ids, values in rows
        ]


class Sampler:
    """Sampler of tokens for sequences that each occupy a slot.

    A row gets the same token whatever other rows are beside it: nothing is summed across rows, and random numbers are
    a function of (seed, number of the answer, position in the answer).

    Args:
        slots: Most sequences at a time (S).
        vocabulary: Logits of a row (V).
        tokens: Size of the tokenizer; ids from there on pad the embedding: they are never drawn, and have no share in
            log-probabilities.
        device: Where the logits are.
    """

    def __init__(
        self, slots: int, vocabulary: int, *, tokens: int | None = None, device: torch.device | str = "cpu"
    ) -> None:
        self._width = vocabulary if tokens is None else min(tokens, vocabulary)
        self._device = torch.device(device)
        self._slots: list[tuple[Sampling, int]] = [(Sampling(), 0)] * slots
        self._place: dict[int, int] = {}  # slot -> its row among the penalised
        self._free: list[int] = []
        self._counts = torch.zeros(0, self._width, dtype=torch.int32, device=device)  # (P, V), in the answer
        self._seen = torch.zeros(0, self._width, dtype=torch.bool, device=device)  # (P, V), in prompt or answer
        self._draws = Draws(self._width)
        self._plan: tuple[tuple[int, ...], _Plan] | None = None

    def set(
        self, slot: int, sampling: Sampling, *, number: int = 0, prompt: Sequence[int] = (), made: Sequence[int] = ()
    ) -> None:
        """Give a slot to a sequence.

        Args:
            slot: 0 to S - 1.
            sampling: How its tokens are drawn.
            number: Of the answer; see `Request.answer_number`.
            prompt: Ids that it continues.
            made: Ids of its answer so far, where it goes on after having been put off.
        """
        self.clear(slot)
        self._slots[slot] = (sampling, number)
        if sampling.penalised:
            if not self._free:
                self._grow()
            place = self._place[slot] = self._free.pop()
            self._counts[place] = 0
            self._seen[place] = False
            self._seen[place, self._ids(prompt)] = True
            self._count(torch.full((len(made),), place, device=self._device), self._ids(made))

    def clear(self, slot: int) -> None:
        """Take a slot back."""
        self._plan = None
        if slot in self._place:
            self._free.append(self._place.pop(slot))

    def accept(self, slots: Sequence[int], ids: Tensor | Sequence[int]) -> None:
        """Count each token that becomes part of an answer: ids[i] in slots[i], where a slot may come several times.

        An id of -1 is none, and its sequence is to be ended.
        """
        if not self._place:
            return
        rows = [row for row, slot in enumerate(slots) if slot in self._place]
        if rows:
            tokens = ids if isinstance(ids, Tensor) else on_device(ids, self._device)
            places = on_device([self._place[slots[row]] for row in rows], self._device)
            self._count(places, tokens.index_select(0, on_device(rows, self._device)))

    def sample(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], allowed: Tensor | None = None
    ) -> Choice:
        """Choose a token for each row.

        Rows of one slot at several positions, as for checking tokens guessed ahead, see its penalties as they are: give
        no such rows to a slot whose `Sampling.penalised`.

        Args:
            logits: (N, V) as the model made them; they are left as they are.
            slots: (N) whose they are.
            positions: (N) tokens that the answer has before this one.
            allowed: (N, V) which tokens a constraint lets through.
        """
        plan = self._planned(slots)
        raw = logits[:, : self._width]
        scores = self._scores(raw, plan, positions, allowed)
        ids = self._chosen(scores, plan, positions)
        if not plan.asked:
            return Choice(ids, plan.logprobs)
        return self._with_logprobs(raw, ids, plan)

    def distribution(
        self, logits: Tensor, slots: Sequence[int], positions: Sequence[int], allowed: Tensor | None = None
    ) -> Tensor:
        """Return the probabilities with which `sample` would choose: (N, V) -> (N, V) in float32."""
        plan = self._planned(slots)
        scores = self._scores(logits[:, : self._width], plan, positions, allowed)
        chances = torch.zeros_like(logits, dtype=torch.float32)
        chances.scatter_(1, scores.argmax(-1, keepdim=True), 1.0)
        for rows in plan.drawing:
            part, among = candidates(scores, rows)
            if among is not None:
                part = chances.new_zeros(len(part), self._width).scatter_add_(1, among.clamp(max=self._width - 1), part)
            chances[rows.index, : self._width] = part / part.sum(-1, keepdim=True)
        return chances

    def _chosen(self, scores: Tensor, plan: "_Plan", positions: Sequence[int]) -> Tensor:
        """A token of each row: (N, V) -> (N,)."""
        native = chooses(scores)
        if native:
            ids = torch.empty(len(scores), dtype=torch.int64)
            if plan.greedy:
                ids[plan.greedy_index] = peaks(scores, plan.greedy_index)
        else:
            best, ids = scores.max(-1)
        for rows in plan.drawing:
            numbers = self._numbers(plan.slots, rows.rows, positions)
            if native:
                chosen = self._draws(scores, rows, numbers)
            else:
                chances, among = candidates(scores, rows)
                chosen = draw(chances, numbers)
                chosen = chosen if among is None else among.gather(1, chosen[:, None])[:, 0]
            ids = ids.index_copy(0, rows.index, chosen)
        # A maximum is NaN if there is one, and -inf if nothing is left.
        return ids if native else torch.where(best.isfinite(), ids, -1)

    def _scores(self, raw: Tensor, plan: "_Plan", positions: Sequence[int], allowed: Tensor | None) -> Tensor:
        """Logits after everything that comes before the temperature: (N, V) -> (N, V).

        Those with nothing to change stay as they are, which saves reading them twice; others are in float32.
        """
        starting = [(row, token) for row, least, ids in plan.least if positions[row] < least for token in ids]
        if not (plan.biased or plan.penalised or plan.banned or starting or allowed is not None):
            return raw
        scores = raw.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if plan.biased:
            scores.index_put_(plan.bias_index, plan.biases, accumulate=True)
        if plan.penalised:
            self._penalise(scores, plan)
        if plan.banned:
            scores[plan.banned_index] = -torch.inf
        if starting:
            scores[_pairs(starting, self._device)] = -torch.inf
        if allowed is not None:
            scores.masked_fill_(~allowed[:, : self._width], -torch.inf)
        return scores

    def _penalise(self, scores: Tensor, plan: "_Plan") -> None:
        if chooses(scores):
            penalise(scores, plan.penalised_index, plan.places, self._counts, self._seen, plan.penalties)
            return
        counts, part = self._counts[plan.places], scores.index_select(0, plan.penalised_index)
        repetition, presence, frequency = plan.penalties
        repeated = torch.where(part > 0, part / repetition, part * repetition)
        part = torch.where(self._seen[plan.places], repeated, part) - frequency * counts - presence * (counts > 0)
        scores.index_copy_(0, plan.penalised_index, part)

    def _with_logprobs(self, raw: Tensor, ids: Tensor, plan: "_Plan") -> Choice:
        asked = plan.asked_index
        logprobs, top_ids, top_logprobs = token_logprobs(raw[asked], ids[asked].clamp(min=0), plan.most)

        def spread(part: Tensor, fill: float) -> Tensor:
            whole = part.new_full((len(ids), *part.shape[1:]), fill)
            return whole.index_copy(0, asked, part)

        return Choice(
            ids, plan.logprobs, spread(logprobs, torch.nan), spread(top_ids, 0), spread(top_logprobs, torch.nan)
        )

    def _numbers(self, slots: Sequence[int], rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Random numbers of rows that draw: (D,) in float64."""
        keys = ((*self._slots[slots[row]], positions[row]) for row in rows)
        numbers = [uniform(sampling.seed, number, position) for sampling, number, position in keys]
        return on_device(numbers, self._device, torch.float64)

    def _planned(self, slots: Sequence[int]) -> "_Plan":
        key = tuple(slots)
        if self._plan is None or self._plan[0] != key:
            samplings = [self._slots[slot][0] for slot in key]
            places = [self._place[slot] for slot in key if slot in self._place]
            self._plan = key, _Plan(key, samplings, places, self._width, self._device)
        return self._plan[1]

    def _grow(self) -> None:
        old = len(self._counts)
        new = min(max(2 * old, 4), len(self._slots))
        self._counts = torch.cat([self._counts, self._counts.new_zeros(new - old, self._width)])
        self._seen = torch.cat([self._seen, self._seen.new_zeros(new - old, self._width)])
        self._free += range(old, new)

    def _ids(self, ids: Sequence[int]) -> Tensor:
        known = [token for token in ids if token < self._width]
        return torch.tensor(known, dtype=torch.int64, device=self._device)

    def _count(self, places: Tensor, ids: Tensor) -> None:
        places = places[: len(ids)]
        self._counts.index_put_((places, ids), torch.ones_like(ids, dtype=torch.int32), accumulate=True)
        self._seen[places, ids] = True


class _Plan:
    """What a composition of slots needs at each step, laid out once: rows of each kind, and their settings."""

    def __init__(
        self,
        slots: tuple[int, ...],
        rows: Sequence[Sampling],
        places: Sequence[int],
        width: int,
        device: torch.device,
    ) -> None:
        def column(values: Sequence[float]) -> Tensor:
            return on_device(values, device, torch.float32)[:, None]

        def pairs(field: str) -> list[tuple[int, Any]]:
            return [(row, token) for row, own in enumerate(rows) for token in getattr(own, field) if token < width]

        self.slots = slots
        self.greedy = [row for row, own in enumerate(rows) if own.greedy]
        self.greedy_index = on_device(self.greedy, device)
        drawn = [row for row, own in enumerate(rows) if not own.greedy]
        kinds = ([row for row in drawn if narrows(rows[row]) == narrowed] for narrowed in (True, False))
        self.drawing = [Rows(kind, [rows[row] for row in kind], width, device) for kind in kinds if kind]
        self.penalised = [row for row, own in enumerate(rows) if own.penalised]
        self.penalised_index, self.places = on_device(self.penalised, device), on_device(places, device)
        names = ("repetition_penalty", "presence_penalty", "frequency_penalty")
        self.penalties = tuple(column([getattr(rows[row], name) for row in self.penalised]) for name in names)
        self.biased = pairs("logit_bias")
        if self.biased:
            self.bias_index = _pairs(self.biased, device)
            biases = [float(rows[row].logit_bias[token]) for row, token in self.biased]
            self.biases = on_device(biases, device, torch.float32)
        self.banned = pairs("banned_ids")
        self.banned_index = _pairs(self.banned, device) if self.banned else ()
        self.least = [
            (row, own.min_new_tokens, [token for token in own.stop_ids if token < width])
            for row, own in enumerate(rows)
            if own.min_new_tokens
        ]
        self.logprobs = [own.logprobs for own in rows]
        self.asked = [row for row, own in enumerate(rows) if own.logprobs is not None]
        self.asked_index = on_device(self.asked, device)
        self.most = min(max((own.logprobs or 0 for own in rows), default=0), width)


def _pairs(pairs: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of rows and of tokens."""
    rows, tokens = zip(*pairs, strict=True)
    return on_device(rows, device), on_device(tokens, device)


def token_logprobs(logits: Tensor, ids: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities of ids, and the likeliest ones: (N, V) and (N,) -> (N,), (N, top) ids and (N, top)."""
    logprobs = logits.float().log_softmax(-1)
    values, found = logprobs.topk(top)
    return logprobs.gather(1, ids[:, None])[:, 0], found, values


def uniform(seed: int, number: int, position: int) -> float:
    """Return the random number in [0, 1) for one position of one answer."""
    block, place = divmod(position, _BLOCK)
    return float(_uniforms(seed, number, block)[place])


@lru_cache(4096)
def _uniforms(seed: int, number: int, block: int) -> npt.NDArray[np.float64]:
    """Random numbers of 64 positions: Philox (Salmon et al. 2011) with the key (seed, number) at a counter of its own,
    which gives them without those before; its bits stay as they are across versions of numpy."""
    generator = np.random.Philox(key=[seed, number], counter=[0, block, 0, 0])
    bits: npt.NDArray[np.float64] = (generator.random_raw(_BLOCK) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53
