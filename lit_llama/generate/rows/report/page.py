"""report.json and report.html of made rows."""

from pathlib import Path

from lit_llama.folder import encode_json, replace_file, replace_text
from lit_llama.generate.rows.report.summary import NGRAM, summarise
from lit_llama.generate.rows.run import RowMaker
from lit_llama.html.render import render
from lit_llama.text.inspect.page import histogram


def write_report(folder: Path, maker: RowMaker) -> None:
    """Write both into the folder of a run.

    Args:
        folder: It.
        maker: The run, as far as it has come.
    """
    report = summarise(folder, maker)
    replace_file(folder / "report.json", encode_json(report))
    page = render(
        "lit_llama.generate.rows.report",
        "rows.html.jinja",
        report,
        styles=["rows.css"],
        name=f"{report['recipe']} by {Path(report['teacher']).name}",
        drawn={name: histogram(entry, None) for name, entry in report["lengths"].items()},
        ngram=NGRAM,
    )
    replace_text(folder / "report.html", page)
