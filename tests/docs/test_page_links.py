"""Links between the pages of the documentation, and the order in which an index and a navigation list them."""

import runpy
from pathlib import Path

import pytest
from conftest import ROOT
from markdown_pages import PAGES, anchors, links, name


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    """Catches a page, file or heading that was renamed."""
    wrong = []
    for link in links(path):
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


@pytest.mark.parametrize("index", ["docs/index.md", "README.md"])
def test_an_index_lists_every_page(index: str) -> None:
    """Catches a page that nobody finds."""
    listed = {(ROOT / index).parent.joinpath(link.partition("#")[0]).resolve() for link in links(ROOT / index)}
    left_out = {"index.md", "api.md"} if index == "README.md" else {"index.md"}
    pages = {page for page in (ROOT / "docs").glob("*.md") if page.name not in left_out}
    assert sorted(map(name, pages - listed)) == []


def test_the_navigation_lists_every_page_once() -> None:
    """Catches a page that the rendered site has and its navigation has not, such as one in a row of another form."""
    settings = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    source = [(ROOT / "docs" / "index.md").read_text("utf-8")]
    settings["add_navigation"](None, settings["root_doc"], source)
    lines = source[0].partition("```{toctree}\n:hidden:\n\n")[2].splitlines()
    entries = [line.removesuffix(">").partition(" <")[2] for line in lines[: lines.index("```")]]
    listed = [name((ROOT / "docs" / f"{entry}.md").resolve()) for entry in entries]
    assert sorted(listed) == sorted(name(page) for page in PAGES if page.name != "index.md")
