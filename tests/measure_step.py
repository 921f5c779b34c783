"""Run by test_plan.py in a process of its own: the memory that one training step takes, against its plan."""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from conftest import tiny_config

from lit_llama.device import Numerics, keep_freed_memory, resident_memory, return_freed_memory
from lit_llama.model.assemble import Assembly, assemble
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.llama import LLaMA
from lit_llama.train.config import TrainConfig
from lit_llama.train.footprint import Build, Shape
from lit_llama.train.loss import TokenLoss
from lit_llama.train.method import Full, LoRA, Method
from lit_llama.train.optim import build_optimizer, set_learning_rate, state_bytes

CPU = torch.device("cpu")


def step(config: LLaMAConfig, method: Method, numerics: Numerics, train: TrainConfig, shape: Shape) -> None:
    """Two micro-batches and an update, twice, as the loop makes them: the second time the optimizer remembers."""
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
    ids = torch.arange(sum(shape.lengths)) % config.vocab_size
    for _ in range(2):
        for _ in range(2):
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


def main(dtype: str, checkpointing: str, tokens: int, way: str, keeps: bool) -> None:
    (keep_freed_memory if keeps else return_freed_memory)()
    torch.set_num_threads(1)
    numerics = Numerics(device=CPU, linear=getattr(torch, dtype), rest=getattr(torch, dtype))
    method: Method = Full() if way == "full" else LoRA(LoRAConfig())
    train = TrainConfig(activation_checkpointing=checkpointing)  # type: ignore[arg-type]
    shape = Shape([tokens // 2, tokens - tokens // 2 - 40, 40], tokens // 2)
    config = tiny_config(
        vocab_size=8000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=5,
        num_attention_heads=12,
        num_key_value_heads=12,
        head_dim=64,
    )
    build = Build(config=config, method=method, numerics=numerics, checkpointing=train.activation_checkpointing)
    sizes = build.sizes()
    kept = sizes.base + 2 * sizes.trained_bytes + state_bytes("adamw", sizes.trained, sizes.trained_bytes)
    passing = build.training_peak(shape)
    step(tiny_config(), method, numerics, train, Shape([20, 30], 40))  # what is loaded at first use
    before = resident_memory()
    watch = Peak()
    watch.start()
    step(config, method, numerics, train, shape)
    watch.done = True
    watch.join()
    print(
        json.dumps(
            {"planned": kept + passing, "passing": passing, "measured": watch.bytes - before, "weights": sizes.plain}
        )
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5] == "keeps")
