"""llama.cpp through llama-cpp-python's C interface, built for this processor; in its own environment."""

import ctypes
import os
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.generation.worker import Result, serve

STEP = 512  # tokens of a prompt that are computed together, llama.cpp's default


class Peer:
    """The tasks, over one context whose cache is cleared before each.

    Args:
        file: A GGUF file.
        slots: Sequences, at most.
        context: Tokens of all of them.
    """

    def __init__(self, file: Path, slots: int = 32, context: int = 16384) -> None:
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), llama_cpp.llama_model_default_params())
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = context, 2048, STEP, slots
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.kv_unified = True
        self._context: Any = llama_cpp.llama_init_from_model(self._model, options)
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def _clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Compute tokens: id, position, sequence, and whether its logits are wanted."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = sequence, wanted
        if status := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode ended with {status}")

    def _best(self, index: int) -> int:
        row = llama_cpp.llama_get_logits_ith(self._context, index)
        values = np.ctypeslib.as_array(ctypes.cast(row, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))
        return int(values.argmax())

    def _prompt(self, ids: list[int], sequence: int = 0) -> int:
        """Compute a prompt, and the id after it."""
        for start in range(0, len(ids), STEP):
            part = ids[start : start + STEP]
            last = start + len(part) == len(ids)
            self._decode([(t, start + i, sequence, last and i == len(part) - 1) for i, t in enumerate(part)])
        return self._best(-1)

    def answer(self, ids: list[int], tokens: int, guess: bool = False) -> Result:
        """One greedy answer, from its first token to its last."""
        self._clear()
        made = [self._prompt(ids)]
        start = perf_counter()
        while len(made) < tokens:
            self._decode([(made[-1], len(ids) + len(made) - 1, 0, True)])
            made.append(self._best(-1))
        return {"seconds": perf_counter() - start, "tokens": tokens - 1, "ids": made}

    def batch(self, prompts: list[list[int]], tokens: int) -> Result:
        """Greedy answers to prompts, all at once."""
        self._clear()
        start = perf_counter()
        made = [[self._prompt(ids, sequence)] for sequence, ids in enumerate(prompts)]
        for _ in range(tokens - 1):
            self._decode(
                [(m[-1], len(p) + len(m) - 1, s, True) for s, (p, m) in enumerate(zip(prompts, made, strict=True))]
            )
            for index, answer in enumerate(made):
                answer.append(self._best(index))
        return {"seconds": perf_counter() - start, "tokens": tokens * len(prompts), "ids": made}

    def prefill(self, ids: list[int]) -> Result:
        """Time to the first token of a prompt."""
        self._clear()
        start = perf_counter()
        self._prompt(ids)
        return {"seconds": perf_counter() - start, "tokens": len(ids)}

    def built(self) -> Result:
        """The instruction sets that it was compiled for."""
        return {"system": llama_cpp.llama_print_system_info().decode().strip()}


if __name__ == "__main__":
    peer = Peer(Path(sys.argv[1]))
    serve({name: getattr(peer, name) for name in ("answer", "batch", "prefill", "built")})
