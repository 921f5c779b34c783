"""Texts of others on their way to a terminal or a file, as a terminal of its own shows them."""

import contextlib
import io
import os
import pty
import sys
import tty
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from lit_llama import console, progress
from lit_llama.console import (
    Pieces,
    Results,
    guarded,
    harmless,
    is_heard,
    keep_line,
    shown,
    talking,
    unbroken,
    verbose,
)

HOSTILE = "a[/b] [red]x[/red] :smile: \x1b[31m \x9b2J \u202eevil\u200b\x07 {task}"
SPELLED = "a[/b] [red]x[/red] :smile: ⟨U+001B⟩[31m ⟨U+009B⟩2J ⟨U+202E⟩evil⟨U+200B⟩⟨U+0007⟩ {task}"


def on_terminal(monkeypatch: pytest.MonkeyPatch, stream: str, columns: int, work: Callable[[], object]) -> str:
    """The bytes that arrive on a terminal."""
    main, side = pty.openpty()
    tty.setraw(side)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    with os.fdopen(side, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, stream, terminal)
        work()
    found = b""
    with contextlib.suppress(OSError):  # when all is read, as the other side is closed
        while part := os.read(main, 1 << 16):
            found += part
    os.close(main)
    return found.decode()


def test_no_text_is_markup_or_acts_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback at [/b], paths with gaps, and escape sequences in a file name that are obeyed."""
    assert on_terminal(monkeypatch, "stderr", 200, lambda: progress.stderr().print(HOSTILE)) == f"{SPELLED}\n"
    assert shown(HOSTILE, io.StringIO()) == HOSTILE


def read_all(source: contextlib.AbstractContextManager[BinaryIO]) -> None:
    with source as file:
        file.read()


@pytest.mark.parametrize(
    "work",
    [
        lambda: [*progress.track([1, 2], HOSTILE)],
        lambda: [*progress.count([1, 2], HOSTILE)],
        lambda: read_all(progress.reading(io.BytesIO(b"xy"), 2, HOSTILE)),
    ],
)
def test_no_description_of_a_bar_is_markup(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    """Catches the same in what is written beside a bar."""
    found = on_terminal(monkeypatch, "stderr", 400, work)
    assert SPELLED in found and "\x1b[31m \x9b" not in found


def test_a_pipe_gets_every_byte(capfd: pytest.CaptureFixture[str]) -> None:
    """Catches a line that is wrapped or cleaned for a program that reads it."""
    text = HOSTILE + " word" * 100
    progress.stderr().print(text)
    results = Results()
    results.write(text)
    found = capfd.readouterr()
    assert found.err == f"{text}\n" and found.out == text


def test_an_answer_does_not_act_on_the_terminal_but_keeps_its_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an answer that moves the cursor, and families and Persian words that are torn apart."""
    family, persian, cut = "👩‍👧", "می‌خواهم", ["👩", "‍", "👧"]

    def work() -> None:
        results = Results()
        for piece in [f"{family} {persian}\n", *cut, "a\u200d\u200cb", "\x1b]0;x\x07"]:
            results.write(piece)

    found = on_terminal(monkeypatch, "stdout", 80, work)
    assert found == f"{family} {persian}\n{family}a⟨U+200D⟩⟨U+200C⟩b⟨U+001B⟩]0;x⟨U+0007⟩"
    assert harmless("plain") == "plain"


@pytest.mark.parametrize(
    "text",
    [
        "👩‍👧 👨🏽‍🚀 🏳️‍🌈 ❤️‍🔥 1️⃣ ℹ️ ✔︎",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "\u0915\u094d\u200d\u0937 \u0915\u094d\u200c\u0937",
        "葛\U000e0100",
    ],
)
def test_joiners_stay_where_they_change_what_is_seen(text: str) -> None:
    """Catches torn families and flags, and words of Persian and Hindi with holes, in one piece or letter by letter."""
    pieces = Pieces()
    assert harmless(text) == text == "".join(map(pieces.take, text)) + pieces.end()


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("pass\u200dword", "pass⟨U+200D⟩word"),
        ("да\u200cнет", "да⟨U+200C⟩нет"),
        ("👩\u200d", "👩⟨U+200D⟩"),
        ("👩\u200dx", "👩⟨U+200D⟩x"),
        ("👩\u200d\u200d👧", "👩⟨U+200D⟩⟨U+200D⟩👧"),
        ("👩\u200d\n", "👩⟨U+200D⟩\n"),
        ("中\u200d文", "中⟨U+200D⟩文"),
        ("😀\ufe0f\ufe01\U000e0110", "😀\ufe0f⟨U+FE01⟩⟨U+E0110⟩"),
        ("a\ufe0fb", "a⟨U+FE0F⟩b"),
        ("\U000e0041\u3164\u115f\u034f", "⟨U+E0041⟩⟨U+3164⟩⟨U+115F⟩⟨U+034F⟩"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("a\u2028b\u00ad\x7f\x85", "a⟨U+2028⟩b⟨U+00AD⟩⟨U+007F⟩⟨U+0085⟩"),
    ],
)
def test_what_hides_is_spelled_however_it_is_cut(text: str, seen: str) -> None:
    """Catches hidden text between letters or behind a pictograph, and a sequence that is cut across pieces."""
    for cut in range(len(text) + 1):
        pieces = Pieces()
        assert pieces.take(text[:cut]) + pieces.take(text[cut:]) + pieces.end() == seen == harmless(text)


def test_a_guarded_terminal_still_moves_its_cursor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bars that are spelled in place of drawn where a door has put the guard before stderr."""

    def work() -> None:
        monkeypatch.setattr(sys, "stderr", guarded(sys.stderr))
        for _ in progress.track([1, 2], HOSTILE):
            print(HOSTILE, file=sys.stderr)
        progress.stderr().print(HOSTILE)

    found = on_terminal(monkeypatch, "stderr", 400, work)
    assert "\x1b[2K" in found and "\x1b[?25l" in found and "⟨U+000D⟩" not in found
    assert "\x1b[31m \x9b" not in found and found.count(SPELLED) >= 4


@pytest.mark.parametrize("width", [20, 33, 40, 80])
def test_no_word_is_broken_at_the_edge(width: int) -> None:
    """Catches "sto" and "ps" in two rows; the oracle cuts rows as a terminal does."""
    text = "Ctrl-D leaves, Ctrl-C stops an answer and 北京 food is written to out/lora/x again and again"
    words = text.split()
    filled = unbroken(text, width)
    assert "\n" not in filled and filled.split() == words, "what is copied is another command"
    cells = [c for c in filled for _ in range(1 if c.isascii() else 2)]  # 北 takes two columns
    rows = ["".join(cells[start : start + width]) for start in range(0, len(cells), width)]
    whole = {word if word.isascii() else "北北京京" for word in words}
    assert set(" ".join(rows).split()) == whole
    assert unbroken("x" * 100, 30) == "x" * 100, "a word that fits into no row stays whole"


def test_a_usage_error_keeps_blanks_and_brackets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a path in an error that is not the one on the disk."""
    from lit_llama.cli import CLI

    def main() -> None:
        raise FileNotFoundError(2, "No such file or directory", str(tmp_path / "two  blanks [/b]"))

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["x"])
        CLI(main)
    assert ended.value.code == 5
    assert capsys.readouterr().err == f"error: {tmp_path}/two  blanks [/b]: No such file or directory\n"


def test_a_full_disk_names_the_places_it_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches "[Errno 28] No space left on device"."""
    from lit_llama.cli import CLI

    def main() -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["x"])
        CLI(main)
    err = capsys.readouterr().err
    assert err.startswith(f"error: a disk is full: {Path.cwd()} has ") and "Errno" not in err


def test_a_thread_and_a_call_have_talk_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call in one thread that has another one speak, or be silent."""
    import threading

    monkeypatch.setitem(console._process, "verbose", False)
    heard: list[bool] = []
    with talking(True) as talk:
        thread = threading.Thread(target=lambda: heard.append(is_heard()))
        thread.start()
        thread.join()
        keep_line("one")
        with talking() as inner:
            heard.append(is_heard())
            keep_line("two")
        with talking(False):
            heard.append(is_heard())
    assert heard == [False, True, False] and talk.lines == ["one", "two"] and inner.lines == ["two"]
    assert not is_heard() and verbose() is False and is_heard()
