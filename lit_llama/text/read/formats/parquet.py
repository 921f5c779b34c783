"""Parquet files are unpacked once in a bounded process, before they are read in this one.

Arrow's reader believes what a footer and page headers say: one wrong bit ends its process with an exception that nobody
catches, or takes whatever memory is named there, and a few bytes may stand for gigabytes of text. What the process has
unpacked within its bounds, row group after row group as it will be read here, is read here. The file imports nothing of
the library at its head, as that process runs it.
"""

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_llama.bounded import Bounded

BATCH = 500
"""Rows turned into objects at a time."""
_BUFFER = 1 << 20  # bytes read at a time of each column
_MEMORY = 2 << 30
_SECONDS, _RATE = 20.0, 4e6  # of the processor: for any file, and bytes of it for each second more
_SLACK = 100  # bytes by which old writers told too small a size of a column
_VALUE = 8  # bytes of Python's for a value, be it none


def batches(file: Any) -> Iterator[Any]:
    """Record batches of an open file; without buffers and threads Arrow is as fast, and holds no row group."""
    yield from file.iter_batches(BATCH, use_threads=False)


def open_parquet(path: Path) -> Any:
    """Open a file that `check_parquet` has passed."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER)


def check_parquet(path: Path, longest: int, most: int) -> None:
    """Have a file unpacked in a bounded process, once for each state of it.

    Args:
        path: The file.
        longest: Most bytes of a row.
        most: Bytes that the file may unpack to.

    Raises:
        DataError: It unpacks to more than any text does; the message names the row where there is one.
        ValueError: Arrow cannot read it.
    """
    status = path.stat()
    _check(str(path), longest, most, status.st_size, status.st_mtime_ns, status.st_ino)


@cache
def _check(path: str, longest: int, most: int, size: int, *_: int) -> None:
    from lit_llama.errors import DataError

    seconds = _SECONDS + size / _RATE
    request = {"path": os.path.abspath(path), "longest": longest, "most": most, "seconds": seconds}
    answer = _process().ask(json.dumps(request))
    if isinstance(answer, int):
        slow = answer == -signal.SIGVTALRM
        raise ValueError(
            f"unpacking it takes more than {seconds:.0f} s" if slow else f"its reader ended with status {answer}"
        )
    reply = json.loads(answer)
    if "refused" in reply:
        raise DataError(f"{path}{reply['refused']}")
    if "error" in reply:
        raise ValueError(reply["error"])


@cache
def _process() -> "Bounded":
    from lit_llama.bounded import Bounded

    return Bounded(Path(__file__))


class _Refused(Exception):
    """Why a file that can be read is not. The message goes behind its path."""


def _unpack(path: Path, longest: int, most: int) -> None:
    """Read all of a file and keep nothing."""
    size = path.stat().st_size
    with open_parquet(path) as file:
        metadata = file.metadata
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            for number in range(group.num_columns):
                _check_column(group.column(number), size)
        told = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        _check_size(max(told, metadata.num_rows), most, size)
        rows = unpacked = 0
        for batch in batches(file):
            held = _size(batch)
            if held > longest:
                for row in range(batch.num_rows):
                    if (found := _size(batch.slice(row, 1))) > longest:
                        raise _Refused(f":row {rows + row}: the row has {found:,} bytes, expected at most {longest:,}")
            rows += batch.num_rows
            unpacked += held
            _check_size(unpacked, most, size)


def _size(batch: Any) -> int:
    """Bytes of a batch, of which Python gets no fewer."""
    return sum(max(column.nbytes, _VALUE * _values(column)) for column in map(_decoded, batch.columns))


def _decoded(column: Any) -> Any:
    """The values behind the numbers of a dictionary."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


def _values(column: Any) -> int:
    """Values of a column, those of lists and structs counted one by one."""
    if not hasattr(column, "flatten"):
        return len(column)
    inner = [column.keys, column.items] if hasattr(column, "items") else column.flatten()  # of a map
    return len(column) + sum(map(_values, inner if isinstance(inner, list) else [inner]))


def _check_column(column: Any, size: int) -> None:
    """Raise ValueError unless a column lies within the file."""
    begins = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else 0]
    start, length = min(filter(None, begins), default=0), column.total_compressed_size  # no page stands at 0
    if start < 0 or length < 0 or start + length > size + _SLACK:
        raise ValueError(f"column {column.path_in_schema} does not fit into the file")


def _check_size(unpacked: int, most: int, size: int) -> None:
    if unpacked > most:
        raise _Refused(
            f" unpacks to more than {most:,} bytes, and has {size:,}: it is packed to fill the memory, and no text"
        )


def _answer(request: dict[str, Any]) -> dict[str, str]:
    try:
        _unpack(Path(request["path"]), request["longest"], request["most"])
        return {}
    except _Refused as error:
        return {"refused": str(error)}
    except MemoryError:  # Arrow's as well
        what = f"{_MEMORY >> 20:,} MB do not hold {BATCH} rows of it"
        return {"refused": f" cannot be unpacked: {what}; it is damaged, or packed to fill the memory"}
    except Exception as error:  # whatever Arrow and its codecs raise
        return {"error": (str(error).splitlines() or [type(error).__name__])[0][:500]}


def _main() -> None:
    """Answer until the input ends. A file that takes too long ends the process."""
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # the others reserve more than they use
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGVTALRM, signal.SIG_DFL)
    import pyarrow

    pyarrow.set_cpu_count(1)
    pyarrow.set_io_thread_count(1)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_VIRTUAL, request["seconds"])  # of this process alone: other work does not count
        reply = json.dumps(_answer(request))
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    _main()
