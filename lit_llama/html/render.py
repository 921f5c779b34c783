"""A report as one page that loads nothing and runs nothing; every text in it is escaped."""

import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from lit_llama.console import visible

_HERE = "lit_llama.text.inspect"
_FLAG = re.compile(r"--\w+(?:\.\w+)*")


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
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    loader = ChoiceLoader([PackageLoader(name, "") for name in dict.fromkeys((package, _HERE))])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    ways: dict[str, Callable[..., Any]] = {"number": number, "percent": percent, **(formats or {})}
    environment.filters |= {"visible": visible, "flags": flags_html} | ways

    def value(path: str, style: str = "number") -> Any:
        """A number of report.json, which the element names."""
        found: Any = report
        for key in path.split("/"):
            found = found[int(key) if isinstance(found, list) else key]
        return Markup('<data value="{}" data-from="{}">{}</data>').format(found, path, ways[style](found))

    sheets = [(_HERE, "report.css"), *((package, name) for name in styles)]
    style = Markup("\n").join(Markup((files(where) / name).read_text("utf-8")) for where, name in sheets)  # all ours
    return environment.get_template(template).render(report, style=style, value=value, **context)


def number(value: float) -> str:
    """Format a number as 1,234 or 1.23."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"


def percent(share: float) -> str:
    """Format a share for people: a little is never shown as nothing, nor nearly all as all."""
    if 0 < share < 0.0005:
        return "under 0.1%"
    return "over 99.9%" if 0.9995 <= share < 1 else f"{share:.1%}"


def flags_html(text: str) -> Any:
    """Escape a text, with flags such as --seed set as code."""
    from markupsafe import Markup, escape

    return Markup(_FLAG.sub(lambda flag: f"<code>{flag.group()}</code>", escape(visible(text))))
