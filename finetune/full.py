"""Fine-tune all weights of a checkpoint on prepared data; writes a checkpoint folder.

python finetune/full.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/full/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import TrainingPrecision
from lit_llama.train.config import FULL, LoggerName, TrainConfig


def main(
    *,
    checkpoint_dir: Path,
    data_dir: Path = Path("data/alpaca"),
    out_dir: Path = Path("out/full/alpaca"),
    train: TrainConfig = FULL,
    precision: TrainingPrecision = "auto",
    dtype: Literal["bfloat16", "float16", "float32"] | None = None,
    seed: int = 1337,
    resume: Literal["never", "auto"] | Path = "never",
    loggers: LoggerName | list[LoggerName] | None = None,
    devices: int | Literal["auto"] = 1,
    num_nodes: int = 1,
    plan: bool = False,
    plan_memory: str | None = None,
    plan_device: str | None = None,
    verify: bool = False,
) -> None:
    """Train every weight; the result is a model of its own, which needs its base no more.

    Weights, gradients and optimizer take 16 bytes for each weight, so a GPU of 80 GB holds about 4 billion of them.

    Args:
        checkpoint_dir: Base model, a folder in Hugging Face layout.
        data_dir: Data folder made by prepare/.
        out_dir: Folder to make for the model, report.html, metrics.csv, run.yaml and states/.
        train: Course of the training.
        precision: Of weights and products. auto is bf16-mixed where the hardware is fast at it, 16-mixed on a GPU
            without bfloat16, else 32-true: in all of them the weights are float32. bf16-true holds weights, gradients
            and optimizer in bfloat16, half of the memory, and loses every update below 0.2 % of a weight.
        dtype: Store the model in this dtype; left out, in that of the base. States are always stored as they train.
        seed: Of the order of the samples.
        resume: Continue the run in out_dir from its newest state (auto), or from the state folder named, such as
            OUT/states/step-000100. The result is that of a run that was never stopped. With more train.epochs or
            train.max_steps than before a run is lengthened, a finished one as well.
        loggers: Also tell others: tensorboard, wandb or mlflow, or several of them: [tensorboard,wandb].
        devices: How many devices share the samples of a step, or all there are; each holds the whole model.
        num_nodes: How many machines do; start the command on each with torchrun or srun.
        plan: Say what the run needs and whether it fits, and train nothing; config.json and the data are enough.
        plan_memory: The same for a GPU with this much memory, such as 80GB, that is not here.
        plan_device: The same for a kind of GPU, such as v100, t4, a100 or rtx4090, which decides the precision of auto,
            too. Of several sizes of its memory the smallest counts, unless plan_memory is given.
        verify: Hash every file that is read, however large, before the work; small ones always are.
    """
    from lit_llama.train.method import Full
    from lit_llama.train.start import start

    start(
        Full(dtype),
        checkpoint_dir,
        data_dir,
        out_dir,
        train=train,
        precision=precision,
        seed=seed,
        resume=resume,
        loggers=loggers,
        devices=devices,
        num_nodes=num_nodes,
        strategy="ddp",
        plan=plan,
        plan_memory=plan_memory,
        plan_device=plan_device,
        verify=verify,
        own={"dtype": dtype},
    )


if __name__ == "__main__":
    CLI(main)
