"""Noise on the embeddings: its size, its draws, and that it is training's alone."""

import math

import torch
from conftest import tiny_model

from lit_llama.model.adapters.lora import apply_lora
from lit_llama.model.adapters.neftune import EmbeddingNoise, add_noise
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LoRAConfig
from lit_llama.train.loss import TokenLoss

LENGTHS = [4, 100, 25]


def test_the_noise_is_as_large_as_each_samples_own_length_says() -> None:
    """alpha / sqrt(L C) of the paper; catches the length of the batch, a normal distribution, one draw a token."""
    noise, x = EmbeddingNoise(5.0).train(), torch.zeros(sum(LENGTHS), 64)
    torch.manual_seed(0)
    parts = torch.stack([noise(x, Packed(LENGTHS)) for _ in range(40)]).split(LENGTHS, dim=1)
    for part, length in zip(parts, LENGTHS, strict=True):
        bound = 5 / math.sqrt(length * 64)
        assert 0.99 * bound < part.abs().max() <= bound
        assert abs(part.std().item() / (bound / math.sqrt(3)) - 1) < 0.05  # of an even distribution
        assert part.mean().abs() < bound / 20


def test_noise_is_drawn_in_training_alone_and_from_the_seed() -> None:
    """Catches noise in evaluation, and draws that a resumed run cannot repeat."""
    model, ids = tiny_model(), torch.arange(20)
    clean = model(ids)
    add_noise(model, 10.0)
    assert torch.equal(model.eval()(ids), clean)
    model.train()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = model(ids), model(ids)
    torch.set_rng_state(state)
    assert torch.equal(model(ids), first) and not torch.equal(first, second)
    assert (first - clean).abs().max() > 1e-2
    add_noise(model, 0.0)
    assert torch.equal(model(ids), clean)


def test_the_loss_sees_the_noise_and_the_adapter_keeps_its_names() -> None:
    """Catches a wrapper that renames what is saved, or that the loss goes around."""
    model = tiny_model()
    apply_lora(model, LoRAConfig(target_modules=["embed_tokens", "q_proj"]))
    names = list(model.state_dict())
    add_noise(model, 10.0)
    assert list(model.state_dict()) == names
    loss_of, ids = TokenLoss(model), torch.arange(20)
    batch = ids, [8, 12], torch.arange(19), ids[1:]
    quiet = loss_of.eval()(*batch)
    assert not torch.isclose(loss_of.train()(*batch), quiet, rtol=1e-4)


def test_noise_keeps_the_dtype_of_the_base() -> None:
    """Catches float32 activations through a bfloat16 model."""
    model = tiny_model().to(torch.bfloat16)
    add_noise(model, 5.0)
    assert model.train()(torch.arange(5)).dtype == torch.bfloat16
