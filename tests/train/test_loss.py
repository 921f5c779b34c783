"""The loss against torch's cross entropy, sample by sample, and the step that is taken with it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Sample, as_transformers, tiny_model, write_splits
from torch import Tensor, nn

from lit_llama.device import numerics
from lit_llama.model.adapters.lora import apply_lora, lora_parameters, parameter_groups
from lit_llama.model.config import LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.batches import collate
from lit_llama.text.dataset.folder import Split
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.train import loss as loss_module
from lit_llama.train.config import PreferenceConfig, TrainConfig
from lit_llama.train.interrupt import Interrupt
from lit_llama.train.logs.log import Log
from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.loop import Trainer, fit
from lit_llama.train.loss import TokenLoss, linear_cross_entropy, linear_log_probs
from lit_llama.train.methods.preference import PairLoss

CHUNK = 4
TARGETS = {"all linear layers": "all-linear", "with the head": ["q_proj", "lm_head"]}


def random_samples(lengths: Sequence[int], prompt: int = 2) -> list[Sample]:
    """Samples whose prompts carry no loss; a longer one trains more tokens."""
    draw = np.random.default_rng(0)
    samples = []
    for length in lengths:
        ids = draw.integers(3, 384, length).tolist()
        samples.append(Sample(ids, [IGNORE_INDEX] * min(prompt, length - 1) + ids[prompt:] if length > 2 else ids))
    return samples


def arrays(samples: Sequence[Sample]) -> list[tuple[Any, Any]]:
    return [(np.array(s.input_ids, np.int32), np.array(s.labels, np.int32)) for s in samples]


def packed_loss(model: LLaMA, samples: Sequence[Sample]) -> Tensor:
    batch = collate(arrays(samples))
    ids, select, targets = (torch.from_numpy(x) for x in (batch.input_ids, batch.select, batch.targets))
    loss: Tensor = TokenLoss(model)(ids, batch.lengths, select, targets)
    return loss


def naive_loss(model: LLaMA, samples: Sequence[Sample]) -> Tensor:
    """Each sample alone, all its logits, shifted labels, torch's own cross entropy."""
    losses = []
    for sample in samples:
        logits = model(torch.tensor(sample.input_ids)).float()
        labels = torch.tensor(sample.labels)
        losses.append(F.cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE_INDEX, reduction="sum"))
    return torch.stack(losses).sum()


def trained_model(targets: Any = "all-linear") -> LLaMA:
    """A tiny model with an adapter whose B is not zero."""
    model = tiny_model()
    apply_lora(model, LoRAConfig(r=4, alpha=6, target_modules=targets))
    torch.manual_seed(1)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK", CHUNK)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 2])
def test_chunked_loss_and_gradient_equal_those_of_torch(count: int) -> None:
    """Catches a chunk left out or counted twice, a gradient off by its target or by the incoming factor."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator)
    targets = torch.randint(50, (count,), generator=generator)
    found = linear_cross_entropy(hidden, weight, targets)
    wanted = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum")
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-6)
    (ours,) = torch.autograd.grad(0.37 * found, hidden)
    (theirs,) = torch.autograd.grad(0.37 * wanted, hidden)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("small_chunks")
def test_chunked_loss_in_bfloat16_is_as_good_as_torchs() -> None:
    """Catches a softmax or a sum that is formed in bfloat16, which errs by percents."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(4 * CHUNK + 1, 64, generator=generator), torch.randn(500, 64, generator=generator)
    targets = torch.randint(500, (4 * CHUNK + 1,), generator=generator)
    half = hidden.to(torch.bfloat16).requires_grad_()
    found = linear_cross_entropy(half, weight.to(torch.bfloat16), targets)
    (ours,) = torch.autograd.grad(found, half)
    exact = half.detach().double().requires_grad_()
    wanted = F.cross_entropy(exact @ weight.to(torch.bfloat16).double().T, targets, reduction="sum")
    (theirs,) = torch.autograd.grad(wanted, exact)
    assert found.dtype == torch.float32 and ours.dtype == torch.bfloat16
    assert abs(found.item() / wanted.item() - 1) < 2e-3
    assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("frozen_hidden", [False, True])
@pytest.mark.parametrize("count", [1, CHUNK, 3 * CHUNK + 2])
def test_gradients_of_a_trained_head_equal_those_of_torch(count: int, frozen_hidden: bool) -> None:
    """Against autograd in float64; catches a chunk whose part of the weight's gradient is lost, or a lost factor."""
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, 16, generator=generator).requires_grad_(not frozen_hidden)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    targets = torch.randint(50, (count,), generator=generator)
    found = linear_cross_entropy(hidden, weight, targets)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    wanted = F.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    (0.37 * found).backward()
    (0.37 * wanted).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=0)
    assert frozen_hidden == (hidden.grad is None)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("count", [1, CHUNK, 3 * CHUNK + 2])
def test_gradients_of_an_adapted_head_equal_those_of_torch(count: int) -> None:
    """Against autograd in float64; catches a factor of the update whose gradient is lost, or counted once a chunk."""
    generator = torch.Generator().manual_seed(count)
    shapes = (count, 16), (50, 16), (count, 3), (50, 3)
    given = [torch.randn(shape, generator=generator, requires_grad=shape != (50, 16)) for shape in shapes]
    exact = [value.detach().double().requires_grad_() for value in given]
    targets = torch.randint(50, (count,), generator=generator)
    found = linear_cross_entropy(given[0], given[1], targets, update=(given[2], given[3]))
    wanted = F.cross_entropy(exact[0] @ exact[1].T + exact[2] @ exact[3].T, targets, reduction="sum")
    (0.37 * found).backward()
    (0.37 * wanted).backward()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    for ours, theirs in zip(given, exact, strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and theirs.grad is not None
            torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("half", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("updated", [False, True])
def test_gradients_of_log_probs_by_a_head_that_trains(
    updated: bool, half: torch.dtype | None, softcap: float | None
) -> None:
    """Against autograd in float64, with a factor for each token and under autocast a scaled loss; catches tokens that
    are summed before they count, logits of the backward pass in other numbers, and factors beyond float16."""
    generator = torch.Generator().manual_seed(0)
    count = 3 * CHUNK + 2
    shapes = [(count, 16), (50, 16), *([(count, 3), (50, 3)] if updated else [])]
    given = [torch.randn(shape, generator=generator).bfloat16().float() / 2 for shape in shapes]
    given = [value.requires_grad_(not updated or index != 1) for index, value in enumerate(given)]
    exact = [value.detach().double().requires_grad_() for value in given]
    targets = torch.randint(50, (count,), generator=generator)
    factors = torch.randn(count, generator=generator) * (1.0 if half is None else 2.0**18)
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        update = (given[2], given[3]) if updated else None
        found = linear_log_probs(given[0], given[1], targets, softcap, update)
    logits = exact[0] @ exact[1].T + (exact[2] @ exact[3].T if updated else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted = logits.log_softmax(-1)[range(count), targets]
    (found * factors).sum().backward()
    (wanted * factors.double()).sum().backward()
    tolerance = {None: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[half]
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=5 * tolerance)
    for ours, theirs in zip(given, exact, strict=True):
        if ours.requires_grad:
            assert ours.grad is not None and theirs.grad is not None
            assert (ours.grad.double() - theirs.grad).norm() < tolerance * theirs.grad.norm()
    with torch.no_grad():
        again = linear_log_probs(given[0], given[1], targets, softcap, update)
    assert not again.requires_grad and torch.allclose(again, found.float(), atol=0.1)


@pytest.mark.parametrize("loss", [TokenLoss, partial(PairLoss, config=PreferenceConfig())], ids=["tokens", "pairs"])
@pytest.mark.parametrize("settings", [{"target_modules": "lm_head"}, {"modules_to_save": "lm_head"}], ids=str)
def test_logits_of_a_head_that_trains_are_never_held_at_once(settings: dict[str, Any], loss: Any) -> None:
    """Catches a head with an adapter, or its whole copy, whose logits are all kept for the backward pass."""
    model = tiny_model()
    apply_lora(model, LoRAConfig(r=4, **{"target_modules": "q_proj"} | settings))
    kept: list[int] = []
    ids = torch.arange(300)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        loss(model, numerics=None)(ids, [300], ids[:-1], ids[1:])
    assert max(kept) < 299 * 384


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_gradients_of_a_trained_head_under_autocast(half: torch.dtype) -> None:
    """With the weight in float32 and products in half, a thousand times the same token; catches a sum that is rounded
    at every chunk, and one that leaves float16."""
    generator = torch.Generator().manual_seed(0)
    hidden = 100 * torch.rand(1000, 16, generator=generator)
    weight = torch.randn(50, 16, generator=generator)
    weight[7] = -1  # a wrong guess each time
    weight.requires_grad_()
    targets = torch.full((1000,), 7)
    with torch.autocast("cpu", half):
        found = linear_cross_entropy(hidden, weight, targets)
    found.backward()
    exact = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ exact.T, targets, reduction="sum").backward()
    assert weight.grad is not None and exact.grad is not None and weight.grad.dtype == torch.float32
    assert (weight.grad - exact.grad).norm() < 2e-2 * exact.grad.norm()


@pytest.mark.usefixtures("small_chunks")
def test_a_trained_head_never_holds_all_logits() -> None:
    """Catches logits that are kept for the backward pass, and a gradient that is formed where none is wanted."""
    hidden, weight = torch.randn(64 * CHUNK, 8), torch.randn(1000, 8, requires_grad=True)
    targets = torch.zeros(64 * CHUNK, dtype=torch.int64)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x.numel()), x)[1], lambda x: x):
        loss = linear_cross_entropy(hidden, weight, targets)
    assert max(saved) == weight.numel() and loss.requires_grad
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("kept"), lambda x: x):
        assert not linear_cross_entropy(hidden, weight, targets).requires_grad


def test_loss_of_extreme_logits_is_finite() -> None:
    """Catches an exponential without its maximum taken out."""
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    found = linear_cross_entropy(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 0]))
    found.backward()
    assert found.item() == pytest.approx(600.0) and hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx([0.0, -2.0])


def test_loss_without_gradient_needs_none() -> None:
    """Catches evaluation that computes and holds a gradient all the same."""
    hidden, weight, targets = torch.randn(3, 8), torch.randn(9, 8), torch.tensor([1, 2, 3])
    found = linear_cross_entropy(hidden, weight, targets)
    assert not found.requires_grad
    torch.testing.assert_close(found, F.cross_entropy(hidden @ weight.T, targets, reduction="sum"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_packed_loss_and_gradients_equal_those_of_each_sample_alone(targets: Any) -> None:
    """Catches a shift in the wrong place, a masked token with loss, leaks between samples, a head that is bypassed."""
    samples = random_samples([12, 3, 30, 28, 4])
    packed, alone = trained_model(targets), trained_model(targets)
    found, wanted = packed_loss(packed, samples), naive_loss(alone, samples)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.backward()
    wanted.backward()
    assert len(lora_parameters(packed)) == {"all-linear": 28}.get(str(targets), 6)
    for ours, theirs in zip(lora_parameters(packed), lora_parameters(alone), strict=True):
        assert ours.grad is not None and theirs.grad is not None and theirs.grad.any()
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is None for p in packed.parameters() if not p.requires_grad)


def test_loss_is_that_of_transformers() -> None:
    """The same labels, unshifted, given to transformers; catches a shift of our own making, seen from outside."""
    model, samples = tiny_model(), random_samples([12, 30])
    other, total = as_transformers(model), 0.0
    for sample in samples:
        ids, labels = torch.tensor([sample.input_ids]), torch.tensor([sample.labels])
        count = int((labels[:, 1:] != IGNORE_INDEX).sum())
        total += other(ids, labels=labels).loss.item() * count
    assert packed_loss(model, samples).item() == pytest.approx(total, rel=1e-5)


LENGTHS = [5, 9, 40, 3, 17, 31, 4, 22]


@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_step_does_not_depend_on_how_its_batch_is_cut(tmp_path: Path, targets: Any) -> None:
    """One batch of 8, and 8 micro-batches of 1, both against AdamW on the mean over all trained tokens; catches a mean
    of means, which weighs the tokens of short samples more, and gradients that are not summed."""
    samples = random_samples(LENGTHS)
    write_splits(tmp_path / "data", {"train": samples, "test": samples[:2]})
    splits = [Split(tmp_path / "data", name) for name in ("train", "test")]
    results = []
    for name, tokens in (("whole", 10_000), ("singly", 1)):
        model = trained_model(targets)
        config = TrainConfig(epochs=1, batch_size=8, micro_batch_tokens=tokens, learning_rate=3e-4, warmup_ratio=0)
        (tmp_path / name).mkdir()
        cpu = numerics("32-true", torch.device("cpu"))
        with Log(tmp_path / name, 1) as log:
            fit(
                Trainer(model, parameter_groups(model), *splits, config, 0, log.say, cpu),
                log,
                lambda: None,
                Interrupt(),
            )
        metrics = read_metrics(tmp_path / name)
        results.append((lora_parameters(model), metrics["loss"][0][1], metrics["grad_norm"][0][1]))
    reference = trained_model(targets)
    parameters = lora_parameters(reference)
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, weight_decay=0.0)
    mean = naive_loss(reference, samples) / sum(label != IGNORE_INDEX for s in samples for label in s.labels[1:])
    mean.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    for found, loss, grad_norm in results:
        assert (loss, grad_norm) == (pytest.approx(mean.item(), rel=1e-5), pytest.approx(norm.item(), rel=1e-5))
        for ours, theirs in zip(found, parameters, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
