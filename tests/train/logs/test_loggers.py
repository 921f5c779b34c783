"""Loggers: TensorBoard's files are read back, the others are told to fakes; what is absent is said at the start."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_llama.errors import ResourceError
from lit_llama.train.logs.log import Log
from lit_llama.train.logs.loggers import check_loggers


def log_two_steps(folder: Path, *names: Any, fail: bool = False) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text("seed: 7\nlora:\n  r: 4\n")
    with Log(folder, 2, loggers=names) as log:
        log.step({"step": 0} | log.evaluated(0, 3.0))
        log.step({"step": 1, "loss": 2.5, "learning_rate": 1e-3, "trained_tokens": 10, "tokens": 20, "seconds": 0.5})
        if fail:
            raise RuntimeError("a defect")


def test_tensorboard_files_hold_every_number(tmp_path: Path) -> None:
    """Read with the protocol buffers of the format itself; catches a value under another step or name."""
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event

    log_two_steps(tmp_path, "tensorboard")
    (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    data, at, found = path.read_bytes(), 0, {}
    while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        found |= {(event.step, value.tag): value.simple_value for value in event.summary.value}
    assert found[0, "test_loss"] == 3.0 and found[1, "loss"] == 2.5 and found[1, "tokens"] == 20
    assert any("run.yaml" in tag for _, tag in found)
    assert (1, "test_loss") not in found and not any(tag == "step" for _, tag in found)


def test_wandb_is_told_settings_numbers_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches numbers without their step, and a failed run that looks finished."""
    told: list[Any] = []
    run = SimpleNamespace(
        log=lambda values, step: told.append((step, values)), finish=lambda exit_code: told.append(exit_code)
    )
    fake = SimpleNamespace(init=lambda **options: told.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log_two_steps(tmp_path / "orders", "wandb")
    assert told[0]["name"] == "orders" and told[0]["config"] == {"seed": 7, "lora": {"r": 4}}
    assert told[1][0] == 0 and told[1][1]["test_loss"] == 3.0
    assert told[2][0] == 1 and told[2][1]["loss"] == 2.5 and told[3] == 0
    with pytest.raises(RuntimeError):
        log_two_steps(tmp_path / "orders", "wandb", fail=True)
    assert told[-1] == 1


def test_mlflow_is_told_settings_numbers_and_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for MLflow."""
    told: list[Any] = []
    fake = SimpleNamespace(
        set_experiment=lambda name: told.append(name),
        start_run=lambda run_name: told.append(run_name),
        log_dict=lambda values, name: told.append((values, name)),
        log_metrics=lambda values, step: told.append((step, values)),
        end_run=lambda status: told.append(status),
    )
    monkeypatch.setitem(sys.modules, "mlflow", fake)
    log_two_steps(tmp_path / "orders", "mlflow")
    assert told[:3] == ["lit_llama", "orders", ({"seed": 7, "lora": {"r": 4}}, "run.yaml")]
    assert told[3][1]["perplexity"] == pytest.approx(20.085536923) and told[4][1]["loss"] == 2.5
    assert told[5] == "FINISHED"
    with pytest.raises(RuntimeError):
        log_two_steps(tmp_path / "orders", "mlflow", fail=True)
    assert told[-1] == "FAILED"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_an_absent_package_is_named_with_its_extra(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback after the first step."""
    for module in ("tensorboard", "tensorboardX", "wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ResourceError, match=rf"--loggers {name} needs .*pip install 'lit_llama\[{name}\]'"):
        check_loggers([name])


def test_the_extras_are_declared() -> None:
    """Catches an error that names an extra which pip does not know."""
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert {"tensorboard", "wandb", "mlflow"} <= project["optional-dependencies"].keys()
