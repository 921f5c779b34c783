"""litgpt's LoRA, in its own environment: `python -m benchmarks.training.peer_litgpt job.json`.

Its model, its collate function, its chunked head and cross entropy, Fabric, and the step of its finetune/lora.py, with
one change: micro-batches are weighted by their trained tokens, so that the loss is that of the others. As it comes it
trains in bf16-mixed, one sample at a time; tuned in bf16-true, as its tutorials advise, or in float32 where the
processor is slow at bfloat16.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file

from benchmarks.training.job import Course, Job
from benchmarks.training.rows import IGNORE_INDEX, load_rows

PREFIX = "base_model.model.model.layers"
NAMES = {
    "attn.proj": "self_attn.o_proj",
    "mlp.fc_1": "mlp.gate_proj",
    "mlp.fc_2": "mlp.up_proj",
    "mlp.proj": "mlp.down_proj",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
Tensors = dict[str, torch.Tensor]


def main() -> None:
    """Train on the rows of the job, and save the adapter as PEFT would."""
    import lightning as L
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import load_checkpoint

    job, course = Job.read(), Course()
    converted = convert(Path(job.checkpoint_dir), Path(job.rows_file).parent)
    parts = ("query", "key", "value", "projection", "mlp")
    config = Config.from_file(
        converted / "model_config.yaml",
        lora_r=job.r,
        lora_alpha=job.alpha,
        lora_dropout=0.0,
        **{f"lora_{part}": True for part in parts},
    )
    best: Literal["bf16-true", "32-true"] = "bf16-true" if job.bfloat16 else "32-true"
    fabric = L.Fabric(devices=1, accelerator="cpu", precision=best if job.tuned else "bf16-mixed")
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(trained, lr=job.learning_rate, weight_decay=0.0))
    load_checkpoint(fabric, model, converted / "lit_model.pth", strict=False)
    missing = model.load_state_dict(to_litgpt(load_file(job.start_file), config.n_layer), strict=False)
    if missing.unexpected_keys:
        raise ValueError(f"other layers are adapted: {missing.unexpected_keys[:4]}")
    _fit(job, course, fabric, model, optimizer)
    _save(job, to_peft(model.state_dict(), config))
    course.write(job)


def convert(checkpoint_dir: Path, folder: Path) -> Path:
    """The checkpoint in litgpt's format, made once."""
    from litgpt.config import configs
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    source = checkpoint_dir.resolve()
    name = next((known["name"] for known in configs if known["name"].lower() == source.name.lower()), None)
    if name is None:
        raise ValueError(f"litgpt knows no model named {source.name}; name the checkpoint's folder as it does")
    target = folder / "litgpt" / name
    if not (target / "lit_model.pth").exists():
        target.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if not (target / path.name).exists():
                (target / path.name).symlink_to(path)
        convert_hf_checkpoint(target, model_name=name)
    return target


def _fit(job: Job, course: Course, fabric: Any, model: Any, optimizer: Any) -> None:
    from litgpt.data.base import get_sft_collate_fn
    from litgpt.utils import chunked_cross_entropy

    samples: list[Any] = [
        {"input_ids": torch.from_numpy(ids).long(), "labels": torch.from_numpy(labels).long(), "token_counts": _COUNTS}
        for ids, labels in load_rows(job.rows_file).ordered(job.steps, by_length=job.tuned)
    ]
    model.max_seq_length = max(len(sample["input_ids"]) for sample in samples)
    collate = get_sft_collate_fn()
    micro_batch = job.micro_batch if job.tuned else 1  # 1 is its default
    model.train()
    course.begin()
    for start in range(0, len(samples), job.batch_size):
        step = samples[start : start + job.batch_size]
        total = sum(int((sample["labels"][1:] != IGNORE_INDEX).sum()) for sample in step)
        losses = []
        for at in range(0, len(step), micro_batch):
            batch = collate(step[at : at + micro_batch])
            targets = batch["labels"][..., 1:]
            logits = model(batch["input_ids"], lm_head_chunk_size=128)
            logits[-1] = logits[-1][..., :-1, :]
            count = (targets != IGNORE_INDEX).sum()
            loss = chunked_cross_entropy(logits, targets) * (count / total)
            fabric.backward(loss)
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        course.step(float(sum(losses)))


_COUNTS = {"raw": 0, "raw_plus_prompt_template": 0}
"""What its collate function counts; the benchmark counts for itself."""


def to_litgpt(start: Mapping[str, torch.Tensor], layers: int) -> Tensors:
    """lora_A by litgpt's names: those of queries, keys and values are stacked."""
    state = {}
    for layer in range(layers):
        there = f"{PREFIX}.{layer}"
        here = f"transformer.h.{layer}"
        state[f"{here}.attn.qkv.lora_A"] = torch.cat([start[f"{there}.{name}.lora_A.weight"] for name in QKV])
        for ours, theirs in NAMES.items():
            state[f"{here}.{ours}.lora_A"] = start[f"{there}.{theirs}.lora_A.weight"]
    return state


def to_peft(state: Mapping[str, torch.Tensor], config: Any) -> Tensors:
    """The adapter by PEFT's names."""
    rows = [config.head_size * heads for heads in (config.n_head, config.n_query_groups, config.n_query_groups)]
    tensors: Tensors = {}
    for layer in range(config.n_layer):
        there = f"{PREFIX}.{layer}"
        here = f"transformer.h.{layer}"
        parts_a = state[f"{here}.attn.qkv.lora_A"].split(config.lora_r)
        parts_b = state[f"{here}.attn.qkv.lora_B"].split(rows)
        for name, a, b in zip(QKV, parts_a, parts_b, strict=True):
            tensors[f"{there}.{name}.lora_A.weight"], tensors[f"{there}.{name}.lora_B.weight"] = a, b
        for ours, theirs in NAMES.items():
            for part in ("lora_A", "lora_B"):
                tensors[f"{there}.{theirs}.{part}.weight"] = state[f"{here}.{ours}.{part}"]
    return {name: value.detach().contiguous().clone() for name, value in tensors.items()}


def _save(job: Job, tensors: Tensors) -> None:
    folder = Path(job.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.checkpoint_dir,
        "r": job.r,
        "lora_alpha": job.alpha,
        "lora_dropout": 0.0,
        "target_modules": [name.rpartition(".")[2] for name in (*QKV, *NAMES.values())],
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")


if __name__ == "__main__":
    main()
