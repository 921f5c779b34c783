"""Downloads from a Hub on localhost: what arrives, what an interruption leaves, and what is said in the end."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextvars import Context
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import ROOT, tiny_config, write_adapter
from fake_hub import CHUNK, REPO, FakeHub

import lit_llama
from lit_llama.conversion import download as module
from lit_llama.conversion.download import download
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError
from lit_llama.folder.publish import publish

JUNK = (
    *("README.md", ".gitattributes", "pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth"),
    *("tiny.gguf", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "training_args.bin", "optimizer.pt"),
    *("vocab.json", "merges.txt", "meta.json", "checkpoint-9/model.safetensors", "modeling_tiny.py"),
)


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_exactly_the_needed_files_make_a_folder_that_loads(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights fetched twice, leftovers of training, a file renamed or cut, or talk on stdout."""
    hub.repos[REPO] |= dict.fromkeys(JUNK, b"x")
    made = download(REPO, tmp_path / "deep" / "tiny", endpoint=hub.endpoint)
    assert sorted(hub.fetched()) == sorted(files)
    assert hub.fetched()[0] == "config.json" and hub.fetched()[-1] == "model.safetensors"
    assert listing(made.parent) == ["tiny"] and listing(made) == sorted([*files, "meta.json", "SHA256SUMS"])
    assert all((made / name).read_bytes() == data for name, data in files.items())
    source = json.loads((made / "meta.json").read_text())["source"]
    hashes = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    assert source == {"repo_id": REPO, "commit": hub.commit(REPO), "files": hashes}
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[-1].endswith(f"next: python generate/chat.py --checkpoint_dir {made}")
    assert lit_llama.load(made).config == lit_llama.load_model(made).config


def test_old_weights_and_an_old_tokenizer_are_taken_where_there_is_nothing_else(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """.bin weights passed over, or a user left alone with a folder that does not load."""
    data = hub.repos[REPO]
    data["pytorch_model.bin"] = data.pop("model.safetensors")
    del data["tokenizer.json"]
    data |= {"vocab.json": b"{}", "merges.txt": b""}
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert set(data) == set(hub.fetched()) | {"merges.txt"}  # which is empty: nothing to fetch
    assert (made / "merges.txt").read_bytes() == b""
    assert f"next: python prepare/checkpoint.py --source {made} " in capsys.readouterr().err


@pytest.mark.parametrize("old", [True, False])
def test_a_delta_is_told_as_one(old: bool, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The next step of a user who is told to convert it, or to chat with it: neither says anything."""
    tensors = {
        name: value * 0.01 for name, value in safetensors.torch.load(hub.repos[REPO]["model.safetensors"]).items()
    }
    if old:
        del hub.repos[REPO]["model.safetensors"]
        torch.save(tensors, tmp_path / "saved")
        hub.repos[REPO]["pytorch_model.bin"] = (tmp_path / "saved").read_bytes()
    else:
        hub.repos[REPO]["model.safetensors"] = safetensors.torch.save(tensors, {"format": "pt"})
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds a delta and no model" in said and "prepare/checkpoint.py" not in said and "chat.py" not in said
    assert f"prepare/delta.py apply --base_dir BASE --delta_dir {made} " in said


def test_a_broken_connection_goes_on_where_it_broke(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    """A file of gigabytes that starts again, in the same run or in the next one, or finished files fetched twice."""
    hub.cuts["model.safetensors"] = 3 * CHUNK
    made = download(REPO, tmp_path / "one", endpoint=hub.endpoint)
    assert hub.ranges("model.safetensors") == [None, f"bytes={3 * CHUNK}-"]
    assert (made / "model.safetensors").read_bytes() == files["model.safetensors"]

    hub.cuts["model.safetensors"], hub.down = 2 * CHUNK, True
    for _ in range(2):
        with pytest.raises(ResourceError, match=r"status 503 .*goes on where it stopped"):
            download(REPO, tmp_path / "two", endpoint=hub.endpoint)
        assert listing(tmp_path) == [".two.unfinished", "one"]
        assert {path.suffix for path in (tmp_path / ".two.unfinished").glob("[!.]*")} == {".part"}
    hub.refusals.clear()
    hub.log.clear()
    made = download(REPO, tmp_path / "two", endpoint=hub.endpoint)
    assert hub.fetched() == ["model.safetensors"] and hub.ranges("model.safetensors") == [f"bytes={2 * CHUNK}-"]
    assert (made / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert listing(tmp_path) == ["one", "two"] and listing(made) == listing(tmp_path / "one")


def test_a_part_of_another_commit_is_not_continued(hub: FakeHub, tmp_path: Path) -> None:
    """Weights whose two halves come from different commits, because the branch moved in between."""
    hub.cuts["model.safetensors"], hub.down = 2 * CHUNK, True
    with pytest.raises(ResourceError):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    hub.refusals.clear()
    hub.repos[REPO]["model.safetensors"] = moved = hub.repos[REPO]["model.safetensors"][::-1]
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert hub.ranges("model.safetensors")[-1] is None and (made / "model.safetensors").read_bytes() == moved
    assert not list(made.glob("*.part"))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_damage_is_found_and_only_that_file_fetched_again(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """A flipped bit in weights or tokenizer that nobody notices, or that stays after the next run."""
    hub.damaged.add(name)
    with pytest.raises(IntegrityError, match=f"{name} of {REPO} arrived damaged.*run the same command again") as caught:
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert caught.value.exit_status == 6 and listing(tmp_path) == [".tiny.unfinished"]
    hub.damaged.clear()
    before = set(hub.fetched())
    hub.log.clear()
    download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert hub.fetched()[0] == name and not (set(hub.fetched()) - {name}) & before


def test_a_disk_too_small_is_found_before_the_transfer(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hours of transfer into a disk that cannot hold it; and a disk that fills up on the way."""
    needed = sum(map(len, files.values()))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(ResourceError, match=f"needs {needed:,} bytes more, only {needed - 1:,} bytes are free"):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert hub.fetched() == [] and listing(tmp_path) == []
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=needed))

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "transfer", full)
    with pytest.raises(
        ResourceError, match=r"config\.json\S* is full: it needs .* bytes more.*goes on where it stopped"
    ):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_leaves_nothing_that_looks_whole(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path, stop: signal.Signals
) -> None:
    """A folder that other programs load although weights are missing, a lock that stays, or a start from nothing."""
    hub.holds["model.safetensors"] = 12 * CHUNK
    command = [sys.executable, str(ROOT / "prepare/download.py"), "--repo_id", REPO]
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert hub.held.wait(60)
        part = tmp_path / "checkpoints" / ".tiny.unfinished"
        deadline = time.monotonic() + 30
        while not any(path.stat().st_size >= 10 * CHUNK for path in part.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(stop)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if stop == signal.SIGINT else -stop), err
    if stop == signal.SIGINT:
        assert "what arrived stays in checkpoints/.tiny.unfinished: run the same command again" in err
    assert not (tmp_path / "checkpoints" / "tiny").exists() and not (part / "config.json").exists()
    hub.log.clear()
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert (again.returncode, again.stdout) == (0, ""), again.stderr
    assert "already here" in again.stderr and hub.fetched() == ["model.safetensors"]
    assert int((hub.ranges("model.safetensors")[0] or "=0-")[6:-1]) >= 10 * CHUNK
    made = tmp_path / "checkpoints" / "tiny"
    assert (made / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert listing(made.parent) == ["tiny"]


def test_two_runs_do_not_write_into_one_folder(hub: FakeHub, tmp_path: Path) -> None:
    """Two processes that append to the same file."""
    with publish(tmp_path / "tiny", "config.json", keep=True) as folder:
        (folder / "kept.part").write_text("x")
        with pytest.raises(ResourceError, match=r"another run is at work on .*tiny"):
            Context().run(download, REPO, tmp_path / "tiny", endpoint=hub.endpoint)
        assert listing(folder) == [".unfinished", "kept.part"]


def test_a_whole_folder_is_not_touched(hub: FakeHub, tmp_path: Path) -> None:
    """A download over a model that is in use."""
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    hub.log.clear()
    for name in ("meta.json", "config.json"):
        with pytest.raises(UserError, match=rf"already holds {name}"):
            download(REPO, made, endpoint=hub.endpoint)
        (made / name).unlink()
    assert hub.log == []


def test_a_kill_while_files_get_their_names_costs_nothing(
    hub: FakeHub, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Everything fetched again after the last possible moment, or files of an unknown state taken as they are."""
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    made.rename(tmp_path / ".tiny.unfinished")
    (tmp_path / ".tiny.unfinished" / "tokenizer.json").write_bytes(files["tokenizer.json"][:-1] + b"?")
    hub.log.clear()
    with pytest.raises(IntegrityError, match="tokenizer"):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert hub.fetched() == ["tokenizer.json"]
    assert all((tmp_path / "tiny" / name).read_bytes() == data for name, data in files.items())


def test_an_adapter_comes_as_it_is_and_names_its_base(
    hub: FakeHub, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter that its own meta.json keeps from loading, or a user who does not learn which base it needs."""
    adapter = write_adapter(tmp_path / "source", tiny_folder)
    hub.repos["owner/lora"] = {path.name: path.read_bytes() for path in adapter.iterdir()} | {"README.md": b"x"}
    made = download("owner/lora", tmp_path / "made", endpoint=hub.endpoint)
    assert set(hub.fetched()) == {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"}
    assert f"next: python generate/chat.py --checkpoint_dir {made}" in capsys.readouterr().err
    assert lit_llama.load(made).style is not None
    settings = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": REPO}
    hub.repos["owner/lora"]["adapter_config.json"] = json.dumps(settings).encode()
    download("owner/lora", tmp_path / "other", endpoint=hub.endpoint)
    assert f"download.py --repo_id {REPO} --destination_path {tmp_path}/tiny (its base)" in capsys.readouterr().err


def test_one_gguf_file_comes_alone(hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All quantisations of a model fetched for one, or one part of a split file that nothing can read."""
    hub.repos[REPO] |= {"q/tiny-Q4_0.gguf": b"GGUF", "tiny-00001-of-00002.gguf": b"x"}
    with pytest.raises(UserError, match=r"no tiny\.gguf; it has q/tiny-Q4_0\.gguf \(4 bytes\), tiny-00001-of-00002"):
        download(REPO, tmp_path / "tiny", file="tiny.gguf", endpoint=hub.endpoint)
    with pytest.raises(CheckpointError, match=r"is one of 2 parts, but owner/tiny has no tiny-00002-of-00002\.gguf"):
        download(REPO, tmp_path / "tiny", file="tiny-00001-of-00002.gguf", endpoint=hub.endpoint)
    made = download(REPO, tmp_path / "tiny", file="q/tiny-Q4_0.gguf", endpoint=hub.endpoint)
    assert hub.fetched() == ["q/tiny-Q4_0.gguf"] and listing(made) == ["SHA256SUMS", "meta.json", "tiny-Q4_0.gguf"]
    assert f"checkpoint.py --source {made}/tiny-Q4_0.gguf --destination_path {tmp_path}/tiny-Q4_0" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("named", [1, 3])
def test_a_gguf_model_in_parts_comes_whole(
    hub: FakeHub, tmp_path: Path, named: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One part of a model, or those of another; the folder it lands in would be the converted model's, too."""
    parts = [f"q8/tiny-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    hub.repos[REPO] |= {part: b"GGUF" + part.encode() for part in [*parts, "q4/tiny-00001-of-00003.gguf"]}
    made = download(REPO, tmp_path / "tiny", file=parts[named - 1], endpoint=hub.endpoint)
    assert hub.fetched() == parts
    assert listing(made) == ["SHA256SUMS", "meta.json", *(part.removeprefix("q8/") for part in parts)]
    assert f"--source {made}/tiny-00001-of-00003.gguf --destination_path {made}-hf" in capsys.readouterr().err


@pytest.mark.parametrize("config", [tiny_config().to_dict("float32") | {"model_type": "mamba"}, [1], "{"])
def test_a_model_for_other_programs_is_downloaded_and_said(
    hub: FakeHub, tmp_path: Path, config: object, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user who learns after the transfer, or never, that the model does not run here."""
    hub.repos[REPO]["config.json"] = (config if isinstance(config, str) else json.dumps(config)).encode()
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    err = capsys.readouterr().err
    assert "note: this project cannot use the model" in err and "for other programs" in err.splitlines()[-1]
    assert listing(made) == sorted([*hub.repos[REPO], "meta.json", "SHA256SUMS"])


def test_a_model_without_template_or_tokenizer_gets_another_advice(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Advice that ends in the next error."""
    del hub.repos[REPO]["chat_template.jinja"]
    download(REPO, tmp_path / "base", endpoint=hub.endpoint)
    assert "next: python generate/base.py" in capsys.readouterr().err
    del hub.repos[REPO]["tokenizer.json"]
    download(REPO, tmp_path / "bare", endpoint=hub.endpoint)
    assert "no tokenizer.json or tokenizer.model" in capsys.readouterr().err
    hub.repos[REPO] |= {"tokenizer.json": b"{}", "tokenizer_config.json": b"["}
    made = download(REPO, tmp_path / "odd", endpoint=hub.endpoint)  # which is whole all the same
    assert f"cannot use it: {made}/tokenizer_config.json is not JSON" in capsys.readouterr().err
