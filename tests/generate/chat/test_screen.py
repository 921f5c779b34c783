"""Answers on a terminal: Markdown as it streams, folded thoughts, and nothing that acts there."""

import io
import re

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from rich.console import Console

from lit_llama.generate.chat.chat import Chat, Plain, Terminal, finished, folded
from lit_llama.generate.chat.store import Store
from lit_llama.generate.chat.terminal import Names
from lit_llama.generate.engine.request import Sampling
from lit_llama.generate.llm import load

OURS = re.compile(r"\x1b\[[0-9;]*[mAK]|\x1b\[\?25[lh]|\r")
"""Colours, cursor up, erase line, hide and show the cursor: what rich writes on its own account."""

HOSTILE = (
    "# Title \x1b]0;owned\x07\n\n[link](https://example.org/\x1b[2J) <https://example.org>\n\n"
    "&#27;[31m &#x1b;]8;; &#8238;live\n\n```sh\necho \x1b[2J\x9b\n```\n\n"
    "`code \x1b[5m` **bold \u202e** ![image](x\x07)\n\n| a\x1b[H | b |\n|---|---|\n| c | \x00 |\n"
)


def streamed(text: str, size: int, *, opened: bool = False, width: int = 60, stopped: bool = False) -> str:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, height=12, color_system="truecolor")
    screen = Terminal(console)
    screen.begin(opened)
    for start in range(0, len(text), size):
        screen.write(text[start : start + size])
    screen.end(stopped)
    return file.getvalue()


def left(output: str) -> str:
    """What stays on the screen: a line that is erased and drawn anew counts once."""
    rows: list[str] = []
    at = 0
    for part in re.split(r"(\x1b\[[0-9;]*[A-Za-z]|\x1b\[\?25[lh]|\r|\n)", output):
        if up := re.fullmatch(r"\x1b\[(\d+)A", part):
            at -= int(up[1])
        elif part == "\x1b[2K":
            rows[at : at + 1] = [""]
        elif part == "\n":
            at += 1
        elif part and not part.startswith("\x1b") and part != "\r":
            rows += [""] * (at + 1 - len(rows))
            rows[at] += part
    return "\n".join(row.rstrip() for row in rows)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_no_sequence_of_an_answer_reaches_the_terminal(size: int) -> None:
    """Titles, links, entities, code or tables that carry escape sequences past the check."""
    output = streamed(HOSTILE, size)
    rest = OURS.sub("", output)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", rest)
    assert "\x1b]8" not in output, "a hyperlink is a sequence that holds words of the answer"
    assert "⟨U+001B⟩" in rest and "Title" in rest and "bold" in rest
    Terminal(Console(file=io.StringIO())).show(HOSTILE)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_streaming_leaves_what_showing_the_whole_does(size: int) -> None:
    """Blocks that are shown twice, torn, or lost while they stream."""
    text = "\n\n".join(
        [
            "# Llamas",
            "They eat **grass** and `hay`.",
            "- one\n- two\n\n  still two\n- three",
            "```py\nx = 1\n\ny = 2\n```",
        ]
        + [f"Paragraph {n} with some words that go on over the edge of the row." for n in range(9)]
    )
    whole = left(streamed(text, len(text)))
    found = [row for row in left(streamed(text, size)).split("\n") if row.strip()]
    assert found == [row for row in whole.split("\n") if row.strip()]
    assert sum("Paragraph 8" in row for row in found) == 1


def test_thoughts_are_folded() -> None:
    """Pages of thoughts before every answer, or an answer that is taken for them."""
    thinking = "<think>\nLet me see: one two three.\n</think>\n\nIt is **four**."
    for size in (1, 200):
        shown = left(streamed(thinking, size))
        assert "Let me see" not in shown and "thought in 6 words" in shown and "It is four." in shown
    opened = left(streamed("so and so</think>Yes.", 3, opened=True))
    assert "so and so" not in opened and "Yes." in opened
    assert folded("<think>a b").thinking and folded("a b", opened=True).thinking
    assert folded("No tags").thoughts is None and folded("a </think> b").thoughts is None
    unended = left(streamed("<think>for ever", 4, stopped=True))
    assert "thinking" in unended and unended.rstrip().endswith("...")


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("one", 0),
        ("one\n", 0),
        ("one\n\n", 0),
        ("one\n\ntwo", 5),
        ("```\na\n\nb", 0),
        ("```\na\n\nb\n```\n\nc", 14),
        ("- a\n\n  still a", 0),
        ("~~~\n```\n\n~~~\n\nx", 14),
    ],
)
def test_finished_blocks_end_outside_of_code_and_lists(text: str, end: int) -> None:
    """Half of a block of code that is shown as one, and the rest as words."""
    assert finished(text) == end


def test_completion_names_commands_settings_models_and_conversations(tiny_folder: object) -> None:
    """A name that has to be typed in full."""
    llm = load(str(tiny_folder), precision="32-true")
    store = Store(None)
    store.create("llamas")
    chat = Chat({"base": llm, "tuned": llm}, Sampling(), store, say=lambda text: None, screen=Plain())
    names = Names(chat)

    def found(text: str) -> list[str]:
        return [completion.text for completion in names.get_completions(Document(text), CompleteEvent())]

    assert found("/re") == ["/rename", "/retry"] and found("hello /re") == []
    assert found("/set temp") == ["temperature"] and found("/model ") == ["base", "tuned"]
    assert found("/switch ll") == ["llamas"] and found("/undo x") == []
