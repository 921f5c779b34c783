"""What is asked of a Hub on localhost, which names it may give, and what its refusals say."""

import contextlib
import json
import re
import socket
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub

from lit_llama.conversion.download import download
from lit_llama.errors import CheckpointError, ResourceError, UserError


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_an_index_says_which_parts_are_needed(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    """Parts of another cut of the same weights, or the index without its parts."""
    parts = {f"model-{i}-of-2.safetensors": b"part %d" % i for i in (1, 2)}
    index = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
    old = dict.fromkeys(("model-1-of-9.safetensors", "pytorch_model.bin.index.json", "pytorch_model-1-of-2.bin"), b"x")
    hub.repos[REPO] |= {**parts, **old, "model.safetensors.index.json": index}
    del hub.repos[REPO]["model.safetensors"]
    made = download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    wanted = (set(files) | set(parts) | {"model.safetensors.index.json"}) - {"model.safetensors"}
    assert set(hub.fetched()) == wanted and len(hub.fetched()) == len(wanted)
    assert set(listing(made)) == wanted | {"meta.json", "SHA256SUMS"}


def test_a_single_file_counts_before_an_index(hub: FakeHub, files: dict[str, bytes], tmp_path: Path) -> None:
    """The shards of an earlier save, which transformers would not take either."""
    index = json.dumps({"weight_map": {"a": "model-1-of-1.safetensors"}}).encode()
    hub.repos[REPO] |= {"model.safetensors.index.json": index, "model-1-of-1.safetensors": b"old"}
    download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert set(hub.fetched()) == set(files)


@pytest.mark.parametrize("name", ["../model.safetensors", "/x.safetensors", "gone.safetensors", "config.json", 7, ""])
def test_an_index_that_names_anything_else_is_refused(hub: FakeHub, tmp_path: Path, name: object) -> None:
    """A file written outside the folder, another file taken for weights, or a traceback."""
    hub.repos[REPO]["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": name}}).encode()
    del hub.repos[REPO]["model.safetensors"]
    with pytest.raises(CheckpointError, match=rf"index\.json names {re.escape(repr(name))}, which is no weight file"):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("name", ["../evil.json", "/evil", "a/../../b", "a\\b", "C:evil", "a//b", "", "red\x1b[31m"])
def test_a_name_that_is_no_plain_path_is_refused(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """A repository whose file names lead out of the folder, or speak to the terminal."""
    hub.repos[REPO][name] = b"x"
    with pytest.raises(CheckpointError, match="no plain relative name") as caught:
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert "\x1b" not in str(caught.value) and hub.fetched() == [] and listing(tmp_path) == []


@pytest.mark.parametrize(
    ("part", "status", "code", "words"),
    [
        ("/resolve/", 403, "GatedRepo", ["is gated", f"/{REPO},", "accept its licence", "hf auth login", "HF_TOKEN"]),
        ("/resolve/", 401, "GatedRepo", ["is gated", "accept its licence"]),
        ("/api/", 401, "", ["--repo_id", "private or not there", "HF_TOKEN"]),
        ("/api/", 401, "RepoNotFound", ["private or not there", "check the spelling"]),
        ("/api/", 403, "", ["403", "token that may read it"]),
        ("/api/", 404, "RepoNotFound", ["--repo_id: there is no model owner/tiny"]),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: FakeHub, tmp_path: Path, part: str, status: int, code: str, words: list[str]
) -> None:
    """A traceback or "not found" for a licence that was not accepted, or a folder left for nothing."""
    hub.refusals[part] = (status, code)
    with pytest.raises(UserError) as caught:
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert caught.value.exit_status == 2 and all(word in str(caught.value) for word in words), caught.value
    assert listing(tmp_path) == []


@pytest.mark.parametrize("name", ["https://huggingface.co/a/b", "a/b/c", "../..", "a b", "", "datasets--x"])
def test_a_bad_name_is_refused_without_the_network(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """An address taken for a name, or a folder outside checkpoints/."""
    with pytest.raises(UserError, match=r"--repo_id is .*expected OWNER/NAME"), contextlib.chdir(tmp_path):
        download(name, tmp_path / "tiny", endpoint=hub.endpoint)
    assert hub.log == [] and listing(tmp_path) == []


def test_a_revision_is_asked_for_and_an_unknown_one_named(hub: FakeHub, tmp_path: Path) -> None:
    """The main branch in place of what was asked for."""
    with pytest.raises(UserError, match="--revision is 'v9': owner/tiny has no such branch, tag or commit") as caught:
        download(REPO, tmp_path / "tiny", revision="v9", endpoint=hub.endpoint)
    assert caught.value.exit_status == 2
    download(REPO, tmp_path / "tiny", revision=hub.commit(REPO), endpoint=hub.endpoint)


def test_no_network_is_told_at_once(hub: FakeHub, tmp_path: Path) -> None:
    """Retries without an end, or a traceback."""
    with socket.socket() as taken:  # bound but not listening
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(ResourceError, match=r"cannot be reached .*check the network") as caught:
            download(REPO, tmp_path / "tiny", endpoint=f"http://127.0.0.1:{taken.getsockname()[1]}")
    assert caught.value.exit_status == 5 and listing(tmp_path) == []


def test_an_answer_that_is_no_description_is_told(hub: FakeHub, tmp_path: Path) -> None:
    """The page of a proxy taken for a repository, or a traceback out of the parser."""
    hub.refusals["/api/"] = (200, "")
    with pytest.raises(ResourceError, match=r"no description of owner/tiny that can be read.*proxy"):
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)


@pytest.mark.parametrize(
    ("present", "words"),
    [
        ({"a-Q4_0.gguf": 1, "b/c.gguf": 2}, ["GGUF files only", "--file", "a-Q4_0.gguf (1 byte), b/c.gguf"]),
        (
            {f"b/c-{number:05}-of-00003.gguf": 10_000 for number in (1, 2, 3)},
            ["It has b/c-00001-of-00003.gguf (3 parts, 30.00 kB)"],
        ),
        ({"original/consolidated.00.pth": 1, "original/params.json": 1}, ["Meta's own", "prepare/checkpoint.py"]),
        ({"README.md": 1, "config.json": 1}, ["no model.safetensors or pytorch_model.bin", "README.md"]),
        ({"model-00001-of-00002.safetensors": 1, "config.json": 1}, ["nor an index", "model-00001-of-00002"]),
        ({"model.safetensors": 1}, ["has model.safetensors but no config.json"]),
        ({"adapter_model.bin": 1}, ["has adapter_model.bin but no adapter_config.json"]),
        ({}, ["no file"]),
    ],
)
def test_a_repository_without_usable_weights_says_what_is_there(
    hub: FakeHub, tmp_path: Path, present: dict[str, int], words: list[str]
) -> None:
    """A folder with everything but weights, or an error that leaves the user to look for himself."""
    hub.repos[REPO] = {name: b"x" * size for name, size in present.items()}
    with pytest.raises(CheckpointError) as caught:
        download(REPO, tmp_path / "tiny", endpoint=hub.endpoint)
    assert caught.value.exit_status == 4 and all(word in str(caught.value) for word in words), caught.value
    assert hub.fetched() == [] and listing(tmp_path) == []
