"""Prompts -> tokens, with a cache of keys and values.

Shapes: B sequences, T tokens of all of them, V vocabulary.
"""

import math
from collections.abc import Collection, Iterator, Sequence

import torch

from lit_llama.errors import UserError
from lit_llama.generate.sampling import Sampling, choose, generators
from lit_llama.model.attention import KVCache
from lit_llama.model.llama import LLaMA


@torch.inference_mode()
def generate(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    tokens: int | None = None,
    cache: KVCache | None = None,
    numbers: Sequence[int] | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue prompts of any lengths, all at once.

    Args:
        model: In evaluation mode.
        prompts: Ids of each sequence; with a cache, only those that are not in it yet.
        max_new_tokens: Most tokens to make for a sequence.
        stop_ids: A sequence ends after any of these, which is given out as well.
        sampling: How tokens are drawn.
        tokens: Size of the tokenizer; ids from there on are padding of the embedding and never drawn.
        cache: Continue in this one, made by `new_cache`.
        numbers: Which stream of random numbers each sequence has, so that its draws do not depend on the others; 0, 1,
            2 and so on if left out.

    Yields:
        After each step, (index of the sequence, id) for every sequence that is still going.

    Raises:
        UserError: A prompt is empty, or too long for the model.
    """
    if any(not prompt for prompt in prompts):
        raise UserError("the prompt is empty, expected at least one token")
    check_counts(max_new_tokens=max_new_tokens)
    longest = max(len(prompt) for prompt in prompts)
    if cache is None:
        check_room(model, longest, max_new_tokens)
        cache = new_cache(model, len(prompts), longest + max_new_tokens)
    device = cache.keys.device
    streams = generators(range(len(prompts)) if numbers is None else numbers, sampling)
    alive = list(range(len(prompts)))
    pending = [list(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        counts = [len(ids) for ids in pending]
        input_ids = torch.tensor([i for ids in pending for i in ids], device=device)
        last = torch.tensor(counts, device=device).cumsum(0) - 1
        logits = model(input_ids, cache.extend(counts), select=last)  # (B, V)
        if tokens is not None and tokens < logits.shape[-1]:
            logits[:, tokens:] = -math.inf
        chosen = choose(logits, sampling, [streams[row] for row in alive])
        yield list(zip(alive, chosen, strict=True))
        going = [row for row, token in enumerate(chosen) if token not in stop_ids]
        if not going:
            return
        pending = [[chosen[row]] for row in going]
        if len(going) < len(alive):
            alive = [alive[row] for row in going]
            cache.keep(going)


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
