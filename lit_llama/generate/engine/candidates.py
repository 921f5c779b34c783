"""Tokens that top_k, top_p and min_p leave, and the draw among them.

In the library's own operations for GPUs, and for CPUs without a compiler; the kernels draw the same tokens.

Shapes: D rows that draw, V vocabulary, K likeliest tokens.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_llama.generate.engine.request import Sampling
from lit_llama.model.kernels.choice import draws

_ROWS = 4  # for each thread, whose probabilities are made at a time
_NUMBERS = 1 << 18  # at a time, or more
_LIKELIEST = 256  # tokens among which those that are kept are looked for first
_WIDTH = 256  # tokens of a block whose probabilities are added up first


class Rows:
    """D rows that draw, all of them among everything or all among the likeliest, and how each narrows it."""

    def __init__(self, rows: Sequence[int], own: Sequence[Sampling], width: int, device: torch.device) -> None:
        self.rows, self.index = rows, on_device(rows, device)
        self.temperature = on_device([one.temperature for one in own], device, torch.float32)[:, None]  # (D, 1)
        ks = [one.top_k if 0 < one.top_k < width else width for one in own]
        self.top_k = on_device(ks, device)[:, None]  # V where a row keeps all
        self.top_p = on_device([one.top_p for one in own], device, torch.float64)[:, None]
        self.min_p = on_device([one.min_p for one in own], device, torch.float32)[:, None]
        self.limited = self.top_k < width  # (D, 1)
        self.narrowed = any(map(narrows, own))
        most = max([_LIKELIEST, *(k + 1 for k in ks if k < width)])
        self.first = width if device.type == "cuda" else min(most, width)  # likeliest tokens looked at first


def narrows(own: Sampling) -> bool:
    """Whether some tokens are left out."""
    return own.top_k > 0 or own.top_p < 1 or own.min_p > 0


def on_device(values: Sequence[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a few numbers on the device; a GPU does not wait for them."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class Draws:
    """Random draws by the kernels of a CPU, a few rows at a time, whose probabilities stay in its caches.

    Args:
        width: Tokens of a row (V).
    """

    def __init__(self, width: int) -> None:
        self._memory = torch.empty(2, 0, width)

    def __call__(self, scores: Tensor, rows: Rows, numbers: Tensor) -> Tensor:
        """Draw by numbers (D,) in [0, 1) in float64: scores (N, V) -> ids (D,); -1 where they are not finite."""
        size = max(_ROWS * torch.get_num_threads(), _NUMBERS // max(scores.shape[1], 1))
        if self._memory.shape[1] < min(size, len(numbers)):
            self._memory = torch.empty(2, min(size, len(numbers)), self._memory.shape[2])
        ids = []
        for first in range(0, len(numbers), size):
            own = slice(first, first + size)
            scaled, chances = self._memory[:, : len(numbers[own])]
            torch.div(scores.index_select(0, rows.index[own]), rows.temperature[own], out=scaled)
            torch.softmax(scaled, -1, out=chances)
            ids.append(draws(chances, rows.top_k[own], rows.top_p[own], rows.min_p[own], numbers[own]))
        return torch.cat(ids)


def candidates(scores: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Return the candidates of a draw: scores (N, V) -> probabilities (D, K), whose rows need not sum to 1, and ids (D,
    K).

    The temperature first, then top_k, top_p and min_p, each of what the one before it left, as in transformers. Ids are
    None where K is V, in order otherwise; behind the last one kept, probabilities are 0.

    Most often few tokens are kept: they are looked for among the likeliest, and among more only where they may go on
    beyond them. On a GPU all are sorted at once, as asking would make it wait.
    """
    chances = (scores.index_select(0, rows.index).float() / rows.temperature).softmax(-1)
    if not rows.narrowed:
        return chances, None
    size, width = rows.first, chances.shape[-1]
    while True:
        likeliest, ids = chances.topk(size)  # (D, K), sorted
        kept, complete = _kept(likeliest, rows)
        if size == width or bool(complete.all()):
            break
        size = min(8 * size, width)
    ids, order = ids.masked_fill(~kept, width).sort()
    return likeliest.masked_fill(~kept, 0).gather(1, order), ids


def _kept(likeliest: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """Which of the likeliest tokens (D, K) pass top_k, top_p and min_p, and for which rows no others do (D,)."""
    floor = likeliest.gather(1, rows.top_k.clamp(max=likeliest.shape[1]) - 1)
    first = ~rows.limited | (likeliest >= floor)
    among = likeliest.masked_fill(~first, 0)
    cumulated = among.cumsum(-1, dtype=torch.float64)
    total = torch.where(rows.limited, cumulated[:, -1:], 1.0)
    inside = (cumulated - among < rows.top_p * total).sum(-1, keepdim=True).clamp(min=1)  # as the likelier are not all
    least = torch.maximum(likeliest.gather(1, inside - 1), rows.min_p * likeliest[:, :1])
    least = torch.where(rows.top_p < 1, least, rows.min_p * likeliest[:, :1])
    kept = first & (likeliest >= least)
    return kept, ~kept[:, -1] & ~(first & rows.limited)[:, -1]


def draw(chances: Tensor, numbers: Tensor) -> Tensor:
    """Draw the places at which the cumulated probabilities of rows exceed their random numbers: (D, K) and (D,) ->
    (D,).

    Probabilities are cumulated in their order, in float64 and row by row, so that a draw does not depend on other rows;
    of many, whole blocks first, and then those of the block that is hit.
    """
    if chances.shape[1] <= 4 * _WIDTH:
        cumulated = chances.cumsum(-1, dtype=torch.float64)
        return _hit(cumulated, numbers * cumulated[:, -1])
    blocks = F.pad(chances, (0, -chances.shape[1] % _WIDTH)).unflatten(1, (-1, _WIDTH))  # (D, V / 256, 256)
    sums = blocks.sum(-1, dtype=torch.float64)
    cumulated = sums.cumsum(-1)
    target = numbers * cumulated[:, -1]
    block = _hit(cumulated, target)[:, None]
    before = (cumulated.gather(1, block) - sums.gather(1, block))[:, 0]
    inside = blocks.gather(1, block[:, :, None].expand(-1, 1, _WIDTH))[:, 0].cumsum(-1, dtype=torch.float64)
    return block[:, 0] * _WIDTH + _hit(inside, target - before)


def _hit(cumulated: Tensor, target: Tensor) -> Tensor:
    """The first place that exceeds a target, one with a probability; rounding does not reach beyond either end."""
    total = cumulated[:, -1]
    below = torch.nextafter(total, torch.zeros_like(total))
    place = torch.searchsorted(cumulated, target.clamp(min=0).minimum(below)[:, None], right=True)
    return place[:, 0].clamp(max=cumulated.shape[1] - 1)
