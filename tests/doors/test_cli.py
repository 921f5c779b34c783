"""The command line around any typed function: flags, files, exit statuses, signals and pipes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

Run = Callable[..., subprocess.CompletedProcess[str]]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | {"PYTHONPATH": str(ROOT)}
DOOR = '''
import sys, time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from lit_llama import errors
from lit_llama.cli import CLI

@dataclass(frozen=True, kw_only=True)
class Group:
    """Some.

    Args:
        deep: Very.
    """

    deep: bool = False

def main(
    *,
    path: Path,
    number: int = 3,
    kind: Literal["a", "b"] = "a",
    quick: bool = False,
    whole: bool = True,
    group: Group = Group(),
    names: str | list[str] = "none",
    numbers: list[float] | None = None,
    pairs: dict[str, str] | None = None,
    words: list[str] | None = None,
    either: Literal["a", "b"] | Literal["z"] = "z",
    then: str = "pass",
) -> None:
    """Say something.

    Args:
        path: Where.
        number: How many.
        kind: Which.
        quick: Soon.
        whole: All of it.
        group: More.
        names: Some.
        numbers: Several.
        pairs: What is what.
        words: Some more.
        either: One of them.
        then: What to do next.
    """
    print(path, number, kind)
    exec(then)

if __name__ == "__main__":
    CLI(main)
'''


@pytest.fixture
def door(tmp_path: Path) -> Path:
    path = tmp_path / "door.py"
    path.write_text(DOOR)
    return path


@pytest.fixture
def run(door: Path) -> Run:
    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(door), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=door.parent, env=ENVIRONMENT, timeout=60)

    return start


def one_line(result: subprocess.CompletedProcess[str], status: int) -> str:
    """The error, proven to be all that stands on stderr."""
    assert result.returncode == status, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").strip()


def test_flags_have_the_names_and_types_of_the_parameters(run: Run) -> None:
    """A value that arrives as text, or results on stderr."""
    result = run("--path", "x/y", "--number", 7, "--kind=b")
    assert (result.returncode, result.stdout, result.stderr) == (0, "x/y 7 b\n", "")


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], "False True False"),
        (["--quick"], "True True False"),
        (["--quick", "--number", 4], "True True False"),
        (["--quick", "true", "--whole", "false"], "True False False"),
        (["--quick=true", "--whole=false", "--group.deep=true"], "True False True"),
        (["--quick", "false", "--whole", "--group.deep"], "False True True"),
        (["--config", "c.yaml", "--quick"], "True False False"),
    ],
)
def test_a_bare_flag_is_true(run: Run, tmp_path: Path, arguments: list[object], values: str) -> None:
    """`--quick` that asks for a value, that takes the next flag for one, or that is true whatever is said."""
    (tmp_path / "c.yaml").write_text("quick: false\nwhole: false\n")
    result = run("--path", "x", "--then", "print(quick, whole, group.deep)", *arguments)
    assert result.stdout.splitlines()[1:] == [values], result.stderr


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ([], ("none", None, None)),
        (["--names", "a"], ("a", None, None)),
        (["--names", "a,b"], ("a,b", None, None)),
        (["--names", "a", "b c", "--number", 4], (["a", "b c"], None, None)),
        (["--names", "a", "--number", 4, "--names=b", "--names", "[c,d]"], (["a", "b", "c", "d"], None, None)),
        (["--names", "[a,b]", "--numbers", "[1,0.5]"], (["a", "b"], [1.0, 0.5], None)),
        (["--numbers", "1,0.5"], ("none", [1.0, 0.5], None)),
        (["--numbers", 1, -0.5, "--quick"], ("none", [1.0, -0.5], None)),
        (["--numbers", "null", "--pairs", "null"], ("none", None, None)),
        (["--pairs", "a=b,c=d e"], ("none", None, {"a": "b", "c": "d e"})),
        (["--pairs", "a=b", "c=x,y=z=1"], ("none", None, {"a": "b", "c": "x", "y": "z=1"})),
        (["--pairs", "a=b", "--pairs", "c=d, e"], ("none", None, {"a": "b", "c": "d, e"})),
        (["--pairs", "a=b c, c=d,  e=f"], ("none", None, {"a": "b c", "c": "d", "e": "f"})),
        (["--pairs", '{"a": "b"}'], ("none", None, {"a": "b"})),
        (["--pairs.a", "b", "--pairs.c", "d"], ("none", None, {"a": "b", "c": "d"})),
    ],
)
def test_lists_are_taken_as_people_and_shells_write_them(run: Run, arguments: list[object], values: object) -> None:
    """The last of two equal flags that wins in silence, a pattern that the shell has spelled out, `a=b` for a JSON."""
    result = run("--path", "x", "--then", "print((names, numbers, pairs))", *arguments)
    assert result.stdout.splitlines()[1:] == [repr(values)], result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a, b"], ["a, b"]),
        (["a", "b"], ["a", "b"]),
        (["[a,b]"], ["a", "b"]),
        (["null"], None),
        (["[a,b]", "c"], [*"abc"]),
    ],
)
def test_a_list_of_one_is_a_list(run: Run, arguments: list[object], words: object) -> None:
    """One word refused where several are taken."""
    result = run("--path", "x", "--then", "print(words)", "--words", *arguments)
    assert result.stdout.splitlines()[1:] == [repr(words)], result.stderr


def test_a_list_that_is_none_is_wrong_usage(run: Run) -> None:
    """Words that are taken for something, or that vanish."""
    for arguments in (["--names"], ["--numbers", "1", "x"], ["--numbers"], ["--pairs", "a"], ["--pairs", "a=b", "c"]):
        assert arguments[0][2:] in one_line(run("--path", "x", *arguments), 2)


def test_the_help_of_a_bare_flag(run: Run) -> None:
    """A form of the flag that nobody is told of; and words that are no answer."""
    assert "--quick [{true,false}]" in run("--help").stdout
    assert "quick" in one_line(run("--path", "x", "--quick", "maybe"), 2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "path"),
        (["--path", "x", "--number", "many"], "number"),
        (["--path", "x", "--number", "1.5"], "number"),
        (["--path", "x", "--kind", "c"], "kind"),
        (["--path", "x", "--colour", "red"], "--colour"),
        (["--path", "x", "--numbe", "4"], "--numbe"),
        (["x"], "x"),
        (["--path"], "--path"),
        (["--path", "x", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(run: Run, arguments: list[str], named: str) -> None:
    """A page of usage, a traceback, or an abbreviation that is guessed."""
    result = run(*arguments)
    assert named in one_line(result, 2) and result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "c"], "--kind is c, expected 'a', 'b'"),
        (["--number", "many"], "--number is many, expected an integer"),
        (["--numbers", "1,x"], "--numbers is [1.0, 'x'], expected a number"),
        (["--pairs", "a"], "--pairs is a, expected NAME=VALUE pairs"),
        (["--either", "c"], "--either is c, expected 'a', 'b' or 'z'"),
        (["--group.deep", "c"], "--group.deep is c, expected true or false"),
    ],
)
def test_a_wrong_value_says_what_is_expected(run: Run, arguments: list[str], message: str) -> None:
    """Types of a programming language, and a list of what each of them has against a value."""
    assert one_line(run("--path", "x", *arguments), 2) == message


def test_a_configuration_file_sets_flags_and_flags_win(run: Run, tmp_path: Path) -> None:
    """A file that is ignored, or that wins over what was typed."""
    (tmp_path / "c.yaml").write_text("path: from/file\nnumber: 5\n")
    assert run("--config", "c.yaml").stdout == "from/file 5 a\n"
    assert run("--config", "c.yaml", "--number", 6).stdout == "from/file 6 a\n"


@pytest.mark.parametrize("text", ["path: x\ncolour: red\n", "path: x\nnumber: many\n", "path: [x\n", "- 1\n"])
def test_a_wrong_configuration_file_is_refused(run: Run, tmp_path: Path, text: str) -> None:
    """A misspelled key that changes nothing."""
    (tmp_path / "c.yaml").write_text(text)
    message = one_line(run("--config", "c.yaml"), 2)
    assert "colour" not in text or "colour in c.yaml is nothing that" in message


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["--config", "c.yaml"], "number"),
        (["--path", "x", "--nmber", "4"], "number"),
        (["--path", "x", "--zzz", "4"], None),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(
    run: Run, tmp_path: Path, arguments: list[str], meant: str | None
) -> None:
    """A page of help to search through for one letter, or a guess where nothing is near."""
    (tmp_path / "c.yaml").write_text("path: x\nnumbr: 4\n")
    message = one_line(run(*arguments), 2)
    assert message.endswith(f"; did you mean --{meant}?") if meant else "did you mean" not in message


def test_the_printed_configuration_can_be_used_again(run: Run, tmp_path: Path) -> None:
    """A printed form that the parser does not read."""
    printed = run("--path", "x", "--number", 9, "--print_config")
    assert printed.returncode == 0
    (tmp_path / "c.yaml").write_text(printed.stdout)
    assert run("--config", "c.yaml").stdout == "x 9 a\n"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        ("errors.UserError", 2),
        ("errors.DataError", 3),
        ("errors.CheckpointError", 4),
        ("errors.ResourceError", 5),
        ("errors.IntegrityError", 6),
        ("errors.LockedError", 75),
        ("errors.NumericalError", 70),
        ("OSError", 5),
        ("PermissionError", 5),
    ],
)
def test_what_a_user_can_cause_is_one_line_with_its_status(run: Run, error: str, status: int) -> None:
    """Statuses mixed up, a traceback, or a message torn over lines."""
    result = run("--path", "x", "--then", f"raise {error}('first\\n  second')")
    assert one_line(result, status) == "first second"


@pytest.mark.parametrize("error", ["KeyError('k')", "ValueError('v')", "AssertionError()", "RuntimeError('r')"])
def test_a_defect_keeps_its_traceback(run: Run, error: str) -> None:
    """Our own mistakes hidden behind a friendly line."""
    result = run("--path", "x", "--then", f"raise {error}")
    assert result.returncode == 1
    assert "Traceback (most recent call last)" in result.stderr and error.split("(")[0] in result.stderr


def test_ctrl_c_is_one_line_and_status_130(door: Path) -> None:
    """A traceback for something the user wanted."""
    command = [sys.executable, str(door), "--path", "x", "--then", "sys.stdout.flush(); time.sleep(60)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stdout.readline() == "x 3 a\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (130, "Interrupted\n")


def test_sigterm_is_not_lost_while_torch_is_imported(run: Run, tmp_path: Path) -> None:
    """torch drops an exception that comes while it imports NumPy, so that a server went on for good."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGTERM)\nexcept BaseException:\n    pass\n"
    )
    result = run("--path", "x", "--then", f"sys.path.insert(0, {str(tmp_path)!r}); import torch; print('went on')")
    assert result.returncode == 128 + signal.SIGTERM and "went on" not in result.stdout


@pytest.mark.parametrize(
    "then",
    [
        "for i in range(50_000): print(i)",
        "for i in range(50_000): print(i, flush=True)",
        "time.sleep(0.3); print('late')",
    ],
    ids=["buffered", "flushed", "at the end"],
)
def test_a_broken_pipe_is_quiet(door: Path, then: str) -> None:
    """`... | head -1` that ends in a traceback, also when only the last flush finds nobody there."""
    command = [sys.executable, str(door), "--path", "x", "--then", f"sys.stdout.flush()\n{then}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "x 3 a\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=30), said) == (0, "")


def test_a_library_is_not_imported_before_the_flags_are_read(run: Run) -> None:
    """`--help` that loads torch, and seconds with it."""
    result = run("--path", "x", "--then", "print(sorted({'torch', 'numpy', 'datasets'} & set(sys.modules)))")
    assert result.stdout == "x 3 a\n[]\n"
