"""docs/python.md and docs/python.ipynb: what they show is run."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from forked_groups import in_forks
from small_runs import ROWS

PAGE, NOTEBOOK = ROOT / "docs" / "python.md", ROOT / "docs" / "python.ipynb"


def run_code(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    (folder / "code.py").write_text(code, "utf-8")
    return in_forks(folder / "code.py", cwd=folder)


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> Path:
    """A model that reads as much as those of people."""
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "checkpoints" / "NAME"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    return folder


@pytest.fixture
def place(base: Path, tmp_path: Path) -> Path:
    """A folder with the files that the page names."""
    for name in ("rows.jsonl", "more.jsonl"):
        rows = [row | {"instruction": f"{name}: {row['instruction']}"} for row in ROWS]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_code_of_the_page_runs(place: Path) -> None:
    """A name, a parameter or a result that is not there any more, and a call that talks."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", PAGE.read_text("utf-8"))
    assert len(blocks) == 8
    # Random weights move little where the steps are few: merged in float32, the difference is seen.
    code = "\n".join(blocks).replace('"checkpoints/both")', '"checkpoints/both", precision="32-true")')
    made = run_code(code, place)
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    assert (place / "both.gguf").is_file() and "torch.Size([3, 384])" in made.stdout


def test_every_function_is_on_the_page() -> None:
    """A function that nobody is told of."""
    import lit_llama

    text = PAGE.read_text("utf-8")
    assert [name for name in lit_llama.__all__ if name.islower() and f"{name}(" not in text] == []


def cells(base: Path, work: Path) -> list[dict[str, Any]]:
    """Cells of the notebook, with a model and a folder of the test and few steps."""
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
    parameters = next(cell for cell in found if "parameters" in cell["metadata"].get("tags", []))
    parameters["source"] = [
        "from pathlib import Path\n",
        f"BASE, WORK, STEPS = Path({str(base)!r}), Path({str(work)!r}), 6\n",
    ]
    return found


def test_the_notebook_is_saved_empty() -> None:
    """A notebook that was saved with what it gave on somebody's machine."""
    found = [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert found and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in found)


def test_the_notebook_runs_in_a_kernel(base: Path, tmp_path: Path) -> None:
    """A notebook that stopped working, and what a kernel lacks of a script: handlers of signals, the backend of
    matplotlib, a loop that does not run yet."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell, own in zip(notebook.cells, cells(base, tmp_path / "work"), strict=True):
        cell.source = "".join(own["source"]).replace("merge(run, merged)", 'merge(run, merged, precision="32-true")')
    nbformat.validate(notebook)
    nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the curve is shown"
