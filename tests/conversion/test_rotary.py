"""The order of the rows of q and k, written out row by row."""

import pytest
import torch

from lit_llama.conversion.tensors import halves_from_pairs, pairs_from_halves


@pytest.mark.parametrize("tail", [(), (3,)])
def test_the_rows_of_each_head_move_as_written_here(tail: tuple[int, ...]) -> None:
    """Catches the permutation in the wrong direction, across heads, and one that needs a matrix."""
    rows = torch.arange(16 * 3).reshape(16, 3) if tail else torch.arange(16)
    halves = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]  # two heads of 8
    assert torch.equal(halves_from_pairs(rows, 2), rows[halves])
    assert torch.equal(pairs_from_halves(rows[halves], 2), rows)
    assert not torch.equal(halves_from_pairs(rows, 2), pairs_from_halves(rows, 2)), "heads of 8 tell the two apart"
