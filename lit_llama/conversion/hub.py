"""A model repository on the Hub: what it holds, which of its files are needed, and what a refusal means.

Every name and number here comes from the network and is checked before it becomes a path.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from httpx2 import HTTPError, InvalidURL
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling

from lit_llama.conversion.gguf.scan import first_parts, part_names
from lit_llama.conversion.source import META_FILE, SETTINGS_FILE
from lit_llama.errors import CheckpointError, ResourceError, UserError
from lit_llama.memory import amount
from lit_llama.model.adapters.peft_folder import CONFIG_FILE as ADAPTER_FILE
from lit_llama.model.files.weights import INDEX_FILE, SINGLE_FILE
from lit_llama.objects import as_object, read_text
from lit_llama.wording import call, param

TIMEOUT = 20  # seconds without an answer

# What lit_llama or another program reads besides the weights; the configuration first, because it is looked at first.
_SETTINGS = (SETTINGS_FILE, "generation_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
_TOKENIZER = (
    *_TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_OLD_TOKENIZER = ("vocab.json", "merges.txt")
# The first one counts, as in transformers: beside a single file an index is of an older save.
_WEIGHTS = (SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LISTED = 20  # most names in a message


@dataclass(frozen=True)
class File:
    """A file of a repository.

    Args:
        path: Its name in the repository.
        size: In bytes.
        sha256: Of its bytes, if it is stored as a large file.
        blob_id: Git's name of the contents, which is a hash of them unless it is a large file.
    """

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    @property
    def name(self) -> str:
        """Name of the file in our folder."""
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Repo:
    """A repository at one commit."""

    repo_id: str
    commit: str
    endpoint: str
    files: Mapping[str, File]


@dataclass(frozen=True)
class Choice:
    """Files that are to be downloaded.

    Args:
        files: In this order.
        marker: The one that makes our folder whole.
        weights: The weights, or the index that names their files.
    """

    files: tuple[File, ...]
    marker: str
    weights: str

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is a tokenizer that this project reads."""
        names = {file.name for file in self.files}
        return bool(names & set(_TOKENIZERS)) or set(_OLD_TOKENIZER) <= names


def read_repo(repo_id: str, revision: str | None, endpoint: str | None) -> Repo:
    """Ask the Hub what a repository holds.

    Args:
        repo_id: OWNER/NAME.
        revision: Branch, tag or commit; None for the main branch.
        endpoint: Address of the Hub; None for HF_ENDPOINT or the public one.

    Raises:
        UserError: There is no such repository or revision, or no leave to read it.
        ResourceError: The Hub cannot be reached.
        CheckpointError: The repository holds a file whose name is no plain relative path.
    """
    api = HfApi(endpoint=endpoint)
    with explained(repo_id, api.endpoint, revision):
        try:
            info = api.model_info(repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT)
            files = [_file(sibling) for sibling in info.siblings or ()]
            commit = _hexadecimal(info.sha, 40)
        except HFValidationError as error:
            raise UserError(parameter="repo_id", value=repo_id, expected="OWNER/NAME as on the model's page") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, HfHubHTTPError):  # status 400 is a ValueError, too
                raise
            raise ResourceError(
                f"{api.endpoint} gives no description of {repo_id} that can be read ({error!r}): is it the Hub, or a "
                "page of a proxy?"
            ) from error
    for file in files:
        if not _is_plain(file.path):
            raise CheckpointError(f"{repo_id} holds {file.path!r}, which is no plain relative name: not downloaded")
    return Repo(repo_id, commit, api.endpoint, {file.path: file for file in files})


def _file(sibling: RepoSibling) -> File:
    size = sibling.lfs.size if sibling.lfs else sibling.size
    if not isinstance(size, int) or size < 0:
        raise ValueError(f"the size of {sibling.rfilename!r} is {size!r}")
    sha256 = _hexadecimal(sibling.lfs.sha256, 64) if sibling.lfs else None
    blob_id = None if sibling.lfs or sibling.blob_id is None else _hexadecimal(sibling.blob_id, 40)
    return File(str(sibling.rfilename), size, sha256, blob_id)


def _hexadecimal(text: object, length: int) -> str:
    if not isinstance(text, str) or not re.fullmatch(rf"[0-9a-f]{{{length}}}", text):
        raise ValueError(f"{text!r} is no hash")
    return text


def _is_plain(path: str) -> bool:
    """No way out of a folder, nothing that a terminal or another system would take for something else."""
    return path.isprintable() and not set(path) & set("\\:") and not set(path.split("/")) & {"", ".", ".."}


def choose(repo: Repo, file: str | None = None) -> Choice:
    """Choose the files that make a folder: a model's, an adapter's, or a GGUF model in one file or in parts.

    Raises:
        UserError: The repository does not hold `file`.
        CheckpointError: It holds no weights of a kind that can be used, or not all parts of `file`.
    """
    files = repo.files
    if file:
        if file not in files:
            raise UserError(
                f"{param('file')}: {repo.repo_id} has no {file}; it has {_listed(repo, '.gguf') or 'no GGUF file'}"
            )
        return Choice(_gguf_parts(repo, file), META_FILE, file)
    weights = next((name for name in _WEIGHTS if name in files), "")
    tokenizer = [name for name in _TOKENIZER if name in files]
    if not set(tokenizer) & set(_TOKENIZERS):
        tokenizer += [name for name in _OLD_TOKENIZER if name in files]
    if weights and SETTINGS_FILE in files:
        names = [name for name in _SETTINGS if name in files] + tokenizer
        return Choice(tuple(files[name] for name in [*names, weights]), SETTINGS_FILE, weights)
    adapter = next((name for name in _ADAPTER_WEIGHTS if name in files), "")
    if adapter and ADAPTER_FILE in files:
        return Choice(tuple(files[name] for name in [ADAPTER_FILE, *tokenizer, adapter]), ADAPTER_FILE, adapter)
    raise CheckpointError(_nothing_usable(repo, weights or adapter))


def _gguf_parts(repo: Repo, file: str) -> tuple[File, ...]:
    """A GGUF file, or all parts of the model that it is a part of."""
    place = PurePosixPath(file)
    names = [str(place.with_name(name)) for name in part_names(place.name)]
    if lost := [name for name in names if name not in repo.files]:
        raise CheckpointError(
            f"{param('file')}: {file} is one of {len(names)} parts, but {repo.repo_id} has no {lost[0]}: name another"
        )
    return tuple(repo.files[name] for name in names) or (repo.files[file],)


def _nothing_usable(repo: Repo, weights: str) -> str:
    """What the repository holds instead, and the way out."""
    name = repo.repo_id
    if weights:
        wanted = ADAPTER_FILE if weights in _ADAPTER_WEIGHTS else SETTINGS_FILE
        return f"{name} has {weights} but no {wanted}, so nothing says what the weights are; ask its author"
    if found := _listed(repo, ".gguf"):
        return f"{name} holds GGUF files only: name one of them with {param('file')}, then convert it. It has {found}"
    if found := _listed(repo, ".pth"):
        return (
            f"{name} holds Meta's own files only ({found}); there mostly is a repository with -hf at its end. Or fetch "
            f"these with `hf download {name}` and convert them with {call('convert')}"
        )
    found = _listed(repo, "")
    return f"{name} has no {SINGLE_FILE} or pytorch_model.bin, nor an index of their parts; it has {found or 'no file'}"


def _listed(repo: Repo, ending: str) -> str:
    parts = {
        path: _gguf_parts_listed(repo, path)
        for path in sorted(repo.files)
        if path.endswith(ending) and (ending != ".gguf" or first_parts([PurePosixPath(path).name]))
    }
    shown = [_described(path, files) if ending else path for path, files in list(parts.items())[:_LISTED]]
    return ", ".join(shown) + (f" and {len(parts) - _LISTED} more" if len(parts) > _LISTED else "")


def _gguf_parts_listed(repo: Repo, path: str) -> list[File]:
    place = PurePosixPath(path)
    names = (str(place.with_name(name)) for name in part_names(place.name) or [place.name])
    return [repo.files[name] for name in names if name in repo.files]


def _described(path: str, files: Sequence[File]) -> str:
    """Name and size of a file, or of a model in parts by its first."""
    parts = f"{len(files)} parts, " if len(files) > 1 else ""
    return f"{path} ({parts}{amount(sum(file.size for file in files))})"


def read_parts(repo: Repo, index: Path, name: str) -> tuple[File, ...]:
    """Return the weight files that an index names.

    Args:
        repo: Where they come from.
        index: The index, downloaded.
        name: What it is called in the repository.

    Raises:
        CheckpointError: It is no index, or names what the repository does not hold.
    """
    try:
        named = set(as_object(read_text(index))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{repo.repo_id}: {name} is not an index of weights: {error!r}") from error
    ending = ".safetensors" if name == INDEX_FILE else ".bin"
    for file in named:
        if not isinstance(file, str) or "/" in file or not file.endswith(ending) or file not in repo.files:
            raise CheckpointError(
                f"{repo.repo_id}: {name} names {file!r}, which is no weight file of this repository; ask its author"
            )
    if not named:
        raise CheckpointError(f"{repo.repo_id}: {name} names no weights")
    return tuple(repo.files[file] for file in sorted(named))


@contextlib.contextmanager
def explained(repo_id: str, endpoint: str, revision: str | None = None) -> Iterator[None]:
    """Say what a refusal of the Hub or of the network means, and what to do."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ResourceError(
            "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set, so nothing is downloaded: unset it"
        ) from error
    except HfHubHTTPError as error:
        raise _refusal(error, repo_id, endpoint, revision) from error
    except (HTTPError, InvalidURL) as error:
        raise ResourceError(
            f"{endpoint} cannot be reached ({error or type(error).__name__}): check the network (HF_ENDPOINT and "
            "HTTPS_PROXY, too) and run the same command again; it goes on where it stopped"
        ) from error


def _refusal(error: HfHubHTTPError, repo_id: str, endpoint: str, revision: str | None) -> UserError:
    status = error.response.status_code
    login = "log in with `hf auth login` or set HF_TOKEN"
    match error:
        case GatedRepoError():
            return UserError(f"{repo_id} is gated: accept its licence on {endpoint}/{repo_id}, then {login}")
        case RevisionNotFoundError():
            return UserError(f"{param('revision')} is {revision!r}: {repo_id} has no such branch, tag or commit")
        case RemoteEntryNotFoundError():
            return CheckpointError(f"{repo_id} lists a file that it does not have any more: run the same command again")
        case RepositoryNotFoundError() if status != 401:
            return UserError(
                f"{param('repo_id')}: there is no model {repo_id} on {endpoint}; if it is private, {login}"
            )
    if status == 401:
        return UserError(
            f"{param('repo_id')}: {repo_id} is private or not there, or the token is not valid: check the spelling, "
            f"or {login}"
        )
    if status in (403, 404):
        said = error.server_message or ("no leave to read it" if status == 403 else "not found")
        return UserError(f"{endpoint} refuses {repo_id} ({status}: {said}); {login}, with a token that may read it")
    return ResourceError(
        f"{endpoint} answers with status {status} ({error.server_message or 'no reason given'}): run the same command "
        "again later; it goes on where it stopped"
    )
