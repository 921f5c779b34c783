"""transformers: `generate` as it comes, in bfloat16."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.generation.worker import Result, serve


def main(folder: Path) -> None:
    """Load and serve."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    def run(prompts: list[list[int]], tokens: int) -> tuple[float, list[list[int]]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        start = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0
            )
        return time.perf_counter() - start, made[:, longest:].tolist()

    def answer(ids: list[int], tokens: int, guess: bool = False) -> Result:
        first, _ = run([ids], 1)
        seconds, made = run([ids], tokens)
        return {"seconds": seconds - first, "tokens": tokens - 1, "ids": made[0]}

    def batch(prompts: list[list[int]], tokens: int) -> Result:
        seconds, made = run(prompts, tokens)
        return {"seconds": seconds, "tokens": tokens * len(prompts), "ids": made}

    def prefill(ids: list[int]) -> Result:
        return {"seconds": run([ids], 1)[0], "tokens": len(ids)}

    serve({"answer": answer, "batch": batch, "prefill": prefill})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
