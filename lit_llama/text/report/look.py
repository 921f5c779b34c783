"""What a report asks to be looked at, for those who read the terminal and no report."""

import json
from pathlib import Path

GRAVE = ("fix", "check")
"""Severities that are said; notes are not."""


def look_at(report: Path) -> list[str]:
    """The grave warnings of a report.json, a line each: severity, what was found, and why it matters."""
    warnings = json.loads(report.read_text("utf-8"))["warnings"]
    return [
        f"{warning['severity'].upper()} {warning['what']} {warning['why']}"
        for warning in warnings
        if warning["severity"] in GRAVE
    ]
