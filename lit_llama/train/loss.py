"""The loss: sum of the cross entropies of the trained tokens, logits only where there is a label.

Shapes: T tokens, N trained tokens, C hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.device import Numerics
from lit_llama.model.attention.layout import Layout, Packed
from lit_llama.model.fused.layer import can_share
from lit_llama.model.llama import LLaMA
from lit_llama.model.low_rank import LoRALinear
from lit_llama.model.operators.narrow import outer, project_back
from lit_llama.model.operators.pointwise import cross_entropy
from lit_llama.model.rows import WholeLinear
from lit_llama.text.dataset.batches import Batch, Rows

CHUNK = 512
"""Trained tokens whose logits are held at a time."""
PLACES = 32
"""On a CPU, batches fill multiples of so many places: for each other number oneDNN makes and keeps other code."""
_LIFT = 256.0
"""Float16 loses values below 6e-8, which a sure token's gradient is soon; the scale of the loss comes only later."""


class TokenLoss(nn.Module):
    """A model together with its loss, so that one call is all a device does for a batch."""

    def __init__(self, model: LLaMA, numerics: Numerics | None = None) -> None:
        super().__init__()
        self.model, self.numerics = model, numerics

    @property
    def shares(self) -> bool:
        """Whether batches should have what their samples begin with only once."""
        return can_share(self.model)

    def of_batch(self, batch: Batch) -> Tensor:
        """Compute the loss of a batch, wherever the model is."""
        return self.computed(batch)

    def divisor(self, split: Rows, rows: list[int]) -> int:
        """Count what the losses of some rows are divided by: their trained tokens."""
        return split.trained_tokens(rows)

    def weight(self, batch: Batch) -> int:
        """Count the share of a batch in that number."""
        return len(batch.targets)

    def prepare(self, split: Rows, rows: list[int], micro_batch_tokens: int) -> None:
        """Find what the losses of some rows need of all of them."""

    def refer(self, split: Rows, micro_batch_tokens: int, tell: Callable[[int], None]) -> None:
        """Find what the losses of a run need of the model as it begins."""

    def measured(self) -> dict[str, float]:
        """Return what else is known of the rows since the last call, by the names of metrics.csv."""
        return {}

    def computed(self, batch: Batch) -> Tensor:
        """Return what `forward` gives for a batch, wherever the model is."""
        device = self.model.lm_head.weight.device
        batch = batch.padded(PLACES) if device.type == "cpu" else batch
        ids, select, targets = (torch.from_numpy(x) for x in (batch.input_ids, batch.select, batch.targets))
        if device.type == "cuda":  # from pinned memory, so that nobody waits for what the GPU is doing
            ids, select, targets = (x.pin_memory().to(device, non_blocking=True) for x in (ids, select, targets))
        found: Tensor = self(ids, batch.lengths, select, targets, batch.parents)
        return found

    def forward(
        self, input_ids: Tensor, lengths: Sequence[int], select: Tensor, targets: Tensor, parents: Sequence[int] = ()
    ) -> Tensor:
        """Compute the sum of -log p(target) over the selected places.

        Args:
            input_ids: (T,) samples laid end to end.
            lengths: Tokens of each sample.
            select: (N,) places that predict a trained token.
            targets: (N,) those tokens.
            parents: Of the samples that go on from another, see `Packed`.

        Returns:
            A float32 scalar.
        """
        with self.numerics.autocast() if self.numerics else nullcontext():
            return self.of_layout(input_ids, Packed(lengths, input_ids.device, parents), select, targets)

    def of_layout(self, input_ids: Tensor, layout: Layout, select: Tensor, targets: Tensor) -> Tensor:
        """Compute the loss of samples whose layout is known."""
        hidden = self.model.model(input_ids, layout).index_select(0, select)  # (N, C)
        head, cap = self.model.lm_head, self.model.config.final_logit_softcapping
        if type(head) is nn.Linear:
            return linear_cross_entropy(hidden, head.weight, targets, cap)
        if isinstance(head, WholeLinear):
            return linear_cross_entropy(hidden, head.trained, targets, cap)
        if isinstance(head, LoRALinear):
            u = F.linear(head.dropout(hidden), head.lora_A.to(hidden.dtype))  # (N, r)
            return linear_cross_entropy(hidden, head.weight, targets, cap, (u, head.lora_B * head.scale))
        return F.cross_entropy(self.model.logits(hidden).float(), targets, reduction="sum")


Update = tuple[Tensor, Tensor]
"""u (N, r) and B (V, r) of an update of low rank, which adds u B' to the logits."""


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, update: Update | None = None
) -> Tensor:
    """Compute the summed cross entropy of `hidden @ weight.T` without ever holding all logits.

    The gradients are formed along with the loss, chunk by chunk in the buffer of the logits (after Hsu et al. 2024,
    arXiv:2410.10989); that of the weight, where it trains, is summed up in float32.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,).
        softcap: Bound c of the logits, which are c tanh(logits / c); None for none.
        update: What is added to the logits before they are bounded, if anything is.

    Returns:
        A float32 scalar.
    """
    u, b = update or (None, None)
    if not torch.is_grad_enabled():
        weight, b = weight.detach(), None if b is None else b.detach()  # or their gradients would seem to be wanted
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, softcap, u, b)  # type: ignore[no-untyped-call]
    return loss


def linear_log_probs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """Compute log p of each target under `hidden @ weight.T`, for a frozen weight, as `linear_cross_entropy` does.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,).
        softcap: Bound of the logits.

    Returns:
        (N,) float32.
    """
    found: Tensor = _LinearLogProbs.apply(hidden, weight.detach(), targets, softcap)  # type: ignore[no-untyped-call]
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        softcap: float | None,
        u: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        total = torch.zeros((), device=hidden.device)
        wanted, trained, _, _, *updated = ctx.needs_input_grad
        gradient = torch.empty_like(hidden) if wanted else None
        summed = torch.zeros_like(weight, dtype=torch.float32) if trained else None
        update = _Added(u, b, any(updated)) if u is not None and b is not None else None
        gradients = wanted or trained or any(updated)
        for part, losses, logits, given, head, lift in _chunks(hidden, weight, targets, softcap, gradients, update):
            total += losses.sum()
            if summed is not None:
                _add_product(summed, logits, given, lift)
            if gradient is not None:
                gradient[part] = (logits @ head).to(gradient.dtype) / lift
            if update is not None:
                update.take_gradients(part, logits, lift)
        of_update = (None, None) if update is None else update.gradients
        ctx.save_for_backward(gradient, None if summed is None else summed.to(weight.dtype), *of_update)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradient, summed, of_u, of_b = ctx.saved_tensors
        factor = grad_outputs[0]
        return (
            None if gradient is None else gradient * factor.to(gradient.dtype),
            None if summed is None else summed.mul_(factor.to(summed.dtype)),  # in place, as it is large
            None,
            None,
            *(None if found is None else found * factor.to(found.dtype) for found in (of_u, of_b)),
        )


class _Added:
    """An update of low rank on the logits, and its gradients as they are summed up.

    Args:
        u: (N, r).
        b: (V, r).
        trained: Whether gradients are wanted.
    """

    def __init__(self, u: Tensor, b: Tensor, trained: bool) -> None:
        self._u, self._b = u, b
        self.gradients: tuple[Tensor | None, Tensor | None] = (None, None)
        if trained:
            self.gradients = torch.empty_like(u), torch.zeros_like(b, dtype=torch.float32)

    def start(self, logits: Tensor, part: slice) -> None:
        """Fill logits (n, V) with u B'."""
        torch.mm(self._u[part].to(logits.dtype), self._b.to(logits.dtype).t(), out=logits)

    def take_gradients(self, part: slice, logits: Tensor, lift: float) -> None:
        """Take those of a chunk; `logits` (n, V) holds `lift` times their gradient."""
        of_u, of_b = self.gradients
        if of_u is None or of_b is None:
            return
        u, found = self._u[part].to(logits.dtype), logits.new_empty(len(logits), self._b.shape[1])
        project_back(found, logits, self._b.to(logits.dtype))
        of_u[part] = found.to(of_u.dtype) / lift
        # A sum over many tokens may be beyond float16.
        summed = torch.mm(u.float().t(), logits.float()) if logits.dtype == torch.float16 else outer(u, logits)
        of_b.add_(summed.t(), alpha=1 / lift)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
        found = torch.empty(len(targets), device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None  # of each token's own, whatever it will count
        for part, losses, logits, _, head, lift in _chunks(hidden, weight, targets, softcap, wanted):
            found[part] = -losses
            if gradient is not None:
                gradient[part] = (logits @ head).to(gradient.dtype) / -lift
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad_outputs[0][:, None].to(gradient.dtype), None, None, None


_Chunk = tuple[slice, Tensor, Tensor, Tensor, Tensor, float]


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None,
    gradients: bool,
    update: _Added | None = None,
) -> Iterator[_Chunk]:
    """A part of the tokens at a time: which, their cross entropies, in the buffer of their logits the gradient of
    these times a factor, their hidden states and the head as they were multiplied, and that factor."""
    kind = hidden.device.type
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    head, lift = weight.to(product), _LIFT if product == torch.float16 else 1.0
    buffer = head.new_empty(min(CHUNK, len(targets)), len(head))
    with torch.autocast(kind, enabled=False):
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            given = hidden[part].to(product)
            logits = buffer[: len(given)]  # (n, V)
            if update is None:
                torch.mm(given, head.t(), out=logits)
            else:
                update.start(logits, part)
                logits.addmm_(given, head.t())
            slope = None if softcap is None else _bound(logits, softcap)
            losses = cross_entropy(logits, targets[part], lift if gradients else 0.0)
            if slope is not None and gradients:
                logits *= slope
            yield part, losses, logits, given, head, lift


def _bound(logits: Tensor, softcap: float) -> Tensor:
    """Bound logits in place; the slope of the bounded ones."""
    ratio = logits.div_(softcap).tanh_()
    slope = 1 - ratio.square()
    logits.mul_(softcap)
    return slope


def _add_product(summed: Tensor, logits: Tensor, hidden: Tensor, lift: float) -> None:
    """Add the gradient of the weight by a chunk: (V, C) += (V, n) @ (n, C).

    The sum over many tokens may be beyond float16, so there it is formed in float32.
    """
    if logits.dtype == torch.bfloat16:
        summed += logits.T @ hidden
    else:
        summed.addmm_(logits.T.float(), hidden.float(), alpha=1 / lift)
