"""The functions of the package: silent, without traces in the process, and with the results of their commands."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_here
from fake_hub import REPO, FakeHub
from small_runs import ROWS
from small_runs import twenty_rows as twenty_rows  # a fixture

import lit_llama
from lit_llama.console import talking
from lit_llama.errors import DataError, Interrupted, UserError
from lit_llama.model.adapters.peft_folder import WEIGHTS_FILE
from lit_llama.train.logs.metrics import read_metrics
from lit_llama.train.loop import Trainer

TRAIN: dict[str, Any] = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-2, "eval_interval": 2, "sample_prompts": 0}
RUN: dict[str, Any] = {"lora": {"r": 2, "alpha": 4}, "train": TRAIN, "precision": "32-true"}
RECIPE = """
rows: 3
sources:
  seeds: {rows: null, order: once}
columns:
  - name: answer
    prompt: "{{ seeds.instruction }}"
    schema: {type: object, properties: {a: {enum: [lamp]}}, required: [a], additionalProperties: false}
    sampling: {max_new_tokens: 60}
output:
  alpaca: {instruction: "{{ seeds.instruction }}", input: "", output: "{{ answer.a }}"}
filters: {rouge: null, seeds: false}
"""
QUIET = """
import json, sys
import lit_llama
base, folder = sys.argv[1:3]
found = {}
"""


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *ROWS]), "utf-8")
    return path


def quietly(code: str, *arguments: object) -> Any:
    """What a script in a process of its own finds, proven to be all that it does not keep to itself."""
    report = Path(str(arguments[1])) / "found.json"
    code = f"{QUIET}{code}\nopen({str(report)!r}, 'w').write(json.dumps(found))\n"
    made = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=str(arguments[1]),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert (made.returncode, made.stdout, made.stderr) == (0, "", ""), made.stderr
    return json.loads(report.read_text())


def test_every_stage_is_silent_and_gives_its_result(tiny_folder: Path, tmp_path: Path) -> None:
    """A line on stderr that nobody asked for, a bar, a warning of a library, a table on stdout; and results that are
    not those of the folders."""
    rows_file(tmp_path)
    found = quietly(
        f"""
data = lit_llama.prepare("rows.jsonl", "data", base, prompt_style="alpaca", test_split_size=0.3, max_seq_length=256)
run = lit_llama.finetune(base, data, "run", **{RUN!r})
merged = lit_llama.merge(run, "merged", precision="32-true")
gguf = lit_llama.convert(merged, "model.gguf", format="gguf")
back = lit_llama.convert(gguf, "back")
made = lit_llama.evaluate([base, run], data, "evaluated", limit=3, max_new_tokens=4, prompt_style="alpaca")
full = lit_llama.finetune(base, data, "full", method="full", train={{"max_steps": 1, "sample_prompts": 0}})
with lit_llama.load(run) as llm:
    text = llm.generate("Order 2 red lamps.", max_new_tokens=5)
    both = llm.generate(["Order 2 red lamps.", "Order 3 red chairs."], max_new_tokens=5)
    said = llm.chat([{{"role": "user", "content": "Order 2 red lamps."}}], max_new_tokens=5)
    pieces = "".join(llm.stream("Order 2 red lamps.", max_new_tokens=5))
    raw = llm.generate("Order", raw=True, max_new_tokens=5)
found = {{
    "rows": data.rows, "losses": run.losses, "test": run.test_losses, "fits": run.plan.fits,
    "proof": merged.proof.top1_agreement, "measures": made.measures, "full": full.losses,
    "texts": [text, both, said, pieces, raw],
}}
""",
        tiny_folder,
        tmp_path,
    )
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    assert found["rows"] == {name: meta["splits"][name]["rows"] for name in ("train", "test")}
    series = read_metrics(tmp_path / "run")
    assert found["losses"] == {str(step): loss for step, loss in series["loss"]} and len(found["losses"]) > 2
    assert found["test"] == {str(step): loss for step, loss in series["test_loss"]} and found["fits"]
    assert (tmp_path / "run" / WEIGHTS_FILE).is_file() and found["proof"] == 1
    assert (tmp_path / "back" / "config.json").is_file() and list(found["full"]) == ["1"]
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    first = results["tasks"][0]["metrics"][0]
    for number, model in enumerate(results["models"]):
        assert found["measures"]["data"][model["name"]][first["name"]] == first["models"][number]["value"]
    text, both, said, pieces, raw = found["texts"]
    assert text == both[0] == said == pieces and isinstance(raw, str) and raw
    door = run_here(
        *("generate/instruct.py", "--checkpoint_dir", tmp_path / "run", "--prompt", "Order 2 red lamps."),
        *("--max_new_tokens", 5, "--temperature", 0),
        cwd=tmp_path,
    )
    assert door.stdout == f"{text}\n", door.stderr


def test_a_download_is_silent_and_can_be_loaded(
    hub: FakeHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bar of the library that fetches, or a folder that is not what is given back."""
    lit_llama.verbose(False)
    try:
        made = lit_llama.download(REPO, tmp_path / "got", endpoint=hub.endpoint)
        with lit_llama.load(made) as llm:
            assert isinstance(llm.chat("hi", max_new_tokens=2), str)
    finally:
        lit_llama.verbose()
    assert made.folder == tmp_path / "got" and capfd.readouterr() == ("", "")
    assert made.log[0].startswith(f"{REPO} at ") and "checked" in made.log[-1]


def test_what_is_said_is_heard_when_asked_for_and_kept_always(
    tiny_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """verbose=True that says nothing, or that stays on behind the call; lines that are lost where nobody hears."""
    rows, settings = rows_file(tmp_path), {"prompt_style": "alpaca", "test_split_size": 0.3}
    lit_llama.verbose(False)
    try:
        loud = lit_llama.prepare(rows, tmp_path / "loud", tiny_folder, verbose=True, **settings)
        heard = capfd.readouterr().err
        quiet = lit_llama.prepare(rows, tmp_path / "quiet", tiny_folder, **settings)
        assert capfd.readouterr() == ("", "")
    finally:
        lit_llama.verbose()
    assert "\n".join(loud.log) + "\n" == heard and "40 rows = " in heard
    assert [line.replace("quiet", "loud") for line in quiet.log] == list(loud.log)
    silent = lit_llama.prepare(rows, tmp_path / "third", tiny_folder, verbose=False, **settings)
    assert capfd.readouterr() == ("", "") and silent.remarks == quiet.remarks
    with talking() as outer:
        lit_llama.prepare(rows, tmp_path / "third", tiny_folder, **settings)
    assert any("unchanged" in line for line in outer.lines)


def test_a_run_leaves_no_trace_in_the_process(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Generators that a notebook has seeded itself, a number of threads, handlers of signals, an environment or the
    backend of matplotlib that are others afterwards."""
    import matplotlib

    def state() -> list[Any]:
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        return [torch.get_num_threads(), handlers, dict(os.environ), random.getstate(), matplotlib.get_backend()]

    torch.set_num_threads(2)
    torch.manual_seed(5)
    random.seed(5)
    before, drawn = state(), torch.get_rng_state()
    run = lit_llama.finetune(tiny_folder, data, tmp_path / "run", **RUN)
    with lit_llama.load(run) as llm:
        llm.generate("Order 2 red lamps.", max_new_tokens=2)
    lit_llama.merge(run, tmp_path / "merged", precision="32-true")
    assert state() == before and torch.equal(torch.get_rng_state(), drawn)
    torch.set_num_threads(1)


def test_only_a_command_tunes_the_allocator(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds of malloc, which cannot be put back, set for a notebook; or a command that lost its speed."""
    tuned: list[str] = []
    for place in ("run.keep_freed_memory", "run.return_freed_memory", "start.keep_few_products"):
        monkeypatch.setattr(f"lit_llama.train.{place}", lambda name=place: tuned.append(name))
    lit_llama.finetune(tiny_folder, data, tmp_path / "run", **RUN)
    assert tuned == []
    flags = [
        "--checkpoint_dir",
        tiny_folder,
        "--data_dir",
        data,
        "--out_dir",
        tmp_path / "door",
        "--train.max_steps",
        1,
    ]
    assert run_here("finetune/lora.py", *flags).returncode == 0
    assert tuned == ["start.keep_few_products", "run.return_freed_memory", "run.keep_freed_memory"]


def test_a_run_is_that_of_the_command(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Defaults or groups of settings that are not those of the flags; here not one weight differs."""
    run = lit_llama.finetune(tiny_folder, data, tmp_path / "run", seed=3, **RUN)
    flags = ["--checkpoint_dir", tiny_folder, "--data_dir", data, "--out_dir", tmp_path / "door", "--seed", 3]
    flags += ["--precision", "32-true", "--lora.r", 2, "--lora.alpha", 4]
    made = run_here("finetune/lora.py", *flags, *(word for name in TRAIN for word in (f"--train.{name}", TRAIN[name])))
    assert made.returncode == 0, made.stderr
    assert (run.folder / WEIGHTS_FILE).read_bytes() == (tmp_path / "door" / WEIGHTS_FILE).read_bytes()


def test_a_run_in_another_thread(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Handlers of signals, which only the main thread may set."""
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.append(lit_llama.finetune(tiny_folder, data, tmp_path / "run", **RUN))
    )
    thread.start()
    thread.join()
    assert len(found) == 1 and found[0].losses == dict(read_metrics(tmp_path / "run")["loss"])


def test_ctrl_c_saves_and_the_same_call_goes_on(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A cell that is interrupted and loses its steps, ends the kernel, or talks although nobody listens."""
    step = Trainer.step
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)

    def struck(self: Trainer) -> dict[str, Any]:
        if self.progress.step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 3"):
        patch.setattr(Trainer, "step", struck)
        lit_llama.finetune(tiny_folder, data, tmp_path / "run", verbose=False, **RUN)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, ignored)
    assert capfd.readouterr() == ("", "")
    run = lit_llama.finetune(tiny_folder, data, tmp_path / "run", resume="auto", verbose=False, **RUN)
    whole = lit_llama.finetune(tiny_folder, data, tmp_path / "whole", verbose=False, **RUN)
    assert (run.folder / WEIGHTS_FILE).read_bytes() == (whole.folder / WEIGHTS_FILE).read_bytes()
    assert run.losses == whole.losses


def test_a_plan_trains_nothing(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """A table on stdout, a folder that is begun, or an error where the answer is that it does not fit."""
    plan = lit_llama.finetune(tiny_folder, data, tmp_path / "run", plan=True, train=TRAIN)
    assert plan.plan.fits and plan.plan.steps == 5 and not plan.losses and not plan.folder.exists()
    small = lit_llama.finetune(tiny_folder, data, tmp_path / "run", plan_memory="1MB", train=TRAIN)
    assert not small.plan.fits


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        (
            "prepare",
            {"max_seq_lenght": 3},
            "`max_seq_lenght` is not a setting of PrepareConfig; did you mean max_seq_length",
        ),
        ("prepare", {"overflow": "cut"}, "`overflow` is cut, expected 'drop', 'truncate_prompt'"),
        ("prepare", {"max_seq_length": "long"}, "`max_seq_length` is long, expected an integer"),
        ("finetune", {"train": {"epoch": 2}}, "`epoch` is not a setting of TrainConfig; did you mean epochs"),
        ("finetune", {"precision": "half"}, "`precision` is half, expected 'auto'"),
        ("finetune", {"method": "qlora"}, "`method` is 'qlora', expected 'lora', 'full'"),
        ("finetune", {"method": "full", "lora": {"r": 2}}, "`lora` is a setting of `method='lora'`"),
        ("finetune", {"dtype": "float16"}, "`dtype` is a setting of `method='full'`"),
        ("finetune", {"devices": 2}, "`devices=2`"),
        ("finetune", {"seed": -1}, "`seed` is -1"),
        ("merge", {"format": "ggml"}, "`format` is 'ggml', expected 'hf', 'gguf'"),
        ("merge", {"format": "GGUF"}, "`format` is 'GGUF', expected 'hf', 'gguf'; did you mean gguf?"),
        ("merge", {"onto": "int4"}, "`onto` is 'int4'"),
        ("convert", {"format": "onnx"}, "`format` is 'onnx', expected 'hf', 'meta', 'lit', 'gguf'"),
        (
            "evaluate",
            {"max_tokens": 3},
            "`max_tokens` is not a setting of Sampling or Loading; did you mean max_new_tokens",
        ),
        ("evaluate", {}, "there is nothing to evaluate on"),
        ("load", {"quantise": "int8"}, "`quantise` is not a setting of Loading; did you mean quantize"),
        ("load", {"quantize": "int2"}, "`quantize` is int2"),
        ("download", {"file": "x.bin"}, "x.bin"),
        ("generate_rows", {}, "a teacher is one of"),
    ],
)
def test_what_a_caller_can_cause_is_a_user_error(
    name: str, settings: dict[str, Any], said: str, tiny_folder: Path, data: Path, tmp_path: Path, python_names: None
) -> None:
    """SystemExit out of a parser, a TypeError out of a dataclass, or a choice that nobody checks."""
    made = tmp_path / "made"
    arguments: dict[str, list[Any]] = {
        "prepare": [rows_file(tmp_path), made, tiny_folder],
        "finetune": [tiny_folder, data, made],
        "merge": [tiny_folder, made],
        "convert": [tiny_folder, made],
        "evaluate": [tiny_folder],
        "load": [tiny_folder],
        "download": ["owner/name", made],
        "generate_rows": ["paraphrase", made],
    }
    if name == "generate_rows":
        settings = {"seeds": rows_file(tmp_path)}
    with pytest.raises(UserError, match=re.escape(said)) as found:
        getattr(lit_llama, name)(*arguments[name], **settings)
    assert "--" not in str(found.value) and ".py" not in str(found.value)
    assert not made.exists()


def test_paths_of_every_kind_and_several_sources(tiny_folder: Path, tmp_path: Path) -> None:
    """A str where a Path is expected, or a list of Paths where texts are."""
    one, two = rows_file(tmp_path), tmp_path / "more.jsonl"
    two.write_text(json.dumps(ROWS[0]) + "\n")
    settings: dict[str, Any] = {"prompt_style": "alpaca", "split": "shuffle", "test_split_size": 4}
    made = lit_llama.prepare([one, str(two)], str(tmp_path / "data"), str(tiny_folder), **settings)
    assert sum(made.rows.values()) == 41 and os.fspath(made) == str(tmp_path / "data")
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        lit_llama.prepare([one, tmp_path / "absent.jsonl"], tmp_path / "data", tiny_folder)


def test_no_room_has_the_name_of_a_function(tiny_folder: Path) -> None:
    """`lit_llama.convert` that is a package as soon as anything has imported it."""
    rooms = {path.stem for path in Path(lit_llama.__file__).parent.iterdir()}
    assert not rooms & set(lit_llama.__all__)
    with pytest.raises(UserError, match="already is a checkpoint folder"):
        lit_llama.convert(tiny_folder, "made")
    assert set(lit_llama.__all__) <= set(dir(lit_llama))


def test_rows_that_a_model_makes(tiny_folder: Path, tmp_path: Path) -> None:
    """Rows that are not those of the file, or counts of something else."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    made = lit_llama.generate_rows(recipe, tmp_path / "rows", tiny_folder, seeds=rows_file(tmp_path), max_rows=2)
    assert made.accepted == len(made.rows) == 2 and set(made.rows[0]) >= {"instruction", "output"}
