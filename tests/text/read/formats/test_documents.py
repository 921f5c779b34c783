"""Documents of text files, and prepare/text.py on them."""

import gzip
import json
from pathlib import Path

import pytest
from conftest import run_here

from lit_llama.errors import DataError, UserError
from lit_llama.text.config import Documents
from lit_llama.text.dataset.folder import Split, read_meta
from lit_llama.text.read.formats import documents as module
from lit_llama.text.read.formats import files
from lit_llama.text.read.formats.documents import read_documents
from lit_llama.text.tokenizer.base import Tokenizer

TEXT = "\ufeffOne\u2028 line.\nTwo  lines \r\n \t\n\n  Three\x0b 北京\x85😀\n\nlast"


def found(path: Path, documents: Documents) -> list[tuple[str, str]]:
    """Texts, and where they stand."""
    rows = list(read_documents(path, documents))
    return [(row.where.removeprefix(str(path)), row.value["text"]) for row in rows if row.value]


@pytest.mark.parametrize("block", [5, 64, 1 << 20])
def test_documents_end_where_they_are_said_to(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches text lost between blocks, lines that Python alone ends, and indentation or blanks that are stripped."""
    monkeypatch.setattr(files, "BLOCK", block)
    (tmp_path / "a.txt").write_bytes(TEXT.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    one, two, three = "One\u2028 line.", "Two  lines ", "  Three\x0b 北京\x85😀"
    for name in ("a.txt", "a.txt.gz"):
        path = tmp_path / name
        assert found(path, "line") == [(":line 1", one), (":line 2", two), (":line 5", three), (":line 7", "last")]
        assert found(path, "paragraph") == [(":line 1", f"{one}\n{two}"), (":line 5", three), (":line 7", "last")]
        assert found(path, "file") == [("", TEXT[1:].replace("\r\n", "\n"))]


def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a picture taken for text, and a file without an end that fills the memory."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="not UTF-8: byte 0xe9 at offset 3"):
        found(path, "line")
    monkeypatch.setattr(module, "LONGEST", 10)
    path.write_text("x" * 11)
    for documents in ("file", "line"):
        with pytest.raises(DataError, match=r"more than 10 characters; cut the file, or use --documents"):
            found(path, documents)


@pytest.fixture
def books(tmp_path: Path) -> Path:
    folder = tmp_path / "books"
    (folder / "deep").mkdir(parents=True)
    for n in range(30):
        lines = [f"Book {n} line {i}." + "\n" * (i % 3 == 2) for i in range(20)]
        (folder / ("deep" if n % 2 else ".") / f"{n:02d}.{'md' if n % 5 else 'txt'}").write_text("\n".join(lines))
    (folder / "cover.png").write_bytes(b"\x89PNG")
    return folder


def test_a_folder_of_books_becomes_windows_of_all_their_words(books: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches a masked token, a book on both sides, a word that is lost, and a file that is no text."""
    flags = ["--source", books, "--tokenizer_path", tiny_folder, "--max_seq_length", 64, "--test_split_size", 0.2]
    done = run_here("prepare/text.py", *flags, "--destination_path", tmp_path / "data")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    meta, tokenizer = read_meta(tmp_path / "data"), Tokenizer.from_path(tiny_folder)
    assert meta["source"]["rows"] == 30 == meta["kept"] == meta["in_parts"] and meta["schemas"] == {"plain text": 30}
    told = ""
    for name in ("train", "test"):
        split = Split(tmp_path / "data", name)
        for row in range(len(split)):
            ids, labels = (column.tolist() for column in split[row])
            assert ids == labels and len(ids) <= 64
            told += tokenizer.decode(ids[1:])  # the first stands in the window before, or nobody predicts it
    for path in books.rglob("*.[tm]*"):
        assert path.read_text().removeprefix("Book") in told
    test = "".join(json.loads(line)["text"] for line in (tmp_path / "data" / "test.jsonl").open())
    books_held_out = {word.split(" ")[0] for word in test.split("Book ")[1:]}
    assert 0 < len(books_held_out) < 20
    again = run_here("prepare/text.py", *flags, "--destination_path", tmp_path / "data")
    assert "unchanged" in again.stderr
    lines = run_here("prepare/text.py", *flags, "--documents", "line", "--destination_path", tmp_path / "data")
    assert "unchanged" not in lines.stderr and read_meta(tmp_path / "data")["source"]["rows"] == 600


def test_one_document_cannot_be_trained_and_tested(books: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """Catches an error about an empty split that does not say what to do."""
    flags = ["--source", books / "00.txt", "--tokenizer_path", tiny_folder, "--destination_path", tmp_path / "data"]
    refused = run_here("prepare/text.py", *flags)
    assert refused.returncode == UserError.exit_status and "--documents paragraph or line" in refused.stderr
    assert run_here("prepare/text.py", *flags, "--documents", "line", "--test_split_size", 0.3).returncode == 0
    empty = run_here("prepare/text.py", "--source", tiny_folder, *flags[2:])
    assert "folder without data files" in empty.stderr and ".txt, .text, .md" in empty.stderr
