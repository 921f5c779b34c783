"""report.json and report.html: a parser and a browser read the page, and every number of it is looked up."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import encode_examples
from pages import Page, check_alone, in_chromium

from lit_llama.html import percent
from lit_llama.text.dataset.batches import step_plan
from lit_llama.text.inspect.findings import CUT, Findings
from lit_llama.text.inspect.report import account, differences, histogram, warnings, write_report
from lit_llama.text.inspect.show import ShownSample, shown_sample
from lit_llama.text.message import instruct
from lit_llama.text.prompts.encode import named_style
from lit_llama.text.tokenizer.base import Tokenizer

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&amp; {{ 7 * 7 }} \x1b[31m"

NOTHING_LOST = {
    "cut": {"rows": 0, "first": []},
    "dropped": {},
    "dropped_by_choice": 0,
    "too_long": {"rows": 0, "median": 0},
}


def build(folder: Path, tokenizer_folder: Path, *, rows: int = 60, hostile: bool = True, **changes: Any) -> Any:
    """A report with something of everything in it; gives what stands in report.json."""
    examples = [
        instruct(f"Say {number}, please", "", f"Number {number}! " * (number % 9 + 1), number) for number in range(rows)
    ]
    examples += [instruct("Say 3, please", "", "Number 3! " * 4, rows), instruct("SAY 4, please", "", "No.", rows + 1)]
    if hostile:
        examples += [instruct(HOSTILE, HOSTILE, HOSTILE + " 北京 😀\nnew line", rows + 2)]
    tokenizer, style = Tokenizer.from_path(tokenizer_folder), named_style("chatml")
    samples, encoded = encode_examples(examples, style, tokenizer, max_seq_length=300, mask_inputs=True)
    assert not encoded.dropped
    findings = Findings()
    for sample, example in zip(samples, examples, strict=True):
        trained = sum(label != -100 for label in sample.labels[1:])
        split = "test" if example.row % 5 == 0 else "train"
        findings.add(
            *(
                example.row,
                f"{HOSTILE if hostile else 'a.json'}:row {example.row}",
                split,
                style.joined(example.prompt[0])["content"],
            ),
            *(example.response, len(sample.input_ids), trained),
        )
    file = HOSTILE if hostile else "a.json"
    meta = {
        "source": {"file": file, "sha256": "0" * 64, "rows": len(samples) + 73},
        "kept": len(samples),
        "cut": {"rows": 1, "first": [f"{file}:row 1"]},
        "dropped": {
            "longer than 300 tokens": {"rows": 72, "first": [f"{file}:row {row}" for row in range(100, 160)]},
            "empty output": {"rows": 1, "first": [f"{file}:row 172"]},
        },
        "dropped_by_choice": 0,
        "too_long": {"rows": 72, "median": 320},
        "max_seq_length": 300,
        "splits": {},
        "tokenizer": {"fingerprint": tokenizer.fingerprint(), "path": HOSTILE if hostile else "t"},
        "seed": 42,
    } | changes
    shown = [
        shown_sample(tokenizer, s.input_ids, s.labels, row=s.row, where=f"{file}:row {s.row}", split="train")
        for s in samples[-3:]
    ]
    text_of = {example.row: (style.joined(example.prompt[0])["content"], example.response) for example in examples}
    found = findings.result(text_of.__getitem__)
    plan = step_plan(findings.lengths_of("train"), batch_size=16, micro_batch_tokens=2048, seed=42)
    folder.mkdir(exist_ok=True)
    write_report(folder, meta, found, shown, name=file, plan=plan, commands=[f"python prepare/x.py {file}"])
    return json.loads((folder / "report.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("report")
    return folder, build(folder, tiny_folder)


def test_the_page_is_well_formed_and_loads_and_runs_nothing(made: tuple[Path, Any]) -> None:
    """An element left open, a script, or a font fetched from elsewhere."""
    page = check_alone((made[0] / "report.html").read_text("utf-8"))
    assert {"svg", "table", "details", "mark"} <= {tag for tag, _ in page.elements}


def test_what_the_data_say_stays_text(made: tuple[Path, Any]) -> None:
    """A row, a file name or a setting that becomes markup, a template, or a control character."""
    text = (made[0] / "report.html").read_text("utf-8")
    assert "<img" not in text and "onerror=alert(1)>" not in text and "\x1b" not in text
    shown = [data for _, data in Page(text).texts]
    spelled = HOSTILE.replace("\x1b", "⟨U+001B⟩")
    assert f"{spelled}: what is in the data" in shown and f"python prepare/x.py {spelled}" in shown
    assert sum(spelled in data for data in shown) > 5


def test_every_number_of_the_page_stands_in_the_json(made: tuple[Path, Any]) -> None:
    """A page that says something else than the file that programs read."""
    folder, report = made
    page = Page((folder / "report.html").read_text("utf-8"))
    numbers = [(attributes, data) for attributes, data in page.texts if "data-from" in attributes and data.strip()]
    seen = set()
    for attributes, data in numbers:
        if attributes["data-from"] in seen:
            continue
        found = report
        for key in str(attributes["data-from"]).split("/"):
            found = found[key]
        seen.add(attributes["data-from"])
        as_number = f"{found:,}" if isinstance(found, int) else f"{found:,.2f}"
        assert data in (as_number, f"{found:.1%}", "under 0.1%", "over 99.9%"), attributes
        assert attributes["value"] == str(found)
    assert len(seen) > 40
    assert {"accounting/rows", "accounting/kept", "accounting/cut", "accounting/dropped"} <= seen


def test_the_rows_add_up_or_that_is_the_first_warning(
    made: tuple[Path, Any], tmp_path: Path, tiny_folder: Path
) -> None:
    """Rows that vanish without a word."""
    sums = made[1]["accounting"]
    assert sums["rows"] == sums["kept"] + sums["cut"] + sums["dropped"] and sums["adds_up"]
    assert sums["dropped_rows"]["longer than 300 tokens"]["rows"] == 72
    assert sums["cut_rows"] == {"rows": 1, "first": [f"{HOSTILE}:row 1"]}
    wrong = build(tmp_path / "wrong", tiny_folder, hostile=False, source={"file": "a.json", "sha256": "", "rows": 3})
    assert wrong["warnings"][0]["severity"] == "fix" and "add up" in wrong["warnings"][0]["what"]


def test_warnings_name_what_was_planted(made: tuple[Path, Any]) -> None:
    """Leakage that stands in a table and nowhere above it."""
    said = [f"{warning['severity']}: {warning['what']}" for warning in made[1]["warnings"]]
    assert any(line.startswith("fix: 73 rows dropped") for line in said)
    assert any("72 are too long, half of them with 320 tokens or more" in entry["why"] for entry in made[1]["warnings"])
    assert any(line.startswith("fix: 1 test row also in train, ") for line in said)
    assert any("1 prompt has more than one answer" in line for line in said)
    assert [line.split(":")[0] for line in said] == sorted(
        (line.split(":")[0] for line in said), key=("fix", "check", "note").index
    )


def test_clean_data_raise_no_warning() -> None:
    """An alarm that is always on is read by nobody."""
    findings = Findings()
    for number in range(50):
        word = f"{number * 7919 % 10007:05}"
        findings.add(number, f"a:{number}", "test" if number % 5 == 0 else "train", f"Say {word}", word * 9, 30, 20)
    meta = {"source": {"file": "a", "rows": 50}, "kept": 50, **NOTHING_LOST}
    assert warnings(account(meta), findings.result()) == []


def test_rows_that_nobody_asked_for_are_no_loss() -> None:
    """A mixture whose weights are reported as a defect of the data."""
    why = "not drawn, by the weight of its source"
    lost = NOTHING_LOST | {"dropped": {why: {"rows": 50, "first": []}}, "dropped_by_choice": 50}
    meta = {"source": {"file": "a", "rows": 100}, "kept": 50, **lost}
    [note] = warnings(account(meta), Findings().result())
    assert (note["severity"], note["why"]) == ("note", f"50 {why}.")


def test_long_lists_are_folded_and_short_ones_are_not(made: tuple[Path, Any]) -> None:
    """A page of a thousand rows to scroll past."""
    text = (made[0] / "report.html").read_text("utf-8")
    assert "<summary>Dropped, longer than 300 tokens: 72 rows</summary>" in text
    assert "The first 60; all are in lost.jsonl." in text
    assert "<h3>Dropped, empty output: 1 row</h3>" in text


def test_an_empty_report_is_a_page(tmp_path: Path) -> None:
    """A division by zero, or a template that expects a limit, a plan, samples or texts."""
    meta = {
        "source": {"file": "a", "rows": 0},
        "kept": 0,
        **NOTHING_LOST,
        "max_seq_length": None,
    }
    write_report(tmp_path, meta, Findings().result(), [])
    findings = Findings(near_duplicates=0)
    findings.add(0, "a:0", "train", "p", "an answer", 9, 5)
    findings.add(1, "a:1", "train", "p", "an answer", 9, 5)
    write_report(tmp_path, meta, findings.result(), [ShownSample(0, "a:0", "train", [])])
    text = (tmp_path / "report.html").read_text("utf-8")
    Page(text)
    assert "<code>--near_duplicates</code> is 0; <code>--near_duplicates</code> 2 would take" in text


def test_histogram_covers_all_rows_and_marks_the_limit() -> None:
    """Bars that overlap or leave the drawing, or a limit drawn at a wrong place."""
    values = {"histogram": {"width": 10, "counts": [1, 0, 4]}, "percentiles": {"p50": 25, "p99": 29}}
    drawn = histogram(values, 50)
    assert [(bar.first, bar.last, bar.count) for bar in drawn.bars] == [(0, 9, 1), (20, 29, 4)]
    assert [bar.height for bar in drawn.bars] == [25, 100] and drawn.most == 4
    scale = {line.label: line.x for line in drawn.lines}
    assert scale["max_seq_length 50"] == pytest.approx(100 / 1.02)
    assert drawn.bars[1].x == pytest.approx(scale["max_seq_length 50"] * 20 / 50)
    assert max(x for x, _ in drawn.ticks) <= 100


def test_differences_give_both_texts_back() -> None:
    """A pair that shows other words than the rows hold, or marks where an excerpt was cut."""
    left, right = differences("the cat  sat.", "the dog sat.")
    assert "".join(text for text, _ in left) == "the cat  sat." and any(
        "cat" in text and differs for text, differs in left
    )
    assert "".join(text for text, _ in right) == "the dog sat." and ("dog", True) in right and ("the ", False) in left
    left, right = differences("same end xy" + CUT, "same end x" + CUT)
    assert not any(differs for _, differs in left + right)


def test_a_share_is_never_rounded_to_nothing() -> None:
    """3 leaked rows of 100,000 shown as 0.0%."""
    assert [percent(x) for x in (0.0, 0.00003, 0.25, 0.99999, 1.0)] == [
        *("0.0%", "under 0.1%", "25.0%", "over 99.9%", "100.0%")
    ]


def test_writing_twice_gives_the_same_bytes(made: tuple[Path, Any], tmp_path: Path, tiny_folder: Path) -> None:
    """A date or a random name in the report, so that equal data differ."""
    build(tmp_path, tiny_folder)
    for name in ("report.json", "report.html"):
        assert (tmp_path / name).read_bytes() == (made[0] / name).read_bytes()


@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [1200, 390])
def test_a_browser_shows_the_page(made: tuple[Path, Any], tmp_path: Path, width: int, scheme: int) -> None:
    """A blank page, an error in the console, or one that is wider than a phone."""
    dom = in_chromium(made[0] / "report.html", tmp_path, width, scheme)
    assert "alert(1)" in dom and "<img" not in dom
    assert dom.count("<span ") > 150
