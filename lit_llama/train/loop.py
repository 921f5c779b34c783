"""The optimization: steps over the training split, evaluations on the test split.

Shapes: T tokens of a micro-batch, N of them with a label.
"""

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lit_llama.device import Numerics, peak_memory, seed_micro_batch, trim_freed_memory
from lit_llama.errors import DataError, NumericalError
from lit_llama.model.fused.layer import give_back
from lit_llama.model.llama import LLaMA
from lit_llama.text.dataset.batches import Batch, Rows, epoch_order, shared_micro_batches
from lit_llama.train.config import TrainConfig
from lit_llama.train.distributed.processes import ALONE, Processes
from lit_llama.train.distributed.shards import copy_all, is_spread, local, whole
from lit_llama.train.interrupt import Interrupt
from lit_llama.train.logs.log import Log
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.footprint import largest_batch, probe
from lit_llama.train.optim import build_optimizer, learning_rate, overflowed, set_learning_rate, state_bytes
from lit_llama.train.stopping import Best
from lit_llama.wording import call, param

PATIENCE = 5
"""Steps in a row that may be skipped because they are not finite; the last of them ends the run. So does an epoch."""
WINDOW, FEW, FAR = 100, 20, 6
"""A loss further above the median of the last WINDOW steps than FAR median deviations is remarked, after FEW steps."""


@dataclass
class Progress:
    """Position of a run: with the weights and what the optimizer remembers, all that its next step depends on.

    Attributes:
        step: Optimizer steps done, the skipped ones among them.
        trained_tokens: Tokens with a loss so far.
        tokens: Tokens that went in so far.
        skipped: Steps skipped in a row up to here.
        losses: Of the last WINDOW steps.
        begun: The evaluation before the first step is done.
    """

    step: int = 0
    trained_tokens: int = 0
    tokens: int = 0
    skipped: int = 0
    losses: list[float] = field(default_factory=list)
    begun: bool = False


class Trainer:
    """A model with the optimizer of its weights that require gradients, its data, and how far they are.

    The loss of a step is the sum over the trained tokens of its whole batch divided by their number, however the batch
    is cut and divided among processes. Which samples a step takes follows from (seed, epoch), its learning rate from
    the step, and what it draws from (seed, step, micro-batch): the step that follows a restored `Progress` is the one
    that would have followed. Whatever is decided here is decided on sums over all processes, and so the same in all.

    Args:
        model: In the state of its beginning.
        groups: Its weights that train, as an optimizer is told, with the `lr_ratio` of each group.
        train: Rows to train on.
        test: Rows to evaluate on; none for no evaluation.
        config: Course of the training.
        seed: Of the order of the samples and of dropout.
        say: Takes remarks on single steps.
        numerics: In which numbers to compute.
        processes: Those that share the work.
        loss_of: The model with its loss, if that is not the cross entropy of the trained tokens.
    """

    def __init__(
        self,
        model: LLaMA,
        groups: list[dict[str, Any]],
        train: Rows,
        test: Rows,
        config: TrainConfig,
        seed: int,
        say: Callable[[str], None],
        numerics: Numerics,
        processes: Processes = ALONE,
        loss_of: TokenLoss | None = None,
    ) -> None:
        self.config, self.progress = config, Progress()
        self.steps = config.steps(len(train))
        self._loss_of = loss_of or TokenLoss(model, numerics)
        was = self._loss_of.training
        self._train = train.counted(self._loss_of.train().shares)
        self._test = test.counted(self._loss_of.eval().shares)
        self._loss_of.train(was)
        self._seed, self._say = seed, say
        self.processes = processes
        self._per_epoch = math.ceil(len(train) / config.batch_size)
        self._device = next(model.parameters()).device
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in self._parameters:
            # Made anew in every step, they would come to lie among the activations, and leave holes there.
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer = build_optimizer(groups, config, self._device)
        self.scaler, self.best = numerics.scaler(), Best()
        self.kept = [p.detach().clone() for p in self._parameters] if config.keep == "best" else []
        self._model = model

    def rows(self, step: int) -> list[int]:
        """Return the rows of the training split in a step (from 0); the last step of an epoch takes what is left."""
        epoch, position = divmod(step, self._per_epoch)
        start = position * self.config.batch_size
        return epoch_order(len(self._train), self._seed, epoch)[start : start + self.config.batch_size].tolist()

    def step(self) -> dict[str, Any]:
        """Do the next step; one whose loss or gradients are not finite changes neither weights nor optimizer.

        Returns:
            The row of metrics.csv, without `loss` and `grad_norm` if the step was skipped.

        Raises:
            DataError: No token of the step's samples carries a loss.
            NumericalError: Too many steps in a row were not finite.
        """
        start = time.perf_counter()
        number, rows = self.progress.step, self.rows(self.progress.step)
        count = self._train.trained_tokens(rows)
        if not count:
            raise DataError(f"step {number + 1}: no token of its {len(rows)} samples carries a loss")
        rate = learning_rate(number, self.steps, self.config)
        set_learning_rate(self.optimizer, rate)
        loss, norm = self._gradients(rows)
        finite, spoilt = math.isfinite(loss) and math.isfinite(norm), overflowed(self.scaler, loss, norm)
        if finite:
            self.optimizer.step()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=False)
        tokens, measured = self._train.places(rows), self._loss_of.measured()
        self.progress.step += 1
        self.progress.trained_tokens += count
        self.progress.tokens += tokens
        if finite:
            self._look_at(loss, rows)
        elif spoilt:
            self._say(f"step {number + 1} is skipped: gradients beyond float16; the loss is scaled down from here on")
        else:
            self._skip(loss, norm, rows)
        return {
            "step": number + 1,
            "epoch": (number + 1) / self._per_epoch,
            "learning_rate": rate,
            **({"loss": loss, "grad_norm": norm} | measured if finite else {}),
            "trained_tokens": count,
            "tokens": tokens,
            "seconds": time.perf_counter() - start,
        }

    def _gradients(self, rows: list[int]) -> tuple[float, float]:
        """Sum up the gradients of a step and clip them; gives its loss and their norm before that."""
        self._loss_of.train()
        total, tokens = torch.zeros((), device=self._device), self._tokens
        count = self._loss_of.divisor(self._train, rows)
        self._loss_of.prepare(self._train, rows, tokens)
        for index, batch in enumerate(_share(self._loss_of, self._train, rows, tokens, self.processes)):
            # Every micro-batch of a step has a number of its own, whichever process it falls to.
            seed_micro_batch(self._seed, self.progress.step, index * self.processes.size + self.processes.rank)
            loss = self._loss_of.of_batch(batch) / count
            self.scaler.scale(loss).backward()
            total += loss.detach()
        total = self.processes.sum_gradients([p for p in self._parameters if not is_spread(p)], total)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm or math.inf)
        return total.item(), whole(norm).item()

    def _look_at(self, loss: float, rows: Sequence[int]) -> None:
        """Remark a loss that stands far out."""
        progress = self.progress
        progress.skipped = 0
        if len(progress.losses) >= FEW:
            median = statistics.median(progress.losses)
            deviation = statistics.median(abs(other - median) for other in progress.losses)
            if loss > median + FAR * deviation:
                self._say(
                    f"step {progress.step}: loss {loss:.4f} stands far above the last {len(progress.losses)} steps "
                    f"(median {median:.4f}, median deviation {deviation:.4f}); {_name_rows(rows)}"
                )
        progress.losses = [*progress.losses, loss][-WINDOW:]

    def _skip(self, loss: float, norm: float, rows: Sequence[int]) -> None:
        """Remark a step that is left out, or end the run."""
        self.progress.skipped += 1
        patience = min(PATIENCE, self._per_epoch) if self._per_epoch > 1 else PATIENCE
        what = f"step {self.progress.step}: loss {loss:.4g}, gradient norm {norm:.4g}; {_name_rows(rows)}"
        if self.progress.skipped >= patience:
            raise NumericalError(
                f"{what}. {patience} steps in a row were not finite; nothing of them is kept. {_way_out()}"
            )
        self._say(f"{what}. The step is skipped")

    def check_learned(self) -> None:
        """Refuse an end at which no step has changed a weight: the result would be what the run began with.

        Raises:
            NumericalError: All steps were skipped.
        """
        if self.progress.step and not self.progress.losses:
            raise NumericalError(
                f"none of the {self.progress.step} steps changed a weight: loss or gradients were not finite in all of "
                f"them, and so they were skipped; there is no result. {_way_out()}"
            )

    def bytes(self) -> int:
        """Return the bytes of the weights that train, of the best of them, and of what the optimizer remembers."""
        remembered = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [*self._parameters, *self.kept, *(value for value in remembered if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def memory(self) -> int:
        """Return the most bytes held so far."""
        return peak_memory(self._device)

    @property
    def evaluates(self) -> bool:
        """Whether there are rows to evaluate on."""
        return len(self._test) > 0

    @property
    def _tokens(self) -> int:
        """Most tokens per forward pass."""
        return self.config.tokens_on(self._device.type)

    def evaluate(self) -> float:
        """Compute the loss on the test split."""
        return evaluate(self._loss_of, self._test, self._tokens, self.processes)

    def test(self) -> tuple[float, dict[str, float]]:
        """Compute the loss on the test split, and what else is known of it."""
        loss = self.evaluate()
        return loss, {f"test_{name}": value for name, value in self._loss_of.measured().items()}

    def refer(self, tell: Callable[[int], None]) -> None:
        """Find what the losses of the run need of the model as it begins; see `TokenLoss.refer`."""
        for split in (self._train, self._test):
            self._loss_of.refer(split, self._tokens, tell)

    def stopped(self, interrupt: Interrupt) -> bool:
        """Whether a signal has come, to whichever process."""
        if number := self.processes.highest(interrupt.received or 0, self._device):
            interrupt.received = signal.Signals(number)
        return bool(number)

    def try_largest(self) -> None:
        """Run the largest micro-batch of all, so that running out of memory happens in the first minute.

        What the optimizer will remember from the first step on has its place beside it: later it is there, too.
        """
        self._loss_of.train()
        kind, processes, share = self._device.type, self.processes.size, self._loss_of.shares
        batch = largest_batch(self._train, self.config, kind, self._seed, processes, share=share)
        held = [local(parameter) for parameter in self._parameters]
        values, size = sum(part.numel() for part in held), sum(part.nbytes for part in held)
        place = torch.empty(state_bytes(self.config.optimizer, values, size), dtype=torch.uint8, device=self._device)
        probe(self._loss_of, Tensor.backward, batch)
        self._loss_of.measured()  # of rows that were only tried
        del place

    def rest(self) -> None:
        """Give back the memory that steps keep for each other, before something else takes its own, and what that has
        left before they go on: a CPU's heap would hold both."""
        if self._device.type == "cpu":
            give_back(self._model)
            trim_freed_memory()

    def compare(self, test_loss: float) -> None:
        """Remember the weights if none were better."""
        better = self.best.update(self.progress.step, test_loss, self.config.min_delta)
        if better and self.kept:
            copy_all(self.kept, self._parameters)

    @property
    def ended(self) -> bool:
        """Whether there is no step left, or the last of them brought nothing."""
        return self.progress.step >= self.steps or self.best.exhausted(self.config)

    def take_best(self) -> None:
        """End with the best weights, where they are wanted."""
        if self.best.exhausted(self.config):
            self._say(f"no lower test loss in {self.best.waited} evaluations; stopped after step {self.progress.step}")
        if self.kept and self.best.step:
            copy_all(self._parameters, self.kept)
            self._say(f"kept the weights of step {self.best.step}, test loss {self.best.loss:.4f}")


def fit(trainer: Trainer, log: Log, save: Callable[[], None], interrupt: Interrupt) -> None:
    """Do the steps that are left, or as many as a signal allows.

    Args:
        trainer: What to train.
        log: Takes a row for each step.
        save: Saves the state; called before the first step, between steps, and when all are done.
        interrupt: Ends the training after a step and a save.
    """
    config, progress = trainer.config, trainer.progress
    if not progress.begun:
        log.status("trying the largest micro-batch")
        trainer.try_largest()
        trainer.rest()
        _refer(trainer, log, interrupt)
        evaluated = _test(trainer, log) if trainer.evaluates else {}
        log.step({"step": 0, "memory": trainer.memory(), **evaluated})
        progress.begun = True
        log.status("saving")
        save()
        trainer.rest()
    while not trainer.ended:
        metrics = trainer.step()
        if trainer.evaluates and (progress.step == trainer.steps or progress.step % config.eval_interval == 0):
            trainer.rest()
            metrics |= _test(trainer, log)
            trainer.compare(metrics["test_loss"])
        log.step(metrics | {"memory": trainer.memory()})
        stopped = trainer.stopped(interrupt)
        if trainer.ended or progress.step % config.save_interval == 0 or stopped:
            log.status("saving")
            trainer.rest()
            save()
            trainer.rest()
        if stopped:
            return


def _refer(trainer: Trainer, log: Log, interrupt: Interrupt) -> None:
    """Compute the reference, where the loss has one.

    Raises:
        KeyboardInterrupt: A signal came, which it names: no state is there yet that the work could go on from.
    """

    def tell(done: int) -> None:
        log.status(f"computing the reference, {done:,} rows so far")
        if trainer.stopped(interrupt):
            raise KeyboardInterrupt(interrupt.received)

    trainer.refer(tell)
    trainer.rest()


def _test(trainer: Trainer, log: Log) -> dict[str, float]:
    """Evaluate, and answer the sample prompts."""
    log.status("evaluating on the test split")
    loss, measured = trainer.test()
    trainer.rest()
    metrics = log.evaluated(trainer.progress.step, loss, measured)
    trainer.rest()
    return metrics


@torch.no_grad()
def evaluate(loss_of: TokenLoss, split: Rows, micro_batch_tokens: int, processes: Processes = ALONE) -> float:
    """Compute the mean loss over a whole split, per trained token or per row, whatever the batches and the
    processes that share them."""
    training = loss_of.training
    loss_of.eval()
    device = next(loss_of.parameters()).device
    total, count = 0.0, 0.0
    loss_of.prepare(split, list(range(len(split))), micro_batch_tokens)
    for batch in _share(loss_of, split, range(len(split)), micro_batch_tokens, processes):
        if len(batch.targets) or processes.sharded:
            total += loss_of.of_batch(batch).item()
            count += loss_of.weight(batch)
    loss_of.train(training)
    total, count = processes.sum((total, count), device)
    if not count:
        raise DataError("no token of the test split carries a loss")
    return total / count


def _share(
    loss_of: TokenLoss, split: Rows, rows: Sequence[int], micro_batch_tokens: int, processes: Processes
) -> Iterator[Batch]:
    """The micro-batches that fall to this process."""
    given = {"even": processes.sharded, "share_beginnings": loss_of.shares}
    return shared_micro_batches(split, rows, micro_batch_tokens, processes.rank, processes.size, **given)


def _name_rows(rows: Sequence[int]) -> str:
    return f"rows {', '.join(map(str, sorted(rows)))} of the train split"


def _way_out() -> str:
    """What to do where nothing can be learned."""
    return (
        f"Begin anew with a lower {param('train.learning_rate')}, or with {param('precision', '32-true')}; "
        f"{param('verify')} looks at every weight of the base, and {call('show_rows')} at the rows"
    )
