"""llama.cpp through the wheel xllamacpp, built for AVX2: its server in this process; its own timings."""

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import xllamacpp

from benchmarks.generation.worker import Result, serve


def main(file: Path, slots: int = 32) -> None:
    """Load and serve."""
    options = xllamacpp.CommonParams()
    options.model.path = str(file)
    options.n_parallel, options.n_ctx = slots, slots * 2048
    threads = len(os.sched_getaffinity(0))
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(options)

    def ask(ids: list[int], tokens: int) -> dict[str, Any]:
        made = server.handle_completions(
            {
                "prompt": ids,
                "n_predict": tokens,
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        return made if isinstance(made, dict) else dict(json.loads(made))

    def answer(ids: list[int], tokens: int, guess: bool = False) -> Result:
        made = ask(ids, tokens)
        timings = made["timings"]
        return {
            "seconds": timings["predicted_ms"] / 1000,
            "tokens": timings["predicted_n"],
            "text": made["choices"][0]["text"],
        }

    def batch(prompts: list[list[int]], tokens: int) -> Result:
        start = perf_counter()
        with ThreadPoolExecutor(len(prompts)) as pool:
            made = list(pool.map(lambda ids: ask(ids, tokens), prompts))
        return {"seconds": perf_counter() - start, "tokens": sum(m["timings"]["predicted_n"] for m in made)}

    def prefill(ids: list[int]) -> Result:
        timings = ask(ids, 1)["timings"]
        return {"seconds": timings["prompt_ms"] / 1000, "tokens": timings["prompt_n"]}

    def built() -> Result:
        return {"system": xllamacpp.get_system_info().strip()}

    serve({"answer": answer, "batch": batch, "prefill": prefill, "built": built})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
