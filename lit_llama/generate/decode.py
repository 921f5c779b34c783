"""Prompts -> tokens, with a cache of keys and values.

Shapes: B sequences, T tokens of all of them, V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace

import torch

from lit_llama.errors import NumericalError, UserError
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.engine.sampling import Sampler
from lit_llama.model.attention import KVCache
from lit_llama.model.llama import LLaMA


@torch.inference_mode()
def generate(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling | Sequence[Sampling],
    tokens: int | None = None,
    cache: KVCache | None = None,
    cached: Sequence[int] = (),
    numbers: Sequence[int] | None = None,
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue prompts of any lengths, all at once.

    Args:
        model: In evaluation mode.
        prompts: Ids of each sequence; with a cache, only those that are not in it yet.
        max_new_tokens: Most tokens to make for a sequence.
        stop_ids: A sequence ends after any of these, which is given out as well.
        sampling: How tokens are drawn, in all sequences or in each of them; its own limit and stop ids do not count.
        tokens: Size of the tokenizer; ids from there on are padding of the embedding and never drawn.
        cache: Continue in this one, made by `new_cache`.
        cached: Ids of the prompt that are in it, for penalties.
        numbers: Number of each answer, which tells its draws from those of others; 0, 1, 2 and so on if left out.
        ended: Asked after each token, by (index of the sequence, id), whether the sequence ends with it.

    Yields:
        After each step, (index of the sequence, id) for every sequence that is still going.

    Raises:
        UserError: A prompt is empty, or too long for the model.
        NumericalError: The logits of a sequence are not finite.
    """
    if any(not prompt for prompt in prompts):
        raise UserError("the prompt is empty, expected at least one token")
    check_counts(max_new_tokens=max_new_tokens)
    longest = max(len(prompt) for prompt in prompts)
    if cache is None:
        check_room(model, longest, max_new_tokens)
        cache = new_cache(model, len(prompts), longest + max_new_tokens)
    device = cache.keys.device
    sampler = Sampler(len(prompts), model.config.vocab_size, tokens=tokens, device=device)
    own = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    for row, prompt in enumerate(prompts):
        number = row if numbers is None else numbers[row]
        sampler.set(row, replace(own[row], stop_ids=stop_ids), number=number, prompt=[*cached, *prompt])
    alive = list(range(len(prompts)))
    pending = [list(prompt) for prompt in prompts]
    for position in range(max_new_tokens):
        counts = [len(ids) for ids in pending]
        input_ids = torch.tensor([i for ids in pending for i in ids], device=device)
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        logits = model(input_ids, cache.extend(counts), select=last)  # (B, V)
        choice = sampler.sample(logits, alive, [position] * len(alive)).ids
        sampler.accept(alive, choice)
        chosen: list[int] = choice.tolist()
        if min(chosen) < 0:
            raise NumericalError(f"{_NOT_FINITE}, for sequence {alive[chosen.index(-1)]} at token {position}")
        step = list(zip(alive, chosen, strict=True))
        yield step
        going = [
            index
            for index, (row, token) in enumerate(step)
            if token not in stop_ids and not (ended and ended(row, token))
        ]
        if not going:
            return
        pending = [[chosen[index]] for index in going]
        if len(going) < len(alive):
            alive = [alive[index] for index in going]
            cache.keep(going)


_NOT_FINITE = (
    "the model's logits are not finite, or every token is banned: the weights may be damaged, or need "
    "--precision 32-true"
)


def new_cache(model: LLaMA, batch: int, capacity: int) -> KVCache:
    """An empty cache for `batch` sequences of at most `capacity` tokens."""
    weight = model.model.embed_tokens.weight
    return KVCache(model.config, batch, capacity, weight.device, weight.dtype)


def check_counts(**flags: int | None) -> None:
    """Raise UserError if a flag that counts something is given and below 1."""
    for name, value in flags.items():
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}, expected 1 or more")


def check_room(model: LLaMA, prompt: int, max_new_tokens: int) -> None:
    """Raise UserError if prompt and answer are longer than the model was trained on."""
    limit = model.config.context_length
    if prompt + max_new_tokens > limit:
        raise UserError(
            f"the prompt has {prompt} tokens; with --max_new_tokens {max_new_tokens} that is more than the {limit} the "
            "model reads: shorten the prompt or the answer"
        )
