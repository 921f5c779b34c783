"""The lint of docstrings: first lines that it refuses, and first lines that it lets pass."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from docstrings import faults


def function(line: str, returns: str = "int") -> str:
    return f'"""Sizes."""\n\ndef size() -> {returns}:\n    """{line}"""\n'


@pytest.mark.parametrize(
    "line",
    [
        "What a file weighs.",
        "The bytes of a file.",
        "The same of a folder.",
        "This is the size.",
        "It is the size.",
        "Which file is largest.",
        "How large a file is.",
        "Size of a file.",
        "Index of the file.",  # a verb that is a noun here
        "Returns the size.",
        "Whether it is large.",  # of a number
        "(N,) sizes.",
        "-log of the size.",
    ],
)
def test_a_function_has_to_begin_with_a_verb(line: str) -> None:
    """Catches a clause, a pronoun, a noun, a formula or the third person where a verb in its base form belongs."""
    (fault,) = faults(function(line))
    assert (fault.name, fault.line) == ("size", 4)


@pytest.mark.parametrize(
    ("line", "returns"),
    [
        ("Return the size of a file.", "int"),
        ("Fine-tune a model.", "None"),
        ("Index the file.", "None"),
        ("Tell whether it is large.", "bool"),
        ("Whether it is large.", "bool"),
        ("Whether it is a pattern.", "TypeGuard[str]"),
    ],
)
def test_a_verb_passes(line: str, returns: str) -> None:
    """Catches a lint that refuses what the rule asks for."""
    assert not list(faults(function(line, returns)))


@pytest.mark.parametrize(
    ("line", "passes"),
    [
        ("Size of a file.", True),
        ("A file.", True),
        ("`<|im_start|>role`, content.", True),
        ("Counts of files.", True),  # a plural, and a third person as well
        ("What a file weighs.", False),
        ("The same on a GPU.", False),
        ("Those of a file.", False),
        ("Where a file lies.", False),
        ("Reads files.", False),
        ("Carries files.", False),
        ("Whether there are files.", False),
    ],
)
def test_classes_modules_and_properties_begin_with_a_noun(line: str, passes: bool) -> None:
    """Catches a rule that holds for one of the three alone."""
    of_class = f'"""Files."""\n\nclass File:\n    """{line}"""\n'
    of_property = f'"""Files."""\n\nclass File:\n    @property\n    def size(self) -> int:\n        """{line}"""\n'
    for source, name in ((of_class, "File"), (of_property, "File.size"), (f'"""{line}"""\n', "the module")):
        assert [fault.name for fault in faults(source)] == ([] if passes else [name])


def test_private_names_and_functions_within_functions_are_free() -> None:
    """Catches a lint of what nobody else calls."""
    inner = 'def outer() -> None:\n    """Do it."""\n    def size() -> int:\n        """The size."""\n'
    assert not list(faults('"""Sizes."""\n\nclass _Size:\n    """What it weighs."""\n' + inner))


def test_a_property_of_truth_may_say_whether() -> None:
    """Catches a lint that knows `property` by one name alone, or takes every clause for a fault."""
    of_class = '"""Files."""\n\nclass File:\n    @cached_property\n'
    source = of_class + '    def large(self) -> bool:\n        """Whether it is."""\n'
    assert not list(faults(source))


def test_the_command_names_file_and_line_and_fails(tmp_path: Path) -> None:
    """Catches a lint that finds faults and lets make go on."""
    (tmp_path / "room").mkdir()
    (tmp_path / "room" / "sizes.py").write_text(function("The size."))
    command = [sys.executable, str(ROOT / "tests" / "docstrings.py"), str(tmp_path)]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stdout.startswith(f"{tmp_path}/room/sizes.py:4: size: the docstring begins with 'The'")
    (tmp_path / "room" / "sizes.py").write_text(function("Return the size."))
    assert subprocess.run(command, capture_output=True).returncode == 0
