"""What every script in finetune/ does with its flags: plan the run, or start its processes and be one of them."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lit_llama.device import TrainingPrecision
from lit_llama.model.config import Quantization
from lit_llama.train.config import LoggerName, TrainConfig
from lit_llama.train.launch import launch
from lit_llama.train.method import Method
from lit_llama.train.processes import Strategy


def start(
    method: Method,
    checkpoint_dir: Path,
    data_dir: Path,
    out_dir: Path,
    *,
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
    own: Mapping[str, Any],
) -> None:
    """Print the plan where one is asked for, else train; see `print_plan`, `launch` and `finetune`.

    Args:
        own: The settings that only this method's script has, by the names of its flags.
    """
    if plan or plan_memory is not None:
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
