"""PDF files as documents: paragraphs of what a reader sees, and one line for what cannot be read."""

import io
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import run_here

from lit_llama.errors import DataError, UserError
from lit_llama.generate.rows.recipe import Source
from lit_llama.generate.rows.sources import Pool
from lit_llama.text.read.formats.documents import pdf_text

PAGES = [
    [
        *(
            "The Rhine",
            "",
            "The Rhine is one of the major rivers of Eu-",
            "rope. It begins in the Swiss Alps and ends in",
        ),
        *("the North Sea.", "The river is about 1,233 km long, and its largest", "city is Cologne."),
    ],
    ["Bees live in colonies (of one queen)."],
]
RHINE = "The Rhine is one of the major rivers of Europe. It begins in the Swiss Alps and ends in the North Sea."
RHINE = f"The Rhine\n\n{RHINE}"
TEXT = f"{RHINE}\n\nThe river is about 1,233 km long, and its largest city is Cologne."
TEXT += "\n\nBees live in colonies (of one queen)."


def pdf(pages: Sequence[Sequence[str]], trailer: bytes = b"", packed: bool = False) -> bytes:
    """A PDF file of lines of text, by hand (ISO 32000-1, 7.5)."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * number) for number in range(len(pages)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [%s] /Count %d >>" % (kids, len(pages)),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, lines in enumerate(pages):
        shown = b"".join(
            b"(%s) Tj T*\n" % line.encode("latin-1").replace(b"(", rb"\(").replace(b")", rb"\)") for line in lines
        )
        drawn = b"BT /F1 12 Tf 14 TL 72 720 Td\n%sET" % shown
        how = b""
        if packed:
            drawn, how = zlib.compress(drawn), b" /Filter /FlateDecode"
        page = b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R" % (5 + 2 * number)
        objects.append(page + b" /Resources << /Font << /F1 3 0 R >> >> >>")
        objects.append(b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(drawn), how, drawn))
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, io.SEEK_END)
    for number, content in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.write(b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer\n<< /Size %d /Root 1 0 R %s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start))
    return out.getvalue()


def protected(word: str) -> bytes:
    import pypdf

    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf(PAGES)))
    writer.encrypt(user_password=word, owner_password="owner", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rhine.pdf"


@pytest.mark.parametrize("packed", [False, True])
def test_lines_become_paragraphs(file: Path, packed: bool) -> None:
    """Catches sentences that end where a line of the page does, and words that a hyphen still divides."""
    file.write_bytes(pdf(PAGES, packed=packed))
    assert pdf_text(file) == TEXT
    pool = Pool(Source(name="documents", documents=(str(file.parent),), length=130), 1)
    assert pool.entries[0].value["text"] == RHINE
    assert pool.entries[0].where == f"{file}:passage 1" and pool.entries[0].value["file"] == "rhine.pdf"


def test_a_password_for_changes_alone_does_not_hinder(file: Path) -> None:
    file.write_bytes(protected(""))
    assert pdf_text(file) == TEXT


AES = b"/Encrypt << /Filter /Standard /V 5 /R 6 /Length 256 /O (%s) /U (%s) /OE (%s) /UE (%s) /Perms (%s) /P -1 "
AES += b"/CF << /StdCF << /CFM /AESV3 /Length 32 >> >> /StmF /StdCF /StrF /StdCF >> /ID [(a) (a)]"
AES = AES % (b"x" * 48, b"x" * 48, b"x" * 32, b"x" * 32, b"x" * 16)


@pytest.mark.parametrize(
    "content, says",
    [
        (lambda: protected("secret"), "is protected by a password: save it without one"),
        (lambda: pdf(PAGES, AES), "is protected by a password: save it without one"),
        (lambda: b"", "is empty"),
        (lambda: b"<!doctype html><p>log in</p>", "cannot be read as PDF: "),
        (lambda: pdf(PAGES)[:200], "cannot be read as PDF: "),
        (lambda: b"%PDF-1.4\n" + bytes(range(256)) * 40, "cannot be read as PDF: "),
        (lambda: pdf(PAGES).replace(b"/Kids [4 0 R 6 0 R]", b"/Kids [2 0 R 2 0 R]"), ""),
        (lambda: pdf([[""]]), "holds no text, its pages may be pictures"),
        (lambda: pdf([]), "holds no text, its pages may be pictures"),
    ],
)
def test_what_cannot_be_read_is_one_line(file: Path, content: object, says: str) -> None:
    file.write_bytes(content())  # type: ignore[operator]
    with pytest.raises(DataError) as error:
        pdf_text(file)
    assert str(error.value).startswith(f"{file} {says}") and "\n" not in str(error.value)


def test_any_damage_is_told_or_coped_with(file: Path) -> None:
    """Never another exception, whichever piece of the file is gone."""
    whole, refused = pdf(PAGES, packed=True), 0
    for at in range(0, len(whole), 37):
        file.write_bytes(whole[:at] + b"\0\xff(<<" + whole[at + 25 :])
        try:
            pdf_text(file)
        except DataError:
            refused += 1
    assert 0 < refused < len(whole) // 37


def test_the_package_that_is_missing_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_bytes(pdf(PAGES))
    monkeypatch.setitem(sys.modules, "pypdf", None)
    with pytest.raises(UserError, match=r"pip install 'lit_llama\[pdf\]'"):
        pdf_text(file)


def test_the_door_refuses_in_one_line(file: Path, tiny_folder: Path) -> None:
    file.write_bytes(protected("secret"))
    flags = ["--recipe", "questions-from-documents", "--documents", file, "--checkpoint_dir", tiny_folder]
    done = run_here("generate/rows.py", *flags, "--preview", 1, cwd=file.parent)
    assert done.returncode == 3 and done.stderr.strip().splitlines()[-1].startswith(f"error: {file} is protected")
