"""Python in the README and in docs/: every block is run on a tiny model, or its names are looked up."""

import ast
import importlib
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, write_adapter
from markdown_pages import PAGES, Block, blocks, name

import lit_llama
from lit_llama.api import weights

WHOLE = "docs/python.md"
"""A page whose blocks follow from each other: tests/docs/test_python_docs.py runs them in their order."""
CODE = [block for path in PAGES for block in blocks(path) if block.language == "python"]
NETWORK = "s3://"
"""A block that reads it is compiled, and its names are looked up."""


@pytest.fixture(scope="module")
def home(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the checkpoint and the adapters that pages name."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_folder, folder / "checkpoints" / "NAME")
    for run in ("demo", "mine"):
        write_adapter(folder / "out" / "lora" / run, folder / "checkpoints" / "NAME")
    return folder


@pytest.mark.parametrize("block", [block for block in CODE if block.page != WHOLE], ids=lambda block: block.place)
def test_blocks_run(block: Block, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a name, parameter or attribute that is not there any more, wherever a block uses it."""
    monkeypatch.chdir(home)
    code = compile(block.text, block.place, "exec")
    if NETWORK in block.text:
        check_names(ast.parse(block.text))
        return
    torch.manual_seed(0)
    exec(code, {"__name__": "page"})


def check_names(tree: ast.Module) -> None:
    """Import what a block imports, and look up the attributes of those modules."""
    modules = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname or alias.name: importlib.import_module(alias.name) for alias in node.names}
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    found = [getattr(modules[node.value.id], node.attr) for node in used if node.value.id in modules]  # type: ignore[attr-defined]
    assert modules and found


def test_the_page_on_python_runs_most_blocks() -> None:
    """Catches blocks that are no longer found, so that nothing is checked."""
    assert sum(block.page == WHOLE for block in CODE) >= 4
    assert {"README.md", "docs/engine.md"} <= {block.page for block in CODE}


def test_the_readme_shows_python_in_ten_lines() -> None:
    """Catches an example that grows."""
    (block,) = [block for block in CODE if block.page == "README.md"]
    assert len(block.text.splitlines()) <= 10


def test_the_api_reference_has_every_public_name() -> None:
    """Catches a name of `lit_llama.__all__`, or one that docs/python.md imports, without an entry in the reference, and
    an entry that is gone."""
    text = "".join(block.text for block in blocks(ROOT / "docs" / "api.md"))
    entries = [line.split(":: ")[1] for line in text.splitlines() if line.startswith(".. auto")]
    for entry in entries:
        home, _, last = entry.rpartition(".")
        assert hasattr(importlib.import_module(home), last), entry
    wanted = {getattr(lit_llama, public) for public in lit_llama.__all__ if public not in ("UserError", "convert")}
    wanted.add(weights.convert)
    for block in CODE:
        if block.page in ("docs/python.md", "docs/engine.md"):
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("lit_llama"):
                    module = importlib.import_module(str(node.module))
                    wanted |= {getattr(module, alias.name) for alias in node.names}
    there = {getattr(importlib.import_module(entry.rpartition(".")[0]), entry.rpartition(".")[2]) for entry in entries}
    assert wanted <= there, name(ROOT / "docs" / "api.md")
