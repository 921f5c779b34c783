"""Search for a learning rate: short runs that share one loaded base and one set of batches.

Each rate trains from the same start over the rows of the run's own first steps, and is evaluated on the same held-out
rows. How the choice is made, and why, says `choose`.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from lit_llama.device import keep_few_products, process_kept
from lit_llama.errors import NumericalError, UserError
from lit_llama.folder.lock import claim
from lit_llama.folder.publish import check_destination, publish
from lit_llama.model.llama import LLaMA
from lit_llama.progress import bar, stderr, stdout
from lit_llama.text.dataset.folder import Split
from lit_llama.train.config import RunConfig
from lit_llama.train.distributed.launch import layout
from lit_llama.train.inputs import fitting, read_inputs
from lit_llama.train.logs.metrics import csv_line
from lit_llama.train.logs.report.run_report import RATES, RATES_CSV
from lit_llama.train.loop import Trainer
from lit_llama.train.memory.plan import Plan, make_plan
from lit_llama.train.memory.plan_table import explained, short
from lit_llama.train.methods.method import Method
from lit_llama.train.optim import check_optimizer
from lit_llama.train.rate import resolved, rule, shape_of, why_none
from lit_llama.train.run import build
from lit_llama.train.start import begin
from lit_llama.wording import call, param

STEPS, ROWS = 24, 128
"""Most optimizer steps of a short run, and most rows of the test split that it is evaluated on."""
FACTOR, EACH_WAY, FURTHER = 2.0, 2, 2
"""Between two rates, how many lie below and above that of the rule, and how many more are tried beyond an edge."""
NEAR = 0.01
"""Test losses that differ by less than this share are taken for equal."""
LAST, DIVERGED = 4, 1.5
"""A rate whose last LAST steps have a loss of DIVERGED times that of the base is given up."""
CSV_FILE, PNG_FILE = RATES_CSV, "learning_rates.png"


@dataclass(frozen=True)
class Trial:
    """One rate and what came of it.

    Args:
        rate: The highest learning rate of the short run.
        steps: Optimizer steps done.
        loss: Mean training loss of the last steps.
        test_loss: On the held-out rows at the end; infinite where the rate was given up.
    """

    rate: float
    steps: int
    loss: float
    test_loss: float

    @property
    def diverged(self) -> bool:
        """Whether it was given up."""
        return not math.isfinite(self.test_loss)


@dataclass(frozen=True)
class Found:
    """Rates that were tried, and the one to take.

    Args:
        folder: Where learning_rates.csv and learning_rates.png lie.
        before: Test loss before any training.
        trials: By rate.
        chosen: The best of them for a longer run.
        rows: Of the test split that were evaluated.
    """

    folder: Path
    before: float
    trials: Sequence[Trial]
    chosen: Trial
    rows: int


def search(attempt: Callable[[float], Trial], centre: float) -> list[Trial]:
    """Try rates from low to high around `centre`, and beyond an edge while that is where the lowest loss is.

    Above a rate that diverges none is tried.
    """
    trials: list[Trial] = []
    for power in range(-EACH_WAY, EACH_WAY + 1):
        if (rate := _rounded(centre * FACTOR**power)) > 1:
            break
        trials.append(attempt(rate))
        if trials[-1].diverged:
            break
    for _ in range(FURTHER):
        best = min(trials, key=lambda trial: trial.test_loss)
        if best is trials[0]:
            trials.insert(0, attempt(_rounded(best.rate / FACTOR)))
        elif best is trials[-1] and best.rate * FACTOR <= 1:
            trials.append(attempt(_rounded(best.rate * FACTOR)))
        else:
            break
    return trials


def choose(trials: Sequence[Trial]) -> Trial:
    """Choose the lowest of the rates whose test loss is within 1 % of the best.

    A short run has its own best rate. One that stops at the height of its schedule prefers a rate that is too low for a
    long one, since a small step shows its gain at once and a large one only after the decay (Wu et al. 2018,
    arXiv:1803.02021); so each short run goes through the whole schedule, down to its end. What is left points the other
    way: the longer a run, the lower its best rate (Bjorck et al. 2024, arXiv:2409.19913; for LoRA, a factor of 15 over
    full tuning in short runs and 10 in long ones, Schulman et al. 2025). Of rates that a short run cannot tell apart
    the lowest is therefore taken, which is also the one further away from divergence.

    Raises:
        NumericalError: All diverged.
    """
    best = min(trial.test_loss for trial in trials)
    if not math.isfinite(best):
        raise NumericalError(
            f"every learning rate from {min(trial.rate for trial in trials):.1e} on diverged; look at the rows with "
            f"{call('show_rows')}, or try {param('precision', '32-true')}"
        )
    return min((trial for trial in trials if trial.test_loss <= best * (1 + NEAR)), key=lambda trial: trial.rate)


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")


def check_searchable(config: RunConfig) -> None:
    """Refuse settings with which no rates are compared.

    Raises:
        UserError: The run is resumed, only planned, or shared by several processes.
    """
    for flag, asked in (
        (param("resume", config.resume), config.resume != "never"),
        (param("plan"), config.only_planned),
        (
            f"more than one process ({param('devices')}, {param('num_nodes')})",
            layout(config.devices, config.num_nodes) != (1, 1),
        ),
    ):
        if asked:
            raise UserError(f"does not go with {flag}: leave one of them out", parameter="find_learning_rate")


def find_learning_rate(method: Method, config: RunConfig, *, owns_process: bool = False) -> Found:
    """Compare learning rates by short runs on the data of a run, and write a table and a chart of them.

    Around the rate of `rate.rule`, or the one of the run where the rule does not hold, five rates are tried, and up to
    two more at an edge: each for at most 24 steps from the same start over the same rows, then on at most 128 rows of
    the test split. Nothing is written before all are done.

    Args:
        method: What trains; without a start of its own.
        config: The run. Its out_dir is not touched: the result lies beside it, in `OUT-rates`.
        owns_process: As for `run.finetune`.

    Raises:
        UserError: As `check_searchable` and `start.begin`; or there is no test split.
        LockedError: Another process works in the folder of the result.
        NumericalError: All rates diverge.
    """
    check_searchable(config)
    method, config = begin(method, config)
    folder = config.out_dir.parent / f"{Path(os.path.abspath(config.out_dir)).name}{RATES}"
    check_destination(folder, CSV_FILE, replace=True)
    inputs = read_inputs(config.base, config.data_dir, method.rows)
    if not len(inputs.test):
        raise UserError(
            f"goes by the test loss, but {config.data_dir} has no test split: prepare the data with a "
            f"{param('test_split_size')} above 0",
            parameter="find_learning_rate",
        )
    train, remarks = fitting(config.train, inputs.splits, config.data_dir)
    train, _ = resolved(method, train, inputs.config, len(inputs.train))
    centre = train.highest_rate
    if reason := why_none(method, train):
        why = f"that of the run, since {reason}"
    else:
        centre, why = rule(inputs.config, train.steps(len(inputs.train)), shape_of(method))
    for remark in (*remarks, f"rates around {centre:.1e}: {why}"):
        stderr().print(remark)
    # Nothing but the rate and the length differs from the run.
    train = replace(
        train, max_steps=min(STEPS, train.steps(len(inputs.train))), keep="last", patience=None, min_delta=0
    )
    splits = inputs.splits | {"test": inputs.test.head(ROWS) if isinstance(inputs.test, Split) else inputs.test}
    plan = make_plan(method, replace(config, train=train), inputs.config, splits)
    check_optimizer(train.optimizer, plan.numerics.device)
    with process_kept(), claim(folder), explained(plan):
        stderr().print(f"plan: {short(plan)}")
        trials = _Trials(method, config, plan, build(method, config, plan, owns_process)[0].model)
        tried = trials.run(centre)
        found = Found(folder, trials.before, tried, choose(tried), len(splits["test"]))
        with publish(folder, CSV_FILE, replace=True) as part:
            _write(found, part)
    return found


class _Trials:
    """Short runs on one model, each from the start of the first."""

    def __init__(self, method: Method, config: RunConfig, plan: Plan, model: LLaMA) -> None:
        self._method, self._seed, self._plan, self._model = method, config.seed, plan, model
        self._loss_of = method.loss_of(model, plan.numerics)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._start = [parameter.detach().clone() for parameter in self._trained]
        self.before = math.nan

    def run(self, centre: float) -> list[Trial]:
        """Try the rates around one, with a bar on a terminal and a line for each."""
        console = stderr()
        steps = self._plan.steps
        with bar(console, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task("trying the largest micro-batch", total=steps * (2 * EACH_WAY + 1))
            trainer = self._trainer(centre)
            trainer.try_largest()
            trainer.rest()
            self.before = trainer.evaluate()
            console.print(f"test loss before training {self.before:.4f}, on {len(self._plan.splits['test'])} rows")

            def attempt(rate: float) -> Trial:
                progress.update(task, description=f"rate {rate:.1e}")
                trial = self._attempt(rate, lambda: progress.advance(task))
                result = "diverged" if trial.diverged else f"test loss {trial.test_loss:.4f}"
                console.print(f"rate {rate:.1e}: {result} after {trial.steps} steps")
                return trial

            return search(attempt, centre)

    def _attempt(self, rate: float, advance: Callable[[], object]) -> Trial:
        """One short run."""
        trainer, losses = self._trainer(rate), list[float]()
        try:
            while not trainer.ended:
                losses.append(trainer.step().get("loss", math.nan))
                advance()
                recent = [loss for loss in losses[-LAST:] if math.isfinite(loss)]
                mean = statistics.fmean(recent) if recent else math.inf
                if len(losses) >= LAST and mean > DIVERGED * self.before:
                    return Trial(rate, len(losses), mean, math.inf)
        except NumericalError:
            return Trial(rate, len(losses), math.inf, math.inf)
        trainer.rest()
        test_loss = trainer.evaluate()
        trainer.rest()
        return Trial(rate, len(losses), mean, test_loss if math.isfinite(test_loss) else math.inf)

    def _trainer(self, rate: float) -> Trainer:
        """A trainer of the model as it began."""
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self._trained), self._start)
        train = replace(self._plan.train, learning_rate=rate)
        splits, groups = self._plan.splits, self._method.groups(self._model, train.weight_decay)
        return Trainer(
            self._model,
            groups,
            splits["train"],
            splits["test"],
            train,
            self._seed,
            lambda remark: None,  # of single steps: a rate that diverges says so by its end
            self._plan.numerics,
            loss_of=self._loss_of,
        )


def table(found: Found) -> Table:
    """Build the table of the rates that were tried."""
    lines = Table(box=box.SIMPLE_HEAD)
    for name in ("learning rate", "loss", "test loss"):
        lines.add_column(name, justify="right")
    lines.add_column("")
    lines.add_row("none", "", f"{found.before:.4f}", "before training")
    for trial in found.trials:
        mark = "chosen" if trial is found.chosen else "diverged" if trial.diverged else ""
        test_loss = "" if trial.diverged else f"{trial.test_loss:.4f}"
        lines.add_row(f"{trial.rate:.1e}", f"{trial.loss:.4f}", test_loss, mark)
    return lines


def print_rates(method: Method, config: RunConfig) -> None:
    """Print the rates of `find_learning_rate` as a table on stdout, and how to use the chosen one.

    A command's own: the process is tuned for the work.

    Raises:
        UserError: As `find_learning_rate`.
    """
    start = time.perf_counter()
    keep_few_products()
    found = find_learning_rate(method, config, owns_process=True)
    stdout().print(table(found))
    if found.chosen.test_loss >= found.before:
        look = call("show_rows")
        stderr().print(f"warning: no rate made the test loss fall; look at the rows with {look}")
    took = time.perf_counter() - start
    stderr().print(f"{found.folder}: {CSV_FILE}, {PNG_FILE}; {took:.1f} s")
    stdout().print(
        f"The same command with {param('train.learning_rate')} {found.chosen.rate:.1e} in place of "
        f"{param('find_learning_rate')} trains "
        "with it."
    )


def _write(found: Found, folder: Path) -> None:
    """Write the table and the chart."""
    from matplotlib.figure import Figure

    lines = [
        csv_line(["learning_rate", "steps", "loss", "test_loss", "chosen"]),
        csv_line([0.0, 0, "", found.before, ""]),
    ]
    for trial in found.trials:
        test_loss = "diverged" if trial.diverged else trial.test_loss
        chosen = "yes" if trial is found.chosen else ""
        lines.append(csv_line([trial.rate, trial.steps, trial.loss, test_loss, chosen]))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    finite = [(trial.rate, trial.test_loss) for trial in found.trials if not trial.diverged]
    axes.plot(*zip(*finite, strict=True), "o-", color="#1f4e8c", label=f"after {found.chosen.steps} steps")
    axes.plot(found.chosen.rate, found.chosen.test_loss, "o", color="#d1495b", markersize=10, label="chosen")
    axes.axhline(found.before, color="#888888", linestyle=":", label="before training")
    for trial in found.trials:
        if trial.diverged:
            axes.axvline(trial.rate, color="#d1495b", linestyle="--", label="diverged")
    axes.set(xscale="log", xlabel="learning rate", ylabel="test loss per trained token")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(folder / PNG_FILE, dpi=150, format="png")
    (folder / CSV_FILE).write_text("".join(lines), "utf-8")
