"""LoRA fine-tuning: checkpoint + data -> adapter folder.

Shapes: T tokens of a micro-batch, N of them with a label.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lit_llama.device import (
    Precision,
    cores,
    describe,
    keep_freed_memory,
    peak_memory,
    pick_device,
    pick_dtype,
    seed_everything,
)
from lit_llama.errors import DataError, NumericalError, UserError
from lit_llama.folder import check_destination, publish, write_json
from lit_llama.model.adapter import CONFIG_FILE, save_adapter
from lit_llama.model.checkpoint import fingerprint, load_model
from lit_llama.model.config import LLaMAConfig, LoRAConfig, Quantization
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import apply_lora, lora_parameters, parameter_groups
from lit_llama.model.neftune import add_noise
from lit_llama.progress import stderr
from lit_llama.text.dataset import META_FILE, SPLITS, Batch, Split, epoch_order, micro_batches, read_meta
from lit_llama.text.formats import read_text
from lit_llama.text.prompts import TEMPLATE_FILE
from lit_llama.text.tokenizer import Tokenizer
from lit_llama.text.vocabulary import check_recorded, check_vocabulary, special_ids
from lit_llama.train.config import RUN_FILE, LoggerName, TrainConfig
from lit_llama.train.curve import draw_curve
from lit_llama.train.log import Log
from lit_llama.train.loggers import check_loggers
from lit_llama.train.loss import TokenLoss
from lit_llama.train.report.run_report import write_run_report
from lit_llama.train.sampler import Sampler
from lit_llama.train.schedule import learning_rate


def finetune_lora(
    checkpoint_dir: Path,
    data_dir: Path,
    out_dir: Path,
    *,
    lora: LoRAConfig,
    train: TrainConfig,
    precision: Precision,
    quantize: Quantization | None = None,
    seed: int,
    arguments: dict[str, Any],
    loggers: Sequence[LoggerName] = (),
) -> None:
    """Train an adapter and write its folder; the parameters are those of finetune/lora.py.

    run.yaml, meta.json and metrics.csv are there from the start; the folder is an adapter once adapter_config.json is,
    at the end.

    Args:
        arguments: The whole configuration, saved as run.yaml.

    Raises:
        UserError: Settings, checkpoint or data that do not fit each other.
        NumericalError: The loss is not finite; no adapter is written.
    """
    start = time.perf_counter()
    check_destination(out_dir, CONFIG_FILE)
    check_loggers(loggers)
    # All that the adapter's folder will hold is read first: hours later it may be gone.
    meta, splits = _read_fitting(checkpoint_dir, data_dir)
    template = read_text(data_dir / TEMPLATE_FILE)
    identity = {"path": str(checkpoint_dir), "fingerprint": fingerprint(checkpoint_dir)}
    identity |= {"quantize": quantize} if quantize else {}
    device = pick_device()
    dtype = pick_dtype(precision, device)
    keep_freed_memory()
    torch.set_num_threads(cores())
    seed_everything(seed)
    model = load_model(checkpoint_dir, device, dtype, quantize)
    adapted = apply_lora(model, lora)
    add_noise(model, train.neftune_noise_alpha)
    steps = train.steps(len(splits["train"]))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / RUN_FILE).write_text(yaml.safe_dump(arguments, sort_keys=False), "utf-8")
    trainable = sum(parameter.numel() for parameter in lora_parameters(model))
    run = {"trainable": trainable, "dtype": _name(dtype), "device": describe(device), "torch": torch.__version__}
    about = {"format": 1, "base": identity, "data": meta, "steps": steps, "run": run}
    write_json(out_dir / META_FILE, about)
    sampler = _sampler(model, checkpoint_dir, data_dir, train)
    with Log(out_dir, steps, sampler=sampler, loggers=loggers) as log:
        log.say(
            f"{trainable:,} trainable parameters in {len(adapted)} layers, "
            f"base in {quantize or _name(dtype)} on {device}; {len(splits['train'])} rows, "
            f"{steps} steps of {train.batch_size}; ready in {time.perf_counter() - start:.1f} s"
        )
        fit(model, splits["train"], splits["test"], train, seed, log, lora.loraplus_lr_ratio)
    with publish(out_dir, CONFIG_FILE) as folder:
        write_json(folder / META_FILE, about)
        (folder / TEMPLATE_FILE).write_text(template, "utf-8")
        save_adapter(model, lora, folder, str(checkpoint_dir))
    draw_curve(out_dir)
    write_run_report(out_dir)
    log.say(
        f"{out_dir}: adapter, report.html, metrics.csv, loss.png, run.yaml; {time.perf_counter() - start:.1f} s, "
        f"peak memory {peak_memory(device) / 1e9:.2f} GB"
    )
    log.say(
        f"next: python finetune/merge.py --adapter_dir {out_dir} --destination_path checkpoints/{out_dir.name}-merged"
    )


def fit(
    model: LLaMA, train: Split, test: Split, config: TrainConfig, seed: int, log: Log, loraplus_lr_ratio: float = 1.0
) -> None:
    """Optimize the adapters of `model` in place.

    The loss of a step is the sum over the trained tokens of its whole batch divided by their number, however the batch
    is cut. Which samples a step takes follows from (seed, epoch), its learning rate from the step.

    Raises:
        NumericalError: Loss or gradients are not finite.
    """
    from lightning.fabric import Fabric  # takes seconds, which a wrong path need not wait for

    device = next(model.parameters()).device
    fabric = Fabric(accelerator=device.type, devices=1)
    parameters = lora_parameters(model)
    groups = parameter_groups(model, loraplus_lr_ratio, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    loss_of, optimizer = fabric.setup(TokenLoss(model), optimizer)
    steps = config.steps(len(train))
    per_epoch = math.ceil(len(train) / config.batch_size)
    log.status("evaluating on the test split")
    test_loss = evaluate(loss_of, test, config.micro_batch_tokens)
    log.step({"step": 0, "memory": peak_memory(device), **log.evaluated(0, test_loss)})
    model.train()
    for step in range(steps):
        start = time.perf_counter()
        epoch, position = divmod(step, per_epoch)
        rows = epoch_order(len(train), seed, epoch)[position * config.batch_size :][: config.batch_size].tolist()
        batches = list(micro_batches(train, rows, config.micro_batch_tokens))
        count = sum(len(batch.targets) for batch in batches)
        if not count:
            raise DataError(f"step {step + 1}: no token of its {len(rows)} samples carries a loss")
        rate = learning_rate(step, steps, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_ratio"]
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = loss_of(*_tensors(batch, device)) / count
            fabric.backward(loss)
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        if not (total + norm).isfinite():
            raise NumericalError(
                f"step {step + 1}: loss {total.item():.4g}, gradient norm {norm.item():.4g}; "
                "no adapter was written. Lower --train.learning_rate, or use --precision 32-true"
            )
        optimizer.step()
        optimizer.zero_grad()
        metrics = {
            "step": step + 1,
            "epoch": (step + 1) / per_epoch,
            "learning_rate": rate,
            "loss": total.item(),
            "grad_norm": norm.item(),
            "trained_tokens": count,
            "tokens": sum(len(batch.input_ids) for batch in batches),
            "seconds": time.perf_counter() - start,
        }
        if (step + 1) % config.eval_interval == 0 or step + 1 == steps:
            log.status("evaluating on the test split")
            test_loss = evaluate(loss_of, test, config.micro_batch_tokens)
            metrics |= log.evaluated(step + 1, test_loss)
        log.step(metrics | {"memory": peak_memory(device)})


@torch.no_grad()
def evaluate(loss_of: torch.nn.Module, split: Split, micro_batch_tokens: int) -> float:
    """Mean loss per trained token over a whole split, whatever the batches."""
    training = loss_of.training
    loss_of.eval()
    device = next(loss_of.parameters()).device
    total, count = 0.0, 0
    for batch in micro_batches(split, range(len(split)), micro_batch_tokens):
        if len(batch.targets):
            total += loss_of(*_tensors(batch, device)).item()
            count += len(batch.targets)
    loss_of.train(training)
    if not count:
        raise DataError("no token of the test split carries a loss")
    return total / count


def _tensors(batch: Batch, device: torch.device) -> tuple[torch.Tensor, Sequence[int], torch.Tensor, torch.Tensor]:
    ids, select, targets = (torch.from_numpy(x).to(device) for x in (batch.input_ids, batch.select, batch.targets))
    return ids, batch.lengths, select, targets


def _read_fitting(checkpoint_dir: Path, data_dir: Path) -> tuple[dict[str, Any], dict[str, Split]]:
    """meta.json and the splits of the data, if they fit the base."""
    config = LLaMAConfig.from_folder(checkpoint_dir)
    meta = read_meta(data_dir)
    tokenizer = Tokenizer.from_path(checkpoint_dir)
    check_vocabulary(checkpoint_dir, config.vocab_size, tokenizer)
    check_recorded(checkpoint_dir, tokenizer, checkpoint_dir)
    for remark in (*tokenizer.remarks, *special_ids(checkpoint_dir, tokenizer).remarks):
        stderr().print(remark, markup=False)
    recorded = meta.get("tokenizer", {})
    if tokenizer.fingerprint() != recorded.get("fingerprint"):
        raise DataError(
            f"{data_dir} was prepared with {recorded.get('path')}, whose vocabulary is not that of "
            f"{checkpoint_dir}; prepare it again with --tokenizer_path {checkpoint_dir}"
        )
    splits = {name: Split(data_dir, name) for name in SPLITS}
    for name, split in splits.items():
        longest = int(split.lengths.max())
        if not split.trained_tokens():
            raise DataError(f"{data_dir}: no token of the {name} split carries a loss; prepare the data again")
        if longest > config.context_length:
            raise DataError(
                f"{data_dir}: the longest sample has {longest} tokens, {checkpoint_dir} reads "
                f"{config.context_length}; prepare the data with a smaller --max_seq_length"
            )
    return meta, splits


def _sampler(model: LLaMA, checkpoint_dir: Path, data_dir: Path, config: TrainConfig) -> Sampler | None:
    if not config.sample_prompts:
        return None
    try:
        return Sampler.from_folders(model, checkpoint_dir, data_dir, config.sample_prompts, config.micro_batch_tokens)
    except UserError as error:
        stderr().print(f"no sample answers: {error}", markup=False)
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
