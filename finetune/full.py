"""Fine-tune all weights of a checkpoint on prepared data; writes a checkpoint folder.

python finetune/full.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/full/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.train.config import FULL, RunConfig


@config_flags(
    "config",
    RunConfig,
    required=["checkpoint_dir"],
    without=["adapter_dir", "lora", "dpo", "quantize"],
    out_dir=Path("out/full/alpaca"),
    train=FULL,
    types={"checkpoint_dir": Path},
    texts={
        "checkpoint_dir": "Base model, a folder in Hugging Face layout.",
        "out_dir": "Folder to make for the model, report.html, metrics.csv, run.yaml and states/.",
        "precision": "Of weights and products. auto is bf16-mixed where the hardware is fast at it, 16-mixed on a GPU "
        "without bfloat16, else 32-true: in all of them the weights are float32. bf16-true holds weights, gradients "
        "and optimizer in bfloat16, half of the memory, and loses every update below 0.2 % of a weight.",
        "seed": "Of the order of the samples.",
        "devices": "How many devices share the samples of a step, or all there are.",
        "strategy": "Each device holds weights, gradients and optimizer whole (ddp), or a part of them (fsdp); auto is "
        "ddp where that fits.",
        "num_nodes": "How many machines do; start the command on each with torchrun or srun.",
    },
)
def main(*, config: RunConfig) -> None:
    """Train every weight; the result is a model of its own, which needs its base no more.

    Weights, gradients and optimizer take 16 bytes for each weight, so a GPU of 80 GB holds about 4 billion of them, and
    with --strategy fsdp each of several its part.

    Args:
        config: The run.
    """
    from lit_llama.train.methods.method import Full
    from lit_llama.train.start import start

    start(Full(config.dtype), config)


if __name__ == "__main__":
    CLI(main)
