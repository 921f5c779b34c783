"""Rotary frequencies against transformers' own, and what turning by them means."""

import math
from typing import Any

import pytest
import torch
from conftest import tiny_config
from paged_steps import Steps

from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LLaMAConfig, RopeScaling
from lit_llama.model.rope import attention_factor, frequencies, rotary, rotate

# Shapes as published; the names say whose.
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
KINDS: dict[str, dict[str, Any]] = {
    "Llama 2": {"head_dim": 128, "max_position_embeddings": 4096},
    "Llama 3": {"head_dim": 128, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    "Vicuna 1.5 16k": {"head_dim": 128, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "Llama 3.1": {
        "head_dim": 128,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192},
    },
    "Llama 3.2": {
        "head_dim": 64,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "rope_scaling": LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192},
    },
    "Qwen 2.5 beyond 32k": {"head_dim": 128, "rope_theta": 1e6, "rope_scaling": YARN},
    "yarn, every option": {
        "head_dim": 64,
        "rope_scaling": YARN | {"attention_factor": 1.25, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    },
    "yarn, ramp of no width": {"head_dim": 16, "rope_scaling": YARN | {"original_max_position_embeddings": 3}},
    "dynamic, head_dim apart": {"head_dim": 80, "rope_scaling": {"type": "dynamic", "factor": 3.0}},
}
SHAPE = {"vocab_size": 8, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize("length", [100, 2048, 2049, 50000])
@pytest.mark.parametrize("raw", KINDS.values(), ids=KINDS)
def test_frequencies_equal_those_of_transformers(raw: dict[str, Any], length: int) -> None:
    """Catches a ramp turned round, a bound off by one, a factor forgotten, growth that starts too early."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LLaMAConfig.from_dict({"model_type": "llama", **SHAPE, **raw})
    theirs = LlamaRotaryEmbedding(LlamaConfig(**SHAPE, **raw))
    theirs(torch.zeros(1), torch.tensor([[length - 1]]))  # the dynamic type looks at the last position
    torch.testing.assert_close(frequencies(config, length), theirs.inv_freq, rtol=2e-6, atol=0)
    assert attention_factor(config.rope_scaling) == pytest.approx(theirs.attention_scaling, abs=1e-12)


def test_llama3_by_its_bands() -> None:
    """Short waves stay as they are, long ones are divided by the factor; catches bounds that are exchanged."""
    scaling = RopeScaling(rope_type="llama3", factor=8.0, original_max_position_embeddings=8192)
    config = tiny_config(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    for i, found in enumerate(frequencies(config).tolist()):
        plain = 500000.0 ** (-2 * i / 128)
        wave = 2 * math.pi / plain
        share = 1.0 if wave < 2048 else 0.0 if wave > 8192 else (8192 / wave - 1) / 3
        assert found == pytest.approx(plain * share + plain / 8 * (1 - share), rel=1e-5), i


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_rotary_is_a_rotation_of_complex_numbers(theta: float) -> None:
    """Components i and i + D/2 are one complex number turned by position * theta^(-2i / D); catches interleaved pairs,
    a wrong direction, a wrong exponent."""
    config = tiny_config(rope_theta=theta)
    half, tokens = config.head_dim // 2, 256
    x = torch.randn(tokens, 4, config.head_dim, generator=torch.Generator().manual_seed(0))
    number = torch.complex(x[..., :half].double(), x[..., half:].double())
    frequency = torch.tensor([theta ** (-2 * i / config.head_dim) for i in range(half)], dtype=torch.float64)
    angle = torch.arange(tokens).double()[:, None, None] * frequency
    turned = number * torch.polar(torch.ones_like(angle), angle)
    found = rotate(x, rotary(config, Packed([tokens]), torch.float32))
    torch.testing.assert_close(found.double(), torch.cat([turned.real, turned.imag], -1), atol=5e-5, rtol=0)


def test_dynamic_follows_the_length_of_each_sequence() -> None:
    """Catches one length for the whole row, by which packing or a neighbour in the batch changes a sample."""
    scaling = RopeScaling(rope_type="dynamic", factor=2.0, original_max_position_embeddings=16)
    config = tiny_config(rope_scaling=scaling, max_position_embeddings=16)
    lengths = [10, 40, 16, 20]
    packed = rotary(config, Packed(lengths), torch.float32)
    alone = [rotary(config, Packed([length]), torch.float32) for length in lengths]
    for part in range(2):
        assert torch.equal(packed[part], torch.cat([pair[part] for pair in alone]))
    cache = Steps(config, 2, 64)
    cache.extend([30, 10])
    later = rotary(config, cache.extend([1, 2]), torch.float32)
    for part in range(2):  # tokens 31 of 31, and 11 and 12 of 12
        found = later[part]
        assert torch.equal(found[:1], rotary(config, Packed([31]), torch.float32)[part][-1:])
        assert torch.equal(found[1:], rotary(config, Packed([12]), torch.float32)[part][-2:])
    assert not torch.equal(frequencies(config, 31), frequencies(config, 12))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("raw", KINDS.values(), ids=KINDS)
def test_a_gpu_turns_by_the_same_angles(raw: dict[str, Any]) -> None:
    """Catches frequencies rounded otherwise there, and tensors left on the wrong device."""
    config = LLaMAConfig.from_dict({"model_type": "llama", **SHAPE, **raw})
    wanted, found = (rotary(config, Packed([3000, 9], device), torch.float32) for device in ("cpu", "cuda"))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-5, rtol=0)
