"""Ours on random weights with the shapes of large models: tokens per second and memory of whole training steps.

Shapes: T tokens of a micro-batch.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from lit_llama.device import peak_memory
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.config import LLaMAConfig, LoRAConfig, Quantization
from lit_llama.model.fused.layer import fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.quantize import is_quantized, quantized
from lit_llama.text.dataset.batches import Batch, collate
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.train.loss import TokenLoss

_LLAMA = {"num_key_value_heads": 32, "num_attention_heads": 32, "head_dim": 128, "hidden_size": 4096}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-2-7b": _LLAMA | {"vocab_size": 32000, "intermediate_size": 11008, "num_hidden_layers": 32},
    "llama-3-8b": _LLAMA
    | {
        "vocab_size": 128256,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "llama-13b": {
        "vocab_size": 32000,
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "head_dim": 128,
    },
}
TOKENS = 8192
"""Of a micro-batch."""
LORA = LoRAConfig(r=16, alpha=32)


def measure(
    name: str, device: str, *, steps: int, warmup: int, sample_tokens: int | None, quantize: Quantization | None
) -> dict[str, Any]:
    """Train a model of the named shape in bfloat16, one packed micro-batch a step."""
    config = LLaMAConfig(**SHAPES[name], max_position_embeddings=max(4096, sample_tokens or 0))
    batches = list(packed(warmup + steps, TOKENS, config.vocab_size, sample_tokens))
    result = train(config, torch.device(device), torch.bfloat16, batches, warmup=warmup, quantize=quantize)
    return {
        "model": name,
        "base": quantize or "bfloat16",
        "device": _name(device),
        "torch": torch.__version__,
        **result,
        **ceilings(device),
    }


def train(
    config: LLaMAConfig,
    device: torch.device,
    dtype: torch.dtype,
    batches: list[Batch],
    *,
    warmup: int,
    quantize: Quantization | None = None,
) -> dict[str, Any]:
    """Take a step on each batch; those after the warm-up are timed together, without waiting in between."""
    model = random_model(config, device, dtype, quantize)
    frozen = sum(math.prod(shape) for name, shape in shapes(config).items() if "embed" not in name)
    apply_lora(model, LORA)
    fuse(model)
    loss_of = TokenLoss(model).train()
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-4, weight_decay=0.0, fused=True)
    losses = []
    start = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == warmup:
            _wait(device)
            start = time.perf_counter()
        loss = loss_of.of_batch(batch) / len(batch.targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    _wait(device)
    seconds = time.perf_counter() - start
    timed = batches[warmup:]
    tokens = sum(len(batch.input_ids) for batch in timed)
    return {
        "tokens_per_second": tokens / seconds,
        "trained_tokens_per_second": sum(len(batch.targets) for batch in timed) / seconds,
        "samples_per_second": sum(len(batch.lengths) for batch in timed) / seconds,
        "tflops": 4 * frozen * tokens / seconds / 1e12,  # forward and gradient of the input; no attention counted
        "peak_memory_gb": peak_memory(device) / 1e9,
        "first_loss": losses[0].item(),
        "last_loss": losses[-1].item(),
    }


@torch.no_grad()
def random_model(
    config: LLaMAConfig, device: torch.device, dtype: torch.dtype, quantize: Quantization | None = None
) -> LLaMA:
    """Weights drawn on the device itself, one by one; norms are one."""
    with torch.device("meta"):
        model = LLaMA(config)
    torch.manual_seed(0)
    for name, shape in shapes(config).items():
        value = torch.ones(shape, dtype=dtype, device=device)
        if not name.endswith("norm.weight"):
            value.normal_(std=0.02)
        module, _, leaf = name.rpartition(".")
        if quantize and is_quantized(name):
            model.set_submodule(module, quantized(value, None, quantize))
        else:
            setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))
    return model


def shapes(config: LLaMAConfig) -> dict[str, torch.Size]:
    """Those of all weights, by their names."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in LLaMA(config).named_parameters()}


def packed(count: int, tokens: int, vocab_size: int, sample_tokens: int | None) -> Iterator[Batch]:
    """Micro-batches of random samples, each filled to at most `tokens` and by the last sample's rest exactly.

    Args:
        count: How many.
        tokens: Of each, T.
        vocab_size: Ids are below it.
        sample_tokens: Of every sample; if None, lengths spread as Alpaca's are: log-normal, 120 on average.
    """
    draw = np.random.default_rng(0)
    for _ in range(count):
        left, samples = tokens, []
        while left:
            length = sample_tokens or int(np.clip(draw.lognormal(4.6, 0.6), 24, 1024))
            length = min(length, left)
            if left - length < 24:  # too little for another sample
                length = left
            ids = draw.integers(0, vocab_size, length + 1, dtype=np.int32)  # the last token is nobody's input
            labels = ids.copy()
            labels[: 1 + length // 2] = IGNORE_INDEX
            samples.append((ids, labels))
            left -= length
        yield collate(samples)


def ceilings(device: str, size: int = 8192) -> dict[str, float]:
    """What the same device does at best just now: a large product in bfloat16, and a large copy."""
    where = torch.device(device)
    a, b = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    product, copy = _seconds(lambda: a @ b, where), _seconds(lambda: a.copy_(b), where)
    return {"matmul_tflops": 2 * size**3 / product / 1e12, "copy_gb_per_second": 2 * 2 * size**2 / copy / 1e9}


def _seconds(run: Any, device: torch.device, times: int = 10) -> float:
    run()
    _wait(device)
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait(device)
    return (time.perf_counter() - start) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device
