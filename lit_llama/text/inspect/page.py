"""report.html of a data folder: its drawings, differences and tokens."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_llama.console import visible
from lit_llama.html.render import render
from lit_llama.text.inspect.pairs import CUT
from lit_llama.text.inspect.show import ShownSample, ShownToken

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
