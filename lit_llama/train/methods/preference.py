"""Losses of pairs of answers: DPO and its relatives, on the log probabilities of whole answers.

Several processes divide the rows of a step, of an evaluation and of the reference. What is measured of the rows, or
needed of all of them, is a sum over the processes.

Shapes: R rows of a batch, N tokens of their answers. Two columns are the chosen and the rejected answer.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file
from torch import Tensor

from lit_llama.device import Numerics
from lit_llama.errors import IntegrityError
from lit_llama.model.attention.layout import Layout
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.batches import Batch, Rows, shared_micro_batches
from lit_llama.text.dataset.pair_batches import PairBatch, PairRows
from lit_llama.train.config import PreferenceConfig
from lit_llama.train.distributed.processes import ALONE, Processes
from lit_llama.train.loss import TokenLoss, head_parts, linear_log_probs

REFERENCE_FILE = "reference.safetensors"
"""In a state, log p of every answer before training."""
_MEASURES = 10
"""Sums that `PairLoss` keeps of its rows."""
_SURE = -1e-7
"""Mean log p of an answer above which its odds are taken as this one's: those of a certain answer are infinite."""


def pair_losses(
    log_probs: Tensor, counts: Tensor, reference: Tensor, config: PreferenceConfig, baseline: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Compute the loss of each row and the rewards of its answers.

    Args:
        log_probs: (R, 2) log p of each answer, the sum over its tokens.
        counts: (R, 2) tokens of each answer; 0 where there is none, which kto alone allows.
        reference: (R, 2) log p of each answer before training; where there is no reference, of no meaning.
        config: Which loss.
        baseline: How far the model has moved from its reference in general; of kto.

    Returns:
        (R,) losses, and (R, 2) rewards without a gradient.
    """
    beta, smoothing = config.strength, config.label_smoothing
    means = log_probs / counts.clamp(min=1)
    if config.loss == "simpo":
        rewards = beta * means
        losses = _smoothed(rewards[:, 0] - rewards[:, 1] - config.lead, smoothing)
    elif config.loss == "orpo":
        rewards = beta * means
        sure = means.clamp(max=_SURE)
        log_odds = sure - torch.log(-torch.expm1(sure))
        losses = -means[:, 0] - beta * F.logsigmoid(log_odds[:, 0] - log_odds[:, 1])
    elif config.loss == "ipo":
        rewards = beta * (log_probs - reference) / counts.clamp(min=1)
        losses = ((rewards[:, 0] - rewards[:, 1]) / beta - 1 / (2 * beta)) ** 2
    elif config.loss == "kto":
        rewards = beta * (log_probs - reference)
        good = config.desirable_weight * torch.sigmoid(beta * baseline - rewards[:, 0])  # 1 - sigmoid(x)
        bad = config.undesirable_weight * torch.sigmoid(rewards[:, 1] - beta * baseline)
        losses = (torch.stack([good, bad], 1) * (counts > 0)).sum(1)
    else:
        rewards = beta * (log_probs - reference)
        losses = _smoothed(rewards[:, 0] - rewards[:, 1], smoothing)
    if config.sft_weight:
        losses = losses - config.sft_weight * means[:, 0] * (counts[:, 0] > 0)
    return losses, rewards.detach()


def _smoothed(lead: Tensor, smoothing: float) -> Tensor:
    """-log sigmoid(lead) where a share of the labels is the wrong way round: (R,)."""
    return -(1 - smoothing) * F.logsigmoid(lead) - smoothing * F.logsigmoid(-lead)


class PairLoss(TokenLoss):
    """A model together with the loss of preference rows.

    Args:
        model: What trains.
        numerics: In which numbers.
        config: Which loss.
        processes: Those that share the rows; all of them must call what needs all rows.
    """

    def __init__(
        self, model: LLaMA, numerics: Numerics | None, config: PreferenceConfig, processes: Processes = ALONE
    ) -> None:
        super().__init__(model, numerics)
        self.config, self.baseline, self._processes = config, 0.0, processes
        self._measured: list[Tensor] = []

    def of_batch(self, batch: Batch) -> Tensor:
        """Compute the sum of the losses of a batch's rows."""
        assert isinstance(batch, PairBatch)
        log_probs = self.log_probs(batch)
        counts, reference = (torch.from_numpy(x).to(log_probs.device) for x in (batch.counts, batch.reference))
        losses, rewards = pair_losses(log_probs, counts, reference, self.config, self.baseline)
        self._measure(rewards, log_probs.detach() - reference, counts)
        return losses.sum()

    def log_probs(self, batch: PairBatch) -> Tensor:
        """Compute log p of each answer: (R, 2) float64, 0 where there is none."""
        if not batch.rows:  # of a process that computes along with others
            return self.computed(batch).double().reshape(0, 2)
        # In float64, as differences of sums over hundreds of tokens decide; and one after the other, as atomic sums on
        # a GPU would come out otherwise each time.
        parts = self.computed(batch).double().split(batch.counts.flatten().tolist())
        return torch.stack([part.sum() for part in parts]).unflatten(0, (-1, 2))

    def of_layout(self, input_ids: Tensor, layout: Layout, select: Tensor, targets: Tensor) -> Tensor:
        """Compute log p of each target: (N,) float32."""
        hidden = self.model.model(input_ids, layout).index_select(0, select)  # (N, C)
        parts = head_parts(self.model.lm_head, hidden)
        if parts is None:
            return -F.cross_entropy(self.model.logits(hidden).float(), targets, reduction="none")
        weight, update = parts
        return linear_log_probs(hidden, weight, targets, self.model.config.final_logit_softcapping, update)

    def divisor(self, split: Rows, rows: list[int]) -> int:
        """Count pairs; of kto, answers."""
        assert isinstance(split, PairRows)
        return int((split.answers[rows] > 0).sum()) if self.config.loss == "kto" else len(rows)

    def weight(self, batch: Batch) -> int:
        """Count the pairs of a batch; of kto, answers."""
        assert isinstance(batch, PairBatch)
        return int((batch.counts > 0).sum()) if self.config.loss == "kto" else len(batch.rows)

    def prepare(self, split: Rows, rows: list[int], micro_batch_tokens: int) -> None:
        """Estimate how far the model has moved from its reference on the prompts of some rows, as kto compares with."""
        assert isinstance(split, PairRows)
        if self.config.loss != "kto":
            return
        others = split.others.counted(self.shares)
        found = [
            float((log_probs - batch.reference)[:, 0].sum())
            for batch, log_probs in self._computed(others, rows, micro_batch_tokens)
        ]
        (total,) = self._processes.sum([sum(found)], self._device)
        self.baseline = max(total / len(rows), 0.0)

    def refer(self, split: Rows, micro_batch_tokens: int, tell: Callable[[int], None]) -> None:
        """Fill in the reference of all rows with what the model computes now, in every process.

        Args:
            split: The rows.
            micro_batch_tokens: Most tokens per forward pass.
            tell: Takes how many rows are done, as often in every process; what it raises ends the work.
        """
        assert isinstance(split, PairRows)
        split.reference[:] = 0
        done = 0
        for rows in [split, *([split.others] if self.config.loss == "kto" else [])] if self.config.refers else []:
            found = np.zeros_like(rows.reference)
            for batch, log_probs in self._computed(rows.counted(self.shares), range(len(rows)), micro_batch_tokens):
                found[batch.rows] = log_probs
                done += int(self._processes.sum([len(batch.rows)], self._device)[0])
                tell(done)
            # Of each row one process has the value, and the others have zero.
            rows.reference[:] = np.reshape(self._processes.sum(found.ravel().tolist(), self._device), found.shape)

    @torch.no_grad()
    def _computed(
        self, split: PairRows, rows: "list[int] | range", tokens: int
    ) -> Iterator[tuple[PairBatch, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]]:
        """Log p of the answers of this process's share of rows, without dropout or noise, batch by batch.

        There are as many batches in every process; those that fill up have no rows.
        """
        training, here = self.training, self._processes
        self.eval()
        try:
            for batch in shared_micro_batches(
                split, rows, tokens, here.rank, here.size, even=here.size > 1, share_beginnings=self.shares
            ):
                assert isinstance(batch, PairBatch)
                yield batch, self.log_probs(batch).cpu().numpy()
        finally:
            self.train(training)

    @property
    def _device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def _measure(self, rewards: Tensor, moved: Tensor, counts: Tensor) -> None:
        """Add up what a batch says of its rows."""
        there = counts > 0
        both = there.all(1)
        right = both & (rewards[:, 0] > rewards[:, 1])
        found = [both.sum(), right.sum(), there.sum(), (moved.abs() * there).sum()]
        self._measured.append(
            torch.cat([torch.stack(found), (rewards * there).sum(0), there.sum(0), counts.sum(0)]).double()
        )

    def measured(self) -> dict[str, float]:
        """Return means over the rows of all processes since the last call, by the names of metrics.csv; what has no
        rows is left out.
        """
        own = torch.stack(self._measured).sum(0).tolist() if self._measured else [0.0] * _MEASURES
        self._measured = []
        pairs, right, answers, drift, *sides = self._processes.sum(own, self._device)
        if not answers:
            return {}
        rewards, there, tokens = sides[:2], sides[2:4], sides[4:]
        found = {"accuracy": right / pairs} if pairs else {}
        for name, reward, count, length in zip(("chosen", "rejected"), rewards, there, tokens, strict=True):
            if count:
                found |= {f"{name}_reward": reward / count, f"{name}_length": length / count}
        if all(there):
            found["margin"] = found["chosen_reward"] - found["rejected_reward"]
        return found | ({"drift": drift / answers} if self.config.refers else {})


def write_reference(splits: Mapping[str, Rows], folder: Path) -> None:
    """Write the references of preference rows into a state; nothing where a run has none."""
    if found := _references(splits):
        save_file(found, folder / REFERENCE_FILE)


def read_reference(splits: Mapping[str, Rows], folder: Path) -> None:
    """Put what `write_reference` wrote back.

    Raises:
        IntegrityError: It is that of other rows.
    """
    if not (wanted := _references(splits)):
        return
    found = load_file(folder / REFERENCE_FILE)
    for name, reference in wanted.items():
        if name not in found or found[name].shape != reference.shape:
            raise IntegrityError(f"{folder / REFERENCE_FILE} does not hold {name} of {len(reference)} rows")
        reference[:] = found[name]


def _references(splits: Mapping[str, Rows]) -> dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]]:
    found: dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float64]]] = {}
    for name, rows in splits.items():
        if isinstance(rows, PairRows):
            found |= {name: rows.reference, f"{name}.others": rows.others.reference}
    return found
