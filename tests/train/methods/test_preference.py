"""Losses of pairs against formulas written out from their papers, and against TRL's."""

import math
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import tiny_model
from pair_data import Row, pair_rows, single_answers
from torch import Tensor

from lit_llama.errors import UserError
from lit_llama.model.adapters.lora import apply_lora, lora_parameters
from lit_llama.model.attention.layout import Packed
from lit_llama.model.config import LoRAConfig
from lit_llama.model.fused.layer import fuse
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.batches import micro_batches
from lit_llama.text.dataset.pair_batches import Mismatched, PairRows
from lit_llama.train.config import PreferenceConfig, PreferenceLoss
from lit_llama.train.loss import linear_log_probs
from lit_llama.train.methods.preference import PairLoss, pair_losses

LOSSES = get_args(PreferenceLoss)
SETTINGS: list[dict[str, Any]] = [
    *({"loss": loss} for loss in LOSSES),
    {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.2, "sft_weight": 0.7},
    {"loss": "ipo", "beta": 0.03, "sft_weight": 2.0},
    {"loss": "simpo", "beta": 2.5, "gamma": 1.4, "label_smoothing": 0.1},
    {"loss": "orpo", "beta": 1.5},
    {"loss": "kto", "beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.6, "sft_weight": 0.2},
]


class Held:
    """Rows in memory."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = [tuple(np.array(part, np.int32) for part in row) for row in rows]
        sides = zip(*([len(part) for part in row] for row in rows), strict=True)
        self.prompt_lengths, self.chosen_lengths, self.rejected_lengths = map(np.array, sides)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


def written_out(
    config: PreferenceConfig, w: float, r: float, n_w: int, n_r: int, ref_w: float, ref_r: float, z0: float
) -> float:
    """The loss of one row as the papers have it, number by number.

    ipo is written over means per token, as its authors have said they ran it.
    """
    beta, eps = config.strength, config.label_smoothing
    mean_w, mean_r = (w / n_w if n_w else 0.0), (r / n_r if n_r else 0.0)
    if config.loss == "dpo":  # equation 7; eps as in the authors' note on noisy labels
        h = beta * (w - ref_w) - beta * (r - ref_r)
        found = -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)
    elif config.loss == "ipo":  # equation 17: (h - 1 / (2 tau)) ^ 2
        found = ((w - ref_w) / n_w - (r - ref_r) / n_r - 1 / (2 * beta)) ** 2
    elif config.loss == "simpo":  # equation 6
        h = beta / n_w * w - beta / n_r * r - config.lead
        found = -(1 - eps) * log_sigmoid(h) - eps * log_sigmoid(-h)
    elif config.loss == "orpo":  # equations 4 to 7, P of an answer being the geometric mean over its tokens
        odds_w, odds_r = (math.exp(mean) / (1 - math.exp(mean)) for mean in (mean_w, mean_r))
        found = -mean_w - beta * log_sigmoid(math.log(odds_w / odds_r))
    else:  # equation 8: lambda_y - v(x, y), of each answer
        found = 0.0
        if n_w:
            found += config.desirable_weight * (1 - 1 / (1 + math.exp(-beta * (w - ref_w - z0))))
        if n_r:
            found += config.undesirable_weight * (1 - 1 / (1 + math.exp(-beta * (z0 - (r - ref_r)))))
    return found - config.sft_weight * mean_w


def drawn(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Log p, counts and reference of answers."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 30, (rows, 2), generator=draw)
    log_probs = -counts * torch.rand(rows, 2, generator=draw, dtype=torch.float64) * 3 - 0.01
    return log_probs, counts, log_probs + torch.randn(rows, 2, generator=draw, dtype=torch.float64) * 5


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_loss_and_its_gradient_are_those_of_the_formula(settings: dict[str, Any]) -> None:
    """Catches a wrong sign, a mean for a sum, a margin or a weight on the wrong side; and a gradient that is cut."""
    config, z0 = PreferenceConfig(**settings), 1.7 if settings["loss"] == "kto" else 0.0
    log_probs, counts, reference = drawn(12)
    if config.loss == "kto":
        counts[::3, 0], counts[1::3, 1] = 0, 0
        log_probs[counts == 0] = reference[counts == 0] = 0.0
    log_probs.requires_grad_()
    losses, rewards = pair_losses(log_probs, counts, reference, config, z0)
    losses.sum().backward()
    assert log_probs.grad is not None and not rewards.requires_grad

    def formula(row: int, w: float, r: float) -> float:
        (n_w, n_r), (ref_w, ref_r) = counts[row].tolist(), reference[row].tolist()
        return written_out(config, w, r, n_w, n_r, ref_w, ref_r, z0)

    step = 1e-5
    for row, (w, r) in enumerate(log_probs.detach().tolist()):
        assert losses[row].item() == pytest.approx(formula(row, w, r), rel=1e-10)
        slopes = [
            (formula(row, w + step, r) - formula(row, w - step, r)) / (2 * step),
            (formula(row, w, r + step) - formula(row, w, r - step)) / (2 * step),
        ]
        assert log_probs.grad[row].tolist() == pytest.approx(slopes, rel=1e-5, abs=1e-9)


def test_a_certain_answer_has_finite_odds() -> None:
    """Catches log(0) where a model has an answer by heart."""
    log_probs = torch.tensor([[0.0, -3.0], [-1e-12, -900.0]], dtype=torch.float64, requires_grad=True)
    losses, _ = pair_losses(log_probs, torch.tensor([[5, 5], [9, 9]]), torch.zeros(2, 2), PreferenceConfig(loss="orpo"))
    losses.sum().backward()
    assert losses.isfinite().all() and log_probs.grad is not None and log_probs.grad.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"loss": "dop"}, "--dpo.loss is 'dop', expected one of dpo, ipo"),
        ({"beta": 0.0}, "--dpo.beta is 0.0"),
        ({"label_smoothing": 0.5}, "--dpo.label_smoothing is 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "--dpo.loss ipo does not read; it goes with dpo, simpo"),
        ({"gamma": 1.0}, "it goes with simpo"),
        ({"loss": "orpo", "sft_weight": 1.0}, "--dpo.sft_weight is 1.0"),
        ({"desirable_weight": 2.0}, "it goes with kto"),
    ],
)
def test_settings_that_nothing_reads_are_refused(settings: dict[str, Any], words: str) -> None:
    """Catches a flag without an effect."""
    with pytest.raises(UserError, match=words):
        PreferenceConfig(**settings)


def adapted(fused: bool = True) -> LLaMA:
    torch.manual_seed(0)
    model = tiny_model().requires_grad_(False)
    apply_lora(model, LoRAConfig(r=2, alpha=4))
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)
    if fused:
        fuse(model)
    return model


def slow_token_log_probs(model: LLaMA, prompt: Any, answer: Any) -> Tensor:
    """Log p of each token of an answer, alone, from all logits in float64."""
    ids = torch.tensor([*prompt, *answer], dtype=torch.int64)
    with torch.no_grad():
        logits = model.lm_head(model.model(ids, Packed([len(ids)]))).double()
    return logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]


def slow_log_prob(model: LLaMA, prompt: Any, answer: Any) -> float:
    """Their sum."""
    return float(slow_token_log_probs(model, prompt, answer).sum())


@pytest.mark.parametrize("share", [True, False], ids=["prompt once", "prompt twice"])
@pytest.mark.parametrize("single", [False, True], ids=["pairs", "single answers"])
def test_log_probs_are_those_of_each_answer_alone(share: bool, single: bool) -> None:
    """Catches an answer that sees the other one, a first token that is left out, and places taken for one another."""
    rows = [*pair_rows(9), ([5], [7, 8], [9]), ([5, 6], [7], [7])]
    rows = single_answers(rows) if single else rows
    held, model = Held(rows), adapted()
    loss_of, split = PairLoss(model, None, PreferenceConfig(loss="kto")), PairRows(held)
    assert loss_of.shares
    batch = split.batch([3, 10, 0, 9, 5], share=share)
    assert bool(batch.parents) is (share and not single)
    found = loss_of.log_probs(batch).detach()
    wanted = [[slow_log_prob(model, held[row][0], held[row][side]) for side in (1, 2)] for row in (3, 10, 0, 9, 5)]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float64), rtol=1e-5, atol=1e-4)
    places = split.counted(share).lengths[[3, 10, 0, 9, 5]]
    assert len(batch.input_ids) == places.sum()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_of_a_step_does_not_depend_on_layout_and_cut(loss: PreferenceLoss) -> None:
    """Catches a gradient that shared prompts lose, and a loss that depends on its micro-batches."""
    rows = pair_rows(10)
    found = []
    for share, tokens in ((True, 10_000), (False, 10_000), (True, 60), (False, 60)):
        model = adapted()
        loss_of, split = PairLoss(model, None, PreferenceConfig(loss=loss)), PairRows(Held(rows)).counted(share)
        loss_of.refer(split, 100, lambda _: None)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.add_(torch.linspace(-0.05, 0.05, parameter.numel()).view_as(parameter))
        loss_of.prepare(split, list(range(10)), tokens)
        total = 0.0
        for batch in micro_batches(split, list(range(10)), tokens, share=share):
            value = loss_of.of_batch(batch) / loss_of.divisor(split, list(range(10)))
            value.backward()
            total += value.item()
        gradients = torch.cat([p.grad.flatten() for p in lora_parameters(model) if p.grad is not None])
        found.append((total, gradients, loss_of.measured()))
    for total, gradients, measured in found[1:]:
        assert total == pytest.approx(found[0][0], rel=1e-5)
        torch.testing.assert_close(gradients, found[0][1], rtol=1e-3, atol=1e-5 * found[0][1].abs().max().item())
        assert measured == pytest.approx(found[0][2], rel=1e-4, abs=1e-5)


def test_gradients_of_log_probs_are_those_of_plain_logits() -> None:
    """Catches weights of tokens that are summed before they count."""
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 16, generator=draw, requires_grad=True)
    weight, targets = torch.randn(50, 16, generator=draw), torch.randint(50, (700,), generator=draw)
    counts = torch.randn(700, generator=draw)
    (linear_log_probs(hidden, weight, targets) * counts).sum().backward()
    twin = hidden.detach().double().requires_grad_()
    wanted = (twin @ weight.double().T).log_softmax(-1)[range(700), targets]
    (wanted * counts.double()).sum().backward()
    assert hidden.grad is not None and twin.grad is not None
    torch.testing.assert_close(hidden.grad.double(), twin.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(linear_log_probs(hidden, weight, targets).double(), wanted, rtol=1e-5, atol=1e-5)


def test_measures_are_those_of_the_rows() -> None:
    """Catches a mean over batches in place of rows, and accuracies that count ties."""
    rows, model = pair_rows(8), adapted()
    loss_of, split = PairLoss(model, None, PreferenceConfig(beta=0.5)), PairRows(Held(rows))
    draw = np.random.default_rng(0)
    split.reference[:] = draw.normal(-40, 5, (8, 2))
    with torch.no_grad():
        for batch in micro_batches(split, range(8), 120, share=True):
            loss_of.of_batch(batch)
    log_probs = np.array([[slow_log_prob(model, row[0], row[side]) for side in (1, 2)] for row in rows])
    rewards = 0.5 * (log_probs - split.reference)
    found = loss_of.measured()
    assert found["accuracy"] == (rewards[:, 0] > rewards[:, 1]).mean()
    assert found["chosen_reward"] == pytest.approx(rewards[:, 0].mean(), rel=1e-4)
    assert found["rejected_reward"] == pytest.approx(rewards[:, 1].mean(), rel=1e-4)
    assert found["margin"] == pytest.approx((rewards[:, 0] - rewards[:, 1]).mean(), rel=1e-4)
    assert found["drift"] == pytest.approx(np.abs(log_probs - split.reference).mean(), rel=1e-4)
    assert found["chosen_length"] == np.mean([len(row[1]) for row in rows])
    assert loss_of.measured() == {}


def test_kto_compares_with_answers_to_other_prompts() -> None:
    """Catches a baseline of the answers themselves, one below zero, and one kind of answer alone."""
    rows = pair_rows(6)
    other = Mismatched(Held(rows))
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in rows)
    for row in range(6):
        prompt, answer, nothing = other[row]
        wanted = rows[(row + 1) % 6][1 + row % 2][: longest - len(prompt)]
        assert prompt.tolist() == rows[row][0] and answer.tolist() == wanted and not len(nothing)
    model = adapted()
    loss_of, split = PairLoss(model, None, PreferenceConfig(loss="kto")), PairRows(Held(rows))
    loss_of.refer(split, 100, lambda _: None)
    loss_of.prepare(split, [0, 2, 3], 100)
    assert loss_of.baseline == pytest.approx(0, abs=1e-4)
    split.others.reference[:, 0] -= [3, 0, 6, 9, 0, 0]
    loss_of.prepare(split, [0, 2, 3], 100)
    assert loss_of.baseline == pytest.approx(6, abs=1e-3)
    split.others.reference[:, 0] += 100
    loss_of.prepare(split, [0, 2, 3], 100)
    assert loss_of.baseline == 0


def test_single_answers_come_from_whichever_side_they_are(tmp_path: Path) -> None:
    """Catches an empty answer to another prompt."""
    other = Mismatched(Held(single_answers(pair_rows(7))))
    assert all(len(other[row][1]) for row in range(7)) and (other.chosen_lengths > 0).all()
