"""Rows encoded by tasks of Ray: the folder of a single process to the last bit, whoever dies, and one line where the
cluster is lost. One cluster of two workers on this machine serves all tests here but those that end it.
"""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ALLOWED, ROOT, on_cores, write_tokenizer
from test_prepare import LONG, RULES, bytes_of

from lit_llama.errors import ClusterError, DataError, ResourceError, UserError
from lit_llama.text.config import PrepareConfig
from lit_llama.text.pipeline.executors import blocks, ray_executor
from lit_llama.text.pipeline.executors.ray_executor import RayExecutor
from lit_llama.text.pipeline.executors.recipe import Recipe
from lit_llama.text.pipeline.records import prepare_records

pytest.importorskip("ray", reason="Ray is not installed: pip install 'lit_llama[ray]'")
pytestmark = pytest.mark.timeout(300)

Make = Callable[..., dict[str, Any]]
ROWS = 16  # of a block


def row(number: int) -> dict[str, Any]:
    """Chats of many turns, long instructions, empty answers, nearly equal rows and exact twins."""
    if number % 7 == 3:
        return {"instruction": f"Question {number}", "output": " "}
    if number % 7 == 4:
        return {"instruction": f"Question {number // 20} about {LONG[:90]}", "input": LONG[:90], "output": "It is."}
    if number % 7 == 5:
        return {"instruction": f"Question {number // 20}", "output": LONG}
    if turn := number % 5:
        turns = [("user", f"Question {number}, {turn}"), ("assistant", f"answer {turn} ä")] * 6
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    return {"prompt": f"A story of {number // 40} words", "completion": LONG[: 20 + number % 9]}


def judged(number: int) -> dict[str, Any]:
    worse = f"Bad {number}" if number % 9 else "Good"
    return {"prompt": f"Question {number % 90}?", "chosen": "Good", "rejected": worse if number % 11 else LONG * 2}


def members(session: int) -> dict[int, str]:
    """Processes of a session that are alive, and their names."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        name, rest = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
        if int(rest[3]) == session and rest[0] != "Z":
            found[int(path.parent.name)] = name
    return found


class Cluster:
    """A head on this machine, as `ray start` makes it, with processes of its own."""

    def __init__(self, home: Path, workers: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        self._log = home / "log"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port"]
        command += [self.address.partition(":")[2], "--num-cpus", str(workers), "--include-dashboard=false"]
        command += ["--disable-usage-stats", "--object-store-memory=100000000"]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", int(self.address.partition(":")[2])), 1).close()
                break
            except OSError:
                assert self._process.poll() is None, self._log.read_text()
                time.sleep(0.1)

    def workers(self) -> list[int]:
        """Processes that are encoding."""
        return [number for number, name in members(self._process.pid).items() if "encode_b" in name]

    def kill(self) -> None:
        for number in members(self._process.pid):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()


@pytest.fixture(scope="module", autouse=True)
def all_cores() -> Iterator[None]:
    """For the dozen processes of a cluster, which counts its workers by them."""
    with on_cores(ALLOWED):
        yield


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:  # as whoever joins a cluster has it
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        found = Cluster(tmp_path_factory.mktemp("cluster"), 2)
        yield found
        found.kill()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """A data folder `data` of rows, anew each time."""
    monkeypatch.setattr(blocks, "ROWS", ROWS)

    def run(rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        rules = {"tokenizer_path": tokenizer, "prompt_style": "chatml"} | RULES | changes
        return prepare_records(PrepareConfig(source=str(path), destination_path=tmp_path / "data", **rules))

    return run


SETTINGS: dict[str, dict[str, Any]] = {
    "truncate_prompt": {"overflow": "truncate_prompt", "max_seq_length": 120, "split": "shuffle"},
    "preference": {"data_kind": "preference"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_the_folder_is_that_of_one_process_bit_for_bit(case: str, make: Make, cluster: Cluster, tmp_path: Path) -> None:
    """Catches a row lost or moved, blocks in the order in which they are done, and a cut text told as the whole."""
    rows = [(judged if case == "preference" else row)(number) for number in range(200)]
    meta = make(rows, **SETTINGS[case])
    single = bytes_of(tmp_path / "data")
    assert meta["dropped"] and (case == "preference" or meta["in_parts"] + meta["cut"]["rows"] > 20)
    assert make(rows, executor="ray", ray_address=cluster.address, **SETTINGS[case]) == meta
    found = bytes_of(tmp_path / "data")
    assert list(found) == list(single) and [name for name in found if found[name] != single[name]] == []


def test_workers_that_die_cost_their_blocks_again_and_nothing_else(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    """Catches a block that is lost with its worker, or comes twice, or out of its order."""
    rows, rules = [row(number) for number in range(1500)], {"overflow": "split", "max_seq_length": 120}
    meta = make(rows, **rules)
    single, killed = bytes_of(tmp_path / "data"), []
    done = threading.Event()

    def kill() -> None:
        while not done.wait(0.05) and len(killed) < 3:
            for number in cluster.workers()[:1]:
                os.kill(number, signal.SIGKILL)
                killed.append(number)
                done.wait(1)

    hunter = threading.Thread(target=kill)
    hunter.start()
    try:
        assert make(rows, executor="ray", ray_address=cluster.address, **rules) == meta
    finally:
        done.set()
        hunter.join()
    assert killed, "no worker was met at work"
    assert bytes_of(tmp_path / "data") == single


def test_an_error_of_a_row_leaves_no_folder_and_the_cluster_as_it_is(
    make: Make, cluster: Cluster, tmp_path: Path
) -> None:
    """Catches an error of a later block that hides the first, and half a folder; the tests below join again."""
    rows = [{"instruction": f"q{n}", "output": LONG if n in (70, 20) else "a"} for n in range(90)]
    with pytest.raises(DataError, match=r"line 21 has .* tokens, more than --max_seq_length 200"):
        make(rows, overflow="error", executor="ray", ray_address=cluster.address)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_few_blocks_are_on_their_way_and_errors_of_reading_come_in_their_turn(
    cluster: Cluster, tokenizer: Path, tmp_path: Path
) -> None:
    """Catches all rows in memory at once, where reading is quicker than the rest, and blocks lost before an error."""
    read = written = most = 0

    def reading() -> Iterator[blocks.Block]:
        nonlocal read, most
        for number in range(120):
            read += 1
            most = max(most, read - written)
            yield blocks.Block(number, [], [])
        raise DataError("line 121")

    config = PrepareConfig(destination_path=tmp_path / "d", tokenizer_path=tokenizer, prompt_style="chatml")
    with (
        RayExecutor(Recipe.of(config), cluster.address) as executor,
        pytest.raises(DataError, match="line 121"),
    ):
        for block, encoded in executor.encode(reading()):
            assert block.number == written and not encoded.conversations
            time.sleep(0.005)
            written += 1
    assert written == 120 and 2 <= most <= 2 * 2 + 3


def test_other_versions_on_a_machine_are_refused(tokenizer: Path) -> None:
    """Catches ids of two versions of a tokenizer in one folder."""
    recipe = Recipe.of(PrepareConfig(destination_path=Path("d"), tokenizer_path=tokenizer, prompt_style="chatml"))
    assert recipe.encoder().render([])
    wrong = {"packages": recipe.packages | {"tokenizers": "0.1"}}, {"packages": {"tokenizers": "0.1"}}, {"encoding": -1}
    said = r"has version [\d.]+ of [a-z ]+, expected (0\.1|-1) as on the machine that"
    for changes in wrong:
        with pytest.raises(UserError, match=said):
            replace(recipe, **changes).encoder()


def encoding(pid: int) -> bool:
    """Whether a session has a worker that encodes."""
    return any("encode_b" in name for name in members(pid).values())


def started(tmp_path: Path, tokenizer: Path, **options: Any) -> "subprocess.Popen[str]":
    """The door at work on a cluster of its own, when its workers encode."""
    rows = tmp_path / "many.jsonl"
    rows.write_text("".join(json.dumps(row(number)) + "\n" for number in range(60_000)))
    command = ["prepare/records.py", "--source", rows, "--tokenizer_path", tokenizer, "--prompt_style", "chatml"]
    command += ["--destination_path", tmp_path / "data", "--near_duplicates", 0, "--executor", "ray"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not any(map(encoding, relays(process.pid))):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.1)
    return process


def relays(pid: int) -> list[int]:
    """Processes that another has started."""
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()]


def gone(session: int) -> bool:
    """Whether a session ends within a minute: workers notice for themselves that nobody is there any more."""
    for _ in range(600):
        if not members(session):
            return True
        time.sleep(0.1)
    return False


def test_a_cluster_that_is_lost_is_one_line(tokenizer: Path, tmp_path: Path) -> None:
    """Catches Ray ending the command by itself, its logs on stderr, half a folder, and processes that are left."""
    process = started(tmp_path, tokenizer)
    (relay,) = [number for number in relays(process.pid) if encoding(number)]
    for number, name in members(relay).items():
        if name == "raylet":
            os.kill(number, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == ClusterError.exit_status == 69
    assert said.count("\n") == 1 and "the Ray cluster (on this machine) was lost while rows were encoded" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl"]
    assert gone(relay)


def test_ctrl_c_ends_all_of_it(tokenizer: Path, tmp_path: Path) -> None:
    """Catches a wait for workers that nobody needs, a traceback, and a cluster that is left behind."""
    process = started(tmp_path, tokenizer)
    (relay,) = [number for number in relays(process.pid) if encoding(number)]
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in said and said.count("\n") <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["many.jsonl"] and gone(relay)


def test_a_cluster_that_is_not_there_is_named(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wait without end, a traceback of Ray, and a folder of nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ClusterError, match=rf"--ray_address 127.0.0.1:{port} cannot be reached \(.*refused"):
        make([row(1)], executor="ray", ray_address=f"127.0.0.1:{port}")
    for address in ("ray://127.0.0.1:1", "host", "host:", ":6379", "host:99999"):
        with pytest.raises(UserError, match="expected HOST:PORT of the head, or auto"):
            make([row(1)], executor="ray", ray_address=address)
    with pytest.raises(UserError, match="--ray_address auto is for --executor ray"):
        make([row(1)], ray_address="auto")
    monkeypatch.setattr(ray_executor, "_START", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:  # which takes connections, and says nothing
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ClusterError, match=r"does not answer within 1 s|cannot be used"):
            make([row(1)], executor="ray", ray_address=address)
    with (
        monkeypatch.context() as changed,
        pytest.raises(ClusterError, match="auto cannot be used: Ray gave up; start a cl"),
    ):
        changed.setattr(sys, "executable", "/bin/false")  # Ray ends its process where the head does not answer
        make([row(1)], executor="ray", ray_address="auto")
    monkeypatch.setattr(ray_executor, "find_spec", lambda _: None)
    with pytest.raises(ResourceError, match=r"pip install 'lit_llama\[ray\]'"):
        make([row(1)], executor="ray")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
