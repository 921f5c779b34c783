"""JSON and YAML from elsewhere: bounded before they are built."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from lit_llama.errors import CheckpointError, DataError, IntegrityError
from lit_llama.objects import ObjectError, as_json, as_object, check_form, load_yaml, read_object, read_text, read_yaml

LAUGHS = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 30))])
SELF = {
    "list": "a: &a [1, *a]",
    "mapping": "a: &a\n  b:\n    - c: *a",
    "merge": "a: &a\n  <<: *a\n",
}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 50_000, "nested more than 64 deep, on line 1"),
        ("{a: " * 50_000, "nested more than 64 deep"),
        ("- " * 50_000 + "x", "nested more than 64 deep"),
        (LAUGHS, r"stands for more than 200,000 values by line 1\d"),
        ("x: " + "1" * 5000, "Exceeds the limit"),
        ("x: " + "y" * (8 << 20), "characters, expected at most"),
        ("x: !!int y", "none of its type"),
        ("x: !!bool y", "none of its type"),
        ("x: !!timestamp y", "none of its type"),
        ("x: 2001-99-99", "none of its type"),
        ("x: [", "is no YAML: while parsing"),
        ("? [a]\n: b", "unhashable"),
        ("x: !!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("x: \x00", "unacceptable character"),
        ("*a", "undefined alias"),
        *((text, r"refers to itself: \*a on line \d stands inside &a") for text in SELF.values()),
    ],
)
def test_yaml_that_is_not_to_be_built_is_refused(text: str, said: str) -> None:
    """Catches brackets that exhaust the stack, lines that stand for gigabytes, circles, and tracebacks."""
    with pytest.raises(ObjectError, match=said):
        load_yaml(text)


def test_yaml_is_what_the_package_makes_of_it() -> None:
    """Catches bounds that change or refuse what people write: anchors, merges, depth; the oracle is PyYAML."""
    usual = "a: &a {x: 1, y: [1, 2]}\nb: {<<: *a, x: 2}\nc: [*a, *a]\nd: 2024-01-02\ne: |\n  text\nf: ~\n"
    for text in (usual, "[" * 64 + "]" * 64, "", "- 1\n" * 50_000):
        assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 200_000, "nested too deep"),
        ("[" * 70 + "]" * 70, "nested more than 64 deep"),
        ('{"a":' * 70 + "1" + "}" * 70, "nested more than 64 deep"),
        ("1" * 5000, "Exceeds the limit"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_json_that_is_not_read_is_told(text: str, said: str) -> None:
    """Catches a RecursionError here, or later in whoever copies or writes the value."""
    with pytest.raises(ObjectError, match=said):
        as_json(text)
    assert as_json("[" * 64 + "]" * 64)
    with pytest.raises(ObjectError, match=r"is not a JSON object but \[1\]"):
        as_object("[1]")


def test_files_are_named(tmp_path: Path) -> None:
    """Catches a pipe that is waited for, and bytes that are no text; each with the kind of error of its place."""
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"config\.json is a folder, a pipe or a device, expected a file; go"):
        read_object(path, CheckpointError, "go")
    path.unlink()
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(IntegrityError, match=r"config\.json is not UTF-8: byte 0xff at offset 7"):
        read_yaml(path, IntegrityError)
    path.write_text("[1]")
    with pytest.raises(IntegrityError, match=r"config\.json is not a mapping"):
        read_yaml(path, IntegrityError)
    with pytest.raises(ObjectError, match="has 3 bytes, expected at most 2"):
        read_text(path, 2)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"steps": True}, "x: steps is True, expected a whole number"),
        ({"steps": 1.5}, "x: steps is 1.5, expected a whole number"),
        ({"steps": 10**30}, "x: steps is 1000"),
        ({"rate": float("nan")}, "x: rate is nan, expected a number"),
        ({"rate": "1"}, "x: rate is '1', expected a number"),
        ({"splits": []}, r"x: splits is \[\], expected an object"),
        ({"splits": {"a": {"rows": "9"}}}, "x: splits: a: rows is '9', expected a whole number"),
        ([], r"x is \[\], expected an object"),
    ],
)
def test_a_value_of_another_form_is_named_with_its_place(value: object, said: str) -> None:
    """Catches a traceback far from the file, and true that is counted with."""
    form = {"steps": int, "rate": float, "splits": {"*": {"rows": int}}}
    check_form({"steps": None, "rate": 1, "splits": {"a": {"rows": 9, "more": []}}, "other": []}, form, "x", DataError)
    with pytest.raises(DataError, match=said):
        check_form(value, form, "x", DataError)


@pytest.mark.parametrize("way", ["--config", "--train"])
@pytest.mark.parametrize("text", ["seed: " + "[" * 50_000, LAUGHS, "a: &a [*a]", "seed: \udcff"])
def test_a_command_refuses_them_within_bounds(tmp_path: Path, way: str, text: str) -> None:
    """Catches a crash of the parser behind --config, and gigabytes; the limits are those of the system."""
    path = tmp_path / "x.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))

    def bound() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))

    for value in [path] if way == "--config" else [path, text]:
        command = [sys.executable, ROOT / "finetune" / "lora.py", way, value]
        done = subprocess.run(command, capture_output=True, text=True, preexec_fn=bound, cwd=ROOT)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (done.returncode, done.stderr[-500:])
        assert done.stderr.startswith("error: ") and len(done.stderr) < 5000
        assert way != "--config" or f"--config {path} " in done.stderr
