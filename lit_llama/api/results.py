"""Results of the package's functions: folders that other functions take, with what is to be known of them.

A call of the face keeps what it says, and puts the process back as it was.
"""

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_llama.console import Talk, talking
from lit_llama.device import process_kept

if TYPE_CHECKING:
    from lit_llama.conversion.merge import Proof
    from lit_llama.generate.evaluate.evaluation import Evaluation
    from lit_llama.train.memory.plan import Plan


Place = str | os.PathLike[str]
"""A path, or a result, which stands for its folder."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A folder, or a file, that a function made; every function takes it in place of a path.

    Attributes:
        folder: What was made.
        remarks: What people should know of it; empty where nothing is to be said.
        log: Lines that a command would have shown on the way.
    """

    folder: Path
    remarks: tuple[str, ...] = ()
    log: tuple[str, ...] = field(default=(), repr=False)

    def __fspath__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True, kw_only=True)
class Prepared(Result):
    """A data folder.

    Attributes:
        meta: What stands in its meta.json.
    """

    meta: Mapping[str, Any] = field(repr=False)

    @property
    def rows(self) -> dict[str, int]:
        """Samples of each split."""
        return {name: counts["rows"] for name, counts in self.meta.get("splits", {}).items()}


@dataclass(frozen=True, kw_only=True)
class Finetuned(Result):
    """A run: an adapter folder, or a checkpoint folder.

    Attributes:
        losses: Training loss of each optimizer step, by its number.
        test_losses: Test loss by the number of steps before the evaluation.
        plan: What the run was planned to need; `plan.fits` says whether that is there.
    """

    losses: Mapping[int, float] = field(default_factory=dict, repr=False)
    test_losses: Mapping[int, float] = field(default_factory=dict)
    plan: "Plan" = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Merged(Result):
    """A merged checkpoint folder, or GGUF file.

    Attributes:
        proof: How far its logits are from those of base and adapter.
    """

    proof: "Proof"


@dataclass(frozen=True, kw_only=True)
class Evaluated(Result):
    """An evaluation, in a folder with report.html and results.json.

    Attributes:
        evaluation: Models, tasks, rows, and all that stands in results.json.
    """

    evaluation: "Evaluation" = field(repr=False)

    @property
    def results(self) -> dict[str, Any]:
        """Contents of results.json: also intervals, and differences between models."""
        return self.evaluation.results

    @property
    def measures(self) -> dict[str, dict[str, dict[str, float]]]:
        """The estimate of each metric, by task, model and metric; of one without rows, nothing."""
        names = [model["name"] for model in self.results["models"]]
        return {
            task["name"]: {
                name: {
                    metric["name"]: metric["models"][number]["value"]
                    for metric in task["metrics"]
                    if metric["models"][number] is not None
                }
                for number, name in enumerate(names)
            }
            for task in self.results["tasks"]
        }


@dataclass(frozen=True, kw_only=True)
class GeneratedRows(Result):
    """Training rows that a model made, in a folder with rows.jsonl, rejected.jsonl and report.html.

    Attributes:
        accepted: Rows that are there.
        rejected: Attempts by the name of the filter that rejected them.
    """

    accepted: int
    rejected: Mapping[str, int]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows."""
        text = (self.folder / "rows.jsonl").read_text("utf-8")
        return [json.loads(line) for line in text.split("\n") if line]


@contextmanager
def called(verbose: bool | None) -> Iterator[Talk]:
    """Begin a call: what it says is kept, the process is put back."""
    with warnings.catch_warnings():  # in a kernel without ipywidgets tqdm warns of that once, for bars nobody asked for
        warnings.filterwarnings("ignore", message="IProgress not found")
        import_module("tqdm.auto")
    with talking(verbose) as talk, process_kept():
        yield talk


def path_of(place: Place | None) -> Path | None:
    """Return a place as a path."""
    return None if place is None else Path(place)
