"""Destinations that are links or mount points, foreign things at names of our own, and full disks."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_llama.errors import ResourceError, UserError
from lit_llama.folder.lock import claim, hold
from lit_llama.folder.place import amount, check_output, check_space, check_writable, free_space, full_disk_explained
from lit_llama.folder.publish import check_absent, publish, replace_file, resume, write_json, write_json_lines

MARKER = "meta.json"


def fill(folder: Path) -> None:
    (folder / "train").mkdir()
    (folder / "train" / "data.arrow").write_text("new")
    (folder / MARKER).write_text("new")


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


@pytest.mark.parametrize("older", [None, "raw.json", "train/old.arrow"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_link_to_a_folder_is_filled(tmp_path: Path, keep: bool, older: str | None) -> None:
    """Catches all work that fails at its last step, and the link replaced by a folder."""
    big, link = tmp_path / "big" / "x", tmp_path / "out" / "name"
    for folder in (big, link.parent):
        folder.mkdir(parents=True)
    if older:
        (big / older).parent.mkdir(exist_ok=True)
        (big / older).write_text("mine")
    link.symlink_to(big)
    with publish(link, MARKER, replace=not keep, keep=keep) as folder:
        assert folder.parent == big, "the temporary folder lies on another disk than the destination"
        fill(folder)
    assert link.is_symlink() and tree(link.parent) == ["name"]
    assert tree(big) == sorted(
        ["SHA256SUMS", "meta.json", "train", "train/data.arrow", *(["raw.json"] if older == "raw.json" else [])]
    )


@pytest.mark.parametrize("keep", [False, True])
def test_a_mount_point_is_filled(disk: Path, tmp_path: Path, keep: bool) -> None:
    """Catches a rename across disks, or over a mount point."""
    with publish(disk, MARKER, keep=keep) as folder:
        fill(folder)
    assert tree(disk) == ["SHA256SUMS", "meta.json", "train", "train/data.arrow"]
    (tmp_path / "link").symlink_to(disk / "below")
    (disk / "below").mkdir()
    with publish(tmp_path / "link", MARKER, replace=True) as folder:
        fill(folder)
    assert tree(disk / "below") == ["SHA256SUMS", "meta.json", "train", "train/data.arrow"]


def test_nothing_is_moved_from_one_folder_of_another_disk_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the same where nothing can be mounted: every move between the destination and its outside fails."""
    big, link = tmp_path / "big", tmp_path / "name"
    big.mkdir()
    link.symlink_to(big)

    def within(move: object) -> object:
        def moved(self: Path, target: Path) -> Path:
            if self.is_relative_to(big) != Path(target).is_relative_to(big):
                raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
            return move(self, target)  # type: ignore[operator]

        return moved

    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, within(getattr(Path, name)))
    for replace in (False, True):
        with publish(link, MARKER, replace=replace) as folder:
            fill(folder)
    assert tree(big) == ["SHA256SUMS", "meta.json", "train", "train/data.arrow"]


def test_a_disk_that_is_mounted_meanwhile_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hours of work that end in "Invalid cross-device link"."""
    replace = Path.replace

    def crosses(self: Path, target: Path) -> Path:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    with publish(tmp_path / "name", MARKER) as folder:
        fill(folder)
        (tmp_path / "name").mkdir()
        monkeypatch.setattr(Path, "replace", crosses)
    monkeypatch.setattr(Path, "replace", replace)
    assert tree(tmp_path) == [
        "name",
        *(f"name/{name}" for name in ("SHA256SUMS", "meta.json", "train", "train/data.arrow")),
    ]


@pytest.mark.parametrize("where", ["name", "parent/name"])
def test_a_link_to_nothing_is_refused_before_the_work(tmp_path: Path, where: str) -> None:
    """Catches work below the mount point of a disk that is not there, or one that fails at its end."""
    (tmp_path / where.split("/")[0]).symlink_to(tmp_path / "unmounted")
    for refused in (publish(tmp_path / where, MARKER), claim(tmp_path / where), resume(tmp_path / where, "plan")):
        with pytest.raises(UserError, match=r"is a link to \S+/unmounted, which is not there"), refused:
            pytest.fail("the body was run")
    with pytest.raises(UserError, match="which is not there"):
        write_json_lines(tmp_path / where, [1])
    assert not (tmp_path / "unmounted").exists()


@pytest.mark.parametrize("name", [".name.unfinished", ".name.lock", ".name.partial", ".name.partial-0123abcd"])
@pytest.mark.parametrize("to", ["folder", "file", "nothing"])
def test_links_at_names_of_our_own_are_not_followed(tmp_path: Path, name: str, to: str) -> None:
    """Catches a folder of somebody else that is emptied or filled, and a file that is cut off."""
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "precious").write_text("mine")
    work = tmp_path / "work"
    work.mkdir()
    (work / name).symlink_to({"folder": theirs, "file": theirs / "precious", "nothing": theirs / "new"}[to])
    for keep in (True, False):
        try:
            with publish(work / "name", MARKER, keep=keep, replace=not keep) as folder:
                fill(folder)
        except UserError as error:
            assert name in str(error) and "link to" in str(error)
    assert tree(theirs) == ["precious"] and (theirs / "precious").read_text() == "mine"
    assert (work / name).is_symlink()


def test_an_unfinished_folder_of_somebody_else_is_not_emptied(tmp_path: Path) -> None:
    """Catches files of the user's own that are removed as half made; what we left ourselves is gone on with."""
    begun = tmp_path / ".name.unfinished"
    begun.mkdir()
    (begun / "diary.txt").write_text("mine")
    refused = pytest.raises(UserError, match=r"\.name\.unfinished is a folder with files of somebody else \(diary")
    with refused, resume(tmp_path / "name", "plan"):
        pytest.fail("the body was run")
    assert (begun / "diary.txt").read_text() == "mine"
    (begun / "diary.txt").unlink()
    (begun / ".journal.jsonl").write_text('{"plan": "plan"}\n')  # as a run of an older version leaves it
    (begun / "half").write_text("x")
    with resume(tmp_path / "name", "plan") as staging:
        assert not (staging.path / "half").exists()
        (staging.path / "SHA256SUMS").write_text("")
    assert tree(tmp_path) == ["name", "name/SHA256SUMS"]


def test_unfinished_work_moves_into_a_destination_that_was_made_meanwhile(tmp_path: Path) -> None:
    """Catches a download of hours that begins anew because of an mkdir."""
    with pytest.raises(ValueError), publish(tmp_path / "name", MARKER, keep=True) as folder:
        (folder / "begun").write_text("half")
        raise ValueError
    (tmp_path / "name").mkdir()
    with pytest.raises(ValueError), publish(tmp_path / "name", MARKER, keep=True) as folder:
        assert (folder / "begun").read_text() == "half"
        raise ValueError
    check_absent(tmp_path / "name")  # it holds nothing but what is unfinished
    with publish(tmp_path / "name", MARKER, keep=True) as folder:
        fill(folder)
    assert tree(tmp_path / "name") == ["SHA256SUMS", "begun", "meta.json", "train", "train/data.arrow"]


@pytest.mark.parametrize("kind", ["notes", "hard link", "folder", "pipe"])
def test_what_is_no_lock_is_neither_opened_nor_written_over(tmp_path: Path, kind: str) -> None:
    """Catches a file that is cut off because it has the name of a lock, and a pipe that is waited for."""
    lock, precious = tmp_path / ".lock", tmp_path / "precious"
    precious.write_text("process 1 is mine")
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    elif kind == "notes":
        lock.write_text("mine")
    else:
        lock.hardlink_to(precious)
    with pytest.raises(UserError, match=r"\.lock is .*move it away"), hold(lock, tmp_path):
        pytest.fail("the body was run")
    assert precious.read_text() == "process 1 is mine" and (kind != "notes" or lock.read_text() == "mine")


def test_a_file_takes_the_place_of_a_link_unless_the_user_named_it(tmp_path: Path) -> None:
    """Catches a file of somebody else written through a link, and an answer file that leaves its disk."""
    precious, link = tmp_path / "disk" / "precious", tmp_path / "run.yaml"
    precious.parent.mkdir()
    precious.write_text("mine")
    link.symlink_to(precious)
    (tmp_path / ".run.yaml.partial").symlink_to(precious)
    replace_file(link, b"new")
    assert precious.read_text() == "mine" and link.read_text() == "new" and not link.is_symlink()
    answers = tmp_path / "answers.jsonl"
    answers.symlink_to(precious)
    write_json_lines(answers, [1])
    assert answers.is_symlink() and precious.read_text() == "1\n" and tree(precious.parent) == ["precious"]


def test_rows_go_into_a_pipe_as_they_are(tmp_path: Path) -> None:
    """Catches a device that is replaced by a file: as root, /dev/null itself."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE, text=True) as reader:
        write_json_lines(pipe, ["x"])
        assert reader.communicate(timeout=30)[0] == '"x"\n'
    assert pipe.is_fifo()
    with pytest.raises(UserError, match="is a folder, expected a file"):
        check_output(tmp_path)


@pytest.mark.parametrize("keep", [False, True])
def test_a_full_disk_is_told_with_place_and_amounts(disk: Path, keep: bool) -> None:
    """Catches "[Errno 28] No space left on device", and half of a result that stays."""
    with (
        pytest.raises(
            ResourceError,
            match=rf"{disk}/name cannot be written: No space left on device; \d\S* \w+ free .* 6\d\.\d\d kB needed",
        ),
        publish(disk / "name", MARKER, keep=keep) as folder,
    ):
        (folder / "x").write_bytes(bytes(1 << 20))
    assert free_space(disk) > 60_000 or keep
    with pytest.raises(ResourceError, match=rf"{disk}/page cannot be written: No space"):
        replace_file(disk / "page", bytes(1 << 20))
    with (
        pytest.raises(ResourceError, match=rf"free on the disk of {disk}: make room"),  # and not "more than 0 bytes"
        full_disk_explained(disk / "page", disk / "page"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not (disk / "page").exists()


def test_free_space_is_that_of_the_place_a_link_leads_to(disk: Path, tmp_path: Path) -> None:
    """Catches the space of another disk, and "0.0 GB free, 0.0 GB are needed"."""
    (tmp_path / "link").symlink_to(disk)
    with pytest.raises(ResourceError, match=r"its disk has 65\.54 kB free, 102\.00 kB are needed"):
        check_space(tmp_path / "link" / "deep" / "er", 100_000)
    with pytest.raises(ResourceError, match=r"65,536 bytes free, 65,53[78] bytes are needed"):
        check_space(disk, 64_253)


def test_amounts_are_told_in_units_that_fit() -> None:
    """Catches amounts that round to nothing."""
    assert [amount(size) for size in (0, 812, 1_250_000, 3 * 10**12)] == ["0 bytes", "812 bytes", "1.25 MB", "3.00 TB"]


def test_what_a_dead_process_had_on_its_way_goes_and_that_of_the_living_stays(tmp_path: Path) -> None:
    """Catches 26 GB that stay after a kill because another command comes next, and work of others that is swept."""
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom lit_llama.folder.place import aside, temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1]) / 'x') as made, aside(Path(sys.argv[1]) / 'y') as part:\n"
        "    (made / 'big').write_text('x')\n    print(flush=True)\n    time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(tmp_path)]
    (tmp_path / ".mine.partial-notes").mkdir()
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (tmp_path / ".z.partial-0123abcd").symlink_to(theirs)
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as living:
        assert living.stdout is not None and living.stdout.readline()
        before = tree(tmp_path)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as killed:
            assert killed.stdout is not None and killed.stdout.readline()
            assert len(tree(tmp_path)) == len(before) + 3
            killed.kill()
        with publish(tmp_path / "other", MARKER) as folder:
            assert set(tree(tmp_path)) - set(before) == {".other.lock", folder.name}
            fill(folder)
        living.kill()
    replace_file(tmp_path / "file", b"x")
    assert set(os.listdir(tmp_path)) == {".mine.partial-notes", ".z.partial-0123abcd", "theirs", "file", "other"}


def test_a_name_that_is_no_text_is_refused_before_the_work(tmp_path: Path) -> None:
    """Catches a traceback of Arrow at the end of the work, which cannot open such a name; reading one is well."""
    bad = tmp_path / os.fsdecode(b"o\xfe")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        check_writable(bad / "x")
    bad.mkdir()
    write_json(bad / "a.json", {"path": str(bad)})
    assert json.loads((bad / "a.json").read_text("utf-8")) == {"path": str(bad)}
