"""The wheel, built and installed beside everything else: the command works outside a clone, and leaves nothing out."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, run_here
from small_runs import ROWS

from lit_llama import __main__ as command

STAGES = ("prepare", "finetune", "generate")
START = [sys.executable, "-P", "-m", "lit_llama"]
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built without a network from a copy, as builds leave things behind."""
    made = tmp_path_factory.mktemp("wheel")
    for name in ("lit_llama", *STAGES):
        shutil.copytree(ROOT / name, made / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, made / "tree" / name)
    _pip("wheel", made / "tree", "--no-build-isolation", "--wheel-dir", made)
    return next(made.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    target = tmp_path_factory.mktemp("installed")
    _pip("install", wheel, "--target", target, "--no-compile")
    return target


def _pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    made = subprocess.run([*command, "--no-deps", "--no-index"], capture_output=True, text=True, timeout=240)
    assert made.returncode == 0, made.stderr


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Run:
    """Run the command outside the clone."""
    # What stands in the folder of the test comes first, so that a test can have a sitecustomize.py.
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{installed}"}

    def start(*arguments: object) -> subprocess.CompletedProcess[str]:
        words = [*START, *map(str, arguments)]
        return subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)

    return start


def test_the_wheel_holds_all_that_git_holds_of_the_package(wheel: Path) -> None:
    """Styles, templates, kernels in C++, recipes or tables that are left behind, and scripts that are no part of it."""
    inside = set(zipfile.ZipFile(wheel).namelist())
    kept = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "lit_llama").rglob("*")
        if path.is_file() and path.suffix != ".pyc" and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in kept} >= {".css", ".jinja", ".cpp", ".h", ".yaml", ".toml", ".js", ".html"}
    assert kept <= inside, kept - inside
    scripts = {f"lit_llama/doors/{path.relative_to(ROOT)}" for stage in STAGES for path in ROOT.glob(f"{stage}/*.py")}
    assert len(scripts) > 12 and scripts <= inside
    others = {name.partition("/")[0] for name in inside} - {"lit_llama"}
    assert all(name.endswith(".dist-info") for name in others), "no top-level package named prepare or tests"


def test_the_command_prepares_outside_the_clone(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    """A script or a style that is found in the clone only, and hints that name scripts that are nowhere here."""
    shown = run("prepare", "records", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: lit-llama prepare records "), shown.stderr
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    flags = ["--source", "rows.jsonl", "--destination_path", "data/mine", "--tokenizer_path", tiny_folder]
    made = run("prepare", "records", *flags, "--test_split_size", 0.3)
    assert (made.returncode, made.stdout) == (0, ""), made.stderr
    assert "ready for lit-llama finetune lora --data_dir data/mine" in made.stderr and ".py" not in made.stderr
    report = (tmp_path / "data" / "mine" / "report.html").read_text("utf-8")
    assert "lit-llama prepare show --data_dir data/mine" in report and "python prepare" not in report
    by_script = run_here("prepare/records.py", *flags, "--test_split_size", 0.3, cwd=tmp_path)
    assert "unchanged, made of the same data" in by_script.stderr, "one source: the very same work"


def test_errors_name_the_command(run: Run, tmp_path: Path) -> None:
    """A way out that names a script."""
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    made = run("finetune", "lora", "--checkpoint_dir", "model.gguf", "--data_dir", "absent")
    assert made.returncode == 4 and "lit-llama prepare checkpoint --source model.gguf" in made.stderr, made.stderr
    made = run("finetune", "lora", "--checkpoint_dir", "absent", "--lr", 3)
    assert made.returncode == 2 and made.stderr.count("\n") == 1 and "--train.learning_rate" in made.stderr
    made = run("finetune", "full", "--load_in_4bit")
    assert "lit-llama finetune lora --quantize nf4" in made.stderr and "finetune/lora.py" not in made.stderr


def test_several_processes_start_the_command_again(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    """A launcher that starts something else than `python -m lit_llama finetune lora`, or loses an option of Python's on
    the way. What the processes then do, tests/train/distributed sees; here they end as soon as they have begun."""
    tell = "os.write(1, f'{os.environ[\"LOCAL_RANK\"]} {json.dumps(sys.orig_argv[1:])}\\n'.encode())"
    ends = f"import json, os, sys\nif 'LIT_LLAMA_LAUNCHER' in os.environ:\n    {tell}\n    os._exit(0)\n"
    (tmp_path / "sitecustomize.py").write_text(ends)
    flags = ["--checkpoint_dir", tiny_folder, "--data_dir", "absent", "--out_dir", "o u t", "--devices", 2]
    made = run("finetune", "lora", *flags)
    assert (made.returncode, made.stderr) == (0, ""), made.stderr
    words = json.dumps([*START[1:], "finetune", "lora", *map(str, flags)])
    assert sorted(made.stdout.splitlines()) == [f"{rank} {words}" for rank in range(2)]


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ((), 0, "finetune"),
        (("--help",), 0, "records"),
        (("prepare",), 0, "Prepare any instruction, chat or text data for fine-tuning."),
        (("finetune", "--help"), 0, "Merge an adapter into its base"),
        (("fintune",), 2, "error: 'fintune' is no stage; did you mean finetune?\n"),
        (("zzz", "lora"), 2, "error: 'zzz' is no stage; there are: prepare, finetune, generate\n"),
        (("finetune", "lroa"), 2, "error: 'lroa' is no door of finetune; did you mean lora?\n"),
        (("prepare", "../finetune/lora"), 2, "'../finetune/lora' is no door of prepare"),
    ],
)
def test_the_list_of_doors(run: Run, words: tuple[str, ...], status: int, said: str) -> None:
    """A page of help or a traceback for a misspelled word; a door that the list forgets."""
    made = run(*words)
    assert made.returncode == status and said in (made.stderr if status else made.stdout), made
    assert (made.stdout if status else made.stderr) == ""
    if len(words) and words[0] == "finetune" and not status:
        listed = {line.split()[0] for line in made.stdout.splitlines()[2:]}
        assert listed == {path.stem for path in ROOT.glob("finetune/*.py")}


def test_a_list_imports_next_to_nothing(installed: Path, tmp_path: Path) -> None:
    """A list that takes seconds, as torch, or anything that a list has no use for, is imported."""
    code = "import sys; sys.argv = ['lit-llama', 'generate', '--help']; from lit_llama.__main__ import main; main()"
    code += "; print(len(sys.modules), {'torch', 'numpy', 'jsonargparse', 'rich', 'yaml'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    made = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    count, named = made.stdout.splitlines()[-1].split(" ", 1)
    assert named == "set()" and int(count) < 250, made.stderr
    script = installed / "bin" / "lit-llama"
    made = subprocess.run([script, "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert made.stdout == "0.1.0\n", made.stderr


def test_a_stop_says_how_to_go_on_with_the_command(installed: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """A Ctrl-C at the installed command that is no one line, or whose way on is a script."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    style = ["--prompt_style", "alpaca", "--test_split_size", 0]
    flags = ["--source", "rows.jsonl", "--destination_path", "data", "--tokenizer_path", tiny_folder, *style]
    assert run_here("prepare/records.py", *flags, cwd=tmp_path).returncode == 0
    words = ["finetune", "lora", "--checkpoint_dir", tiny_folder, "--data_dir", "data", "--out_dir", "o u t"]
    process = subprocess.Popen(
        [str(installed / "bin" / "lit-llama"), *map(str, words), "--train.epochs", "10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    next(line for line in lines if line.startswith("step 1/"))
    process.send_signal(signal.SIGINT)
    last = list(lines)[-1]
    assert process.wait(timeout=60) == 130
    way = shlex.split(last.partition("Continue with: ")[2])
    assert way == ["lit-llama", "finetune", "lora", "--config", "o u t/run.yaml", "--resume", "auto"], last


def test_the_doors_of_the_clone_are_found_beside_the_package() -> None:
    """A clone, or an editable installation of it, whose command looks for scripts in the package alone."""
    assert {str(path.relative_to(ROOT)) for path in command.doors("generate").values()} == {
        str(path.relative_to(ROOT)) for path in ROOT.glob("generate/*.py")
    }
