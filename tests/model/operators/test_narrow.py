"""Products with one narrow side, against float64 and against the library's."""

import pytest
import torch
from torch import Tensor

from lit_llama.model.operators import kernels, narrow

SHAPES = [(7, 6, 3), (1, 2, 1), (33, 70, 9), (12, 576, 16), (200, 96, 24), (65, 130, 64), (5, 34, 80), (5, 33, 4)]
"""T, n, R: rows that fill no tile, more columns than the kernels take, and an odd number of neighbours."""


def inside(tensor: Tensor, beyond: float = torch.nan) -> Tensor:
    """The same numbers as columns of a wider tensor, with others on both sides that must not be read."""
    wide = torch.full((len(tensor), tensor.shape[1] + 4), beyond, dtype=tensor.dtype)
    wide[:, 2:-2] = tensor
    return wide[:, 2:-2]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["compiled", "plain"])
def test_products_are_those_in_float64(
    way: str, dtype: torch.dtype, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an odd last token that is paired with what lies behind it, columns beyond the last, and rows left out."""
    if way == "plain":
        monkeypatch.setattr(kernels, "compiled", lambda: None)
    tokens, columns, few = shape
    draw = torch.Generator().manual_seed(0)
    x, u, a = (
        torch.randn(size, generator=draw).to(dtype) for size in ((tokens, columns), (tokens, few), (few, columns))
    )
    for product, other in ((narrow.project, a), (narrow.project_back, a.t().contiguous())):
        found = inside(torch.full((tokens, few), torch.nan, dtype=dtype))
        product(found, inside(x), inside(other))
        bound = 1e-6 if dtype == torch.float32 else 4e-3
        wanted = x.double() @ a.double().t()
        assert (found - wanted).norm() <= bound * wanted.norm()
    sums, wanted = narrow.outer(inside(u), inside(x)), u.double().t() @ x.double()
    assert sums.dtype == torch.float32 and sums.shape == (few, columns)
    exact = dtype == torch.float32 or (way == "compiled" and few <= narrow.MOST and not columns % 2)
    assert (sums - wanted).norm() <= (1e-6 if exact else 4e-3) * wanted.norm()


def test_columns_that_lie_apart_are_read_where_they_are() -> None:
    """Catches a transposed matrix that is read as if its rows were in one piece."""
    x, u = torch.randn(20, 6).t().contiguous().t(), torch.randn(20, 4)
    torch.testing.assert_close(narrow.outer(u, x), u.t() @ x)
    torch.testing.assert_close(narrow.outer(x, u), x.t() @ u)


@pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler")
def test_sums_do_not_depend_on_the_threads() -> None:
    """Catches columns of which two threads have a share, or none."""
    x, u = torch.randn(130, 1000), torch.randn(130, 10)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3, 8):
        torch.set_num_threads(threads)
        found.append(narrow.outer(u, x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.skipif(kernels.compiled() is None, reason="no C++ compiler")
def test_what_is_no_number_stays_none() -> None:
    """Catches a last token that is multiplied by the zero beside it in place of its own."""
    x, u = torch.ones(3, 4).bfloat16(), torch.ones(3, 2).bfloat16()
    x[2, 1] = torch.nan
    assert narrow.outer(u, x).isnan().any(0).tolist() == [False, True, False, False]
