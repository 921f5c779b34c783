"""TRL's SFTTrainer with PEFT, in its own environment: `python -m benchmarks.training.peer_trl job.json`.

As it comes it recomputes activations and takes 8 samples at a time. Tuned, it keeps them, and the samples of a step
are sorted by length so that there is little padding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.training.job import OPTIONS, Course, Job
from benchmarks.training.rows import load_rows


def main() -> None:
    """Train on the rows of the job, and save the adapter."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    job, course = Job.read(), Course()
    samples = load_rows(job.rows_file).ordered(job.steps, by_length=job.tuned)
    data = Dataset.from_dict(
        {"input_ids": [ids.tolist() for ids, _ in samples], "labels": [labels.tolist() for _, labels in samples]}
    )

    train(SFTTrainer, SFTConfig(**arguments(job)), data, job, course)


def arguments(job: Job) -> dict[str, Any]:
    """Arguments of a trainer's configuration that all of TRL's contenders share."""
    micro_batch = job.micro_batch if job.tuned else 8  # 8 is its default
    option = OPTIONS[job.option]
    settings: dict[str, Any] = {}
    if job.tuned:
        dtype = "bfloat16" if job.bfloat16 and not option.mixed else "float32"
        # Left out, bf16 is on: products in bfloat16, which a processor without them emulates.
        settings = {"gradient_checkpointing": False, "model_init_kwargs": {"dtype": dtype}}
        settings |= {"bf16": job.bfloat16} if option.mixed or not job.bfloat16 else {}
    return {
        "output_dir": job.out_dir,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job.batch_size // micro_batch,
        "max_steps": job.steps,
        "max_length": None,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",  # the rows come in the order of the steps
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
        **option.arguments,
    }


def train(kind: Any, args: Any, data: Any, job: Job, course: Course) -> None:
    """Train an adapter from the job's start with one of TRL's trainers, and save it with the course of the run.

    An option without adapters trains all weights.
    """
    from peft import LoraConfig
    from transformers import TrainerCallback

    class Listener(TrainerCallback):
        """Takes the times of whole steps, from log to log."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not course.losses:
                course.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                course.step(float(logs["loss"]))

    lora = None
    if (own := OPTIONS[job.option].lora) is not None:
        shared: dict[str, Any] = {"lora_dropout": 0.0, "target_modules": "all-linear"}
        lora = LoraConfig(task_type="CAUSAL_LM", r=job.r, lora_alpha=job.alpha, **shared | own)
    trainer = kind(model=job.checkpoint_dir, args=args, train_dataset=data, peft_config=lora, callbacks=[Listener()])
    if lora:
        begin_with(trainer.model, load_file(job.start_file))
    trainer.train()
    trainer.save_model(job.out_dir)
    course.write(job)


@torch.no_grad()
def begin_with(model: torch.nn.Module, start: Mapping[str, torch.Tensor]) -> None:
    """Give every lora_A of a PEFT model its value; lora_B is zero already."""
    parts = {name.replace(".default.", "."): value for name, value in model.named_parameters() if ".lora_A." in name}
    wanted = {name for name in start if ".lora_A." in name}
    if set(parts) != wanted:
        raise ValueError(f"other layers are adapted: {sorted(set(parts) ^ wanted)[:4]}")
    for name, value in parts.items():
        value.copy_(start[name])


if __name__ == "__main__":
    Path(Job.read().out_dir).mkdir(parents=True, exist_ok=True)
    main()
