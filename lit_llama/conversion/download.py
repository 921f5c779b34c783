"""The Hub -> a folder in checkpoints/: only what is needed, gone on with after an interruption, checked.

Files come through the client that huggingface_hub gives to other libraries. Its own hf_hub_download starts a file again
after an interruption, and its HfFileSystem keeps whole blocks only. Here all that arrived stays, and only what is
missing is asked for, in the next attempt as in the next run.
"""

import contextlib
import errno
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import httpx2
import huggingface_hub
from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # loaded when asked for
from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from lit_llama.console import harmless
from lit_llama.conversion.gguf.scan import model_name
from lit_llama.conversion.hub import Choice, File, Repo, choose, explained, read_parts, read_repo
from lit_llama.conversion.native import open_folder
from lit_llama.conversion.source import META_FILE, SETTINGS_FILE
from lit_llama.errors import CheckpointError, IntegrityError, ResourceError, UserError
from lit_llama.folder.lock import reserve
from lit_llama.folder.manifest import write_manifest
from lit_llama.folder.place import remove_own
from lit_llama.folder.publish import check_destination, publish, write_json
from lit_llama.memory import amount, amounts
from lit_llama.model.adapters.peft_folder import CONFIG_FILE as ADAPTER_FILE
from lit_llama.model.config import LLaMAConfig
from lit_llama.model.files.checkpoint import check_no_delta
from lit_llama.model.places import describe_quantization, holds_fp8, of_sixteen_bits, repository
from lit_llama.objects import as_object, read_text
from lit_llama.progress import bar, reading, stderr
from lit_llama.text.prompts.encode import folder_style
from lit_llama.text.tokenizer.special import read_object
from lit_llama.wording import call, param

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


def download(
    repo_id: str,
    destination: Path | None = None,
    *,
    revision: str | None = None,
    file: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Make the folder `destination` out of a repository on the Hub, and say on stderr what to do next.

    Args:
        repo_id: OWNER/NAME.
        destination: Folder to make; None for checkpoints/NAME.
        revision: Branch, tag or commit; None for the main branch.
        file: A GGUF file of the repository, or a part of a GGUF model, of which all parts come.
        endpoint: Address of the Hub; None for HF_ENDPOINT or the public one.

    Returns:
        The folder.

    Raises:
        UserError: There is no such repository, revision or file, or no leave to read it.
        CheckpointError: The repository holds nothing that can be used.
        ResourceError: The network or the disk does not do.
        IntegrityError: A file arrived damaged.
    """
    if file is not None and not file.endswith(".gguf"):
        raise UserError(
            parameter="file",
            value=file,
            expected="the name of a GGUF file",
            remedy=f"a model folder needs no {param('file')}",
        )
    destination = destination or Path("checkpoints") / repo_id.rpartition("/")[2]
    for marker in (META_FILE, SETTINGS_FILE, ADAPTER_FILE):
        check_destination(destination, marker)
    with reserve(destination):
        _download(read_repo(repo_id, revision, endpoint), destination, file)
    return destination


def _download(repo: Repo, destination: Path, file: str | None) -> None:
    choice = choose(repo, file)
    with publish(destination, choice.marker, keep=True) as folder, _told(folder):
        files = choice.files
        if choice.weights.endswith(".index.json"):
            _fetch(repo, repo.files[choice.weights], folder)
            files += read_parts(repo, _part(folder, repo.files[choice.weights]), choice.weights)
        _check_space(files, folder, destination)
        _announce(repo, files, folder)
        hashes = _fetch_all(repo, files, folder)
        _tidy(repo, files, folder, hashes)
    size = sum(entry.size for entry in files)
    _say(f"{destination}: {len(files)} files, {amount(size)}, checked; {_advice(destination, choice)}")


def _say(text: str) -> None:
    stderr().print(text)  # names from the network may hold brackets


@contextlib.contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Whoever stops a download learns that nothing is lost."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        _say(f"what arrived stays in {folder}: run the same command again to go on")
        raise


def _part(folder: Path, file: File) -> Path:
    """Where a file grows. The name holds the hash of its contents, so another commit's file is never continued."""
    return folder / f"{file.name}.{(file.sha256 or file.blob_id or 'unknown')[:16]}.part"


def _present(files: Sequence[File], folder: Path) -> int:
    parts = (_part(folder, file) for file in files)
    return sum(part.stat().st_size for part in parts if part.is_file())


def _check_space(files: Sequence[File], folder: Path, destination: Path) -> None:
    needed = sum(file.size for file in files) - _present(files, folder)
    free = shutil.disk_usage(folder).free
    if needed > free:
        wanted, there = amounts(needed, free)
        raise ResourceError(
            f"{destination} needs {wanted} more, only {there} are free on its disk: free some, or name a "
            f"folder on another disk with {param('destination_path')}"
        )


def _announce(repo: Repo, files: Sequence[File], folder: Path) -> None:
    here = _present(files, folder)
    resumed = f", {amount(here)} of them already here" if here else ""
    size = sum(file.size for file in files)
    _say(f"{repo.repo_id} at {repo.commit[:12]}: {len(files)} files, {amount(size)}{resumed}")


def _fetch_all(repo: Repo, files: Sequence[File], folder: Path) -> dict[str, str]:
    """Bring the files in order; gives their sha256 by name."""
    hashes = {}
    for file in files:
        hashes[file.name] = _fetch(repo, file, folder)
        obstacle = _obstacle(_part(folder, file), Path(repo.repo_id)) if file.name == SETTINGS_FILE else None
        if obstacle and "(FP8)" not in obstacle:  # before the weights come
            _say(f"note: this project cannot use the model ({obstacle}); it is downloaded for other programs")
    return hashes


def _fetch(repo: Repo, file: File, folder: Path) -> str:
    """Bring one file, or what is missing of it, and check it.

    Returns:
        The sha256 of its contents.
    """
    part, named = _part(folder, file), folder / file.name
    if named.is_file():  # a run was killed while it gave the files their names
        named.replace(part)
    if part.is_file() and part.stat().st_size > file.size:
        part.unlink()
    url = hf_hub_url(repo.repo_id, file.path, revision=repo.commit, endpoint=repo.endpoint)
    try:
        with explained(repo.repo_id, repo.endpoint), part.open("ab") as output:
            transfer(url, output, file.size, file.name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(folder).free
            missing, there = amounts(file.size - part.stat().st_size, free)
            raise ResourceError(
                f"the disk of {part} is full: it needs {missing} more, {there} are free; free some and run the "
                "same command again, it goes on where it stopped"
            ) from error
        raise
    finally:
        if part.is_file() and not part.stat().st_size and file.size:
            part.unlink()
    return _verify(part, file, repo)


def _verify(path: Path, file: File, repo: Repo) -> str:
    """Compare the contents with the hash that the Hub names; gives their sha256."""
    sha256 = hashlib.sha256()
    git = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False)  # how Git names small files
    with path.open("rb") as opened, reading(opened, file.size, f"checking {file.name}") as source:
        while block := source.read(1 << 20):
            sha256.update(block)
            if file.blob_id:
                git.update(block)
    found = git.hexdigest() if file.blob_id else sha256.hexdigest()
    expected = file.blob_id or file.sha256 or found
    if found != expected:
        path.unlink()
        raise IntegrityError(
            f"{file.path} of {repo.repo_id} arrived damaged: its hash is {found[:16]}..., the Hub names "
            f"{expected[:16]}...; it was removed: run the same command again to fetch it anew"
        )
    return sha256.hexdigest()


def _tidy(repo: Repo, files: Sequence[File], folder: Path, hashes: Mapping[str, str]) -> None:
    """Give the files their names, the one that makes the folder whole last, and remove what is left of other runs."""
    kept = {_part(folder, file).name for file in files}
    for path in folder.iterdir():
        if path.name not in kept and not path.name.startswith("."):
            remove_own(path)
    entries = {file.name: {"size": file.size, "sha256": hashes[file.name]} for file in files}
    source = {"repo_id": repo.repo_id, "commit": repo.commit, "files": entries}
    write_json(folder / META_FILE, {"format": 1, "source": source})
    for file in reversed(files):
        _part(folder, file).replace(folder / file.name)
    write_manifest(folder, hashes)


def _obstacle(path: Path, folder: Path) -> str | None:
    """Why this project cannot use a config.json as it is.

    Args:
        path: The file.
        folder: The folder or repository that it belongs to.
    """
    try:
        raw = as_object(read_text(path))
        if raw.get("quantization_config"):
            return describe_quantization(raw, folder)
        LLaMAConfig.from_dict(raw)
    except CheckpointError as error:
        return str(error)
    except (ValueError, AttributeError, TypeError, ArithmeticError, RecursionError) as error:
        return f"config.json is not a model configuration: {error}"
    return None


def _advice(folder: Path, choice: Choice) -> str:
    try:
        return _what_next(folder, choice)
    except (CheckpointError, RecursionError) as error:  # the transfer is done, whatever the files hold
        return f"for other programs, this project cannot use it: {error}"


def _what_next(folder: Path, choice: Choice) -> str:
    """The command that a user most likely wants now."""
    name = choice.files[0].name
    if name.endswith(".gguf"):
        target = folder.parent / model_name(name)
        target = target.with_name(f"{target.name}-hf") if target == folder else target
        return f"next: {call('convert', source=folder / name, destination_path=target)}"
    if choice.marker == ADAPTER_FILE:
        return _next_of_adapter(folder, choice)
    if obstacle := _obstacle(folder / SETTINGS_FILE, folder):
        if holds_fp8(read_object(folder / SETTINGS_FILE)):
            return f"next: {obstacle}"
        return f"for other programs, this project cannot use it: {obstacle}"
    if delta := _delta(folder):
        return delta
    if not choice.weights.startswith("model.safetensors"):
        command = call("convert", source=folder, destination_path=f"{folder}-safetensors")
        return f"next: {command} (.bin weights are converted once)"
    if not choice.has_tokenizer:
        return "the repository has no tokenizer.json or tokenizer.model: put the one it was trained with beside it"
    return f"next: {call('load', folder=folder, raw=folder_style(folder) is None)}"


def _delta(folder: Path) -> str | None:
    """What to do with the weights, if they are what is to be added to those of a base."""
    try:
        source = open_folder(folder)
        if source.shape.norm_offset:  # norms of a model may be near zero
            return None
    except CheckpointError:  # which whoever uses them says
        return None
    try:
        check_no_delta(folder, (source.read(name) for name in source.specs if name.endswith("norm.weight")))
    except CheckpointError as error:
        return str(error)
    return None


def _next_of_adapter(folder: Path, choice: Choice) -> str:
    base = read_object(folder / ADAPTER_FILE).get("base_model_name_or_path")
    if isinstance(base, str) and base and Path(base, SETTINGS_FILE).is_file():
        return f"next: {call('load', folder=folder)}"
    if isinstance(base, str) and (wanted := repository(of_sixteen_bits(base) or base)) is not None:
        said = "its base" if wanted == base else f"its base in 16 bits, as {base} is a quantised copy"
        there = folder.parent / wanted.rpartition("/")[2]
        found = {} if wanted == base else {"base_dir": there}
        download = call("download", repo_id=wanted, destination_path=there)
        return f"next: {download} ({said}), then {call('load', folder=folder, **found)}"
    chat = call("load", folder=folder, base_dir="FOLDER_OF_THE_BASE")
    return f"its base is {base!r}, which is not here: next: {chat}"
