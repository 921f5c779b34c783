"""Prefixes that samples share: computed once for all of them, they give the same loss and gradients out of less work.

A chat template or an instruction's preamble is a tenth to a half of short samples. Tokens see what comes before them
and nothing else, so that the states of a common beginning are the same in all samples; its gradient is the sum of what
they send back (as PrefixGrouper does for groups of one prompt: Liu et al. 2025, arXiv:2506.05433). That holds while no
token of the beginning carries a loss of its own, and nothing is drawn for each token.
"""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
LEAST = 8
"""Tokens that are worth a sample of their own."""


def beginnings(samples: Sequence[Ids], most: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Divide samples into groups with common beginnings so that most tokens are saved.

    Args:
        samples: Ids of each.
        most: How many first tokens of each may be shared.

    Returns:
        For each group, length of the beginning and samples that have it: two or more, each sample in one group at most.
    """
    able = [index for index, limit in enumerate(most) if limit >= LEAST]
    return _divided(samples, most, able)[1]


def _divided(samples: Sequence[Ids], most: Sequence[int], group: list[int]) -> tuple[int, list[tuple[int, list[int]]]]:
    """Tokens saved, and the groups: all together, or those apart that go on differently, whichever saves more."""
    if len(group) < 2:
        return 0, []
    shared = _common(samples, most, group)
    together = shared * (len(group) - 1) if shared >= LEAST else 0
    apart: dict[int, list[int]] = defaultdict(list)
    for index in group:
        if most[index] > shared:
            apart[int(samples[index][shared])].append(index)
    parts = [_divided(samples, most, part) for part in apart.values() if len(part) < len(group)]
    saved = sum(part for part, _ in parts)
    if saved > together:
        return saved, [found for _, groups in parts for found in groups]
    return together, [(shared, group)] if together else []


def _common(samples: Sequence[Ids], most: Sequence[int], group: list[int]) -> int:
    """Length of the longest beginning that all of a group have and may share."""
    first, shared = samples[group[0]], min(most[index] for index in group)
    for index in group[1:]:
        different = np.flatnonzero(samples[index][:shared] != first[:shared])
        shared = int(different[0]) if len(different) else shared
    return shared
