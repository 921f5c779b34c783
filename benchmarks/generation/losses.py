"""Loss of a model on given texts, with its weights held as generation holds them, scored by the engine that answers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.request import Request, Sampling
from lit_llama.generate.engine.runner import PackedRunner
from lit_llama.model.config import KVCacheType
from lit_llama.model.files.checkpoint import load_model
from lit_llama.model.kernels.decode import PackedLLaMA
from lit_llama.model.kernels.packing import Weights

CACHE = 1 << 29
Texts = Iterable[tuple[np.ndarray, np.ndarray]]
"""Ids and labels."""


def held_out_losses(checkpoint_dir: Path, texts: Texts, ignored: int) -> list[dict[str, Any]]:
    """A line for float32, for bfloat16, for each way in which packed weights are held beside bfloat16, and for keys and
    values in 8 bits beside each of those.

    Args:
        checkpoint_dir: The model.
        texts: Of which the tokens are scored whose labels are not ignored.
        ignored: The label of the others.
    """
    texts = list(texts)
    lines: list[dict[str, Any]] = []
    ways: list[tuple[str, torch.dtype, Weights, KVCacheType]] = [("float32", torch.float32, "stored", "auto")]
    for kv_cache in get_args(KVCacheType):
        for held in get_args(Weights):
            name = ("bfloat16" if held == "stored" else held) + (", kv int8" if kv_cache == "int8" else "")
            ways.append((name, torch.bfloat16, held, kv_cache))
    for name, dtype, held, kv_cache in ways:
        packed = PackedLLaMA(load_model(checkpoint_dir), dtype, held, consume=True)
        engine = Engine(PackedRunner(packed, CACHE, kv_cache), config=EngineConfig(max_sequences=1))
        loss = _loss(engine, texts, ignored)
        first = float(lines[0]["loss"]) if lines else loss
        lines.append({"weights": name, "loss": loss, "off": loss / first - 1, "bytes": packed.bytes})
    return lines


def _loss(engine: Engine, texts: Texts, ignored: int) -> float:
    """Mean over the scored tokens."""
    total, count = 0.0, 0
    for ids, labels in texts:
        request = Request(ids.tolist(), Sampling(max_new_tokens=0), prompt_logprobs=0)
        scores = next(step.prompt_logprobs for step in engine.stream(request) if step.prompt_logprobs)
        trained = [score.logprob for score, label in zip(scores, labels, strict=True) if score and label != ignored]
        total -= sum(trained)
        count += len(trained)
    return total / count


def table(lines: list[dict[str, Any]]) -> str:
    """The lines for people."""
    rows = [f"{'weights':18}{'loss':>9}{'off':>9}{'GB':>8}"]
    rows += [f"{x['weights']:18}{x['loss']:9.4f}{x['off']:9.2%}{x['bytes'] / 1e9:8.3f}" for x in lines]
    return "\n".join([*rows, "held out, before training; off: from float32"])
