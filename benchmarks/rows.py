"""Rows of a recipe a minute, against the same prompts one after another through transformers.

python benchmarks/rows.py --checkpoint_dir checkpoints/NAME --recipe self-instruct --seeds seeds.jsonl --attempts 32

transformers answers a part of the prompts that ours got, each with as many tokens.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from lit_llama.cli import CLI
from lit_llama.generate.rows.make import local_teacher, read_recipe
from lit_llama.generate.rows.run import Limits, RowMaker
from lit_llama.generate.rows.teacher import Ask, Key, LocalTeacher, Reply


class Recorded:
    """A local teacher, and a list of what it was asked and how long its answers were."""

    def __init__(self, teacher: LocalTeacher) -> None:
        self._teacher, self._asks = teacher, dict[Key, Ask]()
        self.name, self.identity, self.seeded = teacher.name, teacher.identity, True
        self.work: list[tuple[Ask, int]] = []

    def check(self, ask: Ask) -> None:
        """See Teacher."""
        self._teacher.check(ask)

    def add(self, key: Key, ask: Ask) -> None:
        """See Teacher."""
        self._asks[key] = ask
        self._teacher.add(key, ask)

    def wait(self) -> list[tuple[Key, Reply]]:
        """See Teacher."""
        found = self._teacher.wait()
        self.work += [(self._asks[key], max(1, reply.tokens)) for key, reply in found]
        return found

    def close(self) -> None:
        """See Teacher."""
        self._teacher.close()


def one_after_another(folder: Path, work: list[tuple[Ask, int]]) -> float:
    """Seconds of transformers for the same prompts, each with as many tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    start = time.perf_counter()
    for ask, tokens in work:
        prompt = tokenizer.apply_chat_template(
            list(ask.messages), add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        sampling = ask.sampling
        chance = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            model.generate(
                **prompt,
                **(chance if sampling.temperature else {"do_sample": False}),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )
    return time.perf_counter() - start


def main(
    *,
    checkpoint_dir: Path,
    recipe: str = "self-instruct",
    seeds: Path | None = None,
    documents: list[str] | None = None,
    attempts: int = 32,
    compared: int = 16,
) -> None:
    """Print a line of JSON with rows a minute of both.

    Args:
        checkpoint_dir: The teacher, a Hugging Face folder.
        recipe: As for generate/rows.py.
        seeds: As there.
        documents: As there.
        attempts: That ours makes.
        compared: Prompts of those, evenly spread, that transformers answers; its time for all goes by tokens.
    """
    read = read_recipe(recipe, seeds=seeds, documents=documents)
    teacher = local_teacher(checkpoint_dir)
    assert isinstance(teacher, LocalTeacher)
    recorded = Recorded(teacher)
    maker = RowMaker(read, recorded, seed=1)
    start = time.perf_counter()
    maker.run(None, Limits(rows=attempts, attempts=attempts))
    ours = time.perf_counter() - start
    step = max(1, len(recorded.work) // compared)
    some = recorded.work[::step]
    tokens, some_tokens = (sum(count for _, count in work) for work in (recorded.work, some))
    theirs = one_after_another(checkpoint_dir, some) * tokens / some_tokens
    rows = maker.tally.accepted
    result = {
        "rows": rows,
        "prompts": len(recorded.work),
        "tokens": tokens,
        "rows_per_minute": 60 * rows / ours,
        "rows_per_minute_transformers": 60 * rows / theirs,
        "tokens_per_second": tokens / ours,
        "tokens_per_second_transformers": tokens / theirs,
        "times": theirs / ours,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    CLI(main)
