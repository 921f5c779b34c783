"""Manifests: what a folder was when it was written, and the file that is no longer so."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_llama.errors import IntegrityError
from lit_llama.folder import manifest
from lit_llama.folder.manifest import (
    check_folder,
    forget,
    hashes,
    is_intact,
    read_manifest,
    sha256_file,
    write_manifest,
)
from lit_llama.folder.publish import publish


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place of the test's own for what is known of large files; this process knows nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(manifest, "_checked", {})
    return tmp_path / "caches" / "lit_llama" / "hashes"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with publish(tmp_path / "made", "config.json") as made:
        for name in ("train", "test"):
            (made / name).mkdir()
            (made / name / "data.arrow").write_text(name * 100)
        (made / "config.json").write_text("{}")
        (made / "weights").write_bytes(bytes(1000))
        (made / ".hidden").write_text("x")
    return tmp_path / "made"


def flip(path: Path, place: int = 0, *, keep_times: bool = True) -> None:
    """Change one bit, and set the time of writing back."""
    before, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1
    with path.open("r+b") as file:
        file.write(data)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_manifest_names_every_file_and_no_time(folder: Path) -> None:
    """Catches files below that nobody vouches for, and bytes that differ from run to run. sha256sum is the judge."""
    names = ["config.json", "test/data.arrow", "train/data.arrow", "weights"]
    assert list(read_manifest(folder)) == names
    subprocess.run(["sha256sum", "--check", "--quiet", "--strict", "SHA256SUMS"], cwd=folder, check=True)
    before = (folder / "SHA256SUMS").read_bytes()
    os.utime(folder / "weights", (1, 1))
    write_manifest(folder, {"weights": sha256_file(folder / "weights")})
    assert (folder / "SHA256SUMS").read_bytes() == before


def test_a_folder_without_a_manifest_is_read_as_it_is(tmp_path: Path) -> None:
    """Catches foreign and older folders that are refused."""
    (tmp_path / "config.json").write_text("{}")
    assert check_folder(tmp_path) is False and is_intact(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "weights", "train/data.arrow", "SHA256SUMS"])
def test_a_flipped_bit_is_named(folder: Path, name: str) -> None:
    """Catches damage that is believed because size and time of writing are as they were."""
    assert check_folder(folder) is True
    flip(folder / name, 1)
    wanted = r"config\.json is damaged|SHA256SUMS is damaged" if name == "SHA256SUMS" else f"{name} is damaged"
    with pytest.raises(IntegrityError, match=rf"made/({wanted}).*remove the line from SHA256SUMS"):
        check_folder(folder)
    assert not is_intact(folder)


def test_swapped_files_are_named(folder: Path) -> None:
    """Catches test/ in the place of train/, each of which is a whole split."""
    (folder / "train").rename(folder / "other")
    (folder / "test").rename(folder / "train")
    (folder / "other").rename(folder / "test")
    with pytest.raises(IntegrityError, match=r"made/test/data\.arrow is damaged"):
        check_folder(folder)


def test_a_missing_file_is_named_and_may_be_left_out_on_purpose(folder: Path) -> None:
    """Catches a chat template that is lost in silence, and an owner who cannot go on without a file."""
    (folder / "weights").unlink()
    with pytest.raises(IntegrityError, match="made/weights is missing, but SHA256SUMS names it"):
        check_folder(folder)
    forget(folder, "weights")
    assert check_folder(folder) and list(read_manifest(folder)) == [
        "config.json",
        "test/data.arrow",
        "train/data.arrow",
    ]


@pytest.mark.parametrize(
    "line", ["x" * 64 + "  a", "0" * 64 + "  ../a", "0" * 64 + "  /etc/passwd", "no", "0" * 64 + "  a\\b"]
)
def test_what_is_no_manifest_is_refused(folder: Path, line: str) -> None:
    """Catches a file outside of the folder that is read, and a line that is passed over."""
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(IntegrityError, match=r"SHA256SUMS is damaged: .* is no line of a manifest"):
        check_folder(folder)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are hashed from here on; those beyond 999 bytes are large."""
    names: list[str] = []
    plain = manifest.sha256_file

    def noted(path: Path) -> str:
        names.append(path.name)
        return plain(path)

    monkeypatch.setattr(manifest, "sha256_file", noted)
    monkeypatch.setattr(manifest, "ALWAYS", 999)
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the files had been written a while ago; and another process begins."""
    monkeypatch.setattr(manifest, "_TICK", 0)
    monkeypatch.setattr(manifest, "_checked", {})


def test_large_files_are_read_once(
    tmp_path: Path, folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    """Catches minutes of hashing at each start; and small files that are not hashed each time."""
    small = ["config.json", "data.arrow", "data.arrow"]
    for known, hashed in ((False, [*small, "weights"]), (True, small), (True, small)):
        settle(monkeypatch)
        check_folder(folder)
        assert (sorted(read), len(list(caches.glob("*.json")))) == (hashed, 1), known
        read.clear()
    check_folder(folder)
    assert read == [], "the same process knows them"
    check_folder(folder, whole=True)
    assert sorted(read) == [*small, "weights"]


def test_a_writer_knows_what_it_has_written(
    tmp_path: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    """Catches 26 GB that are hashed at the first start though they were just hashed for the manifest."""
    with publish(tmp_path / "made", "config.json") as made:
        (made / "config.json").write_text("{}")
        (made / "weights").write_bytes(bytes(1000))
    settle(monkeypatch)
    read.clear()
    check_folder(tmp_path / "made")
    assert read == ["config.json"]


@pytest.mark.parametrize("change", ["flip", "replace", "copy"])
def test_a_changed_large_file_is_read_again(
    tmp_path: Path, folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Catches other weights of the same size and time of writing; a copy is read once and is as good."""
    settle(monkeypatch)
    check_folder(folder)
    settle(monkeypatch)
    read.clear()
    weights = folder / "weights"
    if change == "copy":
        os.replace(
            subprocess.run(["cp", "-p", str(weights), str(tmp_path / "w")], check=True) and tmp_path / "w", weights
        )
        check_folder(folder)
        assert read.count("weights") == 1
        return
    if change == "flip":
        flip(weights, 999)
    else:
        other = tmp_path / "other"
        other.write_bytes(bytes(999) + b"x")
        os.utime(other, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
        other.replace(weights)
    with pytest.raises(IntegrityError, match="made/weights is damaged"):
        check_folder(folder)


def test_a_record_that_is_damaged_or_cannot_be_kept_is_done_without(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch, caches: Path
) -> None:
    """Catches good weights that are refused, and a home that cannot be written."""
    settle(monkeypatch)
    check_folder(folder)
    (record,) = caches.glob("*.json")
    said = json.loads(record.read_text())
    damages: list[Callable[[], Any]] = [
        lambda: record.write_text("{"),
        lambda: record.write_text(json.dumps(said | {"sha256": "0" * 64})),
        lambda: record.write_text(json.dumps(said | {"status": None})),
    ]
    for damage in damages:
        damage()
        settle(monkeypatch)
        assert check_folder(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    settle(monkeypatch)
    assert check_folder(folder)


def test_a_change_within_a_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """Catches a file that was hashed so soon after it was written that its next change has the same time."""
    path = tmp_path / "x"
    for number in range(50):
        path.write_text(f"{number:3}")
        assert hashes({path: None}) == {path: sha256_file(path)}


def test_small_files_alone_are_checked_where_no_weight_is_read(
    folder: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a preparation that waits for 26 GB of weights beside the tokenizer."""
    flip(folder / "weights")
    assert check_folder(folder, weights=False) and "weights" not in read
    flip(folder / "config.json")
    with pytest.raises(IntegrityError, match=r"config\.json is damaged"):
        check_folder(folder, weights=False)
