"""Records of a run: its files as they grow, a bar or plain lines on stderr, and loggers elsewhere."""

import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn

from lit_llama.errors import IntegrityError, ResourceError
from lit_llama.progress import bar, stderr
from lit_llama.train.config import LoggerName
from lit_llama.train.logs.loggers import open_loggers
from lit_llama.train.logs.metrics import COLUMNS, METRICS, METRICS_FILE, Lines, csv_line, perplexity, rows_of
from lit_llama.train.logs.report.page import duration
from lit_llama.train.logs.report.run_report import write_run_report
from lit_llama.train.logs.sampler import SAMPLES_FILE, Sampler
from lit_llama.wording import param

MEASURED = 5
"""Steps after which the time that the others will take is said."""
REPORT_SECONDS, SAVE_SECONDS = 60, 1
"""Between two reports when nothing else asks for one; and before one is written anew for a save alone."""


_OF_PAIRS = (
    ("test_accuracy", "accuracy", ".0%"),
    ("test_margin", "margin", ".4f"),
    ("test_chosen_reward", "chosen", ".4f"),
    ("test_rejected_reward", "rejected", ".4f"),
    ("test_drift", "drift", ".2f"),
    ("answer_length", "answer tokens", ".1f"),
)
"""Metrics of preference rows as they are said: name, word and form."""


class Log:
    """Rows of metrics.csv, timing.csv and samples.jsonl as they come, the report, and progress on stderr.

    The report is written anew at evaluations and saves, every minute, and when the run ends, however it does.

    Nothing is written before the first `step`, which begins the files anew unless `resume` came first.

    Args:
        folder: The run folder.
        steps: Optimizer steps of the whole run.
        sampler: Answers fixed prompts at every evaluation.
        loggers: Told the same numbers.
        columns: Of metrics.csv.
    """

    def __init__(
        self,
        folder: Path,
        steps: int,
        *,
        sampler: Sampler | None = None,
        loggers: Sequence[LoggerName] = (),
        columns: Sequence[str] = METRICS,
    ) -> None:
        self._folder, self._steps, self._sampler = folder, steps, sampler
        self._console = stderr()
        self._columns = COLUMNS | {METRICS_FILE: tuple(columns)}
        self._files = {name: Lines(folder / name, csv_line(names)) for name, names in self._columns.items()}
        self._files[SAMPLES_FILE] = Lines(folder / SAMPLES_FILE)
        self._begun = False
        self._untold = False  # there are rows that the report has not
        self._reported = time.monotonic()
        self._seconds: list[float] = []  # of the steps done here
        self._progress = bar(self._console, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), transient=False)
        self._task = self._progress.add_task("training", total=steps)
        self._loggers = open_loggers(loggers, folder)

    def __enter__(self) -> "Log":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self.report()
        for file in self._files.values():
            file.close()
        for logger in self._loggers:
            logger.close(failed=kind is not None)

    def resume(self, step: int) -> None:
        """Go on after `step`: what the files say beyond it is cut off, what they said before stays to the byte.

        Raises:
            IntegrityError: metrics.csv does not go as far.
        """
        self._begun = self._untold = True
        kept = {name: file.resume(step) for name, file in self._files.items()}
        if kept[METRICS_FILE] < step:
            raise IntegrityError(
                f"{self._folder / METRICS_FILE} is not as the run left it: it lacks the steps {kept[METRICS_FILE] + 1} "
                f"to {step}. Bring it back, or begin anew in another {param('out_dir')}"
            )
        self._progress.update(self._task, completed=step)

    def status(self, text: str) -> None:
        """Show what is going on, beside the bar."""
        self._progress.update(self._task, description=text)

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        self._progress.console.print(text)

    def evaluated(self, step: int, test_loss: float, measured: Mapping[str, float] | None = None) -> dict[str, float]:
        """Answer the fixed prompts after `step`.

        Args:
            step: The optimizer step before.
            test_loss: What was found.
            measured: What is known of a loss that is no cross entropy, in place of a perplexity.

        Returns:
            The metrics of an evaluation: test_loss, perplexity or `measured` with answer_length, and stopped, the share
            of answers that stop by themselves; for `step`.
        """
        metrics = {"test_loss": test_loss} | dict(measured or {"perplexity": perplexity(test_loss)})
        if self._sampler is None:
            return metrics
        self._begin()
        self.status("answering the sample prompts")
        answers = self._sampler.answers()
        rows = [{"step": step} | row for row in self._sampler.rows(answers)]
        self._files[SAMPLES_FILE].append("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        if measured:
            metrics["answer_length"] = sum(answer.tokens for answer in answers) / len(answers)
        return metrics | {"stopped": sum(answer.stopped for answer in answers) / len(answers)}

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Record an optimizer step, or an evaluation, that is over."""
        self._begin()
        for name, row in rows_of(metrics, self._columns):
            self._files[name].append(row)
        for logger in self._loggers:
            logger.log({name: value for name, value in metrics.items() if name != "step"}, metrics["step"])
        self._show(metrics)
        self._untold = True
        self.report(older=0 if "test_loss" in metrics else REPORT_SECONDS)

    def report(self, *, older: float = 0) -> None:
        """Write the report anew where there is something new, and the last one is `older` than so many seconds."""
        if not self._untold or time.monotonic() - self._reported < older:
            return
        try:
            write_run_report(self._folder)
        except (
            OSError,
            ResourceError,
        ) as error:  # a full disk: training is worth more, and its states say so themselves
            self.say(f"no report this time: {error}")
        self._untold, self._reported = False, time.monotonic()

    def sync(self) -> None:
        """Have what was written on the disk before anything that relies on it."""
        for file in self._files.values():
            if file.path.exists():
                with file.path.open("rb") as handle:
                    os.fsync(handle.fileno())

    def _begin(self) -> None:
        if not self._begun:
            for file in self._files.values():
                file.start()
        self._begun = True

    def _show(self, metrics: Mapping[str, Any]) -> None:
        done = metrics["step"]
        if "test_loss" in metrics:
            stopped = f"  stopped {metrics['stopped']:.0%}" if "stopped" in metrics else ""
            pairs = "".join(f"  {word} {metrics[name]:{form}}" for name, word, form in _OF_PAIRS if name in metrics)
            self.say(f"step {done}/{self._steps}  test loss {metrics['test_loss']:.4f}{pairs}{stopped}")
        if "loss" not in metrics:
            return
        self._seconds.append(metrics["seconds"])
        if len(self._seconds) == MEASURED and done < self._steps:
            # The first steps of a process are slower: what they need is built and found out in them.
            left = statistics.median(self._seconds) * (self._steps - done)
            self.say(
                f"about {duration(left)} for the {self._steps - done} steps that are left, evaluations not counted"
            )
        speed = metrics["trained_tokens"] / metrics["seconds"]
        state = f"loss {metrics['loss']:.4f}  rate {metrics['learning_rate']:.2e}  {speed:,.0f} trained tokens/s"
        self.status(state)
        self._progress.update(self._task, completed=done)
        if not self._console.is_terminal and (done == 1 or done % max(1, self._steps // 10) == 0):
            self.say(f"step {done}/{self._steps}  {state}")


class Silence(Log):
    """Stand-in for a log in the other processes of a run: the first one writes and speaks for all."""

    def __init__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        pass

    def __enter__(self) -> "Silence":
        return self

    def resume(self, step: int) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def evaluated(self, step: int, test_loss: float, measured: Mapping[str, float] | None = None) -> dict[str, float]:
        return {"test_loss": test_loss}

    def step(self, metrics: Mapping[str, Any]) -> None:
        pass

    def report(self, *, older: float = 0) -> None:
        pass

    def sync(self) -> None:
        pass
