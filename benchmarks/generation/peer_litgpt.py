"""litgpt's model with its cache and its `next_token`, one sequence at a time; in its own environment."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from litgpt.config import Config
from litgpt.generate.base import next_token
from litgpt.model import GPT
from litgpt.utils import load_checkpoint

from benchmarks.generation.worker import Result, serve
from benchmarks.training.peer_litgpt import convert


def main(folder: Path, work_dir: Path, longest: int = 2048) -> None:
    """Load and serve."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    converted = convert(folder, work_dir)
    fabric = L.Fabric(devices=1, accelerator="cpu", precision="bf16-true")
    with fabric.init_module(empty_init=True):
        model: Any = GPT(Config.from_file(converted / "model_config.yaml"))
    load_checkpoint(fabric, model, converted / "lit_model.pth")
    model.eval()
    model.max_seq_length = longest
    model.set_kv_cache(batch_size=1)

    @torch.inference_mode()
    def run(ids: list[int], tokens: int) -> tuple[float, float, list[int]]:
        """Seconds of the prompt and of the other tokens, and all of them."""
        start = time.perf_counter()
        token = next_token(model, torch.arange(len(ids)), torch.tensor([ids]), temperature=0.0)
        made, first = [int(token)], time.perf_counter()
        while len(made) < tokens:
            position = torch.tensor([len(ids) + len(made) - 1])
            token = next_token(model, position, token.view(1, 1), temperature=0.0)
            made.append(int(token))
        return first - start, time.perf_counter() - first, made

    def answer(ids: list[int], tokens: int, guess: bool = False) -> Result:
        _, seconds, made = run(ids, tokens)
        return {"seconds": seconds, "tokens": tokens - 1, "ids": made}

    def prefill(ids: list[int]) -> Result:
        return {"seconds": run(ids, 1)[0], "tokens": len(ids)}

    serve({"answer": answer, "prefill": prefill})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
