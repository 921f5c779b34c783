"""The memory of the process itself: what a run has loaded before the first tensor of its model is there.

It is loaded, and used once on a model of nearly nothing, before it is measured: else a plan would count what this
process happens to have imported so far, and the run would take more.
"""

import importlib
from dataclasses import replace

import torch

from lit_llama.device import (
    PRODUCT_BYTES,
    PRODUCTS,
    Numerics,
    resident_memory,
    trim_freed_memory,
)
from lit_llama.model.assemble import assemble
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LLaMAConfig, LoRAConfig, Quantization
from lit_llama.model.llama import LLaMA
from lit_llama.model.quantize import is_quantized, library, quantized
from lit_llama.train.config import TrainConfig
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.footprint import Build, Shape
from lit_llama.train.methods.method import Full, LoRA, Method

_TINY = LLaMAConfig.from_dict(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64,
        "hidden_act": "silu",
    }
)


def program_memory(whole: bool, train: TrainConfig, numerics: Numerics, quantize: Quantization | None) -> int:
    """Return the bytes of this process on a CPU when all is loaded that a run needs: libraries, kernels, and the code
    that is made for matrix products.

    Args:
        whole: The weights of the base train.
        train: Course of the training.
        numerics: In which numbers.
        quantize: How the linear layers are held.
    """
    importlib.import_module("lit_llama.train.run")
    if quantize in ("nf4", "nf4-dq", "int8") or "8bit" in train.optimizer:
        library()
    method: Method = Full() if whole else LoRA(LoRAConfig(r=1))
    build = Build(config=_TINY, method=method, numerics=numerics, checkpointing="none")
    build.training_peak(Shape([8], 4))
    with torch.random.fork_rng([]):
        _step(build, quantize)
    trim_freed_memory()
    # Those of float32 come from a library that has them ready.
    half = (numerics.product or numerics.linear) != torch.float32
    return resident_memory() + half * PRODUCTS * PRODUCT_BYTES


def _step(build: Build, quantize: Quantization | None) -> None:
    """Forward and backward through a model of nearly nothing."""
    numerics = build.numerics

    def load() -> LLaMA:
        model = LLaMA(replace(_TINY, tie_word_embeddings=False)).to(numerics.linear).requires_grad_(False)
        for name, module in list(model.named_modules()) if quantize else ():
            if isinstance(module, torch.nn.Linear) and is_quantized(f"{name}.weight"):
                model.set_submodule(name, quantized(module.weight.detach(), None, quantize))  # type: ignore[arg-type]
        return model

    model = assemble(load, build.assembly()).model
    ids = torch.arange(8)
    with numerics.autocast():
        loss = TokenLoss(model, numerics).train().of_layout(ids, Packed([8]), ids[:4], ids[:4])
    loss.backward()
