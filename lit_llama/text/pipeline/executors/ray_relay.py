"""Relay to Ray: a process between the one that prepares and a cluster, and the task that encodes a block there.

Ray belongs into a process of its own: it takes over signals, reads the environment, and ends the process that uses it
when its cluster is lost. Here that is the relay, and who waits for it can tell, clear away what is half made, and end.

Both talk in frames on the relay's standard streams: 8 bytes of length, one that says what it is, and the contents.
"""

import contextlib
import os
import pickle
import secrets
import struct
import sys
import threading
from dataclasses import dataclass, replace
from queue import Queue
from typing import IO, Any

from lit_llama.errors import ResourceError, UserError
from lit_llama.text.dataset.writer import Samples
from lit_llama.text.message import Conversation, Dropped, Message
from lit_llama.text.pipeline.encoder import Encoded, Encoder
from lit_llama.text.pipeline.render import Note
from lit_llama.wording import word_as

READY, ENCODED, LOST, DEFECT = b"r", b"e", b"l", b"d"
"""What comes back: the cores of the cluster, the answer to a block, the loss of cluster or block, our own mistake."""
_HEAD = struct.Struct("<Qc")
_TRIES = 4  # of a block, whose worker may end each time
_RECONNECT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "15"}
"""Seconds after which a head that does not answer any more is given up."""


def write_frame(stream: IO[bytes], kind: bytes, content: bytes) -> None:
    """Write one frame."""
    stream.write(_HEAD.pack(len(content), kind))
    stream.write(content)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[bytes, bytes] | None:
    """Read one frame: what it is, and its contents; None at the end of the stream, also in the middle of a frame."""
    head = stream.read(_HEAD.size)
    if len(head) < _HEAD.size:
        return None
    size, kind = _HEAD.unpack(head)
    content = stream.read(size)
    return (kind, content) if len(content) == size else None


@dataclass(frozen=True)
class Packed:
    """Samples that an encoder made of a block, without what the sender of the block has.

    Args:
        batch: Ids and labels.
        rows: Row of each sample.
        changed: Messages of those samples that are not what their row is, by the number of the sample.
        cut, parts, dropped, notes: As in Encoded.
    """

    batch: Samples
    rows: list[int]
    changed: dict[int, tuple[Message, ...]]
    cut: list[int]
    parts: list[int]
    dropped: list[Dropped]
    notes: dict[Note, list[int]]

    @classmethod
    def of(cls, conversations: list[Conversation], encoded: Encoded) -> "Packed":
        """Pack what was made of some conversations."""
        whole = {conversation.row: conversation for conversation in conversations}
        changed = {
            number: made.messages for number, made in enumerate(encoded.conversations) if made is not whole[made.row]
        }
        rows = [made.row for made in encoded.conversations]
        return cls(encoded.batch, rows, changed, encoded.cut, encoded.parts, encoded.dropped, encoded.notes)

    def unpacked(self, conversations: list[Conversation]) -> Encoded:
        """Make what the encoder gave, with the conversations that were sent."""
        whole = {conversation.row: conversation for conversation in conversations}
        made = [whole[row] for row in self.rows]
        for number, messages in self.changed.items():
            made[number] = replace(made[number], messages=messages)
        return Encoded(self.batch, made, self.cut, self.parts, self.dropped, self.notes)


_encoders: dict[str, Encoder] = {}
"""In a worker of Ray, the encoder of the run that it works for."""


def encode_block(key: str, recipe: list[Any], block: bytes) -> bytes:
    """Encode the conversations of one block, in a worker.

    Args:
        key: Of the recipe.
        recipe: Reference to it, in a list so that Ray brings it only where it is asked for, and how errors name things.
        block: The conversations, pickled.

    Returns:
        Packed, or the UserError that the encoder raised, pickled.
    """
    word_as(recipe[1])
    try:
        if key not in _encoders:
            import ray

            # Each worker has one core, and Rust's libraries begin a thread for each of the machine.
            os.environ.setdefault("RAYON_NUM_THREADS", "1")
            _encoders.clear()
            _encoders[key] = pickle.loads(ray.get(recipe[0])).encoder()
        conversations, encoder = pickle.loads(block), _encoders[key]
        return pickle.dumps(Packed.of(conversations, encoder.encode(encoder.render(conversations))))
    except UserError as error:
        return pickle.dumps(error)
    except MemoryError:
        return pickle.dumps(ResourceError("memory ran out on a machine of the cluster, which encoded a block of rows"))


def main() -> None:
    """Return in order what a cluster makes of blocks, until standard input ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints
    os.environ |= _RECONNECT | {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1"}
    first = read_frame(sys.stdin.buffer)
    if first is None:
        return
    address, key, recipe, named = pickle.loads(first[1])
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    here = {} if address else {"num_cpus": len(os.sched_getaffinity(0))}
    if not address and not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        # Nobody else may use a cluster of our own; Ray would put such a word into the home folder, for all clusters.
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    try:
        ray.init(address=address or "local", **quiet, **here)
        cores = int(ray.cluster_resources().get("CPU", 0))
        recipe = [ray.put(recipe), named]
        work = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(encode_block)
        write_frame(out, READY, pickle.dumps(cores))
    except Exception as error:  # Ray raises errors of many kinds, also plain ones
        write_frame(out, LOST, _line(error).encode())
        return
    waiting: Queue[Any] = Queue()
    answers = threading.Thread(target=_answer, args=(waiting, out), daemon=True)
    answers.start()
    with contextlib.suppress(Exception):  # the answers tell of a cluster that is lost
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            waiting.put(work.remote(key, recipe, frame[1]))
    waiting.put(None)
    # What is still worked on then is wanted by nobody.
    with contextlib.suppress(Exception):
        ray.shutdown()
    out.close()
    os._exit(0)


def _answer(waiting: "Queue[Any]", out: IO[bytes]) -> None:
    """Write what comes of each block, in their order."""
    import ray

    with contextlib.suppress(OSError):  # nobody listens any more
        for reference in iter(waiting.get, None):
            try:
                write_frame(out, ENCODED, ray.get(reference))
            except ray.exceptions.RayTaskError as error:
                if "failed to import" in str(error):
                    write_frame(out, LOST, b"a machine of the cluster has not this version of lit_llama installed")
                else:
                    write_frame(out, DEFECT, str(error).encode())
            except OSError:
                raise
            except Exception as error:
                write_frame(out, LOST, _line(error).encode())


def _line(error: Exception) -> str:
    """The first line of what an error says."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
