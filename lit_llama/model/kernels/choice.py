"""Choice of tokens on a CPU in one pass over their numbers: sampling.cpp as operators.

Shapes: N rows, V tokens, P places of what is counted.
"""

import torch
from torch import Tensor

from lit_llama.model.operators.define import define
from lit_llama.model.operators.kernels import call, native


def chooses(scores: Tensor) -> bool:
    """Whether there are kernels for scores (N, V)."""
    return scores.stride(1) == 1 and native(scores)


def peaks(scores: Tensor, rows: Tensor) -> Tensor:
    """Choose the likeliest tokens, the first of equals: (., V) and (N,) -> (N,); -1 where scores are not finite."""
    ids: Tensor = _peaks(scores, rows)
    return ids


def draws(chances: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, numbers: Tensor) -> Tensor:
    """Draw tokens among those that are kept.

    Args:
        chances: Probabilities (N, V) in float32, in one piece.
        top_k: (N, 1) in int64; V keeps all.
        top_p: (N, 1) in float64; 1 keeps all.
        min_p: (N, 1) in float32.
        numbers: (N,) in float64, at random in [0, 1).

    Returns:
        (N,); -1 where probabilities are NaN.
    """
    ids: Tensor = _draws(chances, top_k, top_p, min_p, numbers)
    return ids


def penalise(
    scores: Tensor, rows: Tensor, places: Tensor, counts: Tensor, seen: Tensor, penalties: tuple[Tensor, ...]
) -> None:
    """Take penalties from rows of scores (., V) in float32, in place.

    Args:
        scores: In one piece.
        rows: Which (N).
        places: Of each row among what is counted (N).
        counts: Of each token in the answer (P, V), in int32.
        seen: Whether it stands in prompt or answer (P, V).
        penalties: Repetition, presence and frequency: (N, 1) each, in float32.
    """
    _penalise(scores, rows, places, counts, seen, *penalties)


# ---- the kernels, and the operators


def _cpu_peaks(scores: Tensor, rows: Tensor) -> Tensor:
    ids = torch.empty_like(rows)
    call("peak_rows", scores.dtype, scores, scores.stride(0), scores.shape[1], rows, len(rows), ids)
    return ids


def _cpu_draws(chances: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, numbers: Tensor) -> Tensor:
    ids = torch.empty_like(numbers, dtype=torch.int64)
    call("draw_rows", torch.float32, chances, *chances.shape, top_k, top_p, min_p, numbers, ids)
    return ids


def _cpu_penalise(scores: Tensor, rows: Tensor, places: Tensor, *others: Tensor) -> None:
    call("penalise_rows", torch.float32, scores, scores.shape[1], rows, places, len(rows), *others)


_peaks = define(
    "peaks(Tensor scores, Tensor rows) -> Tensor",
    None,
    cpu=_cpu_peaks,
    fake=lambda scores, rows: torch.empty_like(rows),
)
_draws = define(
    "draws(Tensor chances, Tensor top_k, Tensor top_p, Tensor min_p, Tensor numbers) -> Tensor",
    None,
    cpu=_cpu_draws,
    fake=lambda chances, top_k, top_p, min_p, numbers: torch.empty_like(numbers, dtype=torch.int64),
)
_penalise = define(
    "penalise(Tensor(a!) scores, Tensor rows, Tensor places, Tensor counts, Tensor seen, Tensor repetition, "
    "Tensor presence, Tensor frequency) -> ()",
    None,
    cpu=_cpu_penalise,
)
