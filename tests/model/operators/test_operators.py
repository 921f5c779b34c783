"""Operators of torch.library: what FakeTensorMode, autograd and torch.compile are told of them is what they do."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lit_llama.model.kernels.choice
import lit_llama.model.operators.attention
import lit_llama.model.operators.narrow
import lit_llama.model.operators.pointwise  # noqa: F401  what registers the operators
from lit_llama.model.operators import kernels, pointwise
from lit_llama.model.operators.define import define
from lit_llama.train.memory.footprint import _Count

T, H, G, D = 7, 4, 2, 8
SAMPLES = (torch.tensor([0, 4, 7]), torch.tensor([-1, -1]), 0.3, 3)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def heads() -> tuple[Tensor, Tensor, Tensor]:
    return drawn(T, H, D), drawn(T, G, D), drawn(T, G, D)


def gradients() -> list[Any]:
    """Of attention: room, dy, y and the log-sum-exp."""
    q, k, v = heads()
    y = torch.empty_like(q)
    lse = torch.ops.lit_llama.attend(y, q, k, v, *SAMPLES)
    return [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), drawn(T, H, D), y, lse, q, k, v, *SAMPLES]


CALLS: dict[str, Any] = {
    "norm": lambda: [torch.empty(T, D), drawn(T, D), drawn(D), 1e-5],
    "norm_backward": lambda: [
        *(torch.empty(T, D) for _ in "ab"),
        *(drawn(T, D) for _ in "ab"),
        drawn(D),
        drawn(T, D),
        1e-5,
    ],
    "drop": lambda: [torch.empty(T, D), drawn(T, D), torch.tensor(5), 0.3, False],
    "rotate": lambda: [torch.empty(T, H, D), drawn(T, H, D), drawn(T, D // 2), drawn(T, D // 2), -1.0],
    "copy": lambda: [torch.empty(T, D), drawn(T, D)],
    "round_rows": lambda: [torch.empty(T, D), torch.empty(T), drawn(T, D), drawn(D)],
    "swiglu": lambda: [torch.empty(T, D), drawn(T, 2 * D)],
    "swiglu_backward": lambda: [torch.empty(T, 2 * D), drawn(T, D), drawn(T, 2 * D)],
    "cross_entropy": lambda: [drawn(T, 33), torch.arange(T), 0.5],
    "project": lambda: [torch.empty(T, 4), drawn(T, D), drawn(4, D)],
    "project_back": lambda: [torch.empty(T, 4), drawn(T, D), drawn(D, 4)],
    "outer": lambda: [drawn(T, 4), drawn(T, D)],
    "attend": lambda: [torch.empty(T, H, D), *heads(), *SAMPLES],
    "attend_backward": gradients,
    "attention": lambda: [*(x.requires_grad_() for x in heads()), *SAMPLES],
    "peaks": lambda: [drawn(T, 33), torch.tensor([0, 3])],
    "draws": lambda: [
        drawn(2, 33).softmax(1),
        torch.tensor([[5], [33]]),
        torch.ones(2, 1, dtype=torch.float64),
        torch.zeros(2, 1),
        torch.tensor([0.3, 0.6], dtype=torch.float64),
    ],
    "penalise": lambda: [
        drawn(T, 33),
        torch.tensor([0, 3]),
        torch.tensor([0, 1]),
        torch.ones(2, 33, dtype=torch.int32),
        torch.ones(2, 33, dtype=torch.bool),
        *(torch.full((2, 1), 1.3) for _ in "abc"),
    ],
}
KERNELS_ONLY = {"attend", "attend_backward", "attention", "peaks", "draws", "penalise"}


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the compiled kernels, and as if there were no compiler."""
    if request.param == "plain":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    elif kernels.compiled() is None:
        pytest.skip("no C++ compiler")
    yield request.param


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_what_it_says(way: str, name: str) -> None:
    """By torch's own checks. Catches an argument that is written to and not marked, a result without numbers of
    another shape or dtype, and a gradient that torch.compile would lose."""
    if way == "plain" and name in KERNELS_ONLY:
        pytest.skip("what calls it asks for the kernels first")
    torch.library.opcheck(getattr(torch.ops.lit_llama, name).default, tuple(CALLS[name]()))


def test_every_operator_is_checked() -> None:
    """Catches one that is added and not checked here."""
    found = set(torch.ops.lit_llama)
    assert found - {"twice"} == set(CALLS)


def test_nothing_is_computed_without_numbers() -> None:
    """Catches a kernel that reads tensors which have a shape alone, as in the plan of a run."""
    for name, make in CALLS.items():
        arguments = make()
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
            fake = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments]
            getattr(torch.ops.lit_llama, name).default(*fake)


def many(rows: int, width: int) -> dict[str, list[Tensor | float]]:
    """Arguments of so many rows in float16, for which there is no compiled kernel."""

    def x(*shape: int) -> Tensor:
        return drawn(rows, *shape).half()

    return {
        "norm": [x(width), x(width), drawn(width).half(), 1e-5],
        "norm_backward": [x(width), x(width), x(width), x(width), drawn(width).half(), x(width), 1e-5],
        "rotate": [x(2, width // 2), x(2, width // 2), x(width // 4), x(width // 4), -1.0],
        "swiglu": [x(width // 2), x(width)],
        "swiglu_backward": [x(width), x(width // 2), x(width)],
        "cross_entropy": [x(width), torch.arange(rows) % width, 0.5],
    }


def held(plain: Any, arguments: list[Any]) -> tuple[Any, int]:
    """What an operation gives, and the bytes that it holds at once beside its arguments."""
    given = [nn.Parameter(x, requires_grad=False) for x in arguments if isinstance(x, Tensor)]
    with torch.no_grad(), _Count(nn.ParameterList(given)) as count:
        found = plain(*arguments)
    return found, count.peak


@pytest.mark.parametrize("name", many(1, 8))
def test_plain_operations_hold_little_that_no_plan_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches float32 temporaries as large as all rows, and rows that are computed with those of another piece."""
    plain = getattr(pointwise, f"plain_{name}")
    arguments, others = many(1500, 64)[name], many(1500, 64)[name]
    found, peak = held(plain, arguments)
    monkeypatch.setattr(pointwise, "PIECE", 2000)
    wanted, whole = held(plain, others)
    assert 0 < 3 * peak < whole
    assert wanted is None or torch.equal(found, wanted)
    for one, other in zip(arguments, others, strict=True):
        assert not isinstance(one, Tensor) or torch.equal(one, other)


def test_a_wrong_declaration_is_found() -> None:
    """The checks themselves: catches a test that cannot fail."""
    twice = define("twice(Tensor x) -> Tensor", None, cpu=lambda x: x.mul_(2).clone(), fake=torch.empty_like)
    with pytest.raises(Exception, match="x is not defined as mutable but was mutated"):
        torch.library.opcheck(twice, (torch.ones(3),))
