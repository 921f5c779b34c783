"""The loss: sum of the cross entropies of the trained tokens, logits only where there is a label.

Shapes: T tokens, N trained tokens, C hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_llama.device import Numerics, capabilities
from lit_llama.model.adapters.low_rank import LoRALinear
from lit_llama.model.adapters.rows import WholeLinear
from lit_llama.model.attention.layout import Layout, Packed
from lit_llama.model.fused.layer import can_share
from lit_llama.model.llama import LLaMA
from lit_llama.model.operators.narrow import outer, project_back
from lit_llama.model.operators.pointwise import cross_entropy
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
        parts = head_parts(self.model.lm_head, hidden)
        if parts is None:
            return F.cross_entropy(self.model.logits(hidden).float(), targets, reduction="sum")
        weight, update = parts
        return linear_cross_entropy(hidden, weight, targets, self.model.config.final_logit_softcapping, update)


Update = tuple[Tensor, Tensor]
"""u (N, r) and B (V, r) of an update of low rank, which adds u B' to the logits."""


def head_parts(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Update | None] | None:
    """Return a head's weight (V, C) and its update for hidden states (N, C); None where it is more than these."""
    if type(head) is nn.Linear:
        return head.weight, None
    if isinstance(head, WholeLinear):
        return head.trained, None
    if isinstance(head, LoRALinear):
        u = F.linear(head.dropout(hidden), head.lora_A.to(hidden.dtype))  # (N, r)
        return head.weight, (u, head.lora_B * head.scale)
    return None


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
    loss: Tensor = _LinearCrossEntropy.apply(hidden, *_arguments(weight, targets, softcap, update))  # type: ignore[no-untyped-call]
    return loss


def linear_log_probs(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, update: Update | None = None
) -> Tensor:
    """Compute log p of each target under `hidden @ weight.T`, as `linear_cross_entropy` does.

    Where the head trains, its gradient needs how much each token counts, which only the backward pass knows: the
    logits are computed again there.

    Args:
        hidden: (N, C).
        weight: (V, C).
        targets: (N,).
        softcap: Bound of the logits.
        update: What is added to the logits before they are bounded, if anything is.

    Returns:
        (N,) float32.
    """
    found: Tensor = _LinearLogProbs.apply(hidden, *_arguments(weight, targets, softcap, update))  # type: ignore[no-untyped-call]
    return found


def _arguments(weight: Tensor, targets: Tensor, softcap: float | None, update: Update | None) -> tuple[Any, ...]:
    """Arguments of the functions below after the hidden states."""
    u, b = update or (None, None)
    if not torch.is_grad_enabled():  # or gradients of these would seem to be wanted
        weight, b = weight.detach(), None if b is None else b.detach()
    return weight, targets, softcap, u, b


class _Chunk(NamedTuple):
    """Some of the tokens, as the head has computed them."""

    part: slice  # which
    losses: Tensor  # (n,) cross entropies
    logits: Tensor  # (n, V), in their buffer `lift` times the gradient of the losses
    hidden: Tensor  # (n, C), and the head (V, C), as they were multiplied
    head: Tensor
    lift: float


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
        sums = _Gradients(hidden, weight, u, b, ctx.needs_input_grad)
        for chunk in _chunks(hidden, weight, targets, softcap, sums.wanted, u, b):
            total += chunk.losses.sum()
            sums.take(chunk)
        ctx.save_for_backward(*sums.found())
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


class _LinearLogProbs(torch.autograd.Function):
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
        found = torch.empty(len(targets), device=hidden.device)
        wanted, *others = ctx.needs_input_grad
        ctx.again = any(others)
        # Those of each token's own, whatever it will count.
        sums = _Gradients(hidden, weight, u, b, (wanted and not ctx.again, *(False for _ in others)))
        for chunk in _chunks(hidden, weight, targets, softcap, sums.wanted, u, b):
            found[chunk.part] = -chunk.losses
            sums.take(chunk)
        if ctx.again:
            kind = capabilities(hidden.device).kind
            ctx.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            ctx.softcap = softcap
            ctx.save_for_backward(hidden, weight, targets, u, b)
        else:
            ctx.save_for_backward(sums.hidden)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        factors = -grad_outputs[0]
        if not ctx.again:
            (gradient,) = ctx.saved_tensors
            given = None if gradient is None else gradient * factors[:, None].to(gradient.dtype)
            return given, None, None, None, None, None
        hidden, weight, targets, u, b = ctx.saved_tensors
        # Factors of a scaled loss may be beyond float16: the largest of them comes last.
        largest = torch.cat([factors.abs(), factors.new_full((1,), torch.finfo(torch.float32).tiny)]).amax()
        shares = (factors / largest)[:, None]
        sums = _Gradients(hidden, weight, u, b, ctx.needs_input_grad, largest)
        kind, product, enabled = ctx.autocast
        with torch.autocast(kind, product, enabled=enabled):
            for chunk in _chunks(hidden, weight, targets, ctx.softcap, True, u, b):
                chunk.logits.mul_(shares[chunk.part].to(chunk.logits.dtype))
                sums.take(chunk)
        of_hidden, of_weight, *of_update = sums.found()
        return of_hidden, of_weight, None, None, *of_update


class _Gradients:
    """Gradients of what logits are made of, as they are formed chunk by chunk.

    Args:
        hidden: (N, C).
        weight: (V, C).
        u: (N, r), of an update.
        b: (V, r), of an update.
        wanted: Which are wanted, as `needs_input_grad` of the functions above.
        factor: What all of them are multiplied by in the end; None for nothing.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        u: Tensor | None,
        b: Tensor | None,
        wanted: Sequence[bool],
        factor: Tensor | None = None,
    ) -> None:
        self.wanted, self._factor, self._dtype, self._update = any(wanted), factor, weight.dtype, None
        self.hidden = torch.empty_like(hidden) if wanted[0] else None
        self._weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self._u = self._b = None
        if u is not None and b is not None and any(wanted[4:]):
            self._update = u, b
            self._u, self._b = torch.empty_like(u), torch.zeros_like(b, dtype=torch.float32)

    def take(self, chunk: _Chunk) -> None:
        """Take those of a chunk."""
        part, _, logits, hidden, head, lift = chunk
        if self._weight is not None:
            _add_product(self._weight, logits, hidden, lift)
        if self.hidden is not None:
            self.hidden[part] = (logits @ head).to(self.hidden.dtype) / lift
        if self._update is None or self._u is None or self._b is None:
            return
        u, b = (factor.to(logits.dtype) for factor in (self._update[0][part], self._update[1]))
        of_u = logits.new_empty(len(logits), b.shape[1])
        project_back(of_u, logits, b)
        self._u[part] = of_u.to(self._u.dtype) / lift
        # A sum over many tokens may be beyond float16.
        summed = torch.mm(u.float().t(), logits.float()) if logits.dtype == torch.float16 else outer(u, logits)
        self._b.add_(summed.t(), alpha=1 / lift)

    def found(self) -> tuple[Tensor | None, ...]:
        """Return those of hidden states, weight, u and B; None for those that are not wanted."""
        sums = [self.hidden, self._weight, self._u, self._b]
        if self._factor is not None:
            sums = [None if found is None else found.mul_(self._factor.to(found.dtype)) for found in sums]
        of_hidden, of_weight, of_u, of_b = sums
        return of_hidden, None if of_weight is None else of_weight.to(self._dtype), of_u, of_b


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float | None,
    gradients: bool,
    u: Tensor | None,
    b: Tensor | None,
) -> Iterator[_Chunk]:
    """Yield a part of the tokens at a time; the gradient of their losses is in place of the logits where it is asked
    for."""
    kind = capabilities(hidden.device).kind
    product = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    head, lift = weight.to(product), _LIFT if product == torch.float16 else 1.0
    buffer = head.new_empty(min(CHUNK, len(targets)), len(head))
    with torch.autocast(kind, enabled=False):
        for start in range(0, len(targets), CHUNK):
            part = slice(start, start + CHUNK)
            given = hidden[part].to(product)
            logits = buffer[: len(given)]  # (n, V)
            if u is None or b is None:
                torch.mm(given, head.t(), out=logits)
            else:
                torch.mm(u[part].to(product), b.to(product).t(), out=logits)
                logits.addmm_(given, head.t())
            slope = None if softcap is None else _bound(logits, softcap)
            losses = cross_entropy(logits, targets[part], lift if gradients else 0.0)
            if slope is not None and gradients:
                logits *= slope
            yield _Chunk(part, losses, logits, given, head, lift)


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
