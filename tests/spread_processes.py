"""Run by test_spread_processes.py: starts itself twice, and the two train all weights of models, spread over both.

They meet once, as that takes longer than all of the runs.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_llama.train.config import TrainConfig
from lit_llama.train.distributed.launch import launch

COURSE = TrainConfig(
    epochs=2,
    batch_size=4,
    micro_batch_tokens=150,
    learning_rate=1e-3,
    weight_decay=0.1,
    eval_interval=2,
    save_interval=4,
    sample_prompts=0,
    keep="best",
)
"""Twelve steps of 22 rows, of which the last of an epoch has two; a step is several micro-batches in each process."""
SPOILT = 6
"""Step whose loss is not a number, in one of the processes."""


def train(
    checkpoint: Path, data: Path, out: Path, *, strategy: str = "ddp", spoilt: bool = False, **changes: Any
) -> None:
    """finetune as the door of full fine-tuning calls it; `spoilt` spoils the loss of a step in the last process."""
    import pytest

    from lit_llama.train.config import RunConfig
    from lit_llama.train.loop import Trainer
    from lit_llama.train.methods.method import Full
    from lit_llama.train.run import finetune

    folders: dict[str, Any] = {"checkpoint_dir": checkpoint, "data_dir": data, "out_dir": out, "strategy": strategy}
    config = RunConfig(**folders, train=replace(COURSE, **changes), precision="32-true", seed=0, resume="auto")
    with pytest.MonkeyPatch.context() as patch:
        if spoilt:
            gradients = Trainer._gradients

            def spoil(self: Trainer, rows: list[int]) -> tuple[float, float]:
                if self.progress.step == SPOILT - 1 and self.processes.rank == self.processes.size - 1:
                    with pytest.MonkeyPatch.context() as once:
                        of_batch = self._loss_of.of_batch
                        once.setattr(self._loss_of, "of_batch", lambda batch: of_batch(batch) * float("nan"))
                        return gradients(self, rows)
                return gradients(self, rows)

            patch.setattr(Trainer, "_gradients", spoil)
        finetune(Full(), config)


def held_by(trainer: Any) -> list[int]:
    """Values that this process has of the weights, their gradients, the moments and the best weights."""
    from torch.distributed.tensor import DTensor

    weights = list(trainer._model.parameters())
    moments = [value for state in trainer.optimizer.state.values() for value in state.values() if value.ndim]
    groups = [weights, [weight.grad for weight in weights], moments, trainer.kept]
    return [
        sum(value.to_local().numel() if isinstance(value, DTensor) else value.numel() for value in each)
        for each in groups
    ]


def main(data: Path, folder: Path, settings: list[dict[str, Any]]) -> None:
    """Every setting into a folder of its name; one with `stopped` is ended after that step, copied and continued."""
    import pytest
    from known_passes import keep
    from small_runs import Killed, stop_after

    from lit_llama.train import run as run_module
    from lit_llama.train.distributed.processes import Processes, join
    from lit_llama.train.loop import Trainer

    with join(2, 1) as processes, pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def joined(devices: object, num_nodes: object) -> Iterator[Processes]:
            yield processes

        check_learned = Trainer.check_learned

        def measured(self: Trainer) -> None:
            held[name] = held_by(self)
            check_learned(self)

        held: dict[str, list[int]] = {}
        patch.setattr(run_module, "join", joined)
        patch.setattr(Trainer, "check_learned", measured)
        keep(patch)
        for setting in settings:
            name, base = setting.pop("name"), folder / setting.pop("base")
            if stopped := setting.pop("stopped", 0):
                with pytest.MonkeyPatch.context() as short, pytest.raises(Killed):
                    stop_after(short, stopped)
                    train(base, data, folder / name, strategy="fsdp", **setting)
                processes.wait()
                if processes.is_first:
                    shutil.copytree(folder / name, folder / f"{name} copied")
                processes.wait()
            train(base, data, folder / name, strategy="fsdp", **setting)
        (folder / f"held by {processes.rank}.json").write_text(json.dumps(held))


if __name__ == "__main__":
    launch(2, 1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
