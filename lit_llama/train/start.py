"""What every script in finetune/ does with its flags: plan the run, or start its processes and be one of them."""

import shlex
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lit_llama.device import TrainingPrecision
from lit_llama.errors import UserError
from lit_llama.model.adapter import CONFIG_FILE, trained_on, verify_folders
from lit_llama.model.config import Quantization
from lit_llama.progress import stderr
from lit_llama.train.config import LoggerName, TrainConfig
from lit_llama.train.launch import launch
from lit_llama.train.method import LoRA, Method
from lit_llama.train.processes import Strategy
from lit_llama.train.warm_start import find_base, read_start, remark_on_style


def start(
    method: Method,
    checkpoint_dir: Path | None,
    data_dir: Path,
    out_dir: Path,
    *,
    adapter_dir: Path | None = None,
    train: TrainConfig,
    precision: TrainingPrecision,
    quantize: Quantization | None = None,
    seed: int,
    resume: str | Path,
    loggers: list[LoggerName] | LoggerName | None,
    devices: int | Literal["auto"],
    num_nodes: int,
    strategy: Strategy,
    plan: bool,
    plan_memory: str | None,
    plan_device: str | None,
    verify: bool = False,
    own: Mapping[str, Any],
) -> None:
    """Print the plan where one is asked for, else train; see `print_plan`, `launch` and `finetune`.

    Args:
        method: What trains; without a start of its own.
        checkpoint_dir: The base; None for that of `adapter_dir`.
        adapter_dir: An adapter to begin with.
        verify: Read all of what the run begins with, and compare it with its manifests.
        own: The settings that only this method's script has, by the names of its flags.

    Raises:
        UserError: There is no base, or one that is an adapter.
    """
    if verify:
        verify_folders(checkpoint_dir, adapter_dir, data_dir, base_dir=checkpoint_dir if adapter_dir else None)
    if checkpoint_dir is not None:
        _check_base(checkpoint_dir, method)
    if adapter_dir is not None:
        method, checkpoint_dir, quantize = _begin_with(adapter_dir, method, checkpoint_dir, data_dir, quantize)
        own = dict(own) | {"lora": asdict(method.config), "quantize": quantize, "adapter_dir": str(adapter_dir)}
    if checkpoint_dir is None:
        raise UserError(
            "--checkpoint_dir is missing: the base model, a folder in Hugging Face layout; or give --adapter_dir, an "
            "adapter to go on with, which names its base"
        )
    if plan or plan_memory is not None or plan_device is not None:
        from lit_llama.train.plan_table import print_plan

        return print_plan(
            method,
            checkpoint_dir,
            data_dir,
            train=train,
            precision=precision,
            quantize=quantize,
            seed=seed,
            memory=plan_memory,
            card=plan_device,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
        )
    launch(devices, num_nodes)
    from lit_llama.train.run import finetune

    loggers = [loggers] if isinstance(loggers, str) else loggers
    paths = {"checkpoint_dir": str(checkpoint_dir), "data_dir": str(data_dir), "out_dir": str(out_dir)}
    settings = {"train": asdict(train), "precision": precision, "seed": seed, "loggers": loggers}
    finetune(
        method,
        checkpoint_dir,
        data_dir,
        out_dir,
        train=train,
        precision=precision,
        quantize=quantize,
        seed=seed,
        resume=resume,
        arguments=paths | dict(own) | settings | {"devices": devices, "num_nodes": num_nodes},
        loggers=loggers or (),
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
    )


def _check_base(folder: Path, method: Method) -> None:
    """Refuse an adapter where a model is expected, with what can be done with it."""
    if (folder / "config.json").is_file() or not (folder / CONFIG_FILE).is_file():
        return
    name = shlex.quote(str(folder))
    merge = f"python finetune/merge.py --adapter_dir {name} --destination_path {shlex.quote(f'{folder}-merged')}"
    ways = f"give it as --adapter_dir {name} to go on training it, or m" if isinstance(method, LoRA) else "m"
    raise UserError(
        f"--checkpoint_dir {folder} is an adapter and no model: {ways}ake it part of its base first, with {merge}"
    )


def _begin_with(
    adapter_dir: Path, method: Method, checkpoint_dir: Path | None, data_dir: Path, quantize: Quantization | None
) -> tuple[LoRA, Path, Quantization | None]:
    """The method that goes on with an adapter, its base, and how that is held."""
    assert isinstance(method, LoRA)
    base = find_base(adapter_dir, checkpoint_dir)
    config, begun = read_start(adapter_dir, base, method.config)
    remark_on_style(adapter_dir, data_dir)
    trained = trained_on(adapter_dir)
    if trained != quantize:
        kind = f"on a base in {trained}" if trained else "on a base that was not quantised"
        now = f"; it goes on on one in {quantize}" if quantize else ", and goes on so"
        stderr().print(f"{adapter_dir} was trained {kind}{now}")
    return LoRA(config, begun), base, quantize or trained
