"""Requests to the engine, and what comes back of it: ids only, and no torch, so that doors may import it."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal, get_args

from lit_llama.errors import UserError
from lit_llama.wording import param

GREEDY_BELOW = 1e-5
"""Temperatures below are 0: logits divided by less would overflow, and no other token had a chance anyway."""
MAX_SEED = (1 << 63) - 1
MAX_ANSWERS = 65_536
"""Of a prompt: each is a sequence of its own in the engine."""
MAX_STOPS, MAX_STOP_LENGTH = 1000, 1000

Overflow = Literal["error", "drop_oldest"]
"""Beyond what the model reads: refuse, or leave out what is oldest."""

FinishReason = Literal["stop", "length", "abort"]
"""A stop id or stop string came; max_new_tokens were made; somebody called it off."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings by which the tokens of an answer are drawn, and where it ends.

    Everything applies in the order of transformers: logit_bias, repetition_penalty, presence_penalty and
    frequency_penalty, banned_ids and min_new_tokens, temperature, top_k, top_p, min_p. A tie with the last token that
    top_k, top_p or min_p keeps is kept as well.

    A draw depends on the seed, the number of the answer and the position in it, and on nothing else.

    Args:
        temperature: Logits are divided by it; 0 (and what is as good as 0) takes the most likely token, the first of
            equals.
        top_k: Draw among this many most likely tokens; 0 for all.
        top_p: Draw among the fewest most likely tokens that together have this probability; 0 takes the most likely.
        min_p: Draw among tokens that have at least this share of the most likely token's probability.
        repetition_penalty: Logits of tokens that stand in prompt or answer are divided by it if positive, multiplied
            if negative; 1 changes nothing, more repeats less.
        presence_penalty: Taken from the logits of tokens that stand in the answer.
        frequency_penalty: Taken from the logits of tokens once for every time that they stand in the answer.
        logit_bias: Added to the logits of these ids.
        banned_ids: Never drawn.
        min_new_tokens: No stop id is drawn, and no stop string ends the answer, before so many tokens.
        max_new_tokens: Most tokens of an answer.
        stop_ids: An answer ends after any of these, which belongs to its ids.
        stop: An answer ends before any of these texts. The engine knows none: whoever decodes looks for them.
        seed: Of the draws.
        n: Answers to the prompt.
        logprobs: Give the log-probability of each token, and of so many most likely ones beside it; None for none. All
            are of the model's own distribution, before temperature, penalties and filters, as OpenAI and vLLM have it.

    Raises:
        UserError: A value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    banned_ids: Collection[int] = frozenset()
    min_new_tokens: int = 0
    max_new_tokens: int = 256
    stop_ids: Collection[int] = frozenset()
    stop: Sequence[str] = ()
    seed: int = 1234
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        self._real("temperature", "0 (the most likely token) or more", 0)
        self._whole("top_k", "0 (all) or more", 0)
        self._real("top_p", "0 (the most likely token) to 1 (all)", 0, 1)
        self._real("min_p", "0 (all) to 1 (the most likely token)", 0, 1)
        self._real("repetition_penalty", "0.001 to 1000, where 1 changes nothing", 0.001, 1000)
        self._real("presence_penalty", "-2 to 2, where 0 changes nothing", -2, 2)
        self._real("frequency_penalty", "-2 to 2, where 0 changes nothing", -2, 2)
        self._whole("max_new_tokens", "0 (only for a prompt that is scored) or more", 0)
        self._whole("min_new_tokens", f"0 to {param('max_new_tokens', self.max_new_tokens)}", 0, self.max_new_tokens)
        self._whole("seed", f"0 to {MAX_SEED}", 0, MAX_SEED)
        self._whole("n", f"1 to {MAX_ANSWERS}", 1, MAX_ANSWERS)
        if self.logprobs is not None:
            self._whole("logprobs", "0 (of the tokens alone) or more", 0)
        for name in ("banned_ids", "stop_ids"):
            ids = frozenset(getattr(self, name))
            if wrong := [token for token in ids if not _is_id(token)]:
                raise UserError(f"holds {wrong[0]!r}, expected token ids, which are 0 or more", parameter=name)
            object.__setattr__(self, name, ids)
        for token, bias in self.logit_bias.items():
            if not _is_id(token) or not _is_real(bias) or abs(bias) > 1000:
                raise UserError(
                    f"holds {token!r}: {bias!r}, expected a token id and -1000 to 1000", parameter="logit_bias"
                )
        self._check_stops()

    @property
    def greedy(self) -> bool:
        """Whether nothing is left to chance."""
        return self.temperature < GREEDY_BELOW or self.top_p == 0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        """Whether it matters which tokens came before."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def _real(self, name: str, expected: str, low: float, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not (_is_real(value) and low <= value <= high):
            raise UserError(parameter=name, value=value, expected=expected)

    def _whole(self, name: str, expected: str, low: int, high: float = math.inf) -> None:
        value = getattr(self, name)
        if not (_is_whole(value) and low <= value <= high):
            raise UserError(parameter=name, value=value, expected=expected)

    def _check_stops(self) -> None:
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > MAX_STOPS:
            raise UserError(f"holds {len(stops)} texts, expected at most {MAX_STOPS}", parameter="stop")
        for text in stops:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                raise UserError(
                    f"holds {str(text)[:40]!r}, expected texts of 1 to {MAX_STOP_LENGTH} characters", parameter="stop"
                )
        object.__setattr__(self, "stop", stops)


def _is_real(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not _is_bool(value) and math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not _is_bool(value)


def _is_bool(value: object) -> bool:  # which is a whole number to Python
    return isinstance(value, bool)


def _is_id(value: Any) -> bool:
    return _is_whole(value) and value >= 0


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Args:
        ids: Of the prompt.
        sampling: How it is continued.
        constraint: What the answer has to be, as generate/engine/constraint.py has it; None for anything.
        adapter: Name of the adapter that answers; None for the model as it is.
        priority: The smaller, the earlier; equals in the order in which they come.
        number: Tells the draws of requests apart that share a seed, such as the rows of a file.
        prompt_logprobs: Give the log-probability of each token of the prompt, and of so many most likely ones beside
            it; None for none.
        overflow: Where prompt and answer are longer than the model reads: refuse the request, or have the answer go on
            behind the later half of what there is, which is computed again.
        keep: First tokens of the prompt that stay whatever is left out.
        scored_from: With prompt_logprobs, give them from this token of the prompt on only; what comes before need not
            be computed where it is known.

    Raises:
        UserError: The prompt is empty or holds what is no id, or nothing of it is to be scored.
    """

    ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Any = None
    adapter: str | None = None
    priority: int = 0
    number: int = 0
    prompt_logprobs: int | None = None
    overflow: Overflow = "error"
    keep: int = 0
    scored_from: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "ids", tuple(self.ids))
        if not self.ids:
            raise UserError("the prompt is empty, expected at least one token")
        if wrong := [token for token in self.ids if not _is_id(token)]:
            raise UserError(f"the prompt holds {wrong[0]!r}, expected token ids, which are 0 or more")
        if self.overflow not in get_args(Overflow):
            raise UserError(parameter="overflow", value=self.overflow, expected=" or ".join(get_args(Overflow)))
        if not 0 <= self.scored_from < len(self.ids):
            raise UserError(f"the prompt is scored from token {self.scored_from} on, expected 0 to {len(self.ids) - 1}")
        if not 0 <= self.number <= 0xFFFF_FFFF:
            raise UserError(f"the number of the request is {self.number}, expected 0 to {0xFFFF_FFFF}")

    def answer_number(self, answer: int) -> int:
        """Return the number of one of its `n` answers, for the draws: the first is numbered as the request is."""
        return self.number | answer << 32


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution.

    Attributes:
        logprob: Of the token that stands there.
        top: The most likely ids with theirs, the likeliest first; whether the token is among them or not.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """Tokens of an answer that became known at once: most often one.

    Attributes:
        ids: New tokens.
        logprobs: Of each of them, where asked for.
        finish_reason: None while the answer goes on.
        answer: Which of the `n` answers, from 0.
        dropped: Tokens of prompt and answer that the model does not see any more from the next step on, beside those
            before.
        prompt_logprobs: With the last step of a scored prompt: of each of its tokens, None for the first and for those
            that are not scored.
    """

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    answer: int = 0
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    dropped: int = 0
