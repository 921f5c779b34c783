"""Reports as a parser and as Chromium see them."""

import html.parser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}
SHAPES = {"rect", "line", "svg", "defs", "pattern", "path", "title"}


class Page(html.parser.HTMLParser):
    """Elements that are closed where they must be, their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements that are never closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"{tag} with one attribute twice"
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in SHAPES, f"{tag} closes itself, which HTML does not know"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        if self.elements:
            self.texts.append((self.elements[-1][1], data))


def check_alone(text: str) -> Page:
    """The page is well formed, loads nothing and runs nothing."""
    page = Page(text)
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "form"}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "action", "data"):
                assert (value or "").startswith("#") or (tag == "link" and value == "data:,")
    style = text[text.index("<style>") : text.index("</style>")]
    assert not re.search(r"url\((?!#)|@import", style)
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in style
    return page


def in_chromium(path: Path, folder: Path, width: int, scheme: int) -> str:
    """Show a page in Chromium, in the dark (0) or in the light (1).

    It must not be blank on any of its first screens, nor wider than the window (nor a table than its place), nor ask
    the network for anything.

    Returns:
        The document as the browser understood it.
    """
    from PIL import Image

    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    picture, requests = folder / "page.png", folder / "requests.json"
    common = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder}/profile", f"--blink-settings=preferredColorScheme={scheme}"),
        *(f"--window-size={width},3000", "--disable-background-networking", "--disable-component-update"),
    ]

    def run(*flags: object, page: str = path.as_uri()) -> str:
        done = subprocess.run([*common, *map(str, flags), page], capture_output=True, text=True, timeout=120)
        assert "CONSOLE" not in done.stderr, done.stderr
        return done.stdout

    run(f"--screenshot={picture}", f"--log-net-log={requests}")
    # What the browser asks on its own account has no origin.
    origins = set(re.findall(r'"initiator":"([^"]*)"', requests.read_text("utf-8")))
    assert origins <= {"not an origin"}, "the page asks the network"
    image = Image.open(picture).convert("L")
    assert image.size == (width, 3000)
    background = image.getpixel((2, 2))
    assert background < 60 if scheme == 0 else background > 200
    for top in range(0, 3000, 600):  # one screen after the other
        low, high = image.crop((0, top, width, top + 600)).getextrema()
        assert high - low > 100, f"nothing is drawn from {top} on"
    dom = run("--dump-dom")
    assert dom.rstrip().endswith("</html>")
    # A frame of the same width reports how wide its content wants to be; the page itself runs no script.
    frame = folder / "frame.html"
    frame.write_text(
        f"<iframe src='{path.as_uri()}' style='border:0;width:{width}px;height:900px' "
        'onload="let d = this.contentDocument; document.title = d.documentElement.scrollWidth + `/` + '
        '[...d.querySelectorAll(`.wide`)].filter(box => box.scrollWidth > box.clientWidth + 1).length"></iframe>'
    )
    measured = run("--dump-dom", "--allow-file-access-from-files", page=frame.as_uri())
    found = re.search(r"<title>(\d+)/(\d+)</title>", measured)
    assert found and int(found[1]) <= width, "the page has to be scrolled sideways"
    assert not int(found[2]), "a table has to be scrolled sideways"
    return dom
