"""The advantage of the fused core over the plain one, as a ratio within one process, so that noise cancels."""

import copy
import time

import pytest
import torch
from conftest import tiny_config

from lit_llama.device import keep_freed_memory, pick_dtype
from lit_llama.model.adapters.lora import apply_lora
from lit_llama.model.config import LoRAConfig
from lit_llama.model.fused.layer import fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators import kernels
from lit_llama.train.loss import TokenLoss

LENGTHS = [290, 170, 122, 90, 70, 26]
ROUNDS = 7


def seconds(model: LLaMA) -> float:
    """CPU time of a forward and a backward pass over the samples, two thirds of which are trained."""
    tokens = sum(LENGTHS)
    ids, select = torch.arange(tokens) % 4000, torch.arange(tokens // 3, tokens)
    start = time.process_time()
    TokenLoss(model)(ids, LENGTHS, select, ids[select]).backward()
    return time.process_time() - start


@pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler")
def test_a_fused_step_takes_less_than_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an operation that falls back to a slow way, a copy that came in, and work that is done twice.

    The model has the widths of SmolLM2-135M; the plain one runs as if there were no compiler. In float32 the products
    take nearly all of the time.
    """
    keep_freed_memory()  # for both; it is a third of the time of the plain one
    config = tiny_config(
        vocab_size=4000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
    )
    dtype = pick_dtype("auto", torch.device("cpu"))
    plain = LLaMA(config).to(dtype)
    apply_lora(plain, LoRAConfig())
    fused = copy.deepcopy(plain)
    assert fuse(fused) == 4
    models = {"plain": plain, "fused": fused}
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + ROUNDS):
        for name, model in models.items():
            with monkeypatch.context() as patch:
                if name == "plain":
                    patch.setattr(kernels, "compiled", lambda: None)
                times[name].append(seconds(model))
    best = {name: min(found[1:]) for name, found in times.items()}
    assert best["plain"] / best["fused"] > (1.3 if dtype == torch.bfloat16 else 1.0), best
