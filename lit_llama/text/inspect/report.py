"""Report on a data folder, for people: report.html, and every number of it in report.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_llama.folder.publish import write_json
from lit_llama.html.render import percent
from lit_llama.text.inspect.findings import unchecked
from lit_llama.text.inspect.page import render_page
from lit_llama.text.inspect.show import ShownSample

_WHAT = {
    "looks_rendered": "are texts that spell control tokens, which are trained as text; --rendered makes control tokens "
    "of them",
    "opened": "are trained behind what the chat template ends a prompt in, as generation asks for them; in a "
    "conversation it does not write that",
    "joined": "have an answer whose beginning the tokenizer would join to the end of its prompt; it is encoded apart, "
    "as generation meets it",
}
_LEFT_OUT = {
    "template": "are trained without their thoughts, which the chat template leaves out; --thoughts keep trains them",
    "keep": "are trained without their thoughts, although they were to be kept",
    "drop": "are trained without their thoughts, as asked",
}
_TYPED_ENDS = {
    "keep": "have an answer that ends in a spelled control token, which is trained as text: the model will write it "
    "before it stops; --typed_ends strip takes it away",
    "strip": "had an answer that ended in a spelled control token, which was taken away, as asked",
}
_ASKED = {"thoughts": "drop", "typed_ends": "strip"}


def noted(what: str, meta: Mapping[str, Any]) -> str:
    """Return the end of a sentence that begins with a number of rows."""
    if what == "thoughts_left_out":
        return _LEFT_OUT[meta["thoughts"]]
    return _TYPED_ENDS[meta["typed_ends"]] if what == "typed_ends" else _WHAT[what]


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
            f" A larger --max_seq_length or another --overflow keeps long rows: {long['rows']:,} are too long, half of "
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
            "The model learns to stop there. A larger --max_seq_length keeps them whole.",
        )


def _warn_of_fields(accounting: Mapping[str, Any], warn: Any) -> None:
    fields = accounting["fields"]
    for what, severity, begins, why in (
        ("unused", "check", "Fields that nothing uses", "The model never sees them; --fields gives them a place."),
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
