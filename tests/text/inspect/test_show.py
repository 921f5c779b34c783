"""Tokens as a person sees them, against the tokenizer's own text."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import encode_examples, run_here
from pseudo_terminals import on_terminal

from lit_llama.errors import UserError
from lit_llama.folder.manifest import forget
from lit_llama.text.inspect.show import ShownSample, coloured_text, parse_rows, plain_text, shown_sample, visible
from lit_llama.text.message import IGNORE_INDEX, instruct
from lit_llama.text.prompts.encode import named_style
from lit_llama.text.tokenizer.base import Tokenizer

TEXTS = [
    "plain words",
    "Zoë's café — 北京 😀👨‍👩‍👧",
    "  spaces \n\n lines\t",
    "\ufffd in the data \ufffd",
    "<|im_end|>",
]


def sample_of(tokenizer: Tokenizer, answer: str, *, mask_inputs: bool = True) -> ShownSample:
    style = named_style("alpaca")
    [sample], _ = encode_examples(
        [instruct("Do 北", "", answer)], style, tokenizer, max_seq_length=4096, mask_inputs=mask_inputs
    )
    return shown_sample(tokenizer, sample.input_ids, sample.labels, row=0, where="here", split="train")


@pytest.fixture(params=["bpe", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tiny_folder: Path) -> Tokenizer:
    if request.param == "bpe":
        return Tokenizer.from_path(tiny_folder)
    path: Path = request.getfixturevalue("llama_tokenizer")
    return Tokenizer.from_path(path)


@pytest.mark.parametrize("answer", TEXTS)
def test_the_pieces_are_the_text_and_the_ids_are_the_sample(tokenizer: Tokenizer, answer: str) -> None:
    """Text lost or doubled between tokens, or U+FFFD for a character that is spread over several."""
    shown = sample_of(tokenizer, answer)
    ids = [token.id for token in shown.tokens if not token.control]
    text = "".join(token.text for token in shown.tokens if not token.control)
    assert text == tokenizer.decode(ids)
    assert text.count("\ufffd") == answer.count("\ufffd")
    trained = "".join(token.text for token in shown.tokens if token.trained)
    assert trained == answer + tokenizer.eos or trained.strip() == (answer + tokenizer.eos).strip()


def test_a_character_of_several_tokens_stands_with_the_last(tiny_folder: Path) -> None:
    """Bytes shown as characters that nobody wrote."""
    tokens = sample_of(Tokenizer.from_path(tiny_folder), "😀").tokens
    trained = [token for token in tokens if token.trained]
    assert [token.text for token in trained[:-1]].count("😀") == 1
    assert all(token.text in ("", "😀") for token in trained[:-1])


def test_a_character_cut_in_its_middle_is_no_replacement_character(tokenizer: Tokenizer) -> None:
    """A cut answer that seems to hold damaged text."""
    ids = tokenizer.encode("ab 𒀀")[:-1]
    shown = shown_sample(tokenizer, ids, ids, row=0, where="", split="train")
    assert "".join(token.text for token in shown.tokens).strip() == "ab" and shown.tokens[-1].text == ""


def test_control_tokens_and_the_first_token(tokenizer: Tokenizer) -> None:
    """A control token that is taken for text, text that is taken for one, or a first token with a loss."""
    shown = sample_of(tokenizer, "say </s> <|im_end|>", mask_inputs=False).tokens
    controls = [token for token in shown if token.control]
    assert controls[-1].text == tokenizer.eos and controls[-1].trained
    assert len(controls) == 1 + bool(tokenizer.bos)
    assert not shown[0].trained and all(token.trained for token in shown[1:])


def test_plain_text_marks_trained_runs(tiny_folder: Path) -> None:
    """A bracket left open, or one around every token."""
    tokenizer = Tokenizer.from_path(tiny_folder)
    shown = plain_text(sample_of(tokenizer, "two words").tokens)
    assert shown.endswith(f"### Response:⟦two words⟪{tokenizer.eos}⟫⟧") and shown.count("⟦") == 1
    ids = tokenizer.encode("abc")
    none = shown_sample(tokenizer, ids, [IGNORE_INDEX] * len(ids), row=0, where="", split="train")
    assert plain_text(none.tokens) == "abc"


def test_nothing_in_the_data_acts_on_the_terminal(tiny_folder: Path) -> None:
    """An escape sequence in a row that clears the screen or hides text."""
    tokens = sample_of(Tokenizer.from_path(tiny_folder), "a\x1b[2Jb\u202ec\rd").tokens
    for shown in (plain_text(tokens), coloured_text(tokens).plain):
        assert not {"\x1b", "\u202e", "\r"} & set(shown)
    assert visible("a\x1b\n\tb\u200b") == "a⟨U+001B⟩\n\tb⟨U+200B⟩"


def test_colours_differ_in_form_too(tiny_folder: Path) -> None:
    """Trained and masked tokens that are the same without colour."""
    text = coloured_text(sample_of(Tokenizer.from_path(tiny_folder), "two\nwords").tokens)
    styles = {str(span.style) for span in text.spans}
    assert any("underline" in style for style in styles) and any("reverse" in style for style in styles)
    assert "↵▏\n" in text.plain and "·" in text.plain


@pytest.mark.parametrize(
    ("rows", "wanted"), [("0", [0]), ("0,17", [0, 17]), ("3-5", [3, 4, 5]), ("7,1-2,7", [7, 1, 2, 7])]
)
def test_rows_are_positions_and_ranges(rows: str, wanted: list[int]) -> None:
    """A range without its end."""
    assert [row for part in parse_rows(rows) for row in part] == wanted


@pytest.mark.parametrize("rows", ["", "x", "1,", "-1", "1.5", "5-3", "1 2"])
def test_other_rows_are_refused(rows: str) -> None:
    """A list that is read in part, or a range that shows nothing."""
    with pytest.raises(UserError, match="--rows is"):
        parse_rows(rows)


@pytest.fixture
def data(tiny_folder: Path, alpaca_rows: Callable[[list[dict[str, str]]], Path]) -> Path:
    folder = alpaca_rows([{"instruction": f"Say {i}", "input": "", "output": f"It is {i}."} for i in range(9)])
    flags = ["--tokenizer_path", tiny_folder, "--data_file_name", "rows.json", "--test_split_size", 2]
    made = run_here("prepare/alpaca.py", *flags, "--destination_path", folder, "--mask_inputs", "true")
    assert made.returncode == 0, made.stderr
    return folder


def test_the_door_shows_rows_with_the_recorded_tokenizer(data: Path) -> None:
    """Another split, other rows, or a tokenizer that has to be typed again."""
    shown = run_here("prepare/show.py", "--data_dir", data, "--rows", "1,0", "--split", "test")
    assert shown.returncode == 0 and shown.stderr == ""
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    lines = shown.stdout.splitlines()
    assert lines[0] == "⟦trained: in the loss⟧  masked: read only  ⟪control token⟫"
    assert [line.split(":")[0] for line in lines if line.startswith("test row")] == ["test row 1", "test row 0"]
    assert shown.stdout.index(f"⟦{rows[1]['output']}") < shown.stdout.index(f"⟦{rows[0]['output']}")
    default = run_here("prepare/show.py", "--data_dir", data)
    assert [line.split(":")[0] for line in default.stdout.splitlines() if line.startswith("train row")] == [
        *("train row 0", "train row 1", "train row 2")
    ]


def test_a_terminal_gets_colours_unless_it_asks_for_none(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape sequences in a terminal that wants none, or brackets in one that has colours."""
    flags = ["--data_dir", data, "--rows", "0"]
    monkeypatch.delenv("NO_COLOR", raising=False)
    status, coloured = on_terminal("prepare/show.py", flags)
    assert status == 0 and "\x1b[" in coloured and "⟦" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    status, plain = on_terminal("prepare/show.py", flags)
    assert status == 0 and "\x1b[" not in plain and "⟦It is" in plain


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (["--rows", "x"], 2, "--rows is 'x'"),
        (["--rows", "5-999999999999"], 2, "has the rows 0 to 6"),
        (["--tokenizer_path", "absent"], 4, "absent"),
        (["--split", "dev"], 2, "split"),
    ],
)
def test_wrong_flags_are_one_line(data: Path, flags: list[str], status: int, named: str) -> None:
    """A traceback, or a legend with nothing below it."""
    result = run_here("prepare/show.py", "--data_dir", data, *flags)
    assert (result.returncode, result.stdout) == (status, "") and named in result.stderr
    assert result.stderr.count("\n") == 1


def test_another_tokenizer_is_refused(data: Path, llama_tokenizer: Path) -> None:
    """Ids read with the wrong vocabulary: fluent nonsense."""
    result = run_here("prepare/show.py", "--data_dir", data, "--tokenizer_path", llama_tokenizer)
    assert result.returncode == 6 and "is not the tokenizer" in result.stderr


def test_a_tokenizer_that_moved_is_named(data: Path, tmp_path: Path, tiny_folder: Path) -> None:
    """No way to say where it is now."""
    meta = json.loads((data / "meta.json").read_text())
    meta["tokenizer"]["path"] = str(tmp_path / "gone")
    (data / "meta.json").write_text(json.dumps(meta))
    forget(data, "meta.json")
    result = run_here("prepare/show.py", "--data_dir", data)
    assert result.returncode == 4 and "--tokenizer_path" in result.stderr
    moved = Path(shutil.copytree(tiny_folder, tmp_path / "moved"))
    assert run_here("prepare/show.py", "--data_dir", data, "--tokenizer_path", moved).returncode == 0
