"""Prepare any instruction, chat or text data for fine-tuning.

python prepare/records.py --source chats.jsonl --destination_path data/chats --tokenizer_path checkpoints/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from lit_llama.cli import CLI
from lit_llama.flags import config_flags
from lit_llama.text.config import PrepareConfig


@config_flags("config", PrepareConfig, required=["source"], without=["documents", "test_limit"])
def main(*, config: PrepareConfig) -> None:
    """Read, render, tokenize, mask and split; writes train and test, a report and the prompt style.

    Args:
        config: What is read, how rows become samples, and where they go.
    """
    from lit_llama.text.pipeline.records import prepare_records
    from lit_llama.train.config import usual_steps

    prepare_records(config, plan=usual_steps())


if __name__ == "__main__":
    CLI(main)
