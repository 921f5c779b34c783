"""Fine-tune a checkpoint with LoRA on prepared data; writes an adapter folder in PEFT's layout.

python finetune/lora.py --checkpoint_dir checkpoints/NAME --data_dir data/NAME --out_dir out/lora/NAME
"""

from lit_llama import signals

signals.begin(__name__)

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from lit_llama.cli import CLI
from lit_llama.device import TrainingPrecision
from lit_llama.model.config import LoRAConfig
from lit_llama.train.config import LoggerName, TrainConfig


def main(
    *,
    checkpoint_dir: Path | None = None,
    adapter_dir: Path | None = None,
    data_dir: Path = Path("data/alpaca"),
    out_dir: Path = Path("out/lora/alpaca"),
    lora: LoRAConfig = LoRAConfig(),
    train: TrainConfig = TrainConfig(),
    precision: TrainingPrecision = "auto",
    quantize: Literal["nf4", "nf4-dq", "int8", "fp8"] | None = None,
    seed: int = 1337,
    resume: Literal["never", "auto"] | Path = "never",
    loggers: LoggerName | list[LoggerName] | None = None,
    plan: bool = False,
    plan_memory: str | None = None,
    plan_device: str | None = None,
    devices: int | Literal["auto"] = 1,
    num_nodes: int = 1,
    strategy: Literal["auto", "ddp", "fsdp"] = "auto",
    verify: bool = False,
) -> None:
    """Train low-rank adapters; the base stays as it is.

    Args:
        checkpoint_dir: Base model, a folder in Hugging Face layout; needed unless adapter_dir names it.
        adapter_dir: Adapter to go on with, from here or from PEFT: its values, r, alpha and targets, on its base. The
            result is an adapter of its own in out_dir.
        data_dir: Data folder made by prepare/.
        out_dir: Folder to make for the adapter, report.html, metrics.csv, run.yaml and states/.
        lora: Shape of the adapter.
        train: Course of the training.
        precision: Of the frozen base and the activations; auto is bf16-true where the hardware is fast at it, 16-mixed
            on a GPU without bfloat16. In the mixed ones only matrix products have 16 bits. The adapter itself is
            always float32.
        quantize: Hold the linear layers of the frozen base in 4 bits (nf4; nf4-dq, a little smaller yet) or 8 (int8),
            which saves most of their memory and costs time; or train with products of 8-bit floats (fp8), faster on
            GPUs that have them and less exact. Merging and generating hold it the same way by themselves.
        seed: Of the adapter's start, the order of the samples and dropout.
        resume: Continue the run in out_dir from its newest state (auto), or from the state folder named, such as
            OUT/states/step-000100. The result is that of a run that was never stopped. With more train.epochs or
            train.max_steps than before a run is lengthened, a finished one as well.
        loggers: Also tell others: tensorboard, wandb or mlflow, or several of them: [tensorboard,wandb].
        plan: Say what the run needs and whether it fits, and train nothing; config.json and the data are enough.
        plan_memory: The same for a GPU with this much memory, such as 16GB, that is not here.
        plan_device: The same for a kind of GPU, such as v100, t4, a100 or rtx4090, which decides the precision of auto,
            too. Of several sizes of its memory the smallest counts, unless plan_memory is given.
        devices: GPUs of this machine that share the samples of each step, or auto for all of them; without GPUs, as
            many processes on the CPU. The steps are those of one process, and any number of them can continue a run.
            Under torchrun or srun, which start the processes themselves, leave this and num_nodes out.
        num_nodes: Machines that do; each needs the same folders.
        strategy: Each process holds the whole base (ddp), or a part of its layers (fsdp); auto is ddp where it fits.
        verify: Hash every file that is read, however large, before the work; small ones always are.
    """
    from lit_llama.train.method import LoRA
    from lit_llama.train.start import start

    start(
        LoRA(lora),
        checkpoint_dir,
        data_dir,
        out_dir,
        adapter_dir=adapter_dir,
        train=train,
        precision=precision,
        quantize=quantize,
        seed=seed,
        resume=resume,
        loggers=loggers,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        plan=plan,
        plan_memory=plan_memory,
        plan_device=plan_device,
        verify=verify,
        own={"adapter_dir": None, "lora": asdict(lora), "quantize": quantize, "strategy": strategy},
    )


if __name__ == "__main__":
    CLI(main)
