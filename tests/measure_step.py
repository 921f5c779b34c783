"""Run by test_plan.py in a process of its own: the memory that one training step takes, against its plan."""

import json
import sys
import threading
import time
from pathlib import Path

import torch
from conftest import tiny_config

from lit_llama.device import Numerics, resident_memory, return_freed_memory
from lit_llama.model.config import LLaMAConfig, LoRAConfig
from lit_llama.model.fused.layer import fuse
from lit_llama.model.llama import LLaMA
from lit_llama.model.lora import apply_lora, lora_parameters
from lit_llama.train.config import TrainConfig
from lit_llama.train.footprint import Build, Shape
from lit_llama.train.loss import TokenLoss
from lit_llama.train.method import LoRA
from lit_llama.train.optim import STATE_BYTES, build_optimizer, set_learning_rate
from lit_llama.train.recompute import recompute_activations

CPU = torch.device("cpu")


def step(config: LLaMAConfig, lora: LoRAConfig, numerics: Numerics, train: TrainConfig, shape: Shape) -> None:
    """Two micro-batches and an update, as the loop makes them."""
    with torch.device("meta"):
        model = LLaMA(config)
    model.load_state_dict(
        {name: torch.full(value.shape, 0.01, dtype=numerics.linear) for name, value in model.state_dict().items()},
        assign=True,
    )
    apply_lora(model, lora)
    fuse(model, train.activation_checkpointing)
    recompute_activations(model, train.activation_checkpointing)
    optimizer = build_optimizer(lora_parameters(model), train, CPU)
    set_learning_rate(optimizer, 1e-4)
    loss_of = TokenLoss(model, numerics).train()
    ids = torch.arange(sum(shape.lengths)) % config.vocab_size
    for _ in range(2):
        loss_of(ids, list(shape.lengths), torch.arange(shape.trained), ids[: shape.trained]).backward()
    optimizer.step()


class Peak(threading.Thread):
    """Watches how much of the process is in memory; getrusage also counts what importing once took."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.bytes = max(self.bytes, resident_memory())
            time.sleep(0.0005)


def main(dtype: str, checkpointing: str, tokens: int) -> None:
    return_freed_memory()
    torch.set_num_threads(1)
    numerics = Numerics(device=CPU, linear=getattr(torch, dtype), rest=getattr(torch, dtype))
    lora, train = LoRAConfig(), TrainConfig(activation_checkpointing=checkpointing)  # type: ignore[arg-type]
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
    build = Build(config=config, method=LoRA(lora), numerics=numerics, checkpointing=train.activation_checkpointing)
    sizes = build.sizes()
    planned = sizes.base + int((8 + STATE_BYTES["adamw"]) * sizes.trained) + build.training_peak(shape)
    step(tiny_config(), lora, numerics, train, Shape([20, 30], 40))  # what is loaded at first use
    before = resident_memory()
    watch = Peak()
    watch.start()
    step(config, lora, numerics, train, shape)
    watch.done = True
    watch.join()
    print(json.dumps({"planned": planned, "measured": watch.bytes - before, "weights": sizes.base}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
