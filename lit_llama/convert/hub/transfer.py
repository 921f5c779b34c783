"""Transfer of one file from the Hub, through the client that huggingface_hub gives to other libraries.

Its own hf_hub_download starts a file again after an interruption, and its HfFileSystem keeps whole blocks only. Here
all that arrived stays, and only what is missing is asked for, in the next attempt as in the next run.
"""

import time
from collections.abc import Callable
from typing import BinaryIO

import httpx2
import huggingface_hub
from huggingface_hub import constants, get_session, get_token
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # loaded when asked for
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from lit_llama.console import harmless
from lit_llama.errors import ResourceError
from lit_llama.progress import bar, stderr

_BROKEN = (httpx2.NetworkError, httpx2.TimeoutException, httpx2.RemoteProtocolError)
_LATER = (408, 429)  # statuses that ask for patience
_ATTEMPTS = 5  # in a row that bring nothing
_LONGEST = 300.0  # seconds to wait, as the Hub counts requests by five minutes


class _Later(Exception):
    """An answer that asks to come again after some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def transfer(url: str, output: BinaryIO, size: int, name: str) -> None:
    """Append what is missing of a file, with a bar on a terminal.

    Args:
        url: Of the file on the Hub, or of any place that it sends to.
        output: Opened for appending; it holds the first bytes of the file already.
        size: Of the whole file, in bytes.
        name: For the bar.

    Raises:
        HfHubHTTPError: The Hub refuses.
        HTTPError: The network does not do, after several attempts.
        ResourceError: The contents are of another size.
    """
    fruitless, told = 0, False
    with bar(stderr(), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task(harmless(name), total=size, completed=output.tell())
        while (before := output.tell()) < size:
            seconds = 1.0
            try:
                _receive(url, output, size, lambda: progress.update(task, completed=output.tell()))
                problem: Exception = ResourceError(f"{name} did not arrive whole: run the same command again")
            except _BROKEN as error:
                problem = error
            except _Later as error:
                seconds = error.seconds
                problem = ResourceError(
                    f"{name}: the Hub answers fewer requests than are made; run the same command later"
                )
            fruitless = 0 if output.tell() > before else fruitless + 1
            if output.tell() == size:
                break
            if fruitless > _ATTEMPTS:
                raise problem
            if not told:
                place = httpx2.URL(url)
                there = f"{place.scheme}://{place.netloc.decode()}"
                progress.console.print(f"{there} does not answer as it should, trying again ...")
                told = True
            time.sleep(seconds)


def _receive(url: str, output: BinaryIO, size: int, moved: Callable[[], object]) -> None:
    """Append what one answer brings."""
    start = output.tell()
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", url, headers=_headers(start), timeout=timeout, follow_redirects=True) as response:
        if response.status_code in _LATER:
            wanted = response.headers.get("Retry-After", "")
            raise _Later(min(float(wanted), _LONGEST) if wanted.isdecimal() else 1.0)
        if response.is_error:
            response.read()  # which says why
        hf_raise_for_status(response)
        if start and response.status_code != 206:  # all of it comes again
            output.seek(0)
            output.truncate()
        elif start and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise httpx2.RemoteProtocolError(f"bytes from {start} on were asked for, others came")
        for chunk in response.iter_bytes():
            if output.tell() + len(chunk) > size:
                raise ResourceError(f"{url} sends more than {size:,} bytes: is it the Hub, or a page of a proxy?")
            output.write(chunk)
            moved()


def _headers(start: int) -> dict[str, str]:
    """Headers of a request for the bytes from `start` on, as they are, so that they can be counted."""
    headers = {"Accept-Encoding": "identity", "User-Agent": f"lit_llama; hf_hub/{huggingface_hub.__version__}"}
    if start:
        headers["Range"] = f"bytes={start}-"
    if not constants.HF_HUB_DISABLE_IMPLICIT_TOKEN and (token := get_token()):
        headers["Authorization"] = f"Bearer {token}"  # the client keeps it from other hosts that it is sent to
    return headers
