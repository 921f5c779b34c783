"""Fine-tune a checkpoint with LoRA on prepared data; writes an adapter folder in PEFT's layout.

python finetune/lora.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/lora/NAME
"""

from dataclasses import asdict
from pathlib import Path

from lit_llama.cli import CLI
from lit_llama.device import TrainingPrecision
from lit_llama.model.config import LoRAConfig
from lit_llama.train.config import TrainConfig


def main(
    *,
    checkpoint_dir: Path,
    data_dir: Path = Path("data/alpaca"),
    out_dir: Path = Path("out/lora/alpaca"),
    lora: LoRAConfig = LoRAConfig(),
    train: TrainConfig = TrainConfig(),
    precision: TrainingPrecision = "auto",
    seed: int = 1337,
    plan: bool = False,
    plan_memory: str | None = None,
) -> None:
    """Train low-rank adapters; the base stays as it is.

    Args:
        checkpoint_dir: Base model, a folder in Hugging Face layout.
        data_dir: Data folder made by prepare/.
        out_dir: Folder to make for the adapter, metrics.csv, loss.png and run.yaml.
        lora: Shape of the adapter.
        train: Course of the training.
        precision: Of the frozen base and the activations; auto is bf16-true where the hardware is fast at it, 16-mixed
            on a GPU without bfloat16. In the mixed ones only matrix products have 16 bits. The adapter itself is
            always float32.
        seed: Of the adapter's start, the order of the samples and dropout.
        plan: Say what the run needs and whether it fits, and train nothing; config.json and the data are enough.
        plan_memory: The same for a GPU with this much memory, such as 16GB, that is not here.
    """
    if plan or plan_memory is not None:
        from lit_llama.train.plan_table import plan_lora

        return plan_lora(
            checkpoint_dir, data_dir, lora=lora, train=train, precision=precision, seed=seed, memory=plan_memory
        )
    from lit_llama.train.loop import finetune_lora

    paths = {"checkpoint_dir": str(checkpoint_dir), "data_dir": str(data_dir), "out_dir": str(out_dir)}
    settings = {"lora": asdict(lora), "train": asdict(train), "precision": precision, "seed": seed}
    finetune_lora(
        checkpoint_dir,
        data_dir,
        out_dir,
        lora=lora,
        train=train,
        precision=precision,
        seed=seed,
        arguments=paths | settings,
    )


if __name__ == "__main__":
    CLI(main)
