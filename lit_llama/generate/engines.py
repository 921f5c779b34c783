"""Engines on a model as it is, on its packed weights or a packed copy, and with a smaller model that guesses."""

import torch

from lit_llama.generate.engine.draft import DraftModel
from lit_llama.generate.engine.engine import Engine, EngineConfig
from lit_llama.generate.engine.runner import PackedRunner, TorchRunner
from lit_llama.generate.plan import GenerationPlan, cache_limit
from lit_llama.model.config import KVCacheType, LLaMAConfig
from lit_llama.model.kernels.decode import PackedLLaMA
from lit_llama.model.kernels.trained import Factors, factors_of
from lit_llama.model.llama import LLaMA

ADAPTER = "adapter"
"""Name of the adapter of a folder in its engine."""


def torch_engine(
    model: LLaMA, tokens: int, cache_bytes: int, max_sequences: int, kv_cache: KVCacheType = "auto"
) -> Engine:
    """Build an engine on a model as it is, of whose logits the first `tokens` count."""
    runner = TorchRunner(model, cache_bytes, kv_cache, max_sequences)
    return Engine(runner, tokens=tokens, config=_limits(max_sequences))


def packed_engine(model: LLaMA, tokens: int, plan: GenerationPlan) -> Engine:
    """Build an engine on the packed weights of a model, which loses them; its adapter is added to all requests."""
    cache_bytes = cache_limit(model.config, plan.dtype, plan.device, plan.max_sequences, plan.kv_cache)
    factors = factors_of(model)
    weights = PackedLLaMA(model, plan.dtype, plan.weights_kind, consume=True)
    runner = PackedRunner(weights, cache_bytes, plan.kv_cache)
    return _with_adapter(Engine(runner, tokens=tokens, config=_limits(plan.max_sequences)), factors)


def copied_engine(model: LLaMA, tokens: int, cache_bytes: int, max_sequences: int, dtype: torch.dtype) -> Engine:
    """Build an engine on a packed copy of a model in `dtype`, which goes on training as it is.

    Raises:
        ResourceError: There are no kernels for it here, see `packs`.
    """
    runner = PackedRunner(PackedLLaMA(model, dtype), cache_bytes)
    return _with_adapter(Engine(runner, tokens=tokens, config=_limits(max_sequences)), factors_of(model))


def _with_adapter(engine: Engine, factors: dict[str, Factors]) -> Engine:
    """Give an engine the updates of low rank that all of its requests take."""
    if factors:
        engine.add_adapter(ADAPTER, factors)
        engine.default_adapter = ADAPTER
    return engine


def speculate(engine: Engine, draft: Engine, tokens: int, max_sequences: int) -> None:
    """Let the model of one engine guess the `tokens` of another's tokenizer."""
    runner = draft.runner
    guesser = DraftModel(
        runner,
        tokens=tokens,
        max_sequences=max_sequences,
        cost=_products(runner.config) / _products(engine.runner.config),
        adapter=draft.default_adapter,
    )
    engine.add_guesser(guesser)


def _products(config: LLaMAConfig) -> int:
    """Multiplications of a token in the matrices of a model."""
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layers = range(config.num_hidden_layers)
    layer = sum(config.hidden_size * (heads + 3 * config.mlp_width(index)) for index in layers)
    return layer + config.hidden_size * config.vocab_size


def _limits(max_sequences: int) -> EngineConfig:
    return EngineConfig(max_sequences=max_sequences, max_batch_tokens=max(512, 2 * max_sequences))
