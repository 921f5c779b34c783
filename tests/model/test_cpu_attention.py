"""The backward pass of our own against autograd's through the plain formula."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.model.attention import layout as attention
from lit_llama.model.attention.layout import QUERIES, Packed, causal_attention
from lit_llama.model.operators import kernels

SHAPES = [(1, 1, 1, 1, 4), (2, 4, 2, 7, 8), (3, 6, 2, QUERIES, 8), (2, 9, 3, QUERIES + 1, 16), (1, 4, 4, 150, 8)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt(D)) v, written out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    return scores.masked_fill(torch.ones_like(scores[0, 0]).triu(1).bool(), -math.inf).softmax(-1) @ v


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of the output."""
    batch, heads, groups, length, size = shape
    draw = torch.Generator().manual_seed(sum(shape))
    q, k, v, dy = (
        torch.randn(batch, count, length, size, generator=draw).to(dtype) for count in (heads, groups, groups, heads)
    )
    return [(3 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()], dy


@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_are_autograds(shape: tuple[int, ...]) -> None:
    """Catches a key that is seen too early, a head that goes to another key, and a scale left out."""
    inputs, dy = drawn(shape, torch.float32)
    ours = causal_attention(*inputs)
    wanted = plain(*(x.double() for x in inputs))
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(wanted, inputs, dy.double()), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_no_less_exact_than_the_library() -> None:
    """Catches scores that are rounded before they are exponentiated."""
    inputs, dy = drawn((3, 6, 2, 200, 32), torch.bfloat16)
    exact = torch.autograd.grad(plain(*(x.double() for x in inputs)), inputs, dy.double())
    library = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    for ours, theirs, wanted in zip(
        torch.autograd.grad(causal_attention(*inputs), inputs, dy),
        torch.autograd.grad(library, inputs, dy),
        exact,
        strict=True,
    ):
        off, off_theirs = ((x.double() - wanted).norm() / wanted.norm() for x in (ours, theirs))
        assert off < 1.3 * off_theirs and off < 0.01


def test_packed_samples_take_it_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler. Catches padding that leaves a trace in gradients, and generation that pays for them."""
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    (q, k, v), dy = drawn((1, 4, 2, 60, 8), torch.float32)
    q, k, v, dy = (x.detach()[0].transpose(0, 1).contiguous() for x in (q, k, v, dy))  # (T, H, D)
    layout, lengths = Packed([20, 21, 19]), [20, 21, 19]
    called = []
    monkeypatch.setattr(attention, "causal_attention", lambda *x: called.append(1) or causal_attention(*x))
    layout.attend(0, q, k, v)
    assert not called
    for x in (q, k, v):
        x.requires_grad_()
    ours = layout.attend(0, q, k, v)
    assert called
    wanted = torch.cat(
        [
            plain(*(x.transpose(0, 1)[None] for x in parts))[0].transpose(0, 1)
            for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
    )
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    for got, want in zip(
        torch.autograd.grad(ours, (q, k, v), dy), torch.autograd.grad(wanted, (q, k, v), dy), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
