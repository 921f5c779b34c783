"""Decoder layers with a backward pass of their own, against their plain twins under autograd."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import tiny_model
from paged_steps import Steps
from torch import Tensor, nn

from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.attention.dispatch import Kept, attend_backward, attend_into
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.fused.layer import fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators import kernels, pointwise
from lit_llama.train.loss import TokenLoss

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
LENGTHS = [130, 73, 47, 10, 1]
"""Longer than a block of queries, odd, and as short as can be."""


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the compiled kernels, and as if there were no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    elif kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    yield request.param


def adapted(device: str = "cpu", dtype: torch.dtype = torch.float32, **settings: Any) -> LLaMA:
    """A small model whose adapters change something."""
    lora = {name: settings.pop(name) for name in ("target_modules", "rank_pattern") if name in settings}
    model = tiny_model(num_hidden_layers=3, **settings).to(dtype)
    torch.manual_seed(1)
    apply_lora(model, LoRAConfig(r=4, **lora))
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.05)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.weight.data.copy_(torch.rand(len(module.weight)) * 2 - 0.5)  # the same in every dtype
    return model.to(device).train()


def step(model: LLaMA) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of the packed samples."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 384, (sum(LENGTHS),), generator=torch.Generator().manual_seed(3)).to(device)
    select = torch.arange(5, len(ids), device=device)
    loss = TokenLoss(model)(ids, LENGTHS, select, ids[select])
    loss.backward()
    return loss.detach().cpu(), {n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None}


SETTINGS: list[dict[str, Any]] = [
    {},
    {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    {"sliding_window": 20},
    {"num_key_value_heads": 1},
    {"target_modules": "q_proj,v_proj,down_proj"},
    {"rank_pattern": {"q_proj": 9, "layers.1.mlp.up_proj": 2}},
    {"model_type": "qwen3", "use_qk_norm": True},
    {"model_type": "qwen3", "use_qk_norm": True, "num_key_value_heads": 1, "target_modules": "k_proj"},
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("leave", ["none", "selective", "full"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_gradients_are_autograds(way: str, settings: dict[str, Any], leave: Any, device: str) -> None:
    """Catches a term of the backward pass that is left out, whatever it is, and samples that see each other."""
    wanted_loss, wanted = step(adapted(dtype=torch.float64, **settings))
    _, autograds = step(adapted(device, **settings))
    model = adapted(device, **settings)
    assert fuse(model, leave) == 3
    loss, found = step(model)
    torch.testing.assert_close(loss.double(), wanted_loss.double(), rtol=1e-6, atol=0)
    assert found.keys() == wanted.keys() and len(wanted) >= 6
    for name, gradient in wanted.items():
        off, usual = ((each[name] - gradient).norm() / gradient.norm() for each in (found, autograds))
        assert off < max(1e-5, 2 * usual), f"{name} is off by {off:.1e}, autograd's by {usual:.1e}"


@pytest.mark.parametrize("settings", [{}, {"model_type": "qwen3", "use_qk_norm": True}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_in_bfloat16_it_is_no_less_exact_than_autograd(device: str, settings: dict[str, Any]) -> None:
    """Catches a sum in bfloat16, and an update that is rounded away."""
    _, exact = step(adapted(**settings))
    _, plain = step(adapted(device, torch.bfloat16, **settings))
    model = adapted(device, torch.bfloat16, **settings)
    fuse(model)
    _, ours = step(model)

    def off(found: dict[str, Tensor]) -> Tensor:
        return torch.stack([(found[name] - exact[name]).norm() / exact[name].norm() for name in exact])

    assert off(ours).mean() < 1.1 * off(plain).mean() and off(ours).max() < 0.05


def test_names_weights_and_everything_but_packed_samples_stay_as_they_were() -> None:
    """Catches weights that lose their names or bits, and a cache that is not filled."""
    plain, model = adapted(), adapted()
    fuse(model)
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        n for n, p in plain.named_parameters() if p.requires_grad
    ]
    ids, logits = torch.arange(30), []
    with torch.no_grad():
        for each in (model, plain):
            cache = Steps(each.config, 1, 40)
            each(ids[:20], cache.extend([20]))
            logits.append(each(ids[20:], cache.extend([10])))
        assert torch.equal(*logits)
        torch.testing.assert_close(model(ids), plain(ids), rtol=1e-4, atol=1e-4)


def test_an_update_counts_at_once() -> None:
    """Catches a joined matrix that still holds the adapter of the step before."""
    model, plain = adapted(), adapted()
    fuse(model)
    step(model)
    for each in (model, plain):
        with torch.no_grad():
            for parameter in lora_parameters(each):
                parameter.mul_(-2).add_(0.01)
        each.zero_grad()
    torch.testing.assert_close(step(model)[0], step(plain)[0], rtol=1e-6, atol=0)


def test_less_is_kept_than_autograd_keeps() -> None:
    """(4 C + 2 kv + 2 I) values a token and layer, and the few of the updates; catches what is kept unasked."""

    def kept(model: LLaMA, tokens: int) -> int:
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        sizes: dict[int, dict[int, int]] = {}  # of each storage, its parts
        wholes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                wholes[storage.data_ptr()] = storage.nbytes()
                sizes.setdefault(storage.data_ptr(), {})[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(torch.zeros(tokens, dtype=torch.int64))
        return sum(min(wholes[storage], sum(parts.values())) for storage, parts in sizes.items())

    model, plain = adapted(), adapted()
    fuse(model)
    config: LLaMAConfig = model.config
    width, inner = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    values = 3 * width + heads + 2 * inner + 4 * 16  # 16 is the most that four ranks fill up to
    most = 4 * 3 * 200 * values + 4 * 200 * 3 * width  # layers, then embedding, rotation and last norm
    assert kept(model, 200) < most < 0.75 * kept(plain, 200)


Operation = tuple[str, Callable[[torch.dtype], list[Any]]]
OPERATIONS: list[Operation] = [
    ("norm", lambda d: [_wide(d, 70), _draw(d, 37, 70), _draw(d, 70), 1e-5]),
    (
        "norm_backward",
        lambda d: [_wide(d, 70), _wide(d, 70), *(_draw(d, 37, 70) for _ in "xy"), _draw(d, 70), _draw(d, 37, 70), 1e-5],
    ),
    ("swiglu", lambda d: [_wide(d, 133), 4 * _draw(d, 37, 266)]),
    ("swiglu_backward", lambda d: [_wide(d, 266), _draw(d, 37, 133), 4 * _draw(d, 37, 266)]),
]


def _draw(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _wide(dtype: torch.dtype, columns: int) -> Tensor:
    """Columns of a wider tensor, filled with what must not stay."""
    return torch.full((37, columns + 6), float("nan"), dtype=dtype)[:, :columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "make"), OPERATIONS, ids=[name for name, _ in OPERATIONS])
def test_each_operation_is_its_plain_twin(name: str, make: Callable[..., list[Any]], dtype: torch.dtype) -> None:
    """Catches a wrong stride, a last tile that is left out, and a rounding in between."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    ours, wanted = make(dtype), make(dtype)
    getattr(pointwise, name)(*ours)
    getattr(pointwise, f"plain_{name}")(*wanted)
    for got, want in zip(ours, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cross_entropy_and_its_gradient_are_torchs(way: str, dtype: torch.dtype) -> None:
    """Also of logits far apart; catches an overflow, and a gradient without its -1."""
    logits = (30 * _draw(torch.float32, 37, 301)).to(dtype)
    targets = torch.arange(37) * 8
    exact = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    wanted.sum().backward()
    unchanged = logits.clone()
    torch.testing.assert_close(pointwise.cross_entropy(unchanged, targets, 0.0).double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(unchanged, logits)
    loss = pointwise.cross_entropy(logits, targets, 2.0)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    assert exact.grad is not None
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.double(), 2 * exact.grad, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 301])
def test_a_target_that_is_no_token_is_refused(target: int) -> None:
    """Catches memory of somebody else that is read and written."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    with pytest.raises(IndexError, match="none of the 301 tokens"):
        pointwise.cross_entropy(torch.zeros(2, 301), torch.tensor([5, target]), 1.0)


def test_rounding_is_torchs() -> None:
    """Of numbers of any size, those included that are too small for a normal float; catches one that is cut off."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    sizes = torch.logspace(-40, 38, 200)[:, None]
    gate, up = _draw(torch.float32, 200, 97).abs() + 1, _draw(torch.float32, 200, 97) * sizes
    rounded = torch.cat([gate, up], 1).bfloat16()
    ours, wide = torch.empty(200, 97, dtype=torch.bfloat16), torch.empty(200, 97)
    pointwise.swiglu(ours, rounded)
    pointwise.swiglu(wide, rounded.float())
    assert torch.equal(ours, wide.bfloat16()) and 0 < ours.abs()[ours != 0].min() < torch.finfo(torch.bfloat16).tiny


def test_what_is_no_number_stays_none(way: str) -> None:
    """A step that is not finite is skipped, if it is seen; catches a maximum or a rounding that hides it."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(3, 8, dtype=dtype)
        x[1, 3] = float("nan")
        out = torch.empty_like(x)
        pointwise.norm(out, x, torch.ones(8, dtype=dtype), 1e-5)
        assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
        pointwise.swiglu(out[:, :4], x)
        assert out[1, 3].isnan()
        loss = pointwise.cross_entropy(x.clone(), torch.zeros(3, dtype=torch.int64), 1.0)
        assert loss[1].isnan() and loss[[0, 2]].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window", [None, 1, 50, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 3, 6), (9, 3, 64)], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS, [512, 40]], ids=len)
def test_attention_is_the_formula(
    way: str, lengths: list[int], shape: tuple[int, int, int], dtype: torch.dtype, window: int | None, device: str
) -> None:
    """Output and gradients against float64; catches a key that is seen too early or too late, and one of another
    sample."""
    heads, groups, size = shape
    if device == "cuda" and size % 8:
        pytest.skip("no kernel on a GPU takes such heads")
    qkv = _draw(torch.float32, sum(lengths), (heads + 2 * groups) * size).to(device, dtype)
    parts = [x.unflatten(1, (-1, size)) for x in qkv.split([heads * size, groups * size, groups * size], dim=1)]
    dy = _draw(torch.float32, sum(lengths) + 1, heads * size)[1:].unflatten(1, (heads, size)).to(device, dtype)
    layout, y = Packed(lengths, device), torch.empty_like(dy)
    q, k, v = parts
    kept = attend_into(y, (q, k, v), layout, window)
    room = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    gradients = attend_backward(room, dy, y, kept, (q, k, v), layout, window)
    exact = [x.double().cpu().requires_grad_() for x in parts]
    wanted = _formula(exact, lengths, window)
    exact_gradients = torch.autograd.grad(wanted, exact, dy.double().cpu())
    limit = 0.015 if dtype == torch.bfloat16 else 2e-6
    for got, want in zip((y, *gradients), (wanted, *exact_gradients), strict=True):
        # A key alone in its window changes nothing, so that there is nothing to compare with but dy.
        assert (got.double().cpu() - want).norm() < limit * max(want.norm(), dy.double().norm().cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_nothing(dtype: torch.dtype) -> None:
    """Catches a sum in the order in which threads end, and scratch that two of them share."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    layout = Packed([33, 70, 5, 150, 21, 40], parents=[-1, 0, 0, -1, -1, 4])
    q, k, v, dy = (
        _draw(dtype, sum(layout.counts), heads, 16) + shift for heads, shift in ((4, 0), (2, 0), (2, 1), (4, 1))
    )
    found, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            y, room = torch.empty_like(q), (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
            kept = attend_into(y, (q, k, v), layout, None)
            found.append([y, *kept.tensors, *attend_backward(room, dy, y, kept, (q, k, v), layout, None)])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


def test_memory_that_ends_is_an_error() -> None:
    """Catches a process that ends without a word."""
    if kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    layout, q = Packed([4]), torch.zeros(4, 2, 16)
    layout.__dict__["offsets"] = torch.tensor([0, 1 << 44])
    y, lse = torch.empty_like(q), torch.empty(4, 2)
    with pytest.raises(MemoryError, match="attend"):
        attend_into(y, (q, q, q), layout, None)
    with pytest.raises(MemoryError, match="attend_backward"):
        attend_backward((y, y, y), q, y, Kept([lse]), (q, q, q), layout, None)


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_samples_that_go_on_from_another_are_as_if_they_repeated_it(
    way: str, dtype: torch.dtype, window: int | None
) -> None:
    """Two beginnings, one of them with two samples and one with three, and a sample of its own. Catches gradients of a
    beginning that are lost or counted twice, and positions among the keys that are off by its length."""
    heads, groups, size = 4, 2, 16
    lengths, parents = [33, 70, 5, 90, 21, 1, 64, 30], [-1, 0, 0, -1, -1, 4, 4, 4]
    qkv = _draw(torch.float32, sum(lengths), (heads + 2 * groups) * size).to(dtype)
    q, k, v = (x.unflatten(1, (-1, size)) for x in qkv.split([heads * size, groups * size, groups * size], dim=1))
    dy = _draw(torch.float32, sum(lengths) + 1, heads * size)[1:].unflatten(1, (heads, size)).to(dtype)
    layout, y = Packed(lengths, parents=parents), torch.empty_like(dy)
    kept = attend_into(y, (q, k, v), layout, window)
    room = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
    gradients = attend_backward(room, dy, y, kept, (q, k, v), layout, window)

    exact = [x.double().requires_grad_() for x in (q, k, v)]
    starts = [sum(lengths[:number]) for number in range(len(lengths))]
    whole, wanted = [], []
    for start, own, parent in zip(starts, lengths, parents, strict=True):
        rows = [] if parent < 0 else [torch.arange(starts[parent], starts[parent] + lengths[parent])]
        whole.append(torch.cat([*rows, torch.arange(start, start + own)]))
        parts = [x[whole[-1]] for x in exact]
        wanted.append(_formula(parts, [len(whole[-1])], window)[-own:])
    expected = torch.cat(wanted)
    limit = 0.015 if dtype == torch.bfloat16 else 2e-6
    results = zip((y, *gradients), (expected, *torch.autograd.grad(expected, exact, dy.double())), strict=True)
    assert all((got.double() - want).norm() < limit * want.norm() for got, want in results)
    assert layout.position_ids.tolist()[33:36] == [33, 34, 35] and layout.lengths[1] == 103


def _formula(parts: list[Tensor], lengths: list[int], window: int | None) -> Tensor:
    """softmax(q k' / sqrt(D)) v for each sample, written out."""
    outputs = []
    for q, k, v in zip(*(x.split(lengths) for x in parts), strict=True):
        repeat = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))  # (L, H, D)
        scores = torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5
        distance = torch.arange(len(q))[:, None] - torch.arange(len(q))
        hidden = (distance < 0) | (distance >= (window or len(q)))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(outputs)


def test_a_compiler_that_fails_is_said_and_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    """Catches a traceback where the compiler is broken, and a library that is half written."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such processor" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.compiled.__wrapped__() is None
    assert "no such processor" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
