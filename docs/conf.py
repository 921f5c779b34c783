"""Settings of Sphinx, which renders README.md, docs/ and an API reference: make docs."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "lit_llama"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md"]
exclude_patterns = [".venv", "build", "checkpoints", "data", "out"]  # not even looked into
myst_heading_anchors = 3  # the anchors of GitHub
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
highlight_language = "none"
html_theme = "furo"
html_title = "lit_llama"
html_extra_path = ["site/index.html"]  # leads to the first page
html_static_path = ["site/site.css"]
html_css_files = ["site.css"]
html_show_copyright = False
html_show_sphinx = False


def add_navigation(app: "Sphinx", docname: str, source: list[str]) -> None:
    """Make the table of docs/index.md the navigation, so that the order of pages is told in one place."""
    if docname == root_doc:
        pages = re.findall(r"^\| \[([^\]]+)\]\(([\w-]+)\.md\)", source[0], flags=re.MULTILINE)
        around = ("README", "../README"), ("Measurements", "../benchmarks/README"), ("Contributing", "../CONTRIBUTING")
        entries = [f"{title} <{page}>" for title, page in (around[0], *pages, *around[1:])]
        lines = ["", "```{toctree}", ":hidden:", "", *entries, "```", ""]
        source[0] += "\n".join(lines)


def setup(app: "Sphinx") -> None:
    """Sphinx calls this."""
    app.connect("source-read", add_navigation)
