"""From a raw file to a data folder: every row accounted for, the same bytes twice, and all or nothing on disk."""

import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest

from lit_llama.errors import CheckpointError, DataError, ResourceError
from lit_llama.folder import publish as folder_module
from lit_llama.folder.manifest import sha256_file
from lit_llama.text.config import PrepareConfig
from lit_llama.text.dataset.folder import Split, read_meta
from lit_llama.text.dataset.split import shuffle_split
from lit_llama.text.message import IGNORE_INDEX
from lit_llama.text.pipeline import alpaca
from lit_llama.text.pipeline import prepare as prepare_module
from lit_llama.text.pipeline.alpaca import DATA_FILE, find_or_download, prepare_alpaca
from lit_llama.text.prompts.encode import folder_style, named_style
from lit_llama.text.tokenizer.base import Tokenizer

Rows = list[dict[str, str]]
WriteRows = Callable[[Rows], Path]
ROWS: Rows = [
    {"instruction": f"Say {n}.", "input": "in words 😀" if n % 3 else "", "output": f"it is {n}"} for n in range(40)
]
EMPTY, LONG = (4, 17), (9, 30)
for number in EMPTY:
    ROWS[number]["output"] = " "
for number in LONG:
    ROWS[number]["output"] = "words and words " * 20


@pytest.fixture
def prepare(tiny_folder: Path) -> Callable[..., dict[str, Any]]:
    """prepare_alpaca with small defaults."""

    def run(folder: Path, **changes: Any) -> dict[str, Any]:
        name = changes.pop("data_file_name", "rows.json")
        settings: dict[str, Any] = {"tokenizer_path": tiny_folder, "prompt_style": "alpaca", "split": "shuffle"}
        settings |= {"test_split_size": 8, "max_seq_length": 200} | changes
        return prepare_alpaca(PrepareConfig(destination_path=folder, **settings), name)

    return run


Prepare = Callable[..., dict[str, Any]]


def places(folder: Path, rows: Iterable[int]) -> list[str]:
    """What rows are called."""
    return [f"{folder / 'rows.json'}:row {row}" for row in rows]


def tallies(found: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """What meta.json says of rows by reason."""
    return {reason: {"rows": len(places), "first": places} for reason, places in found.items()}


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_row_is_accounted_for(prepare: Prepare, alpaca_rows: WriteRows, tiny_folder: Path) -> None:
    """Catches rows lost between the file and the splits, and counts that are not those of the folder."""
    folder = alpaca_rows(ROWS)
    meta = prepare(folder)
    assert meta == read_meta(folder)
    wanted = {"empty output": places(folder, EMPTY), "longer than 200 tokens": places(folder, LONG)}
    assert meta["dropped"] == tallies(wanted)
    assert (meta["source"]["rows"], meta["kept"], meta["cut"]) == (40, 36, {"rows": 0, "first": []})
    for name in ("train", "test"):
        split, counts = Split(folder, name), meta["splits"][name]
        assert counts["rows"] == len(split)
        assert counts["tokens"] == split.lengths.sum() and counts["longest"] == split.lengths.max() <= 200
        assert counts["trained_tokens"] == split.trained_tokens()
    assert sum(counts["rows"] for counts in meta["splits"].values()) == meta["kept"]


def test_meta_tells_how_the_folder_was_made(prepare: Prepare, alpaca_rows: WriteRows, tiny_folder: Path) -> None:
    """Catches anything that a later step would have to ask for again."""
    folder = alpaca_rows(ROWS)
    meta = prepare(folder, prompt_style="chatml", mask_inputs=False, seed=3, max_seq_length=150)
    tokenizer = Tokenizer.from_path(tiny_folder)
    raw = folder / "rows.json"
    files = [{"path": str(raw), "sha256": sha256_file(raw), "rows": 40}]
    assert meta["source"] == {"file": str(raw), "files": files, "rows": 40} and meta["schemas"] == {"Alpaca": 40}
    assert meta["tokenizer"] == {"fingerprint": tokenizer.fingerprint(), "size": 384, "path": str(tiny_folder)}
    wanted = {
        "prompt_style": "chatml",
        "mask_inputs": False,
        "seed": 3,
        "max_seq_length": 150,
        "overflow": "drop",
        "test_split_size": 8,
    }
    assert wanted.items() <= meta.items()
    assert folder_style(folder) == named_style("chatml")


def test_the_splits_hold_the_rows_that_were_drawn_in_that_order(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches a split of the kept rows, so that another max_seq_length exchanges test rows, and a wrong answer."""
    folder = alpaca_rows(ROWS)
    prepare(folder)
    tokenizer = Tokenizer.from_path(Path(read_meta(folder)["tokenizer"]["path"]))
    for name, order in zip(("train", "test"), shuffle_split(40, 8, 42), strict=True):
        split = Split(folder, name)
        answers = [[i for i in split[row][1].tolist() if i != IGNORE_INDEX] for row in range(len(split))]
        wanted = [ROWS[row]["output"] for row in order if row not in EMPTY + LONG]
        assert [tokenizer.decode(ids) for ids in answers] == wanted
    held_out = [row for row in shuffle_split(40, 8, 42)[1] if row not in EMPTY + LONG]
    lines = (folder / "test.jsonl").read_bytes().decode().rstrip("\n").split("\n")
    assert [json.loads(line) for line in lines] == [ROWS[row] for row in held_out]


def test_datasets_opens_the_folder(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches files of ours in the folder that other programs stumble over."""
    folder = alpaca_rows(ROWS)
    meta = prepare(folder)
    opened = datasets.load_from_disk(str(folder))
    assert {name: len(opened[name]) for name in opened} == {n: c["rows"] for n, c in meta["splits"].items()}


def test_cut_answers_are_counted(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches answers that are shortened in silence."""
    folder = alpaca_rows(ROWS)
    meta = prepare(folder, overflow="truncate_response")
    assert {"cut": meta["cut"]} == tallies({"cut": places(folder, LONG)}) and meta["kept"] == 38
    assert meta["dropped"] == tallies({"empty output": places(folder, EMPTY)})
    assert max(counts["longest"] for counts in meta["splits"].values()) == 200


def test_all_rows_and_reasons_are_shown(
    prepare: Prepare, alpaca_rows: WriteRows, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a loss that stands only in a file nobody opens; and talk on stdout."""
    folder = alpaca_rows(ROWS)
    prepare(folder)
    out, err = capsys.readouterr()
    assert out == "" and "40 rows = 36 kept (of them 0 cut) + 4 dropped" in err
    assert "empty output: 2 (row 4, row 17;" in err and "longer than 200 tokens: 2 (row 9, row 30;" in err


def test_twice_gives_the_same_bytes_and_leaves_the_raw_file(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches a clock, a random fingerprint, an order of a set, and a raw file that is moved or rewritten."""
    folder = alpaca_rows(ROWS)
    raw = (folder / "rows.json").read_bytes()
    prepare(folder)
    first = contents(folder)
    assert set(first) >= {"meta.json", "test.jsonl", "chat_template.jinja", "dataset_dict.json", "rows.json"}
    prepare(folder)
    assert contents(folder) == first and first["rows.json"] == raw
    assert [path.name for path in folder.parent.iterdir()] == ["data"], "nothing is left beside it"


def test_another_seed_replaces_the_whole_folder(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches an ignored seed, and files of the older result that stay among the new ones."""
    folder = alpaca_rows(ROWS)
    prepare(folder)
    before = contents(folder)
    (folder / "train" / "data-00001-of-00002.arrow").write_bytes(b"of an older, larger result")
    (folder / "notes.txt").write_text("mine")
    prepare(folder, seed=43)
    after = contents(folder)
    assert set(after) == {*before, "notes.txt"}
    same = {name for name in before if before[name] == after[name]}
    assert same & {"test.jsonl", "meta.json", "train/data-00000-of-00001.arrow"} == set()


def test_test_rows_that_stand_in_train_are_counted(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches a test loss that flatters without a word: duplicates planted on both sides of the split."""
    rows = [dict(row) for row in ROWS]
    train, test = shuffle_split(40, 8, 42)
    test = [row for row in test if row not in EMPTY + LONG]
    for row in test[:2]:
        rows[row] = dict(rows[next(other for other in train if other not in EMPTY + LONG)])
    assert prepare(alpaca_rows(rows))["test_rows_also_in_train"] == 2
    assert prepare(alpaca_rows(ROWS))["test_rows_also_in_train"] == 0


def test_fewer_rows_than_lit_llama_held_out(prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches documented commands that fail on 1000 rows, and nearly all rows held out of 2100."""
    folder = alpaca_rows(ROWS[:3] + ROWS[5:9])
    meta = prepare(folder, test_split_size=None)
    assert {name: counts["rows"] for name, counts in meta["splits"].items()} == {"train": 6, "test": 1}
    assert "1 of 7 rows are for testing, not the usual 2000" in meta["remarks"][0]
    with pytest.raises(DataError, match=r"is 2000, but there are 7 rows: expected 1 to 6, .* or 0 to train on all"):
        prepare(folder, test_split_size=2000)


def test_chats_are_sent_to_their_own_door(
    prepare: Prepare, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches Alpaca downloaded into a folder of chats, and a chat refused without a word on what takes it."""
    folder = tmp_path / "my chats"
    folder.mkdir()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": turns, "n": n}) + "\n" for n in range(9)))
    with pytest.raises(DataError, match=r"records.py --source '.*/my chats/chats.jsonl'"):
        prepare(folder, data_file_name=DATA_FILE)
    with pytest.raises(DataError, match=r"is a file, expected the folder .*records.py --source '.*chats.jsonl'"):
        prepare(folder / "chats.jsonl")
    prepare(folder, data_file_name="chats.jsonl", test_split_size=2)
    assert "holds chats; prepare/alpaca.py is for single instructions" in " ".join(capsys.readouterr().err.split())
    (folder / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "dancer", "content": "a"}]}))
    with pytest.raises(DataError, match=r"unknown role 'dancer'.* holds chats; .* python prepare/records.py --source"):
        prepare(folder, data_file_name="chats.jsonl", test_split_size=2)


# All or nothing

FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "test split too large": ({"test_split_size": 40}, "--test_split_size is 40, but there are 40 rows"),
    "nothing fits": (
        {"max_seq_length": 20},
        "no row of the train split is usable: .* 38 longer than 20 tokens",
    ),
    "no room": ({"max_seq_length": 2}, "--max_seq_length is 2, expected 3 or more"),
    "too long": ({"overflow": "error"}, "row 9 has [0-9]+ tokens"),
    "no tokenizer": ({"tokenizer_path": Path("nowhere.model")}, "nowhere.model does not exist"),
    "mistyped file": ({"data_file_name": "row.json"}, "row.json does not exist; put the data there"),
    "bad row": ({"data_file_name": "bad.json"}, "bad.json:row 1: no schema fits the fields instruction"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_changes_nothing_on_disk(name: str, prepare: Prepare, alpaca_rows: WriteRows) -> None:
    """Catches half a result, and an older result that is destroyed by a mistyped flag."""
    changes, message = FAILURES[name]
    folder = alpaca_rows(ROWS)
    (folder / "bad.json").write_text(json.dumps([ROWS[0], {"instruction": "a"}]))
    fresh = contents(folder.parent)
    with pytest.raises((DataError, CheckpointError), match=message):
        prepare(folder, **changes)
    assert contents(folder.parent) == fresh
    prepare(folder)
    whole = contents(folder.parent)
    with pytest.raises((DataError, CheckpointError), match=message):
        prepare(folder, **changes)
    assert contents(folder.parent) == whole


@pytest.mark.parametrize("broken", ["write_report", "raw_row", "write_json"])
def test_an_interrupted_write_leaves_the_older_result(
    broken: str, prepare: Prepare, alpaca_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches writing into the folder itself: a full disk or Ctrl-C would spoil what was there."""
    folder = alpaca_rows(ROWS)
    prepare(folder)
    whole = contents(folder.parent)

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_module, broken, fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(folder, seed=43)
    assert contents(folder.parent) == whole


def test_an_interrupted_move_leaves_nothing_that_looks_whole(
    prepare: Prepare, alpaca_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches new rows beside the meta.json of old ones: at every rename the folder is whole or says it is not."""
    move, moved, allowed = folder_module._move, [], 0

    def failing(source: Path, target: Path) -> None:
        if len(moved) == allowed:
            raise OSError("power is gone")
        move(source, target)
        moved.append(target.name)

    folder = alpaca_rows(ROWS)
    prepare(folder)
    monkeypatch.setattr(folder_module, "_move", failing)
    for allowed in range(6):  # noqa: B007, failing reads it
        moved.clear()
        with pytest.raises(OSError, match="power is gone"):
            prepare(folder, seed=43)
        assert "meta.json" not in moved
        with pytest.raises(DataError, match="is no finished data folder"):
            read_meta(folder)
        assert (folder / "rows.json").is_file() and [path.name for path in folder.parent.iterdir()] == ["data"]
    monkeypatch.setattr(folder_module, "_move", move)
    assert prepare(folder, seed=43) == read_meta(folder)


# Download


class Server:
    """A file on 127.0.0.1, and how the answer is broken."""

    def __init__(self) -> None:
        self.body = json.dumps(ROWS).encode()
        self.status, self.length, self.requests = 200, len(self.body), 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests += 1
                self.send_response(outer.status)
                if outer.length >= 0:
                    self.send_header("Content-Length", str(outer.length))
                self.end_headers()
                self.wfile.write(outer.body)

            def log_message(self, *_: object) -> None:
                pass

        self.http = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/{DATA_FILE}"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The address of the published file, on this machine."""
    found = Server()
    thread = threading.Thread(target=found.http.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(alpaca, "URL", found.url)
    yield found
    found.http.shutdown()
    thread.join()
    found.http.server_close()


@pytest.mark.parametrize("sized", [True, False])
def test_the_published_file_is_downloaded_once(sized: bool, server: Server, prepare: Prepare, tmp_path: Path) -> None:
    """Catches a changed byte, a second download, and a server (or proxy) that does not tell the size."""
    server.length = server.length if sized else -1
    folder = tmp_path / "new" / "data"
    meta = prepare(folder, data_file_name=DATA_FILE)
    assert (folder / DATA_FILE).read_bytes() == server.body and meta["source"]["rows"] == 40
    prepare(folder, data_file_name=DATA_FILE)
    assert server.requests == 1


@pytest.mark.parametrize("broken", ["truncated", "not found", "refused"])
def test_a_failed_download_says_what_to_put_where(
    broken: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches half a file that passes as the data set the next time, and a machine without network left helpless."""
    if broken == "truncated":
        server.length += 100
    elif broken == "not found":
        server.status = 404
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setattr(alpaca, "URL", f"http://127.0.0.1:{free.getsockname()[1]}/{DATA_FILE}")
    with pytest.raises(ResourceError) as caught:
        find_or_download(tmp_path, DATA_FILE)
    reason = {"truncated": "bytes arrived", "not found": "Not Found|Error", "refused": "refused"}[broken]
    assert caught.match(reason) and caught.match(alpaca.URL) and caught.match(f"put it at {tmp_path / DATA_FILE}")
    assert not list(tmp_path.iterdir())


def test_a_mistyped_name_never_downloads(server: Server, tmp_path: Path) -> None:
    """Catches 40 MB of the wrong data for a typo."""
    with pytest.raises(DataError, match="does not exist; put the data there, or name another file"):
        find_or_download(tmp_path, "alpaca_data_cleaned.json")
    assert server.requests == 0 and not list(tmp_path.iterdir())
