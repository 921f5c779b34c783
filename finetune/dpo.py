"""Train a LoRA adapter on preference data, so that chosen answers become likelier than rejected ones.

python finetune/dpo.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/dpo/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.train.config import PREFERENCE, RunConfig


@config_flags(
    "config",
    RunConfig,
    without=["dtype"],
    out_dir=Path("out/dpo/preferences"),
    data_dir=Path("data/preferences"),
    train=PREFERENCE,
    texts={
        "adapter_dir": "Adapter to go on with, from here or from PEFT, such as one of supervised training: it goes on "
        "training, and the reference is that adapter as it is now, not the bare base. The result is an adapter of its "
        "own in out_dir.",
        "data_dir": "Preference data folder made by prepare/records.py --as preference.",
    },
)
def main(*, config: RunConfig) -> None:
    """Train low-rank adapters on pairs of answers; the base stays as it is, and is held once.

    The log probabilities of the reference are computed once for each row, before the first step, with the model as it
    is then, and kept in the states.

    Args:
        config: The run.
    """
    from lit_llama.train.methods.method import Preference
    from lit_llama.train.start import start

    start(Preference(config.lora, preference=config.dpo), config)


if __name__ == "__main__":
    CLI(main)
