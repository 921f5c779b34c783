"""Generation against transformers, and batches against one sequence at a time."""

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from paged_steps import Steps, made_by

from lit_llama.generate.engine.request import Sampling
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.llama import LLaMA

REAL_PROMPTS = [
    "What food do llamas eat?",
    "Extract the order as JSON: item, quantity.\n\nTwo blue lamps for Zoë O'Brien, please.",
    "Write a haiku about 北京.",
]


def run(
    model: LLaMA,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 40,
    stop_ids: Collection[int] = (),
    sampling: Sampling | None = None,
    **more: Any,
) -> list[list[int]]:
    sampling = replace(sampling or Sampling(), max_new_tokens=max_new_tokens, stop_ids=stop_ids)
    return made_by(model, prompts, sampling, **more)


def random_prompts(count: int, seed: int = 0, longest: int = 30) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(384) for _ in range(numbers.randint(1, longest))] for _ in range(count)]


def reference(model: Any, prompt: list[int], max_new_tokens: int, stop_ids: list[int] | None) -> list[int]:
    """New ids of transformers' greedy search, the stop token included."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_ids,
        pad_token_id=0,
    )
    return [int(i) for i in out[0, len(prompt) :]]


@pytest.mark.real
def test_greedy_answers_of_the_real_model_are_those_of_transformers(real_folder: Path) -> None:
    """Positions, masks or rotary angles that are off only in the cache, where the loss never sees them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_folder)
    theirs = AutoModelForCausalLM.from_pretrained(real_folder, dtype=torch.float32).eval()
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)["input_ids"]
        for text in REAL_PROMPTS
    ]
    made = run(load_model(real_folder, dtype=torch.float32), prompts, 32, {2})
    assert made[0][:12] == reference(theirs, prompts[0], 12, [2])
    for prompt, answer in zip(prompts, made, strict=True):  # the same claim, by induction over the steps, but quick
        with torch.inference_mode():
            logits = theirs(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert logits.argmax(-1).tolist() == answer
        assert len(answer) == 32 or (answer[-1] == 2 and 2 not in answer[:-1])


@pytest.mark.parametrize("seed", range(3))
def test_greedy_ids_of_a_tiny_model_are_those_of_transformers(tiny_folder: Path, seed: int) -> None:
    """An error of the cache on random weights, where the most likely tokens have no rhythm to hide it."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    prompts = random_prompts(3, seed)
    wanted = [reference(theirs, prompt, 64, None) for prompt in prompts]
    assert run(load_model(tiny_folder, dtype=torch.float32), prompts, 64) == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_of_unequal_prompts_equals_one_at_a_time(temperature: float) -> None:
    """Padding that is attended to, or positions counted from the longest prompt."""
    model, prompts = tiny_model(), random_prompts(7)
    sampling = Sampling(temperature=temperature, seed=9)
    alone = [run(model, [ids], sampling=sampling, first=row)[0] for row, ids in enumerate(prompts)]
    assert run(model, prompts, sampling=sampling) == alone
    assert len({tuple(ids) for ids in alone}) == 7


def test_sequences_that_stop_early_leave_the_others_as_they_are() -> None:
    """A cache row that goes to another sequence when one is done."""
    model, prompts = tiny_model(), random_prompts(8, seed=2)
    free = run(model, prompts, 40)
    stop_ids = {free[0][3], free[3][11], free[5][0]}
    made = run(model, prompts, 40, stop_ids)
    assert made == [run(model, [prompt], 40, stop_ids)[0] for prompt in prompts]
    assert len({len(ids) for ids in made}) >= 3, "the sequences were to end at different steps"


def test_every_stop_id_ends_a_sequence_and_is_given_out() -> None:
    """Only the first of several stop ids, a stop token swallowed, or one step too many."""
    model, prompt = tiny_model(), [7, 8, 9]
    free = run(model, [prompt], 30)[0]
    for place in (0, 4, 17):
        first = free.index(free[place])
        others = {384 + place, 999}
        assert run(model, [prompt], 30, others | {free[place]})[0] == free[: first + 1]


def test_a_stop_id_in_the_prompt_stops_nothing() -> None:
    """A prompt whose turns end in the stop token, which is every chat."""
    model = tiny_model()
    prompt = [7, 2, 9]
    assert len(run(model, [prompt], 1, {2})[0]) == 1
    free = run(model, [prompt], 10)[0]
    assert run(model, [prompt], 10, {2})[0] == free[: free.index(2) + 1 if 2 in free else None]


@pytest.mark.parametrize("count", [1, 2, 33])
def test_max_new_tokens_is_the_number_of_tokens(count: int) -> None:
    """One token too many or too few."""
    assert [len(ids) for ids in run(tiny_model(), random_prompts(3), count)] == [count] * 3


def test_more_tokens_begin_like_fewer() -> None:
    """A cache whose size changes the result."""
    model, prompts = tiny_model(), random_prompts(2)
    assert [ids[:5] for ids in run(model, prompts, 50)] == run(model, prompts, 5)


def test_a_prompt_may_come_in_parts() -> None:
    """A cache that is continued at the wrong position."""
    model, prompt = tiny_model(), random_prompts(1, seed=4)[0] + [5, 6, 7]
    wanted = run(model, [prompt], 20)
    assert run(model, [prompt], 20, max_batch_tokens=17) == wanted


def test_logits_of_a_cache_are_those_of_the_whole_sequence() -> None:
    """A difference too small to change the most likely token."""
    model, ids = tiny_model(), torch.tensor(random_prompts(1, seed=5, longest=40)[0])
    cache = Steps(model.config, 1, len(ids))
    with torch.inference_mode():
        steps = [model(ids[i : i + 1], cache.extend([1])) for i in range(len(ids))]
        torch.testing.assert_close(torch.cat(steps), model(ids), rtol=1e-4, atol=1e-4)
