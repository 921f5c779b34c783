"""TRL's DPOTrainer with PEFT, in its own environment: `python -m benchmarks.training.peer_trl_dpo job.json`.

As it comes it recomputes activations, takes 8 pairs at a time, and computes the reference in each step. Tuned, it keeps
activations, the pairs of a step are sorted by length, and the reference is computed once before the first step.
"""

import time
from pathlib import Path
from typing import Any

from benchmarks.training.held_out import BETA
from benchmarks.training.job import Course, Job
from benchmarks.training.peer_trl import arguments, train
from benchmarks.training.rows import COLUMNS, load_rows


def main() -> None:
    """Train on the pairs of the job, and save the adapter."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    job, course = Job.read(), Course()
    rows = load_rows(job.rows_file)
    pairs = rows.ordered(job.steps, by_length=job.tuned)
    names = [f"{column}_ids" for column in COLUMNS[3]]
    columns = zip(*pairs, strict=True)
    data = Dataset.from_dict(
        {name: [part.tolist() for part in parts] for name, parts in zip(names, columns, strict=True)}
    )

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """Takes encoded pairs, and the time in which their reference is computed."""

        def _prepare_dataset(self, dataset: Any, *rest: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *rest: Any) -> Any:
            begun = time.monotonic()
            found = super()._precompute_ref_logps(dataset, *rest)
            # Of these pairs; the other contender computes that of all rows.
            course.reference = (time.monotonic() - begun) / len(pairs) * len(rows.train)
            return found

    shared = arguments(job) | {"beta": BETA}
    if job.tuned:
        shared |= {"precompute_ref_log_probs": True, "precompute_ref_batch_size": job.micro_batch}
    train(Trainer, DPOConfig(**shared), data, job, course)


if __name__ == "__main__":
    Path(Job.read().out_dir).mkdir(parents=True, exist_ok=True)
    main()
