"""Losses of pairs against TRL's own, on the same pairs and the same model, where TRL is installed.

TRL averages ORPO's cross entropy over the tokens of a batch, prompts among them; the paper over those of an answer, and
so does this program. That term is left out here.
"""

import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_preference import Held, adapted, pair_rows, single_answers, slow_token_log_probs
from torch import Tensor

from lit_llama.model.adapters.lora import lora_parameters
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.pair_batches import Mismatched, PairRows
from lit_llama.train.config import PreferenceConfig
from lit_llama.train.methods.preference import PairLoss, pair_losses

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
trl = pytest.importorskip("trl")
ROWS = pair_rows(8)


def moved(settings: dict[str, Any], rows: list[Any]) -> tuple[PairLoss, PairRows]:
    """A model that has gone some way from the reference of the rows."""
    model = adapted()
    loss_of, split = PairLoss(model, None, PreferenceConfig(**settings)), PairRows(Held(rows))
    loss_of.refer(split, 200, lambda _: None)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return loss_of, split


def padded(model: LLaMA, sequences: list[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Log p of the answer tokens of each sequence as TRL lays them out, and their mask with a place more."""
    found = [torch.cat([torch.zeros(len(p) - 1), slow_token_log_probs(model, p, a).float()]) for p, a in sequences]
    masks = [torch.tensor([0] * len(p) + [1] * len(a)) for p, a in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(found, batch_first=True), pad(masks, batch_first=True)


def trainer(**settings: Any) -> Any:
    """What TRL's methods read of themselves."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, gather=lambda x: x)
    given = {"model": SimpleNamespace(training=True), "accelerator": accelerator, "aux_loss_enabled": False}
    given |= {"ld_alpha": None, "precompute_ref_logps": True, "f_divergence_type": "reverse_kl", "loss_weights": [1.0]}
    given |= {"label_smoothing": 0.0, "use_weighting": False, "_total_train_tokens": 0, "_tp_size": 1}
    given |= {"_metrics": defaultdict(lambda: defaultdict(list)), "calculate_KL": True}
    return SimpleNamespace(**given | settings)


def outputs_of(log_probs: Tensor) -> Any:
    nothing = torch.zeros_like(log_probs)
    return lambda **_: SimpleNamespace(
        log_probs=log_probs, entropy=nothing, mean_logits=nothing, is_top1=nothing.long(), aux_loss=None
    )


@pytest.mark.parametrize(
    "settings", [{"loss": "dpo"}, {"loss": "dpo", "beta": 0.7}, {"loss": "ipo", "beta": 0.2}], ids=str
)
def test_pairs_with_a_reference(settings: dict[str, Any]) -> None:
    """Catches a loss that bears the name alone."""
    loss_of, split = moved(settings, ROWS)
    with torch.no_grad():
        found = loss_of.of_batch(split.batch(range(8), share=True)).item() / 8
    measured = loss_of.measured()
    sequences = [(row[0], row[side]) for side in (1, 2) for row in ROWS]
    log_probs, mask = padded(loss_of.model, sequences)
    reference = torch.from_numpy(split.reference).float()
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    name = {"dpo": "sigmoid", "ipo": "ipo"}[settings["loss"]]
    theirs = trainer(beta=loss_of.config.strength, loss_types=[name])
    wanted = trl.DPOTrainer._compute_loss(theirs, outputs_of(log_probs), inputs, False)
    assert found == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
    if settings["loss"] == "dpo":
        rewards = theirs._metrics["train"]
        assert measured["accuracy"] == pytest.approx(rewards["rewards/accuracies"][0])
        assert measured["margin"] == pytest.approx(rewards["rewards/margins"][0], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    "settings", [{"loss": "simpo", "label_smoothing": 0.1}, {"loss": "orpo", "beta": 0.3}], ids=str
)
def test_pairs_without_a_reference(settings: dict[str, Any]) -> None:
    """Catches sums in place of means, and a margin on the wrong scale."""
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer").CPOTrainer
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer").ORPOTrainer
    loss_of, split = moved(settings, ROWS)
    batch = split.batch(range(8), share=True)
    with torch.no_grad():
        log_probs, counts = loss_of.log_probs(batch), torch.from_numpy(batch.counts)
        found, rewards = pair_losses(log_probs, counts, log_probs, loss_of.config)
    log_ps, mask = padded(loss_of.model, [(row[0], row[side]) for side in (1, 2) for row in ROWS])
    means = (log_ps.sum(1) / mask.sum(1)).view(2, -1)
    config = loss_of.config
    if config.loss == "simpo":
        theirs = trainer(
            alpha=0.0, loss_type="simpo", beta=2.0, simpo_gamma=0.5, label_smoothing=config.label_smoothing
        )
        wanted, chosen, rejected = cpo.cpo_loss(theirs, *means)
    else:
        weighted, chosen, rejected, _, _ = orpo.odds_ratio_loss(trainer(beta=config.beta), *means)
        wanted = -means[0] - weighted
    torch.testing.assert_close(found.float(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rewards.float(), torch.stack([chosen, rejected], 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("single", [True, False], ids=["single answers", "pairs"])
def test_single_answers(single: bool) -> None:
    """Catches a baseline on another scale, and means over rows in place of answers."""
    rows = single_answers(ROWS) if single else ROWS
    loss_of, split = moved({"loss": "kto", "beta": 0.3, "desirable_weight": 1.4}, rows)
    split.others.reference[:, 0] -= 2.5  # as if it had moved much
    loss_of.prepare(split, list(range(8)), 200)
    with torch.no_grad():
        found = loss_of.of_batch(split.batch(range(8), share=True)).item() / loss_of.divisor(split, list(range(8)))
    answers = [(row, side) for row in range(8) for side in (0, 1) if rows[row][1 + side]]
    log_probs, mask = padded(loss_of.model, [(rows[row][0], rows[row][1 + side]) for row, side in answers])
    other = Mismatched(Held(rows))
    others = torch.stack([slow_token_log_probs(loss_of.model, *other[row][:2]).sum() for row in range(8)]).float()
    inputs: dict[str, Any] = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask)}
    inputs |= {"completion_mask": mask, "label": torch.tensor([side == 0 for _, side in answers])}
    inputs |= {"ref_logps": torch.tensor([split.reference[row, side] for row, side in answers], dtype=torch.float32)}
    inputs |= {"ref_KL_logps": torch.from_numpy(split.others.reference[:, 0]).float()}
    theirs = trainer(
        beta=0.3, loss_type="kto", desirable_weight=1.4, undesirable_weight=1.0, _compute_kl_logps=lambda *_: others
    )
    wanted = trl.KTOTrainer._compute_loss(theirs, outputs_of(log_probs), inputs, False)
    assert loss_of.baseline > 0.1
    assert loss_of.baseline == pytest.approx(theirs._metrics["train"]["kl"][0], rel=1e-4, abs=1e-4)
    assert found == pytest.approx(float(wanted), rel=1e-5, abs=1e-5)
