"""Run by test_plan.py in a process of its own: the memory that training steps take, against their plans.

Every step is in a fork of this process, which has imported all and computed nothing.
"""

import importlib
import json
import os
import sys
import threading
import time
import traceback

import torch
from conftest import tiny_config

from lit_llama.device import Numerics, keep_freed_memory, resident_memory, return_freed_memory
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.train.config import TrainConfig
from lit_llama.train.loss import TokenLoss
from lit_llama.train.memory.footprint import Build, Shape
from lit_llama.train.methods.method import Full, LoRA, Method
from lit_llama.train.optim import build_optimizer, set_learning_rate, state_bytes

CPU = torch.device("cpu")


def step(
    config: LLaMAConfig,
    method: Method,
    numerics: Numerics,
    train: TrainConfig,
    *steps: list[Shape],
) -> None:
    """The micro-batches of each step and an update, as the loop makes them: in the second step the optimizer remembers,
    and its second micro-batch finds the gradients of the first."""
    with torch.device("meta"):
        model = LLaMA(config)
    model.load_state_dict(
        {name: torch.full(value.shape, 0.01, dtype=numerics.linear) for name, value in model.state_dict().items()},
        assign=True,
    )
    assemble(model, Assembly(adapt=method.apply, checkpointing=train.activation_checkpointing))
    optimizer = build_optimizer(method.groups(model, 0.0), train, CPU)
    set_learning_rate(optimizer, 1e-4)
    loss_of = TokenLoss(model, numerics).train()
    for micro_batches in steps:
        for shape in micro_batches:
            ids = torch.arange(sum(shape.lengths)) % config.vocab_size
            loss_of(ids, list(shape.lengths), torch.arange(shape.trained), ids[: shape.trained]).backward()
        optimizer.step()
        optimizer.zero_grad()


class Peak(threading.Thread):
    """Watches how much of the process is in memory; getrusage also counts what importing once took."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.bytes = max(self.bytes, resident_memory())
            time.sleep(0.0005)


def measure(dtype: str, checkpointing: str, tokens: int, way: str, keeps: bool) -> dict[str, int]:
    """Bytes that were planned and those that were taken."""
    (keep_freed_memory if keeps else return_freed_memory)()
    torch.set_num_threads(1)
    numerics = Numerics(device=CPU, linear=getattr(torch, dtype), rest=getattr(torch, dtype))
    method: Method = Full() if way == "full" else LoRA(LoRAConfig())
    train = TrainConfig(activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    shape = Shape([tokens // 2, tokens - tokens // 2 - 40, 40], tokens // 2)
    config = tiny_config(
        vocab_size=6000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    build = Build(config=config, method=method, numerics=numerics, checkpointing=train.activation_checkpointing)
    sizes = build.sizes()
    kept = sizes.base + 2 * sizes.trained_bytes + state_bytes("adamw", sizes.trained, sizes.trained_bytes)
    passing = build.training_peak(shape)
    # What is loaded at first use, and the code of products, which is made for each size of those in 16 bits: a plan
    # counts them with the program. A heap that keeps what is freed would keep this step's memory as well.
    few = Shape([20, 30], 40)
    step(tiny_config() if keeps else config, method, numerics, train, [few if keeps or dtype == "float32" else shape])
    before = resident_memory()
    watch = Peak()
    watch.start()
    step(config, method, numerics, train, [few], [shape, shape])
    watch.done = True
    watch.join()
    return {"planned": kept + passing, "passing": passing, "measured": watch.bytes - before, "weights": sizes.plain}


def main(settings: list[str]) -> None:
    """Each of them in a fork; prints a line of JSON for each."""
    importlib.import_module("torch._dynamo")  # as tensors without numbers do at their first operation
    for setting in settings:
        process = os.fork()
        if not process:
            try:
                dtype, checkpointing, tokens, way, heap = setting.split()
                print(json.dumps(measure(dtype, checkpointing, int(tokens), way, heap == "keeps")), flush=True)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(process, 0)[1]:
            sys.exit(f"{setting} failed")


if __name__ == "__main__":
    main(sys.argv[1:])
