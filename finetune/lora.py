"""Fine-tune a checkpoint with LoRA on prepared data; writes an adapter folder in PEFT's layout.

python finetune/lora.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/lora/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.train.config import RunConfig


@config_flags("config", RunConfig, without=["dtype", "dpo"])
def main(*, config: RunConfig, find_learning_rate: bool = False) -> None:
    """Train low-rank adapters; the base stays as it is.

    Args:
        config: The run.
        find_learning_rate: Compare learning rates by short runs on the data, print them and train nothing else; a table
            and a chart go to OUT-rates beside out_dir.
    """
    from lit_llama.train.methods.method import LoRA

    if find_learning_rate:
        from lit_llama.train.rate_search import print_rates

        return print_rates(LoRA(config.lora), config)
    from lit_llama.train.start import start

    start(LoRA(config.lora), config)


if __name__ == "__main__":
    CLI(main)
