"""Data sets of the Hub through the datasets library itself, over HTTP on localhost."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from fake_data_hub import data_hub

from lit_llama.errors import ResourceError, UserError
from lit_llama.text.dataset.folder import read_meta


def rows(first: str, count: int) -> bytes:
    return b"".join(
        json.dumps({"instruction": f"{first} {number}", "output": f"answer {number}"}).encode() + b"\n"
        for number in range(count)
    )


FILES = {"README.md": b"---\nlicense: mit\n---\n", "data/train.jsonl": rows("q", 40), "data/test.jsonl": rows("t", 3)}


def test_a_data_set_of_the_hub_is_fetched_once_and_then_needs_no_network(tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a library that is called in another way than it expects, splits that get lost, and a message of its own.

    What is missing and what cannot be reached are told apart, as the way out is another one.
    """

    def prepare(source: str, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, str(ROOT / "prepare/records.py"), "--source", source, "--split", "given"]
        command += ["--destination_path", str(tmp_path / "data"), "--tokenizer_path", str(tiny_folder)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = inherited | given | environment
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)

    with data_hub("owner/rows", FILES) as endpoint:
        made = prepare("owner/rows", endpoint)
        missing = prepare("owner/others", endpoint)
    assert made.returncode == 0, made.stderr
    meta = read_meta(tmp_path / "data")
    assert {name: split["rows"] for name, split in meta["splits"].items()} == {"train": 40, "test": 3}
    assert [file["path"] for file in meta["source"]["files"]] == ["owner/rows/train", "owner/rows/test"]
    assert missing.returncode == UserError.exit_status and "nor a data set of the Hub" in missing.stderr
    again = prepare("owner/rows", endpoint, HF_HUB_OFFLINE="1")
    assert again.returncode == 0 and "unchanged, made of the same data" in again.stderr, again.stderr
    away = prepare("owner/others", endpoint, HF_HUB_OFFLINE="1")
    assert away.returncode == ResourceError.exit_status and "cannot be fetched from the Hub" in away.stderr
