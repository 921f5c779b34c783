"""Servers that are compared: how each is started, and how it is waited for."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from lit_llama.errors import ResourceError

ROOT = Path(__file__).parent.parent.parent
_STARTS = 120.0


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: Its address.
        process: What runs it.
    """

    url: str
    process: subprocess.Popen[bytes]

    def memory(self, name: str) -> int:
        """Bytes as Linux counts them: VmHWM at most so far, RssAnon now, without what lies in files."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def command(name: str, checkpoint_dir: Path, gguf: Path | None, python: str, port: int, slots: int) -> list[str]:
    """Words that start a server.

    Args:
        name: "ours" or "llama-cpp-python".
        checkpoint_dir: The model.
        gguf: It for llama.cpp.
        python: The Python that has llama_cpp.server.
        port: To listen at.
        slots: Answers that ours makes together.

    Raises:
        ResourceError: There is no GGUF file.
    """
    if name == "ours":
        words = [sys.executable, ROOT / "generate" / "serve.py", "--checkpoint_dir", checkpoint_dir]
        return [*map(str, words), "--port", str(port), "--batch_size", str(slots)]
    if gguf is None:
        raise ResourceError("llama-cpp-python needs a GGUF file of the model: prepare/checkpoint.py --format gguf")
    # One request interrupts another unless told otherwise; threads as many as there are cores, as ours.
    threads = str(len(os.sched_getaffinity(0)))
    return [
        *(python, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(port), "--n_ctx", "2048"),
        *("--interrupt_requests", "False", "--n_threads", threads, "--n_threads_batch", threads),
    ]


@contextlib.contextmanager
def running(words: Sequence[str], port: int, log: Path) -> Iterator[Server]:
    """A server, from when it answers.

    Raises:
        ResourceError: It ends, or does not answer for two minutes.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait(url, process, log)
            yield Server(url, process)
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ResourceError(f"the server ended with status {process.returncode}, see {log}")
        with contextlib.suppress(httpx2.HTTPError):
            if httpx2.get(f"{url}/v1/models").status_code == 200:
                return
        time.sleep(0.1)
    raise ResourceError(f"the server did not answer within {_STARTS:g} s, see {log}")


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as made:
        port: int = made.getsockname()[1]
        return port
