"""Fine-tune a checkpoint with LoRA on prepared data; writes an adapter folder in PEFT's layout.

python finetune/lora.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/lora/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.train.config import RunConfig


@config_flags("config", RunConfig, without=["dtype", "dpo"])
def main(*, config: RunConfig) -> None:
    """Train low-rank adapters; the base stays as it is.

    Args:
        config: The run.
    """
    from lit_llama.train.method import LoRA
    from lit_llama.train.start import start

    start(LoRA(config.lora), config)


if __name__ == "__main__":
    CLI(main)
