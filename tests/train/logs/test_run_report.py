"""report.json and report.html of a run: read with a parser and a browser, every number looked up in the files."""

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import Page, check_alone, in_chromium
from small_runs import LORA, SHORT, run
from small_runs import twenty_rows as twenty_rows  # a fixture

from lit_llama.folder.publish import write_json, write_json_lines
from lit_llama.train.logs.metrics import METRICS, METRICS_FILE, TIMING, TIMING_FILE, Lines, csv_line
from lit_llama.train.logs.report.page import duration, size
from lit_llama.train.logs.report.run_report import REPORT_HTML, REPORT_JSON, write_run_report

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp; {{ 7 * 7 }} \x1b[31m"
SPELLED = HOSTILE.replace("\x1b", "⟨U+001B⟩")
PARTS = ("look", "curves", "evaluations", "samples", "settings", "identity", "commands")


def write_files(
    folder: Path,
    steps: int = 60,
    *,
    every: int = 5,
    done: bool = True,
    text: str = HOSTILE,
    vocabulary: int = 32000,
    rate: float = 0.01,
    **changes: Any,
) -> None:
    """The files of a run that went well; `changes` are functions of the step by column."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "epoch": lambda s: s / 20,
        "learning_rate": lambda s: 1e-3 * (1 - s / max(1, steps) / 1.1),
        "loss": lambda s: 3 * 0.95**s + 0.1 * (s % 3),
        "grad_norm": lambda s: 0.5 + 0.1 * (s % 4),
        "trained_tokens": lambda s: 100 + s % 7,
        "tokens": lambda s: 300 + s % 7,
        "test_loss": lambda s: 3 * 0.95**s + 0.3,
        "perplexity": lambda s: math.exp(3 * 0.95**s + 0.3),
        "stopped": lambda s: min(1.0, s / max(1, steps) + 0.25),
        "seconds": lambda s: 0.5,
        "memory": lambda s: 1_500_000_000 + s,
    } | changes
    tables = {name: Lines(folder / name, csv_line(columns)) for name, columns in FILES.items()}
    for step in range(steps + 1):
        known = {name: f(step) for name, f in values.items() if step or name in EVALUATION or name == "memory"}
        if step % every and step != steps:
            known = {name: value for name, value in known.items() if name not in EVALUATION}
        for name, columns in FILES.items():
            tables[name].append(csv_line([(known | {"step": step}).get(column, "") for column in columns]))
    for table in tables.values():
        table.close()
    answers = [
        {
            "step": s,
            "row": row,
            "prompt": f"{text} {row}",
            "answer": f"{text} at {s}",
            "reference": text,
            "stopped": s > 0,
        }
        for s in range(0, steps + 1, every)
        for row in (3, 8)
    ]
    write_json_lines(folder / "samples.jsonl", answers)
    settings = {
        "checkpoint_dir": f"checkpoints/{text}",
        "data_dir": "data/x y",
        "lora": {"r": 16, "alpha": 16, "target_modules": "all-linear"},
        "train": {"epochs": 3, "max_grad_norm": 1.0, "learning_rate": rate},
        "seed": 1337,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    splits = {"train": {"rows": 1200, "tokens": 9000, "trained_tokens": 4000}}
    data = {"source": {"file": text, "files": [{"path": text, "sha256": "5" * 64}]}, "splits": splits, "key": "7" * 64}
    run = {"trainable": 12345, "dtype": "bfloat16", "vocab_size": vocabulary, "device": "a GPU", "torch": "2"}
    write_json(folder / "meta.json", {"base": {"fingerprint": "9" * 64}, "data": data, "steps": steps, "run": run})
    if done:
        (folder / "adapter_config.json").write_text("{}")


FILES = {METRICS_FILE: METRICS, TIMING_FILE: TIMING}
EVALUATION = ("test_loss", "perplexity", "stopped")


def report_of(folder: Path, **options: Any) -> Any:
    write_files(folder, **options)
    write_run_report(folder)
    return json.loads((folder / REPORT_JSON).read_text("utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("runs") / "a run"
    return folder, report_of(folder)


def page_of(folder: Path) -> str:
    return (folder / REPORT_HTML).read_text("utf-8")


def test_the_page_is_well_formed_and_loads_and_runs_nothing(made: tuple[Path, Any]) -> None:
    """An element left open, a script, or a part that is missing."""
    page = check_alone(page_of(made[0]))
    assert {"svg", "table", "details", "path"} <= {tag for tag, _ in page.elements}
    identities = {attributes.get("id") for _, attributes in page.elements}
    assert set(PARTS) <= identities
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {f"#{part}" for part in PARTS}


def test_what_prompts_answers_and_settings_say_stays_text(made: tuple[Path, Any]) -> None:
    """A prompt, an answer, a path or a name that becomes markup, a template, or a control character."""
    text = page_of(made[0])
    assert "<script" not in text and "<img" not in text and "\x1b" not in text
    shown = [data.strip() for _, data in Page(text).texts]
    for wanted in (f"{SPELLED} 3", f"{SPELLED} at 60", f"checkpoints/{SPELLED}", SPELLED):
        assert wanted in shown, wanted


def test_every_number_of_the_page_stands_in_the_json(made: tuple[Path, Any]) -> None:
    """A page that says something else than the file that programs read."""
    folder, report = made
    page = Page(page_of(folder))
    seen = set()
    for tag, attributes in page.elements:
        if tag == "data":
            found = report
            for key in str(attributes["data-from"]).split("/"):
                found = found[int(key) if isinstance(found, list) else key]
            assert attributes["value"] == str(found)
            seen.add(attributes["data-from"])
    assert {"verdict/before/test_loss", "verdict/after/perplexity", "verdict/memory", "verdict/seconds"} <= seen
    assert len(seen) > 80


def test_the_verdict_is_that_of_the_files(made: tuple[Path, Any]) -> None:
    """Means of means, a best that is the last, and times or tokens that are counted twice."""
    verdict = made[1]["verdict"]
    tokens = {
        name: sum(base + s % 7 for s in range(1, 61)) for name, base in (("trained_tokens", 100), ("tokens", 300))
    }
    assert verdict["before"]["step"] == 0 and verdict["after"]["step"] == verdict["best"]["step"] == 60
    assert verdict["before"]["test_loss"] == pytest.approx(3.3) and verdict["after"]["stopped"] == 1.0
    assert verdict["seconds"] == pytest.approx(30) and verdict["memory"] == pytest.approx(1.5e9, rel=1e-6)
    for name, count in tokens.items():
        assert verdict[name] == count and verdict[f"{name}_per_second"] == pytest.approx(count / 30)
    assert verdict["finished"] and (verdict["steps"], verdict["of_steps"]) == (60, 60)
    assert [row["step"] for row in made[1]["evaluations"]] == list(range(0, 61, 5))


def test_what_differs_from_the_defaults_is_marked(made: tuple[Path, Any]) -> None:
    """Settings among which nobody finds what was changed."""
    assert made[1]["changed"] == {"lora.r": 8, "train.learning_rate": 3e-4}
    text = page_of(made[0])
    assert text.count('<tr class="changed">') == 2 and "default 0.0003" in text


def test_base_and_data_are_named_with_their_hashes(made: tuple[Path, Any]) -> None:
    """A run of which nobody knows what it was made of."""
    identity = made[1]["identity"]
    assert identity["base"] == f"checkpoints/{HOSTILE}" and identity["base fingerprint"] == "9" * 64
    assert identity["made of"] == f"{HOSTILE} (sha256 {'5' * 64})" and identity["data key"] == "7" * 64
    assert identity["rows"] == "train 1,200 rows, 9,000 tokens, 4,000 of them trained"
    assert identity["trained on"] == "a GPU, bfloat16" and identity["trainable parameters"] == "12,345"


def test_answers_of_the_first_the_middle_and_the_last_evaluation(made: tuple[Path, Any]) -> None:
    """Answers of one prompt under another, or the wrong steps beside each other."""
    samples = made[1]["samples"]
    assert [sample["row"] for sample in samples] == [3, 8]
    assert [(answer["step"], answer["stopped"]) for answer in samples[1]["answers"]] == [
        (0, False),
        (30, True),
        (60, True),
    ]
    text = page_of(made[0])
    assert text.count("… cut at the limit") == 2 and text.count("■ stopped") == 4


def test_commands_can_be_typed(made: tuple[Path, Any]) -> None:
    """A folder with a space that becomes two arguments, and a repetition that is refused as its folder is full."""
    said = {entry["what"]: shlex.split(entry["command"]) for entry in made[1]["commands"]}
    folder = str(made[0])
    again = said["Repeat the run"]
    assert again == ["python", "finetune/lora.py", "--config", f"{folder}/run.yaml", "--out_dir", f"{folder}-again"]
    assert said["Talk to it"][-1] == folder and said["Answer the test split"][-1] == "data/x y"
    root = Path(__file__).parents[3]
    assert all((root / command[1]).is_file() for command in said.values())


@pytest.mark.parametrize(
    ("changes", "severity", "said"),
    [
        ({"loss": lambda s: "" if s in (7, 9) else 1.0}, "fix", "2 steps skipped"),
        ({"test_loss": lambda s: 1 + s}, "fix", "The test loss did not fall"),
        ({"test_loss": lambda s: 3 - s / 30 + (s - 30) / 20 * (s > 30)}, "check", "lowest at step 30 (2.0000)"),
        ({"test_loss": lambda s: math.nan if s > 20 else 1.0}, "fix", "not finite at step 25"),
        ({"stopped": lambda s: 0.25}, "check", "Only 25% of the sample answers"),
        ({"loss": lambda s: 0.01}, "check", "times the training loss"),
        ({"grad_norm": lambda s: 5.0}, "note", "scaled down in 60 of 60 steps"),
        ({"done": False}, "note", "there is no result yet"),
        ({"perplexity": lambda s: 20000.0}, "fix", "The perplexity is 20,000, of a vocabulary of 32,000"),
        ({"perplexity": lambda s: 500.0}, "check", "The perplexity is 500, of"),
        ({"perplexity": lambda s: 110.0, "vocabulary": 256}, "fix", "The perplexity is 110, of"),
        ({"rate": 1.0}, "check", "The learning rate of 1 is far above"),
        ({"loss": lambda s: 1 + s / 10}, "fix", "The training loss rose from 1.55"),
    ],
)
def test_what_went_wrong_is_said(tmp_path: Path, changes: dict[str, Any], severity: str, said: str) -> None:
    """A run that learned by heart, went out of bounds or never stops, under a page that looks well."""
    report = report_of(tmp_path / "run", text="x", **changes)
    assert any(w["severity"] == severity and said in w["what"] for w in report["warnings"]), report["warnings"]
    Page(page_of(tmp_path / "run"))
    json.loads((tmp_path / "run" / REPORT_JSON).read_text(), parse_constant=lambda name: pytest.fail(name))


def test_the_grave_warnings_are_said_in_the_terminal(
    tiny_folder: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report that nobody opens, and a run that sounds as if it had gone well."""
    train = replace(SHORT, max_steps=1, learning_rate=1.0, max_grad_norm=1e-9)
    out = run(tiny_folder, data, tmp_path / "out", LORA, train)
    lines = capsys.readouterr().err.splitlines()
    wanted = [w for w in json.loads((out / REPORT_JSON).read_text())["warnings"] if w["severity"] != "note"]
    assert any("learning rate of 1" in warning["what"] for warning in wanted)
    for warning in wanted:
        assert f"{warning['severity'].upper()} {warning['what']} {warning['why']}" in lines
    assert not any("scaled down" in line for line in lines), "notes stay in the report"


RATES = """learning_rate,steps,loss,test_loss,chosen
0,0,,1.6825,
0.00065,24,1.5759,1.6528,
0.0013,24,1.5408,1.6351,yes
0.0104,12,2.7268,diverged,
"""


def test_rates_that_were_compared_have_a_table_and_a_curve(tmp_path: Path) -> None:
    """Catches a search that nobody finds again, a rate drawn at another one's place, and a loss that is not there."""
    (tmp_path / "run-rates").mkdir()
    (tmp_path / "run-rates" / "learning_rates.csv").write_text(RATES)
    report = report_of(tmp_path / "run", text="x")
    assert [rate["learning_rate"] for rate in report["rates"] if rate["chosen"]] == [0.0013]
    assert [rate.get("test_loss") for rate in report["rates"]] == [1.6825, 1.6528, 1.6351, None]
    page = check_alone(page_of(tmp_path / "run"))
    words = [text.strip() for _, text in page.texts]
    assert {"6.5e-04", "1.3e-03", "1.0e-02", "chosen", "diverged", "before training"} <= {*words}
    assert "1.3e-03: 1.64" in words and 'href="#rates"' in page_of(tmp_path / "run")
    for wrong in ("nothing of ours", RATES.replace("24", "x"), ""):
        (tmp_path / "run-rates" / "learning_rates.csv").write_text(wrong)
        assert report_of(tmp_path / "run", text="x")["rates"] == []


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"perplexity": lambda s: 500.0 + s}, "Lower --train.learning_rate, which is 0.01."),
        ({"perplexity": lambda s: 9000.0 - 10 * s}, "It was 9,000 before 60 steps: the base knows little of such rows"),
        ({"perplexity": lambda s: 9000.0 - s, "rate": 1e-6}, "raise --train.learning_rate, which is 1e-06"),
        ({"perplexity": lambda s: 500.0 + s, "rate": 1e-6}, "1e-06 is low already: look at the rows"),
        ({"loss": lambda s: 1 + s / 10, "rate": 1e-6}, "1e-06 is low already: look at the rows"),
    ],
)
def test_the_way_out_suits_the_rate_and_the_base(tmp_path: Path, changes: dict[str, Any], way: str) -> None:
    """Catches advice to lower a rate that is tiny, or of a run that was only too short."""
    whys = [warning["why"] for warning in report_of(tmp_path / "run", text="x", **changes)["warnings"]]
    assert any(way in why for why in whys), whys
    if "Lower" not in way:
        assert not any("Lower --train.learning_rate, which" in why for why in whys)


def test_a_run_that_was_stopped_has_its_curves_and_the_way_on(tmp_path: Path) -> None:
    """A page of step 0 while metrics.csv has eighteen, and no word on how to go on."""
    write_files(tmp_path, 18, every=100, text="x", done=False)
    write_json(tmp_path / "meta.json", json.loads((tmp_path / "meta.json").read_text()) | {"steps": 1089})
    write_run_report(tmp_path)
    report = json.loads((tmp_path / REPORT_JSON).read_text())
    assert (report["verdict"]["steps"], report["verdict"]["of_steps"]) == (18, 1089)
    assert report["commands"][0]["command"].endswith("run.yaml --resume auto")


def test_a_run_that_went_well_raises_no_warning(tmp_path: Path) -> None:
    """An alarm that is always on is read by nobody."""
    assert report_of(tmp_path / "run", loss=lambda s: 3 * 0.95**s + 0.25)["warnings"] == []


@pytest.mark.parametrize("steps", [0, 1, 3000])
def test_runs_of_any_length_have_a_page(tmp_path: Path, steps: int) -> None:
    """The first evaluation alone, a single step, and thousands."""
    report = report_of(tmp_path / "run", steps=steps, every=max(1, steps // 40), learning_rate=lambda s: 1e-3)
    assert report["verdict"]["steps"] == steps
    Page(page_of(tmp_path / "run"))
    assert len(page_of(tmp_path / "run")) < 300_000


def test_a_folder_with_metrics_alone_has_a_page(tmp_path: Path) -> None:
    """A crash where a run has no samples, no times, or is looked at by an older folder."""
    (tmp_path / METRICS_FILE).write_text(csv_line(METRICS) + csv_line([0, "", "", "", 3.0, *[""] * 5]))
    write_run_report(tmp_path)
    assert "None were asked for." in page_of(tmp_path)
    Page(page_of(tmp_path))


def test_times_and_sizes_are_for_people() -> None:
    """Minutes of 60 seconds, and megabytes called gigabytes."""
    assert [duration(s) for s in (0.04, 59.94, 60, 3599.4, 3661, 90_000)] == [
        *("0.0 s", "59.9 s", "1 min 0 s", "59 min 59 s", "1 h 1 min", "25 h 0 min")
    ]
    assert [size(n) for n in (547_000_000, 26_030_000_000)] == ["547.00 MB", "26.03 GB"]


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_page(made: tuple[Path, Any], tmp_path: Path, width: int, scheme: int) -> None:
    """A blank page, an error in the console, a request to the network, or a page wider than a phone."""
    dom = in_chromium(made[0] / REPORT_HTML, tmp_path, width, scheme)
    assert "alert(1)" in dom and "<script" not in dom and "<img" not in dom
    assert all(f'id="{part}"' in dom for part in PARTS) and dom.count("<path ") > 20


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("<img src='http://127.0.0.1:9/x.png'>", "asks the network"),
        ("<div style='width:800px'>wide</div>", "page has to be scrolled sideways"),
        ("<div class='wide' style='overflow:auto'><p style='width:800px'>wide</p></div>", "table has to be scrolled"),
    ],
)
def test_the_browser_would_see_what_is_wrong(tmp_path: Path, body: str, wrong: str) -> None:
    """A check that lets everything pass."""
    page = tmp_path / "bad.html"
    lines = "<p>words</p>" * 300
    page.write_text(f"<!doctype html><html><body style='background:#fff'>{body}{lines}</body></html>")
    with pytest.raises(AssertionError, match=wrong):
        in_chromium(page, tmp_path, 390, 1)
