"""Sources and bytes: what stands at a path is found, unpacked and named for what it is."""

import gzip
import io
import os
import re
from pathlib import Path

import pyarrow as pa
import pytest

from lit_llama.errors import DataError, UserError
from lit_llama.text.read.formats import files
from lit_llama.text.read.formats.files import Dialect, decoded, open_bytes
from lit_llama.text.read.formats.paths import expand, unchanged


def read(path: Path) -> str:
    """The whole text of a file."""
    with open_bytes(path) as stream:
        return "".join(decoded(stream, path))


def refused(path: Path) -> str:
    """The message of the error, which always names the file and can be printed."""
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(path) in str(caught.value) and str(caught.value).encode()
    return str(caught.value)


def put(folder: Path, *names: str) -> None:
    """Files that hold something."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("[]")


def test_sources_come_to_files_in_a_fixed_order_and_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an order that depends on the file system, a file trained on twice, and hidden files taken for data."""
    put(tmp_path, "b.jsonl", "a.json", "sub/c.CSV", "sub/d.parquet", "sub/e.tsv.gz", "f.ndjson.zst")
    put(tmp_path, ".hidden.json", ".cache/x.json", "README.md", "notes.txt")
    monkeypatch.chdir(tmp_path)
    every = ["a.json", "b.jsonl", "f.ndjson.zst", "sub/c.CSV", "sub/d.parquet", "sub/e.tsv.gz"]
    assert [str(path) for path in expand(["."])] == every
    assert [str(path) for path in expand(["*.json*"])] == every[:2]
    assert [str(path) for path in expand(["sub", "b.jsonl", "*.json", "./b.jsonl", "."])] == [
        *every[3:], "b.jsonl", "a.json", "f.ndjson.zst"
    ]  # fmt: skip
    put(tmp_path, "odd[1].json")
    assert [str(path) for path in expand(["odd[1].json"])] == ["odd[1].json"]
    put(tmp_path, "dir[v2]/g.json", "dir[v2]/h.csv")
    assert [str(path) for path in expand(["dir[v2]/*.json"])] == ["dir[v2]/g.json"]
    assert [str(path) for path in expand(["dir[v2]"])] == ["dir[v2]/g.json", "dir[v2]/h.csv"]
    (tmp_path / "link.json").symlink_to("a.json")
    assert [str(path) for path in expand(["a.json", "link.json"])] == ["a.json"]
    assert [path.name for path in expand(["**/c.*"])] == ["c.CSV"]


def test_a_folder_may_hold_folders_of_the_datasets_library(tmp_path: Path) -> None:
    """Catches the library's own JSON files taken for rows, and a folder that holds itself."""
    put(tmp_path, "a.json", "two/dataset_dict.json", "two/train/state.json", "two/train/dataset_info.json")
    (tmp_path / "again").symlink_to(tmp_path)
    put(tmp_path, "one/state.json", "one/dataset_info.json", "one/data.arrow", "z/state.json")
    found = [path.relative_to(tmp_path).as_posix() for path in expand([str(tmp_path)])]
    assert found == ["a.json", "one", "two", "z/state.json"]


def test_files_that_describe_a_repository_are_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a cloned repository that stops at its first JSON file, and rows that are passed over in silence."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "dataset_infos.json", "data/train.jsonl", "data/package.json", "states/state.json")
    said: list[str] = []
    assert [str(path) for path in expand(["."], remark=said.append)] == ["data/train.jsonl", "states/state.json"]
    assert [remark.split(" is left out")[0] for remark in said] == ["data/package.json", "dataset_infos.json"]
    assert [str(path) for path in expand(["dataset_infos.json"])] == ["dataset_infos.json"]
    with pytest.raises(DataError, match=r"\*.json matches only dataset_infos.json and the like"):
        expand(["*.json"])


ENCODINGS = {"cp1252": "Grüße", "gbk": "你好，世界", "utf-16": "Grüße 你好", "iso2022_jp": "こんにちは", "utf-32": "é"}


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_other_encodings_are_read_as_asked_for(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches characters cut at the border of two blocks, a mark that becomes text, and another encoding in silence."""
    text = f'[{{"a": "{ENCODINGS[encoding]}"}}]\n' * 40
    (tmp_path / "a").write_bytes(text.encode(encoding))
    for block in (1, 3, 1 << 20):
        monkeypatch.setattr("lit_llama.text.read.formats.files.BLOCK", block)
        said: list[str] = []
        with open_bytes(tmp_path / "a") as stream:
            assert "".join(decoded(stream, tmp_path / "a", Dialect(encoding), said.append)) == text
        assert said and encoding[:5] in said[0]


def test_utf_8_stays_utf_8_whatever_is_asked_for(tmp_path: Path) -> None:
    """Catches "GrÃ¼ÃŸe" trained on, since one of several files needed --encoding."""
    path, said = tmp_path / "a", list[str]()
    path.write_text("Grüße " * 30, "utf-8")
    with open_bytes(path) as stream:
        assert "".join(decoded(stream, path, Dialect("cp1252"), said.append)) == "Grüße " * 30
    assert said == [f"{path} is read as UTF-8, which it is, and not as cp1252"]
    path.write_bytes(b"x" * 70 + b"\x81")
    with pytest.raises(DataError, match=r"is not cp1252: byte 0x81 at offset 70"), open_bytes(path) as stream:
        list(decoded(stream, path, Dialect("cp1252")))


@pytest.mark.parametrize(
    "wrong", [{"encoding": "cp99"}, {"encoding": "base64"}, {"encoding": "rot13"}, {"escape": ""}, {"escape": "ab"}]
)
def test_a_dialect_that_is_none_is_a_usage_error(wrong: dict[str, str]) -> None:
    """Catches a LookupError of codecs, and one of the csv module."""
    with pytest.raises(UserError, match=r"--e(ncoding|scape) is "):
        Dialect(**wrong)


def test_a_source_that_names_nothing_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a bare FileNotFoundError, an empty pattern that passes in silence, and a hang on a pipe."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "data/alpaca.json", "empty/README.md")
    (tmp_path / "loop.json").symlink_to("loop.json")
    (tmp_path / "dead.json").symlink_to("gone.json")
    os.mkfifo(tmp_path / "pipe.json")
    wanted = {
        "data/alpca.json": "data/alpca.json does not exist (working folder: {here}); the closest name is data/alpaca.j",
        "dat/alpaca.json": "dat/alpaca.json does not exist (working folder: {here}); the closest name is data",
        "zzz": "zzz does not exist (working folder: {here})",
        "data/alpca[1].json": "data/alpca[1].json does not exist (working folder: {here}); the closest name is data/al",
        "*.parquet": "*.parquet matches no file (working folder: {here})",
        "empty": "empty is a folder without data files (it holds README.md); expected JSON",
        "-": "'-' is no source: save the data to a file",
        "": "a source is empty",
        "a\0b": "is no source",
        "loop.json": "loop.json cannot be read: Too many levels of symbolic links",
        "dead.json": "dead.json is a link to gone.json, which does not exist",
        "pipe.json": "pipe.json is a pipe or a device",
        "n" * 300: "does not exist (working folder",
    }
    for source, message in wanted.items():
        with pytest.raises(DataError) as caught:
            expand([source])
        assert message.format(here=tmp_path) in str(caught.value)


NOT_DATA: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "empty inside gzip": (gzip.compress(b""), "is empty"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer, not the data; fetch"),
    "HTML page": (b"\n <!DOCTYPE HTML>\n<html>", "HTML page, not the data; download the raw file"),
    "HTML page behind a mark": (b"\xef\xbb\xbf<html lang=en>", "HTML page"),
    "HTML page in gzip": (gzip.compress(b"<!doctype html>"), "HTML page"),
    "failed download": (b"404: Not Found", "failed download"),
    "failed login": (b"Invalid username or password.", "log in"),
    "zip": (b"PK\x03\x04\x14", "a ZIP archive, or a workbook under a wrong name; unpack it"),
    "bzip2": (b"BZh91AY", "packed by bzip2"),
    "xz": (b"\xfd7zXZ\x00\x00", "packed by xz"),
    "Arrow": (b"ARROW1\0\0", "an Arrow file"),
    "gzip in gzip": (gzip.compress(gzip.compress(b"[]")), "is packed twice"),
    "gzip cut off": (gzip.compress(b"[1, 2, 3]" * 99)[:-9], "is packed, and damaged or cut off"),
    "gzip with a wrong sum": (gzip.compress(b"[1, 2]")[:-8] + b"\0" * 8, "damaged or cut off: CRC check failed"),
    "gzip and rubbish": (gzip.compress(b"[1, 2]") + b"rubbish", "damaged or cut off"),
    "gzip damaged": (b"\x1f\x8b\x08\0\0\0\0\0\0\xff\xff\xff\xff\xff", "damaged or cut off"),
    "zstd cut off": (pa.compress(b"[1, 2]" * 99, "zstd", asbytes=True)[:-4], "damaged or cut off: Truncated"),
    "zstd and rubbish": (pa.compress(b"[1, 2]", "zstd", asbytes=True) + b"rubbish", "damaged or cut off"),
    "cp1252": (
        '{"a": "café"}'.encode("cp1252"),
        "byte 0xe9 at offset 10; it may be CP1252.*--encoding cp1252.*iconv -f CP1252 -t UTF-8",
    ),
    "cp1252 with two in a row": ("Straße grüßt".encode("cp1252"), "it may be CP1252"),
    "GBK": ('{"a": "你好，世界"}'.encode("gbk"), "byte 0xc4 at offset 7; it may be GBK.*iconv -f GBK"),
    "UTF-16 cut off": ('{"a": "b"}'.encode("utf-16")[:-1], "is not utf-16-le: byte 0x7d at offset 20"),
    "UTF-16 without a mark": ('{"a": "b"}'.encode("utf-16-le"), "byte 0x00 at offset 1; it may be UTF-16"),
    "UTF-16, big end first": ('{"a": "b"}'.encode("utf-16-be"), "byte 0x00 at offset 0; it may be UTF-16"),
    "cut inside a character": ("é".encode()[:1], "byte 0xc3 at offset 0"),
    "behind a mark": (b"\xef\xbb\xbfab\xff", "byte 0xff at offset 5"),
    "surrogate": (b"ab\xed\xa0\x80", "byte 0xed at offset 2"),
}


@pytest.mark.parametrize("name", NOT_DATA)
def test_what_is_no_data_is_named_for_what_it_is(name: str, tmp_path: Path) -> None:
    """Catches a decoding error about an archive or a web page, and an encoding that is guessed in silence."""
    content, message = NOT_DATA[name]
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)
    refused(path)


def test_the_offset_of_a_wrong_byte_is_that_in_the_file(tmp_path: Path) -> None:
    """Catches offsets counted from the block that was read last, and good text before the byte that gets lost."""
    path = tmp_path / "long.txt"
    good = "a" * ((1 << 20) - 1) + "é" + "b" * 77  # a character on the border of two blocks
    path.write_bytes(good.encode() + b"\xff" + b"c" * 9)
    assert f"byte 0xff at offset {len(good.encode())};" in refused(path)
    got = ""
    with pytest.raises(DataError), open_bytes(path) as stream:
        for block in decoded(stream, path):
            got += block
    assert got == good


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_packed_text_is_unpacked_whatever_its_name(ending: str, tmp_path: Path) -> None:
    """Catches a packer recognised by its name only, members of a file that get lost, a mark left in the text."""
    text = "\ufeff[1]\r\n" + "北京 é\u2028" * 300_000
    raw = text.encode()
    half = len(raw) // 2
    for packed in (
        gzip.compress(raw),
        gzip.compress(raw[:1]) + gzip.compress(raw[1:half]) + gzip.compress(raw[half:]),
        pa.compress(raw, "zstd", asbytes=True),
        pa.compress(raw[:half], "zstd", asbytes=True) + pa.compress(raw[half:], "zstd", asbytes=True),
        raw,
    ):
        path = tmp_path / f"text.json{ending}"
        path.write_bytes(packed)
        assert read(path) == text[1:]


def test_a_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    """Catches a bare IsADirectoryError."""
    assert "is a folder, expected a file" in refused(tmp_path)
    assert "does not exist" in refused(tmp_path / "no.json")
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refused(tmp_path / "pipe")


def test_no_leave_to_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a PermissionError with a traceback."""
    path = tmp_path / "a.json"
    path.write_text("[]")

    def deny(*_: object, **__: object) -> io.BytesIO:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    assert refused(path) == f"{path} cannot be read: Permission denied"


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """Catches half of a file that is still being written or downloaded."""
    path = tmp_path / "a.json"
    path.write_text("[]")
    with unchanged(path):
        path.read_bytes()
    with pytest.raises(DataError, match=r"changed while it was read \(2 bytes before, 3 now\): wait"), unchanged(path):
        path.write_text("[1]")
    with pytest.raises(DataError, match="changed"), unchanged(path):
        os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="does not exist"), unchanged(path):
        path.unlink()


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_what_unpacks_without_end_is_refused(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is filled with rows out of a few bytes; text that is much alike is read."""
    monkeypatch.setattr(files, "FREE", 100_000)
    row = b'{"instruction": "a", "output": "b"}\n' * 20_000
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(gzip.compress(row, 9) if ending == ".gz" else pa.compress(row, "zstd", asbytes=True))
    monkeypatch.setattr(files, "RATIO", 50)
    assert re.search(r"unpacks to more than 1\d\d,\d{3} bytes, and has [\d,]+: it is packed to fill", refused(path))
    monkeypatch.setattr(files, "RATIO", 50_000)
    assert read(path) == row.decode()
