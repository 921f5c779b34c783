"""Pages of reports that load nothing and run nothing, every text in them escaped, and their charts.

Charts are lines over the steps of a run, as shapes in a square of 100 by 100 that the page stretches; words are set
beside.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from lit_llama.console import visible

_HERE = "lit_llama.text.inspect"
_NAME = re.compile(r"--\w+(?:\.\w+)*|`(lit_llama\.[^`]+|[a-z][\w.]*(?:=[^`]+)?)`")


def render(
    package: str,
    template: str,
    report: Mapping[str, Any],
    *,
    styles: Sequence[str] = (),
    formats: Mapping[str, Callable[..., Any]] | None = None,
    **context: Any,
) -> str:
    """Render the HTML of a report.

    Args:
        package: Where `template` and `styles` lie; it extends page.html.jinja, which lies here.
        template: File name.
        report: What stands in report.json; its keys are names in the template.
        styles: Style sheets beside the one of all reports.
        formats: Filters of this template, and ways of `value` to write a number.
        context: Further names.
    """
    from markupsafe import Markup

    ways: dict[str, Callable[..., Any]] = {"number": number, "percent": percent, **(formats or {})}

    def value(path: str, style: str = "number") -> Any:
        """A number of report.json, which the element names."""
        found: Any = report
        for key in path.split("/"):
            found = found[int(key) if isinstance(found, list) else key]
        return Markup('<data value="{}" data-from="{}">{}</data>').format(found, path, ways[style](found))

    sheets = [(_HERE, "report.css"), *((package, name) for name in styles)]
    style = Markup("\n").join(Markup((files(where) / name).read_text("utf-8")) for where, name in sheets)  # all ours
    return _template(package, template, tuple(ways.items())).render(report, style=style, value=value, **context)


@functools.cache
def _template(package: str, template: str, ways: tuple[tuple[str, Callable[..., Any]], ...]) -> Any:
    """Compile a template once: a run renders its report with each evaluation."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    loader = ChoiceLoader([PackageLoader(name, "") for name in dict.fromkeys((package, _HERE))])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "names": names_html} | dict(ways)
    return environment.get_template(template)


def number(value: float) -> str:
    """Format a number as 1,234 or 1.23."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def percent(share: float) -> str:
    """Format a share for people: a little is never shown as nothing, nor nearly all as all."""
    if 0 < share < 0.0005:
        return "under 0.1%"
    return "over 99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def names_html(text: str) -> Any:
    """Escape a text, with names of parameters and calls set as code."""
    from markupsafe import Markup, escape

    return Markup(_NAME.sub(lambda name: f"<code>{name[1] or name[0]}</code>", escape(visible(text))))


Series = list[tuple[int, float]]


MOST = 500  # places along a line; more are drawn as the least and the greatest of each place
_MOST_TICKS = 7
_LOG_FROM = 8.0  # greatest / least, from which on a logarithmic scale says more


@dataclass(frozen=True)
class Line:
    """Line that is to be drawn.

    Args:
        label: Its name in the legend.
        kind: Its class in the style sheet.
        points: Steps and values.
        dots: Mark every point, with its value.
    """

    label: str
    kind: str
    points: Series
    dots: bool = False


@dataclass(frozen=True)
class Drawn:
    """A line in the drawing: `path` as in SVG, `dots` its marked points with their words."""

    label: str
    kind: str
    path: str
    dots: list[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """Drawing of the page; places in percent from the left and from the top, ticks with their words."""

    title: str
    lines: list[Drawn]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    summary: str


def chart(title: str, lines: Sequence[Line], steps: int, *, from_zero: bool = False) -> Chart | None:
    """Lay out a chart, None if there is no point to draw.

    The scale is logarithmic where all values are above 0 and far apart, unless it is to begin at 0.

    Args:
        title: What is drawn, with its unit.
        lines: Those without points are left out.
        steps: The last step of the scale.
        from_zero: Begin the scale at 0.
    """
    lines = [Line(line.label, line.kind, list(_finite(line.points)), line.dots) for line in lines]
    lines = [line for line in lines if line.points]
    values = [value for line in lines for _, value in line.points]
    if not values:
        return None
    low, high = min(values), max(values)
    logarithmic = not from_zero and low > 0 and high / low > _LOG_FROM
    if logarithmic:
        low, high, ticks = _log_ticks(low, high)
    else:
        low, high, ticks = _linear_ticks(0.0 if from_zero else low, high)
    x_steps = max(steps, max(step for line in lines for step, _ in line.points), 1)

    def place(value: float) -> float:
        if low == high:  # values that differ by less than a tick can show
            return 50.0
        share = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return 100 - 100 * share

    drawn = [
        Drawn(
            line.label,
            line.kind,
            "M" + "L".join(f"{100 * step / x_steps:.2f} {place(value):.2f}" for step, value in _thin(line.points)),
            [
                (100 * step / x_steps, place(value), f"step {step:,}: {figure(value)}")
                for step, value in (line.points if line.dots else [])
            ],
        )
        for line in lines
    ]
    x_ticks = [(100 * at / x_steps, f"{at:,}") for at in range(0, x_steps + 1, _step_of_ticks(x_steps))]
    said = "; ".join(f"{line.label} from {figure(line.points[0][1])} to {figure(line.points[-1][1])}" for line in lines)
    return Chart(title, drawn, x_ticks, [(place(tick), figure(tick)) for tick in ticks], f"{title}: {said}")


def figure(value: float) -> str:
    """Format a number with the three digits that matter: 1,230, 0.0123, 3e-04."""
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.2g}"


def _finite(points: Series) -> Iterator[tuple[int, float]]:
    return ((step, value) for step, value in points if math.isfinite(value))


def _thin(points: Series) -> Iterable[tuple[int, float]]:
    """Of many points those that show: the least and the greatest of each place, in their order."""
    if len(points) <= 2 * MOST:
        return points
    width = -(-len(points) // MOST)
    kept = []
    for start in range(0, len(points), width):
        part = points[start : start + width]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _linear_ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round numbers around the values: the ends of the scale and three to six ticks."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span))
    step = next(power * by for by in (0.2, 0.5, 1, 2, 5, 10) if span / (power * by) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    return first * step, last * step, [at * step for at in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> tuple[float, float, list[float]]:
    """A scale a little wider than the values; as many round ticks as there is room for."""
    low, high = low / 1.1, high * 1.1
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    finer = [[by * 10.0**power for power in powers for by in factors] for factors in ((1, 2, 5), (1, 3), (1,))]
    coarser = [[10.0**power for power in powers if power % every == 0] for every in range(2, len(powers))]
    kept = [[tick for tick in ticks if low <= tick <= high] for ticks in (*finer, *coarser)]
    return low, high, next((ticks for ticks in kept if len(ticks) <= _MOST_TICKS), kept[-1])


def _step_of_ticks(end: int) -> int:
    return next(by * 10**power for power in range(19) for by in (1, 2, 5) if by * 10**power * 6 >= end)
