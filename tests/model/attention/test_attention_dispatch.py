"""Choice among the kernel of a CPU, torch's varlen_attn and the reference; each of them as the formula."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from lit_llama.device import Capabilities
from lit_llama.model.attention import dispatch, reference
from lit_llama.model.attention.layout import Packed
from lit_llama.model.operators import kernels

LENGTHS = [60, 21, 20, 1]
Options = dict[str, Any]
OPTIONS: list[Options] = [
    {},
    {"window": 7},
    {"scale": 0.11},
    {"softcap": 3.0},
    {"softcap": 3.0, "window": 7, "scale": 2.0},
]


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lengths: list[int] = LENGTHS,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softcap(scale q k') masked, its softmax, times v, for each sample: written out."""
    outputs = []
    for query, key, value in zip(*(x.split(lengths) for x in (q, k, v)), strict=True):
        key, value = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (key, value))
        scores = torch.einsum("ihd,jhd->hij", query, key) * (q.shape[2] ** -0.5 if scale is None else scale)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(query))[:, None] - torch.arange(len(query))
        hidden = (distance < 0) | (distance >= (window or len(query)))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), value))
    return torch.cat(outputs)


def drawn(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """q (T, H, D), k and v (T, G, D), and the gradient of the output."""
    draw = torch.Generator().manual_seed(3)
    q, k, v, dy = (torch.randn(sum(LENGTHS), heads, 16, generator=draw).to(dtype) for heads in (4, 2, 2, 4))
    return [(3 * q).requires_grad_(), k.requires_grad_(), v.requires_grad_()], dy


def check(inputs: list[Tensor], ours: Tensor, dy: Tensor, limit: float = 1e-5, **options: Any) -> None:
    """Compare output and gradients with the formula in float64."""
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = formula(exact[0], exact[1], exact[2], **options)
    found = (ours, *torch.autograd.grad(ours, inputs, dy))
    for got, want in zip(found, (wanted, *torch.autograd.grad(wanted, exact, dy.double())), strict=True):
        assert (got.double() - want).norm() < limit * want.norm()


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the compiled kernels, and as if there were no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    elif kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    return request.param


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_is_the_formula(way: str, dtype: torch.dtype, options: Options) -> None:
    """Output and gradients; catches a scale or a bound of the scores that is left out, or put on after the mask."""
    inputs, dy = drawn(dtype)
    ours = Packed(LENGTHS).attend(0, *inputs, **options)
    check(inputs, ours, dy, 1e-5 if dtype == torch.float32 else 0.015, **options)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_samples_that_go_on_from_another_see_it(options: Options) -> None:
    """By the reference; catches options that are lost where samples have a parent."""
    (q, k, v), _ = drawn()
    whole, own = [0, *range(20, 50)], [*range(20, 50)]
    packed = [torch.cat([x[:1], x[own]]) for x in (q, k, v)]
    ours = reference.reference(
        *packed, Packed([1, 30], parents=[-1, 0]), *(options.get(name) for name in ("window", "scale", "softcap"))
    )
    alone = formula(*(x[whole].double() for x in (q, k, v)), lengths=[31], **options)
    torch.testing.assert_close(ours.double(), alone, rtol=1e-5, atol=1e-5)


def test_the_way_is_chosen_by_device_and_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kernel that is given what it does not know, and one that is not used."""
    layout, shared = Packed([2, 1]), Packed([2, 1], parents=[-1, 0])
    q = torch.zeros(3, 4, 16)
    if kernels.compiled() is not None:
        assert dispatch.way(q, layout) == dispatch.way(q.bfloat16(), shared) == "kernel"
    assert dispatch.way(q.double(), layout) == dispatch.way(q, layout, 3.0) == "reference"
    monkeypatch.setattr(kernels, "compiled", lambda: None)
    assert dispatch.way(q, layout) == "reference"
    gpu = Capabilities(kind="cuda", bfloat16=True, flash_attention=True)
    monkeypatch.setattr(dispatch, "capabilities", lambda device: gpu)
    assert dispatch.way(q.half(), layout) == dispatch.way(q.bfloat16(), layout) == "varlen"
    others = [(q, layout), (q.half(), shared), (q.half()[..., :12], layout), (torch.zeros(3, 4, 264).half(), layout)]
    assert [dispatch.way(*each) for each in others] == ["reference"] * 4


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_varlen_attn_keeps_its_result_once(options: Options, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the formula in place of torch's kernel, which is for GPUs. Catches a window or a scale that is handed over
    wrongly, gradients of another result, and memory for a second result."""
    calls: list[Options] = []

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            y = formula(q, k, v, **options)
            ctx.save_for_backward(q, k, v, y)
            return y

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            *inputs, y = ctx.saved_tensors
            assert again or y.data_ptr() == out.data_ptr()
            with torch.enable_grad():
                own = [x.detach().requires_grad_() for x in inputs]
                return torch.autograd.grad(formula(own[0], own[1], own[2], **options), own, gradients[0])

    def stand_in(q: Tensor, k: Tensor, v: Tensor, *sizes: Any, **given: Any) -> Tensor:
        calls.append(given | {"offsets": sizes[0].tolist(), "longest": sizes[2]})
        return Formula.apply(q, k, v)

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    monkeypatch.setattr(dispatch, "way", lambda *_: "varlen")
    inputs, dy = drawn()
    with torch.no_grad():
        out = torch.zeros(len(dy), 80)[:, 5:69].unflatten(1, (4, 16))
        kept = dispatch.attend_into(out, (inputs[0], inputs[1], inputs[2]), Packed(LENGTHS), **options, again=again)
        assert (kept.graph is None) == again
        room = (torch.empty_like(inputs[0]), torch.empty_like(inputs[1]), torch.empty_like(inputs[2]))
        qkv = inputs[0].detach(), inputs[1].detach(), inputs[2].detach()
        found = dispatch.attend_backward(room, dy, out, kept, qkv, Packed(LENGTHS), **options)
    wanted = formula(inputs[0], inputs[1], inputs[2], **options)
    torch.testing.assert_close(out, wanted)
    for got, want in zip(found, torch.autograd.grad(wanted, inputs, dy), strict=True):
        torch.testing.assert_close(got, want)
    window, scale = options.get("window"), options.get("scale")
    assert calls[0] == {
        "scale": scale,
        "window_size": (-1 if window is None else window - 1, 0),
        "enable_gqa": True,
        "offsets": [0, 60, 81, 101, 102],
        "longest": 60,
    }
