"""Run by test_planned_memory.py in a process of its own: runs of a small model, and the memory that each one took.

Every run is a fork of this process, which has imported what a door imports ahead of its plan and nothing else: its peak
is its own.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import datasets  # noqa: F401

from lit_llama.device import keep_few_products
from lit_llama.model.config import LoRAConfig
from lit_llama.model.quantize import library
from lit_llama.train import run as run_module
from lit_llama.train.config import PreferenceConfig, RunConfig, TrainConfig
from lit_llama.train.logs import sampler
from lit_llama.train.methods.method import Full, LoRA, Method, Preference


def high_water() -> int:
    """VmHWM: most bytes that were resident at a time."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def finetune(folder: Path, setting: dict[str, Any]) -> dict[str, int]:
    """One run; gives what its plan said and what it took."""
    if setting.get("returns"):
        run_module.keep_freed_memory = lambda: None
    sampler.MAX_NEW_TOKENS = 12  # the first of them take the most
    train = TrainConfig(**{"max_steps": 1, "batch_size": 8, "sample_prompts": 0} | setting.get("train", {}))
    lora = LoRAConfig(**setting.get("lora", {}))
    dpo = PreferenceConfig(**setting.get("dpo", {}))
    method: Method = Full() if setting.get("full") else LoRA(lora)
    if "dpo" in setting:
        method = Preference(lora, preference=dpo)
    config = RunConfig(
        checkpoint_dir=folder / "model",
        data_dir=folder / ("pairs" if "dpo" in setting else "data"),
        out_dir=folder / setting["name"],
        lora=lora,
        dpo=dpo,
        train=train,
        precision=setting.get("precision", "bf16-true"),
        quantize=setting.get("quantize"),
        seed=0,
    )
    keep_few_products()  # as a door does
    plan = run_module.finetune(method, config, owns_process=True)
    return {
        "planned": plan.peak,
        "most": plan.peak + plan.holes,
        "measured": high_water(),
        "program": plan.memory.program,
        "roomy": plan.roomy,
    }


def main(folder: Path, settings: list[dict[str, Any]]) -> None:
    """Every setting in a fork; prints a line of JSON for each."""
    importlib.import_module("torch._dynamo")  # as tensors without numbers do at their first operation
    importlib.import_module("matplotlib.backends.backend_agg")  # as every run does at its end, when it holds little
    for setting in settings:
        process = os.fork()
        if not process:
            try:
                found = finetune(folder, setting)
                print(json.dumps({"name": setting["name"]} | found), flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(process, 0)[1]:
            sys.exit(f"{setting['name']} failed")
        if setting.get("quantize"):
            library()  # seconds; the plan of the first such run has loaded it for itself


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
