"""Time and memory of the filters that compare a made row with all before it, as their pool grows.

python benchmarks/row_filters.py --rows 100000

The rows are synthetic: words of natural frequency (Zipf's law), a third of the rows of a few templates with other words
in them, as made rows are, and some near copies. A line of JSON for each tenth of the pool.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Iterator
from itertools import accumulate

from lit_llama.cli import CLI
from lit_llama.generate.rows.attempt import Attempt
from lit_llama.generate.rows.filters import RowFilters
from lit_llama.generate.rows.recipe import Filters, Recipe

WORDS, TEMPLATES, COPIES = 20_000, 200, 0.03


def synthetic(rows: int, seed: int) -> Iterator[Attempt]:
    """Attempts with a prompt of 6 to 40 words and an answer of 10 to 80."""
    draw = random.Random(seed)
    words = [f"{draw.choice('bcdfgklmnprstvw')}{draw.choice('aeiou')}{number:x}" for number in range(WORDS)]
    weights = list(accumulate(1 / (rank + 10) for rank in range(WORDS)))

    def some(least: int, most: int) -> list[str]:
        return draw.choices(words, cum_weights=weights, k=draw.randint(least, most))

    def others(text: list[str], share: float) -> list[str]:
        return [draw.choice(words) if draw.random() < share else word for word in text]

    templates = [some(8, 20) for _ in range(TEMPLATES)]
    prompt, answer = some(6, 40), some(10, 80)
    for number in range(rows):
        if number % 3 == 0:
            prompt, answer = others(draw.choice(templates), 0.5), some(10, 80)
        elif draw.random() < COPIES:
            prompt, answer = others(prompt, 0.1), others(answer, 0.02)
        else:
            prompt, answer = some(6, 40), some(10, 80)
        row = {"instruction": " ".join(prompt), "input": "", "output": " ".join(answer)}
        yield Attempt(number=number, row=row)


def peak() -> float:
    """Most memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def main(*, rows: int = 100_000, seed: int = 1) -> None:
    """Print how long a row takes, and the memory of the pool.

    Args:
        rows: Rows that are judged; those that are no copies stay in the pool.
        seed: Of the rows.
    """
    recipe = Recipe(
        name="synthetic",
        place="synthetic",
        rows=rows,
        give_up_after=rows,
        parameters={},
        sources=(),
        columns=(),
        kind="alpaca",
        output={},
        filters=Filters(),
        digest="",
    )
    filters, accepted, step = RowFilters(recipe, []), 0, max(1, rows // 10)
    before, spent, rejected = peak(), 0.0, dict[str, int]()
    for attempt in synthetic(rows, seed):
        start = time.perf_counter()
        attempt.rejected = filters.judge(attempt)
        if attempt.rejected is None:
            filters.accept(attempt)
        spent += time.perf_counter() - start
        if attempt.rejected is None:
            accepted += 1
        else:
            rejected[attempt.rejected[0]] = rejected.get(attempt.rejected[0], 0) + 1
        if (attempt.number + 1) % step == 0:
            told = {"rows": attempt.number + 1, "pool": accepted, "rejected": rejected}
            told |= {"ms_per_row": round(1000 * spent / step, 3), "memory_mb": round(peak() - before)}
            print(json.dumps(told), flush=True)
            spent = 0.0


if __name__ == "__main__":
    CLI(main)
