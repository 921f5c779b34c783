"""What cannot be used as seeds, documents, test data or limits is one line at the door, and leaves no folder behind."""

from pathlib import Path

import pytest
from conftest import run_here


@pytest.mark.parametrize(
    "flag, name, content, says",
    [
        ("seeds", "s.jsonl", b"", "s.jsonl is empty"),
        ("seeds", "s.jsonl", b"\n\n", "s.jsonl holds no rows"),
        ("seeds", "s.jsonl", b'{"instruction": "a"\n', "s.jsonl:line 1 is not JSON"),
        ("seeds", "s.jsonl", b"<!doctype html><p>log in", "s.jsonl is an HTML page"),
        ("seeds", "s.jsonl", b"3\n", "s.jsonl:line 1: found a number, expected an object"),
        ("seeds", "s.jsonl", b'{"instruction": "\xff"}\n', "s.jsonl"),
        ("seeds", "s.jsonl", None, "s.jsonl does not exist"),
        ("documents", "d.md", b"", "d.md is empty"),
        ("documents", "d.md", b" \n\n", "d.md holds nothing for the source documents"),
        ("documents", "d.html", b"<script>x</script>", "d.html holds nothing for the source documents"),
        ("documents", "d.html", b"caf\xe9", "d.html is not UTF-8 at byte 3"),
        ("test_data", "t.jsonl", b"\n", "t.jsonl"),
    ],
)
def test_files_that_cannot_be_used(
    flag: str, name: str, content: bytes | None, says: str, tiny_folder: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    recipe = {"seeds": "answers", "documents": "questions-from-documents", "test_data": "magpie"}[flag]
    flags = ["--recipe", recipe, "--checkpoint_dir", tiny_folder, f"--{flag}", name]
    done = run_here("generate/rows.py", *flags, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and says in last and not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--max_tokens", 0], "--max_tokens is 0, expected 1 or more"),
        (["--max_rows", -3], "--max_rows is -3, expected 1 or more"),
        (["--max_time", "soon"], "--max_time is 'soon', expected a time such as 90s, 30m or 2h"),
        (["--seeds", "x.jsonl"], "magpie has no source seeds"),
        (["--endpoint", "http://localhost:1/v1"], "a teacher is one of --checkpoint_dir and --endpoint, found both"),
    ],
)
def test_flags_that_cannot_be_used(flags: list[object], says: str, tiny_folder: Path, tmp_path: Path) -> None:
    done = run_here("generate/rows.py", "--recipe", "magpie", "--checkpoint_dir", tiny_folder, *flags, cwd=tmp_path)
    assert done.returncode == 2 and says in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_an_endpoint_has_no_turn_of_the_user_to_go_on_with(tmp_path: Path) -> None:
    flags = ["--recipe", "magpie", "--endpoint", "http://localhost:1/v1", "--endpoint_model", "m"]
    done = run_here("generate/rows.py", *flags, cwd=tmp_path)
    assert done.returncode == 2 and "this recipe needs --checkpoint_dir" in done.stderr
