"""Loggers beside the files of the run folder: TensorBoard, Weights & Biases, MLflow."""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

from lit_llama.errors import IntegrityError, ResourceError
from lit_llama.objects import read_yaml
from lit_llama.train.config import RUN_FILE, LoggerName

PROJECT = "lit_llama"
_MODULES = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",), "mlflow": ("mlflow",)}


class Logger(Protocol):
    """Receiver of a run's numbers elsewhere."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Record the numbers of a step."""

    def close(self, failed: bool) -> None:
        """Close the records, as the run is over."""


def check_loggers(names: Sequence[LoggerName]) -> None:
    """Find out before anything else whether the loggers can be had.

    Raises:
        ResourceError: A package is absent.
    """
    for name in names:
        if not any(map(_imports, _MODULES[name])):
            what = " or ".join(_MODULES[name])
            raise ResourceError(f"needs {what}: pip install 'lit_llama[{name}]'", parameter="loggers", value=name)


def _imports(module: str) -> bool:
    try:
        import_module(module)
    except ImportError:
        return False
    return True


def open_loggers(names: Sequence[LoggerName], folder: Path) -> list[Logger]:
    """Open the loggers for the run in `folder`, which are told its run.yaml."""
    path = folder / RUN_FILE
    settings = read_yaml(path, IntegrityError) if path.exists() else {}
    made: dict[str, type[Any]] = {"tensorboard": _TensorBoard, "wandb": _WandB, "mlflow": _MLflow}
    return [made[name](folder, settings) for name in names]


class _TensorBoard:
    """Event files in OUT/tensorboard; a run that is resumed adds one."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        from lightning_fabric.loggers.tensorboard import TensorBoardLogger

        self._logger = TensorBoardLogger(folder / "tensorboard", name="", version="")
        self._logger.experiment.add_text("run.yaml", f"```yaml\n{yaml.safe_dump(dict(settings), sort_keys=False)}```")

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._logger.log_metrics(values, step)

    def close(self, failed: bool) -> None:
        self._logger.finalize("failed" if failed else "success")


class _WandB:
    """A run of the project lit_llama, grouped with those that were resumed in the same folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        name = folder.resolve().name
        self._run = wandb.init(project=PROJECT, name=name, group=name, dir=str(folder), config=dict(settings))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _MLflow:
    """A run of the experiment lit_llama, wherever MLFLOW_TRACKING_URI says."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        mlflow.start_run(run_name=folder.resolve().name)
        mlflow.log_dict(dict(settings), RUN_FILE)

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")
