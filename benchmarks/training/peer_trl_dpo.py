"""TRL's DPOTrainer with PEFT, in its own environment: `python -m benchmarks.training.peer_trl_dpo job.json`.

As it comes it recomputes activations, takes 8 pairs at a time, and computes the reference in each step. Tuned, it keeps
activations, the pairs of a step are sorted by length, and the reference is computed once before the first step.
"""

import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.training.held_out import BETA
from benchmarks.training.job import Course, Job
from benchmarks.training.peer_trl import begin_with
from benchmarks.training.rows import COLUMNS, load_rows


def main() -> None:
    """Train on the pairs of the job, and save the adapter."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    job, course = Job.read(), Course()
    rows = load_rows(job.rows_file)
    pairs = rows.ordered(job.steps, by_length=job.tuned)
    names = [f"{column}_ids" for column in COLUMNS[3]]
    columns = zip(*pairs, strict=True)
    data = Dataset.from_dict(
        {name: [part.tolist() for part in parts] for name, parts in zip(names, columns, strict=True)}
    )

    class Listener(TrainerCallback):
        """Takes the times of whole steps, from log to log."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not course.losses:
                course.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                course.step(float(logs["loss"]))

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

    micro_batch = job.micro_batch if job.tuned else 8  # 8 is its default
    settings = (
        {
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "bfloat16"},
            "precompute_ref_log_probs": True,
            "precompute_ref_batch_size": micro_batch,
        }
        if job.tuned
        else {}
    )
    trainer = Trainer(
        model=job.checkpoint_dir,
        args=DPOConfig(
            output_dir=job.out_dir,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=job.batch_size // micro_batch,
            max_steps=job.steps,
            max_length=None,
            beta=BETA,
            learning_rate=job.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",  # the rows come in the order of the steps
            logging_steps=1,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            **settings,
        ),
        train_dataset=data,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=job.r, lora_alpha=job.alpha, lora_dropout=0.0, target_modules="all-linear"
        ),
        callbacks=[Listener()],
    )
    begin_with(trainer.model, load_file(job.start_file))
    trainer.train()
    trainer.save_model(job.out_dir)
    course.write(job)


if __name__ == "__main__":
    Path(Job.read().out_dir).mkdir(parents=True, exist_ok=True)
    main()
