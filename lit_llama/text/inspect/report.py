"""Report on a data folder, for people: report.html with drawings, differences and tokens, and every number of it in
report.json.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_llama.console import visible
from lit_llama.folder.publish import write_json
from lit_llama.html import percent, render
from lit_llama.text.inspect.findings import CUT, unchecked
from lit_llama.text.inspect.show import ShownSample, ShownToken
from lit_llama.wording import param

LISTED = 50  # rows shown before a list is folded
_WORD = re.compile(r"\w+|\s|[^\w\s]")


@dataclass(frozen=True)
class Bar:
    """A bin of a histogram, in percent of the drawing."""

    x: float
    width: float
    height: float
    first: int
    last: int
    count: int


@dataclass(frozen=True)
class Line:
    """A marked value of a histogram. `row` is the line of its label, `left` if that stands left of it."""

    x: float
    label: str
    kind: str
    row: int
    left: bool


@dataclass(frozen=True)
class Histogram:
    """Histogram as the page draws it; places in percent."""

    bars: list[Bar]
    lines: list[Line]
    ticks: list[tuple[float, int]]
    most: int


def render_page(report: Mapping[str, Any], samples: Sequence[ShownSample]) -> str:
    """Render the HTML of a report (see `write_report`) and of samples shown token by token."""
    return render(
        "lit_llama.text.inspect",
        "report.html.jinja",
        report,
        samples=samples,
        histogram=histogram,
        differences=differences,
        tokens=tokens_html,
        listed=LISTED,
    )


def histogram(lengths: Mapping[str, Any], limit: int | None) -> Histogram:
    """Build the bars, the marked percentiles and max_seq_length.

    Args:
        lengths: An entry of `lengths` in the findings.
        limit: max_seq_length, None where it says nothing.
    """
    width, counts = lengths["histogram"]["width"], lengths["histogram"]["counts"]
    end = max(width * len(counts), (limit or 0) * 1.02, 1)
    most = max(counts, default=0)
    bars = [
        Bar(100 * k * width / end, 100 * width / end, 100 * count / most, k * width, (k + 1) * width - 1, count)
        for k, count in enumerate(counts)
        if count
    ]
    marks = [(lengths["percentiles"].get(name), name) for name in ("p50", "p99")]
    named = [
        (at, f"{'median' if name == 'p50' else name} {at:,}", "percentile") for at, name in marks if at is not None
    ]
    if limit:
        named.append((limit, f"max_seq_length {limit:,}", "limit"))
    lines = [Line(100 * at / end, label, kind, row, left=at > end / 2) for row, (at, label, kind) in enumerate(named)]
    steps = (step * 10**power for power in range(12) for step in (1, 2, 5))
    step = next(step for step in steps if step * 5 >= end)
    ticks = [(100 * at / end, at) for at in range(0, int(end) + 1, step)]
    return Histogram(bars, lines, ticks, most)


def differences(first: str, second: str) -> tuple[list[tuple[str, bool]], list[tuple[str, bool]]]:
    """Return both texts in pieces, with whether the other lacks them."""
    cut = first.endswith(CUT) and second.endswith(CUT)  # both go on, so their ends are no difference
    one, other = (_WORD.findall(visible(text.removesuffix(CUT) if cut else text)) for text in (first, second))
    codes = difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    left, right = [], []
    for index, (tag, *ends) in enumerate(codes, 1):
        differs = tag != "equal" and not (cut and index == len(codes))
        left.append(("".join(one[ends[0] : ends[1]]), differs))
        right.append(("".join(other[ends[2] : ends[3]]), differs))
    end = [(CUT, False)] if cut else []
    return [piece for piece in left + end if piece[0]], [piece for piece in right + end if piece[0]]


def tokens_html(tokens: Sequence[ShownToken]) -> Any:
    """Render every token as its own element; spaces and newlines stay what they are, so that a copy is the text."""
    from markupsafe import Markup, escape

    parts = []
    for token in tokens:
        text = escape(visible(token.text)).replace(" ", Markup("<i> </i>")).replace("\n", Markup("<i class=n></i>\n"))
        kind = token.kind[0] + (" c" if token.control else "") + ("" if token.text else " p")
        title = f"id {token.id}, {token.kind}" + (", control token" if token.control else "")
        title += "" if token.text else ", first part of a character"
        parts.append(Markup('<span class="{}" title="{}">{}</span>').format(kind, title, text))
    return Markup("").join(parts)


_WHAT = {
    "opened": "are trained behind what the chat template ends a prompt in, as generation asks for them; in a "
    "conversation it does not write that",
    "joined": "have an answer whose beginning the tokenizer would join to the end of its prompt; it is encoded apart, "
    "as generation meets it",
}
_AS_ASKED = {
    "thoughts_left_out": {
        "keep": "are trained without their thoughts, although they were to be kept",
        "drop": "are trained without their thoughts, as asked",
    },
    "typed_ends": {"strip": "had an answer that ended in a spelled control token, which was taken away, as asked"},
}
_ASKED = {"thoughts": "drop", "typed_ends": "strip"}


def noted(what: str, meta: Mapping[str, Any]) -> str:
    """Return the end of a sentence that begins with a number of rows."""
    chosen: Any = meta.get({"thoughts_left_out": "thoughts"}.get(what, what))
    if what == "looks_rendered":
        return (
            f"are texts that spell control tokens, which are trained as text; {param('rendered')} makes control "
            "tokens of them"
        )
    if what == "thoughts_left_out" and chosen == "template":
        keep = param("thoughts", "keep")
        return f"are trained without their thoughts, which the chat template leaves out; {keep} trains them"
    if what == "typed_ends" and chosen == "keep":
        return (
            "have an answer that ends in a spelled control token, which is trained as text: the model will write it "
            f"before it stops; {param('typed_ends', 'strip')} takes it away"
        )
    return _WHAT[what] if what in _WHAT else _AS_ASKED[what][chosen]


def grade(what: str, meta: Mapping[str, Any]) -> str:
    """Grade how much a note asks for attention: "fix", "check" or "note"."""
    if what == "looks_rendered":
        return "fix"
    rule = {"thoughts_left_out": "thoughts", "typed_ends": "typed_ends"}.get(what)
    return "note" if rule is None or meta[rule] == _ASKED[rule] else "check"


GRAVE = ("fix", "check")
"""Severities that are said; notes are not."""


def look_at(report: Path) -> list[str]:
    """Return the grave warnings of a report.json, a line each: severity, what was found, and why it matters."""
    warnings = json.loads(report.read_text("utf-8"))["warnings"]
    return [
        f"{warning['severity'].upper()} {warning['what']} {warning['why']}"
        for warning in warnings
        if warning["severity"] in GRAVE
    ]


REPORT_JSON, REPORT_HTML = "report.json", "report.html"
FORMAT = 1
_COUNTED = (
    "kept",
    "cut",
    "dropped",
    "splits",
    "key",
    "near_duplicates_checked",
    "made_of",
    "too_long",
    "dropped_by_choice",
    "remarks",
    "fields",
    "notes",
)  # stand elsewhere in the report
_MANY_DROPPED, _MANY_REPEATED, _MANY_LEAKED = 0.1, 0.01, 0.01

_KINDS = (("exact", "the same"), ("normalised", "the same but for case or spaces"), ("near", "nearly the same"))
Json = dict[str, Any]


def write_report(
    folder: Path,
    meta: Mapping[str, Any],
    findings: Mapping[str, Any],
    samples: Sequence[ShownSample],
    *,
    name: str = "",
    plan: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
) -> None:
    """Write report.json and report.html, which opens without a network.

    Args:
        folder: Where to.
        meta: As in meta.json: `source.rows` = `kept` + `dropped` (by reason), `cut` rows are among the kept; of both
            the number of `rows` and the `first` of their places. Everything else is shown as a setting.
        findings: `Findings.result()`.
        samples: Shown token by token, see `shown_sample`.
        name: Of the data folder, if `folder` is not its final place.
        plan: `step_plan()` with the defaults of training.
        commands: That make and use this folder.
    """
    accounting = account(meta)
    report = {
        "format": FORMAT,
        "name": name or folder.resolve().name,
        "accounting": accounting,
        "warnings": warnings(accounting, findings),
        "findings": dict(findings),
        "plan": dict(plan) if plan else None,
        "settings": _flat({key: value for key, value in meta.items() if key not in _COUNTED}),
        "commands": list(commands),
    }
    write_json(folder / REPORT_JSON, report)
    (folder / REPORT_HTML).write_text(render_page(report, samples), "utf-8")


def account(meta: Mapping[str, Any]) -> Json:
    """Account for every raw row; a sum that does not come out is said, not hidden."""
    rows, cut, dropped = meta["source"]["rows"], meta["cut"], meta["dropped"]
    lost = sum(tally["rows"] for tally in dropped.values())
    return {
        "rows": rows,
        "kept": meta["kept"] - cut["rows"],
        "cut": cut["rows"],
        "dropped": lost,
        "dropped_share": lost / rows if rows else 0.0,
        "dropped_by_choice": meta["dropped_by_choice"],
        "fields": meta.get("fields", {}),
        "notes": [
            {"what": noted(what, meta), "severity": grade(what, meta), **tally}
            for what, tally in meta.get("notes", {}).items()
        ],
        "too_long": meta["too_long"],
        "remarks": list(meta.get("remarks", [])),
        "adds_up": rows == meta["kept"] + lost,
        "cut_rows": cut,
        "dropped_rows": dropped,
    }


def warnings(accounting: Mapping[str, Any], findings: Mapping[str, Any]) -> list[Json]:
    """List what to look at, the gravest first: {"severity": "fix" | "check" | "note", "what", "why"}."""
    found: list[Json] = []

    def warn(severity: str, what: str, why: str) -> None:
        found.append({"severity": severity, "what": what, "why": why})

    if not accounting["adds_up"]:
        warn("fix", "The rows do not add up.", "Rows were lost or counted twice: a defect, please report it.")
    _warn_of_losses(accounting, warn)
    _warn_of_fields(accounting, warn)
    for note in accounting["notes"]:
        what, _, more = note["what"].partition("; ")
        why = f"{more[0].upper()}{more[1:]}." if more else "As asked."
        warn(note["severity"], f"{_rows(note['rows'])} {what}.", why)
    _warn_of_leakage(findings, warn)
    _warn_of_contents(findings, warn)
    for remark in accounting["remarks"]:
        warn("note", f"{remark[0].upper()}{remark[1:]}.", "Said by prepare/ as well.")
    order = ("fix", "check", "note")
    return sorted(found, key=lambda warning: order.index(warning["severity"]))


def _warn_of_losses(accounting: Mapping[str, Any], warn: Any) -> None:
    lost, share = accounting["dropped"], accounting["dropped_share"]
    if lost:
        reasons = ", ".join(f"{tally['rows']:,} {reason}" for reason, tally in accounting["dropped_rows"].items())
        many = lost - accounting["dropped_by_choice"] > _MANY_DROPPED * accounting["rows"]
        long = accounting["too_long"]
        more = (
            f" A larger {param('max_seq_length')} or another {param('overflow')} keeps long rows: {long['rows']:,} "
            "are too long, half of "
            f"them with {long['median']:,} tokens or more."
            if many and long["rows"]
            else ""
        )
        warn(
            "fix" if many else "note",
            f"{_rows(lost)} dropped, {percent(share)} of all.",
            f"{reasons}.{more}",
        )
    if accounting["cut"]:
        warn(
            "check",
            f"{_rows(accounting['cut'])} cut: the answer ends early.",
            f"The model learns to stop there. A larger {param('max_seq_length')} keeps them whole.",
        )


def _warn_of_fields(accounting: Mapping[str, Any], warn: Any) -> None:
    fields = accounting["fields"]
    for what, severity, begins, why in (
        (
            "unused",
            "check",
            "Fields that nothing uses",
            f"The model never sees them; {param('fields')} gives them a place.",
        ),
        ("written_as_text", "note", "Fields that were no text", "They were written as JSON text, as asked."),
        ("left_out", "note", "Fields left out", "As asked."),
    ):
        if named := fields.get(what):
            listed = ", ".join(f"{field} ({_rows(rows)})" for field, rows in named.items())
            warn(severity, f"{begins}: {listed}.", why)


def _warn_of_leakage(findings: Mapping[str, Any], warn: Any) -> None:
    leakage, conflicting = findings["leakage"], findings["conflicting"]
    if leakage["rows"]:
        kinds = ", ".join(
            f"{leakage[kind]['rows']:,} {words}" for kind, words in _KINDS if leakage.get(kind, {}).get("rows")
        )
        grave = "fix" if leakage["share"] >= _MANY_LEAKED else "check"
        what = f"{_rows(leakage['rows'], 'test row')} also in train, {percent(leakage['share'])} of the test rows."
        warn(grave, what, f"{kinds}. The test loss will look better than it is.")
    if conflicting["prompts"]:
        across = conflicting["prompts_in_train_and_test"]
        also = f" {across:,} of them stand in train and test." if across else ""
        have = "prompt has" if conflicting["prompts"] == 1 else "prompts have"
        what = f"{conflicting['prompts']:,} {have} more than one answer ({conflicting['rows']:,} rows)."
        warn("check", what, f"Fine for open questions, contradictory for closed ones.{also}")


def _warn_of_contents(findings: Mapping[str, Any], warn: Any) -> None:
    answers, repeated = findings["answers"], sum(kind["rows"] for kind in findings["duplicates"].values())
    if findings["untrained"]["rows"]:
        what = f"{_rows(findings['untrained']['rows'])} without a trained token."
        warn("fix", what, "They cost time and teach nothing.")
    if answers["empty"]["rows"]:
        warn("fix", f"{_rows(answers['empty']['rows'])} with an empty answer.", "The model learns to say nothing.")
    if answers["refused"]["rows"]:
        what = f"{_rows(answers['refused']['rows'])} answered with a refusal."
        warn("check", what, 'As in "I\'m sorry, but as an AI". Remove them unless the model is to learn it.')
    if answers["short"]["rows"]:
        limit = findings["rules"]["short_is_below"]
        what = f"{_rows(answers['short']['rows'])} with an answer of fewer than {limit} characters."
        warn("note", what, "Right for numbers and choices, wrong for prose.")
    trouble = {name: entry["rows"] for name, entry in findings["encoding"].items() if entry["rows"]}
    if trouble:
        what = "Text that was damaged on its way: " + ", ".join(f"{name} ({n:,})" for name, n in trouble.items()) + "."
        warn("check", what, "Mostly a file read in the wrong encoding. The model learns to write it, too.")
    if repeated:
        share = repeated / findings["rows"]
        what = f"{_rows(repeated)} repeat an earlier row, exactly or nearly ({percent(share)})."
        warn("check" if share >= _MANY_REPEATED else "note", what, "Repeated rows weigh more in training.")
    if not findings["near_duplicates_checked"]:
        why = unchecked(findings["rows"], findings["near_duplicates_limit"])
        warn("note", "Near-duplicates were not looked for.", f"{why[0].upper()}{why[1:]}.")


def _rows(count: int, what: str = "row") -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _flat(value: Mapping[str, Any], prefix: str = "") -> Json:
    """Nested settings by dotted names."""
    flat: Json = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(entry, f"{name}.") if isinstance(entry, Mapping) else {name: entry}
    return flat
