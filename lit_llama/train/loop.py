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
    Numerics,
    TrainingPrecision,
    cores,
    keep_freed_memory,
    peak_memory,
    return_freed_memory,
    seed_everything,
)
from lit_llama.errors import DataError, NumericalError
from lit_llama.folder import check_destination, publish, write_json
from lit_llama.model.adapter import CONFIG_FILE, save_adapter
from lit_llama.model.checkpoint import fingerprint, load_model
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import apply_lora, lora_parameters
from lit_llama.progress import stderr
from lit_llama.text.dataset import META_FILE, SPLITS, Batch, Split, epoch_order, micro_batches, read_meta
from lit_llama.text.formats import read_text
from lit_llama.text.prompts import TEMPLATE_FILE
from lit_llama.text.tokenizer import Tokenizer
from lit_llama.text.vocabulary import check_recorded, check_vocabulary, special_ids
from lit_llama.train.config import TrainConfig
from lit_llama.train.log import Log, draw_curve
from lit_llama.train.loss import TokenLoss
from lit_llama.train.optim import build_optimizer, set_learning_rate
from lit_llama.train.plan import make_plan
from lit_llama.train.plan_table import advice, does_not_fit, explained, short
from lit_llama.train.recompute import recompute_activations
from lit_llama.train.scaling import overflowed
from lit_llama.train.schedule import learning_rate
from lit_llama.train.stopping import Best
from lit_llama.train.warm_up import largest_batch, warm_up

RUN_FILE = "run.yaml"


def finetune_lora(
    checkpoint_dir: Path,
    data_dir: Path,
    out_dir: Path,
    *,
    lora: LoRAConfig,
    train: TrainConfig,
    precision: TrainingPrecision,
    seed: int,
    arguments: dict[str, Any],
) -> None:
    """Train an adapter and write its folder; the parameters are those of finetune/lora.py.

    run.yaml and metrics.csv are there from the start; the folder is an adapter once adapter_config.json is, at the end.

    Args:
        arguments: The whole configuration, saved as run.yaml.

    Raises:
        UserError: Settings, checkpoint or data that do not fit each other.
        NumericalError: The loss is not finite; no adapter is written.
        ResourceError: Memory ran out.
    """
    start = time.perf_counter()
    check_destination(out_dir, CONFIG_FILE)
    # All that the adapter's folder will hold is read first: hours later it may be gone.
    meta, splits = _read_fitting(checkpoint_dir, data_dir)
    template = read_text(data_dir / TEMPLATE_FILE)
    identity = {"path": str(checkpoint_dir), "fingerprint": fingerprint(checkpoint_dir)}
    config = LLaMAConfig.from_folder(checkpoint_dir)
    plan = make_plan(config, splits, lora=lora, train=train, precision=precision, seed=seed)
    numerics, device = plan.numerics, plan.numerics.device
    stderr().print(f"plan: {short(plan)}", markup=False)
    if not plan.fits:
        stderr().print(f"warning: {does_not_fit(plan)}; {advice(plan)}", markup=False)
    (keep_freed_memory if plan.roomy else return_freed_memory)()
    torch.set_num_threads(cores())
    seed_everything(seed)
    with explained(plan):
        model = load_model(checkpoint_dir, device, numerics.rest, numerics.linear)
        adapted = apply_lora(model, lora)
        recompute_activations(model, train.activation_checkpointing)
    steps = train.steps(len(splits["train"]))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / RUN_FILE).write_text(yaml.safe_dump(arguments, sort_keys=False), "utf-8")
    with Log(out_dir, steps) as log:
        trainable = sum(parameter.numel() for parameter in lora_parameters(model))
        log.say(
            f"{trainable:,} trainable parameters in {len(adapted)} layers, base in {_name(numerics.linear)} on "
            f"{device}; {len(splits['train'])} rows, {steps} steps of {train.batch_size}; ready in "
            f"{time.perf_counter() - start:.1f} s"
        )
        with explained(plan):
            fit(model, splits["train"], splits["test"], train, seed, log, numerics)
    with publish(out_dir, CONFIG_FILE) as folder:
        write_json(folder / META_FILE, {"format": 1, "base": identity, "data": meta, "steps": steps})
        (folder / TEMPLATE_FILE).write_text(template, "utf-8")
        save_adapter(model, lora, folder, str(checkpoint_dir))
    draw_curve(out_dir)
    log.say(
        f"{out_dir}: adapter, metrics.csv, loss.png, run.yaml; {time.perf_counter() - start:.1f} s, "
        f"peak memory {peak_memory(device) / 1e9:.2f} GB"
    )
    log.say(
        f"next: python finetune/merge.py --adapter_dir {out_dir} --destination_path checkpoints/{out_dir.name}-merged"
    )


def fit(model: LLaMA, train: Split, test: Split, config: TrainConfig, seed: int, log: Log, numerics: Numerics) -> None:
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
    optimizer = build_optimizer(parameters, config, device)
    loss_of, optimizer = fabric.setup(TokenLoss(model, numerics), optimizer)
    scaler, best = numerics.scaler(), Best()
    kept = [parameter.detach().clone() for parameter in parameters] if config.keep == "best" else []
    steps = config.steps(len(train))
    per_epoch = math.ceil(len(train) / config.batch_size)
    log.status("evaluating on the test split")
    log.step({"step": 0, "test_loss": evaluate(loss_of, test, config.micro_batch_tokens)})
    model.train()
    log.status("trying the largest micro-batch")
    warm_up(loss_of, fabric.backward, largest_batch(train, config, seed))
    for step in range(steps):
        start = time.perf_counter()
        epoch, position = divmod(step, per_epoch)
        rows = epoch_order(len(train), seed, epoch)[position * config.batch_size :][: config.batch_size].tolist()
        batches = list(micro_batches(train, rows, config.micro_batch_tokens))
        count = sum(len(batch.targets) for batch in batches)
        if not count:
            raise DataError(f"step {step + 1}: no token of its {len(rows)} samples carries a loss")
        rate = learning_rate(step, steps, config)
        set_learning_rate(optimizer, rate)
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = loss_of(*_tensors(batch, device)) / count
            fabric.backward(scaler.scale(loss))
            total += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
        skipped = overflowed(scaler, total, norm)
        if not skipped and not (total + norm).isfinite():
            raise NumericalError(
                f"step {step + 1}: loss {total.item():.4g}, gradient norm {norm.item():.4g}; "
                "no adapter was written. Lower --train.learning_rate, or use --precision 32-true"
            )
        if not skipped:
            optimizer.step()
        scaler.update()
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
            metrics["test_loss"] = evaluate(loss_of, test, config.micro_batch_tokens)
            if best.update(step + 1, metrics["test_loss"], config.min_delta) and config.keep == "best":
                torch._foreach_copy_(kept, [parameter.detach() for parameter in parameters])
        log.step(metrics)
        if best.exhausted(config):
            log.say(f"no lower test loss in {best.waited} evaluations; stopped after step {step + 1}")
            break
    if config.keep == "best" and best.step:
        with torch.no_grad():
            torch._foreach_copy_(list[torch.Tensor](parameters), kept)
        log.say(f"kept the adapter of step {best.step}, test loss {best.loss:.4f}")


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
