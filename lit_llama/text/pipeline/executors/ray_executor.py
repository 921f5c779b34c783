"""Executor of Ray's tasks: the rows are read and written here, and encoded on all cores of a machine or a cluster."""

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, Queue
from typing import Self

from lit_llama.errors import ClusterError, ResourceError, UserError
from lit_llama.text.pipeline.encoder import Encoded
from lit_llama.text.pipeline.executors import ray_relay as relay
from lit_llama.text.pipeline.executors.blocks import Block
from lit_llama.text.pipeline.executors.ray_relay import DEFECT, ENCODED, LOST, READY, read_frame, write_frame
from lit_llama.text.pipeline.executors.recipe import Recipe
from lit_llama.wording import param, wording

_CONNECT, _START, _STOP = 10, 180, 30
"""Seconds to wait for a machine that is named, until Ray has started or was joined, and until it has ended."""
_AHEAD = 2
"""Blocks on their way for each core of the cluster: one is worked on, one waits for it."""
_Sent = Block | BaseException | None
"""A block that was sent, the error that ended the reading, or the end."""


class RayExecutor:
    """Executor of Ray's tasks, which are retried where their worker or machine ends.

    Args:
        recipe: Of the encoder, which each worker builds for itself.
        address: Cluster to join, as HOST:PORT or auto; None to start one on this machine, that ends with this.

    Raises:
        ResourceError: Ray is not installed.
        UserError: The address is none.
        ClusterError: There is no cluster at the address, or it does not start.
    """

    def __init__(self, recipe: Recipe, address: str | None = None) -> None:
        if find_spec("ray") is None:
            raise ResourceError(
                "needs Ray, which is not installed: pip install 'lit_llama[ray]'", parameter="executor", value="ray"
            )
        if address is not None and address != "auto":
            _reach(address)
        self._address = address
        root = str(Path(__file__).parents[4])  # of this very library, wherever it is
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                f"from {relay.__name__} import main; main()",
            ],  # its task is found by that name
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Ray keeps its logs in its folder
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is meant for this process
        )
        assert self._process.stdin and self._process.stdout
        self._to, self._from = self._process.stdin, self._process.stdout
        try:
            self._cores = self._begin(recipe)
        except BaseException:
            self._end(patience=1)  # it may wait for the cluster, and hear of nothing
            raise

    def _begin(self, recipe: Recipe) -> int:
        """Cores of the cluster, when it is there."""
        with contextlib.suppress(BrokenPipeError):
            write_frame(self._to, READY, pickle.dumps((self._address, recipe.key, recipe.written, wording())))
        where = param("ray_address", self._address) if self._address else "Ray on this machine"
        if not select.select([self._from], [], [], _START)[0]:
            raise ClusterError(f"{where} does not answer within {_START} s: see what `ray status` says")
        kind, content = read_frame(self._from) or (LOST, b"Ray gave up")
        if kind != READY:
            raise ClusterError(f"{where} cannot be used: {content.decode()}; {self._hint()}")
        cores = int(pickle.loads(content))
        if cores < 1:
            raise ClusterError(f"{where} has no core to work on: add a machine with `ray start --address`")
        return cores

    def _hint(self) -> str:
        """What to do about a cluster that cannot be used."""
        if self._address is None:
            return f"its logs are in /tmp/ray; {param('executor', 'local')} does without"
        if self._address == "auto":
            return f"start a cluster with `ray start --head`, or leave {param('ray_address')} out"
        return "it has to be of the same versions of Ray and Python, and may ask for a token: see docs/prepare.md"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def encode(self, blocks: Iterator[Block]) -> Iterator[tuple[Block, Encoded]]:
        """Encode each block into the samples that it comes to, a bounded number of them at a time.

        Raises:
            UserError: What `Encoder` says of a row.
            ClusterError: The cluster was lost, or the workers of one block ended again and again.
        """
        # A thread reads and sends, this one receives: then an interrupt meets nothing that cannot be left at once.
        sent: Queue[_Sent] = Queue(_AHEAD * self._cores)
        ended = threading.Event()
        sender = threading.Thread(target=self._send, args=(blocks, sent, ended), daemon=True)
        sender.start()
        try:
            while (block := sent.get()) is not None:
                if isinstance(block, BaseException):
                    raise block
                yield block, self._receive(block)
        finally:
            ended.set()
            with contextlib.suppress(Empty):
                while True:  # the sender may wait for a place
                    sent.get_nowait()
            sender.join(_STOP)

    def _send(
        self, blocks: Iterator[Block], sent: "Queue[Block | BaseException | None]", ended: threading.Event
    ) -> None:
        """Read blocks and send them, in order."""
        try:
            for block in blocks:
                sent.put(block)
                if ended.is_set():
                    return
                with contextlib.suppress(BrokenPipeError):  # who receives tells of it
                    write_frame(self._to, ENCODED, pickle.dumps(block.conversations))
            sent.put(None)
        except BaseException as error:  # of a row that cannot be read, in its turn
            sent.put(error)

    def _receive(self, block: Block) -> Encoded:
        kind, content = read_frame(self._from) or (LOST, b"")
        if kind == ENCODED:
            found = pickle.loads(content)
            if isinstance(found, UserError):
                raise found
            encoded: Encoded = found.unpacked(block.conversations)
            return encoded
        if kind == DEFECT:
            raise RuntimeError(content.decode())
        which = param("ray_address", self._address) if self._address else "on this machine"
        if not content:
            raise ClusterError(
                f"the Ray cluster ({which}) was lost while rows were encoded; nothing was written: run the same "
                f"command again when it is back, or with {param('executor', 'local')}"
            )
        rows = f"{block.conversations[0].where} to {block.conversations[-1].where}" if block.conversations else "none"
        raise ClusterError(
            f"the Ray cluster ({which}) could not encode the rows from {rows}: {content.decode()}; nothing was written"
        )

    def _end(self, patience: float = _STOP) -> None:
        """End the relay, which ends the cluster that it has started; after so many seconds by force."""
        with contextlib.suppress(OSError):
            self._to.close()
        number, last = self._process.pid, time.monotonic() + patience
        try:
            while time.monotonic() < last and not os.waitid(os.P_PID, number, os.WEXITED | os.WNOWAIT | os.WNOHANG):
                time.sleep(0.02)
        finally:
            # What a lost cluster left is of the relay's group, whose number is nobody else's until it is waited for.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(number, signal.SIGKILL)
            self._process.wait()
            self._from.close()


def _reach(address: str) -> None:
    """Check that something answers at an address."""
    host, colon, port = address.rpartition(":")
    if "://" in address or not (colon and host and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(
            parameter="ray_address",
            value=address,
            expected="HOST:PORT of the head, or auto: run this on a machine of the cluster",
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT).close()
    except OSError as error:
        raise ClusterError(
            f"{param('ray_address', address)} cannot be reached ({error.strerror or error}): see what `ray status` "
            "says there"
        ) from error
