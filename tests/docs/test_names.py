"""The lint of names in texts: what it refuses, what it lets pass, and that doors have what calls name."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from conftest import ROOT
from names import Call, calls, faults, functions, library, parameters
from test_page_commands import flags

from lit_llama.commands import Commands

IMPORTED = "from lit_llama.wording import call, param, params\n"


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("def f():\n    raise UserError('--seed is wrong')", "the flag --seed"),
        ("def f(x):\n    return f'{x}: try --lora.dropout {x}'", "the flag --lora.dropout"),
        ("def f():\n    '''Read what --as says.'''", "the flag --as"),
        ("X = 'make it with prepare/records.py'", "the script 'prepare/records.py'"),
        ("def f(x):\n    return f'python finetune/{x}.py'", "the script 'finetune/….py'"),
        ("X = 'type lit-llama finetune'", "the script 'lit-llama finetune'"),
        ("def f():\n    return param('sead')", "the parameter 'sead'"),
        ("def f():\n    return params(lr=1)", "the parameter 'lr'"),
        ("def f():\n    raise DataError('x', parameter='dropout')", "the parameter 'dropout'"),
        ("def f():\n    return call('convret')", "lit_llama.convret, which is no public function"),
        ("def f():\n    return call('merge', checkpoint_dir=1)", "lit_llama.merge with 'checkpoint_dir'"),
        ("def f():\n    return call('merge', config=1)", "lit_llama.merge with 'config'"),
        ("HINT = f'try {param(\"seed\", 1)}'", "when the module is imported"),
        ("class A:\n    hint = call('merge')", "when the module is imported"),
    ],
)
def test_a_text_that_does_not_do_is_found(source: str, why: str) -> None:
    """A flag, a script or a name of nothing that gets by."""
    found = [fault.why for fault in faults(IMPORTED + source)]
    assert len(found) == 1 and why in found[0], found


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n    return param('lora.dropout', 0) + params(quantize='nf4') + param('data_kind')",
        "def f():\n    return call('finetune', config=1, method='dpo', resume='auto') + call('load', raw=True)",
        "def f(name):\n    raise UserError('x', parameter=f'lora.{name}', value=param(name))",
        "X = 'llama-cli --lora x', 'ray start --head', 'data/prepare/records.py', 'prepare/', '--no-such-thing'",
        "# --seed and prepare/records.py",
    ],
)
def test_a_text_that_does_passes(source: str) -> None:
    """A command of another program, or a comment, that is taken for ours."""
    assert not list(faults(IMPORTED + source))


def named_calls() -> Iterator[Call]:
    """All calls that the library names."""
    return (found for path in library(ROOT / "lit_llama") for found in calls(path.read_text("utf-8")))


def test_every_call_is_a_command_of_a_door() -> None:
    """A way out that no script has: a function without a door, or an argument without a flag."""
    missing = set()
    for found in set(named_calls()):
        words = (
            Commands().call(found.function, {name: "lora" for name in found.arguments}).removeprefix("python ").split()
        )
        assert (ROOT / words[0]).is_file(), found
        missing |= {(words[0], word) for word in words[1:] if word.startswith("--") and word not in flags(words[0])}
    assert not missing


def test_names_are_known() -> None:
    """A lint that knows no names, or that of the package differ: then it would let everything pass."""
    import lit_llama

    assert {"seed", "train.epochs", "lora.dropout", "dpo.beta", "data_kind", "temperature"} <= parameters()
    assert {name for name in functions() if "." not in name} <= set(lit_llama.__all__)
    for name in (name for name in functions() if "." in name):
        module, _, function = name.rpartition(".")
        assert callable(getattr(import_module(f"lit_llama.{module}"), function))
    assert {"prepare", "finetune", "load", "merge", "convert", "add_delta", "show_rows"} <= set(functions())
    assert len(set(named_calls())) > 20


def test_the_command_tells_where(tmp_path: Path) -> None:
    """A lint that finds nothing, and `make lint` passes."""
    import subprocess

    (tmp_path / "cli.py").write_text("X = '--seed'\n")
    (tmp_path / "wrong.py").write_text("\nX = '--seed'\n")
    command = [sys.executable, str(ROOT / "tests" / "names.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == f"{tmp_path / 'wrong.py'}:2: names the flag --seed; `param` names a parameter\n"
