"""This project's contender, finetune/lora.py or dpo.py as it is: `python -m benchmarks.training.ours job.json`.

Its settings are the defaults, but for what all contenders share.
"""

import runpy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.training.job import OPTIONS, Course, Job

DOORS = Path(__file__).parent.parent.parent / "finetune"


def main() -> None:
    """Run the door, listening to what it logs."""
    from lit_llama.train.logs.log import Log
    from lit_llama.train.loop import Trainer

    job, course, log_step, compute_reference = Job.read(), Course(), Log.step, Trainer.refer

    def step(self: Log, metrics: Mapping[str, Any]) -> None:
        log_step(self, metrics)
        if "loss" in metrics:
            # The time of an evaluation after the last step is none of the step's.
            seconds = metrics["seconds"] if "test_loss" in metrics else None
            course.step(metrics["loss"], seconds, metrics["trained_tokens"])
        else:
            course.begin()

    def refer(self: Trainer, tell: Callable[[int], None]) -> None:
        begun = time.monotonic()
        compute_reference(self, tell)
        course.reference = time.monotonic() - begun

    Log.step = step  # type: ignore[method-assign]
    Trainer.refer = refer  # type: ignore[method-assign]
    name = "dpo" if job.preference else "full" if OPTIONS[job.option].lora is None else "lora"
    door = str(DOORS / f"{name}.py")
    sys.argv = [door, *flags(job)]
    runpy.run_path(door, run_name="__main__")
    course.write(job)


def flags(job: Job) -> list[str]:
    """The command line: what is shared with the peers, and else the defaults."""
    values: dict[str, Any] = {
        "checkpoint_dir": job.checkpoint_dir,
        "data_dir": job.data_dir,
        "out_dir": job.out_dir,
        "seed": job.seed,
        "train.max_steps": job.steps,
        "train.epochs": job.steps,  # enough of them, whatever the number of rows
        "train.batch_size": job.batch_size,
        "train.learning_rate": job.learning_rate,
        "train.schedule": "constant",
        "train.warmup_ratio": 0,
        "train.weight_decay": 0,
        "train.max_grad_norm": 0,
        "train.eval_interval": job.steps,
        "train.sample_prompts": 0,
    }
    option = OPTIONS[job.option]
    if option.lora is not None:
        values |= {"lora.r": job.r, "lora.alpha": job.alpha, "lora.dropout": 0}
    values |= option.flags
    if job.precision:
        values["precision"] = job.precision
    if job.quantize:
        values["quantize"] = job.quantize
    return [f"--{name}={value}" for name, value in values.items()]


if __name__ == "__main__":
    main()
